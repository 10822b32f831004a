"""Step 6: train the layers that compare to rank every group as the teacher does (`python -m training.train`); started again, it resumes.

The layers that read stay as they are: trained on groups they soon read worse what the groups do not hold (measured: README), and without them a step
takes half the time.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, kl_div, log_softmax

from training.run import Run
from training.sets import SEED
from training.student import Tokens, logits_of, pairs_of

if TYPE_CHECKING:
    from collections.abc import Sequence

GROUPS_PER_STEP = 4
BUCKET_STEPS = 32  # groups of like length share a step within a bucket of so many steps
STEPS_TOGETHER = 2  # steps of a plan that make one of the optimizer: two lengths, and more often than not two kinds of groups
LEARNING_RATE, WARM_UP_STEPS = 1e-4, 50
POINTWISE_WEIGHT = 0.3
STEPS, PRINT_STEPS = 1900, 25

SHORT_LENGTH = 96  # of every second group of passages, the part that shares most with the query: more groups in the same time

Group = dict[str, Any]


def read_groups(work: Path) -> list[Group]:
    """The stored groups, without those that the leakage check found fault with; every second group of passages is cut short."""
    texts = json.loads((work / "texts.json").read_text(encoding="utf-8"))
    left_out = set(json.loads((work / "left_out.json").read_text(encoding="utf-8")))
    bad = {number for number, text in enumerate(texts) if text in left_out}
    with (work / "groups.jsonl").open(encoding="utf-8") as lines:
        stored: list[Group] = [json.loads(line) for line in lines]
    groups = [group for group in stored if not bad.intersection((group["query"], *group["texts"]))]
    for number, group in enumerate(groups):
        group["short"] = number % 2 > 0 and group["kind"] == "passages"
        if group["short"]:
            group["length"] = SHORT_LENGTH
    return groups


def plan(groups: Sequence[Group], tokens: Tokens, seed: int) -> list[list[int]]:
    """The groups of every step of one epoch."""
    rng = random.Random(seed)
    order = list(range(len(groups)))
    rng.shuffle(order)

    def size(index: int) -> float:
        group = groups[index]
        return float(sum(min(group["length"], tokens.length(text)) for text in group["texts"]) / len(group["texts"]))

    steps: list[list[int]] = []
    for start in range(0, len(order), GROUPS_PER_STEP * BUCKET_STEPS):
        bucket = sorted(order[start : start + GROUPS_PER_STEP * BUCKET_STEPS], key=size)
        cut = [bucket[at : at + GROUPS_PER_STEP] for at in range(0, len(bucket), GROUPS_PER_STEP)]
        rng.shuffle(cut)
        steps += cut
    return steps


def rate(step: int, decay_from: int, steps: int, peak: float = LEARNING_RATE) -> float:
    """Warm-up, a plateau, and a straight line down to a fiftieth: when to go down can be decided while it runs."""
    falling: float = max(0.02, (steps - step) / max(1, steps - decay_from))
    rising: float = min(1.0, (step + 1) / WARM_UP_STEPS)
    return peak * min(rising, falling)


def losses(groups: Sequence[Group], logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(how far each group's distribution is from the teacher's, how far each probability is)."""
    parts = torch.split(logits, [len(group["texts"]) for group in groups])
    listwise = [
        kl_div(log_softmax(own, 0), log_softmax(torch.tensor(group["logits"]), 0), log_target=True, reduction="sum")
        for own, group in zip(parts, groups, strict=True)
    ]
    wanted = torch.tensor([value for group in groups for value in group["probabilities"]])
    return torch.stack(listwise).mean(), binary_cross_entropy_with_logits(logits, wanted)


def train(work: Path, out: Path, steps: int) -> None:
    """Train from the last checkpoint to the last step."""
    tokens = Tokens(work)
    groups = read_groups(work)
    planned = plan(groups, tokens, SEED)
    schedule = [sum(planned[at : at + STEPS_TOGETHER], []) for at in range(0, len(planned), STEPS_TOGETHER)][:steps]  # noqa: RUF017 # two short lists
    run, begin, pairs, sums = Run(work, "start", out, 0.0, 1.0), time.monotonic(), 0, [0.0, 0.0]
    print(f"{len(groups)} groups, {len(schedule)} steps, beginning at {run.step}", flush=True)
    while run.step < len(schedule):
        chosen = [groups[index] for index in schedule[run.step]]
        texts = [pair for group in chosen for pair in pairs_of(group, tokens)]
        listwise, pointwise = losses(chosen, logits_of(run.model, texts))
        run.update(listwise + POINTWISE_WEIGHT * pointwise, rate(run.step, len(schedule) // 3, len(schedule)))
        pairs, sums = pairs + len(texts), [sums[0] + listwise.item(), sums[1] + pointwise.item()]
        if run.step % PRINT_STEPS == 0:
            speed = pairs / (time.monotonic() - begin)
            means = f"listwise {sums[0] / PRINT_STEPS:.4f}, pointwise {sums[1] / PRINT_STEPS:.4f}"
            print(f"{time.strftime('%H:%M:%S')} {run.step}/{len(schedule)}: {means}, {speed:.0f} pairs/s", flush=True)
            sums = [0.0, 0.0]
        run.save(last=run.step == len(schedule))


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="directory that training.build has filled")
    parser.add_argument("--out", type=Path, required=True, help="directory for checkpoints")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    train(options.work, options.out, options.steps)


if __name__ == "__main__":
    main()
