"""Step 7: train the layers that compare (`python -m training.train`); started again, it resumes.

They learn to rank every group as exact late interaction of the tokens they are given does (`training.target`), mixed with the teacher's stored
logits; and, token by token, what each token of the query is worth in each document: hundreds of targets a step instead of 64. A run that begins with
the weights of others (`--begin`) learns from the labels too.
The layers that read stay as they are: trained on groups they soon read worse what the groups do not hold (measured: README), and without them a step
takes half the time.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, kl_div, log_softmax

from training import target
from training.run import Run, average, command_line
from training.sets import SEED
from training.student import MOST_QUERY_TOKENS, READING_LAYERS, Marks, Tokens, build_student, compare, head, in_order, pairs_of, read, read_marks

if TYPE_CHECKING:
    from collections.abc import Sequence

GROUPS_PER_STEP = 4
BUCKET_STEPS = 32  # groups of like length share a step within a bucket of so many steps
STEPS_TOGETHER = 2  # steps of a plan that make one of the optimizer: two lengths, and more often than not two kinds of groups
LEARNING_RATE, WARM_UP_STEPS = 1e-4, 50
WEIGHTS = 1.0, 0.1, 1.0  # of the losses: listwise, pointwise, tokens
SCALE = 20.0  # makes logits of late interaction
ALONE_STEPS = 400  # the last ones of the first run, without the teacher: its bi-encoder and BM25 rank worse than the tokens do, on most sets
QUERY_WIDTH = MOST_QUERY_TOKENS + 2
STEPS, PRINT_STEPS = 2800, 25

SHORT_LENGTH = 96  # of every second group of passages, the part that shares most with the query: more groups in the same time

Group = dict[str, Any]


class Goal(NamedTuple):
    """What the logits of a group are to be: SCALE times MaxSim and `averages` of the averages' cosine; of the stored logits the share `teacher`; and
    `label` more for the text that is known to be the answer."""

    averages: float
    teacher: float
    label: float


WITH_TEACHER, ALONE, WITH_LABELS = Goal(target.AVERAGES, 0.3, 0.0), Goal(target.AVERAGES, 0.0, 0.0), Goal(0.75, 0.1, 1.5)
LATER_RATE = LEARNING_RATE / 2  # where a later run begins to fall from


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


def listwise_loss(groups: Sequence[Group], parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """How far each group's distribution is from the teacher's, the average."""
    found = [
        kl_div(log_softmax(own, 0), log_softmax(torch.tensor(group["logits"]), 0), log_target=True, reduction="sum")
        for own, group in zip(parts, groups, strict=True)
    ]
    return torch.stack(found).mean()


def losses(groups: Sequence[Group], logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(how far each group's distribution is from the teacher's, how far each probability is)."""
    parts = torch.split(logits, [len(group["texts"]) for group in groups])
    wanted = torch.tensor([value for group in groups for value in group["probabilities"]])
    return listwise_loss(groups, parts), binary_cross_entropy_with_logits(logits, wanted)


class Seen(NamedTuple):
    """What one step needs of n pairs, in their order; T is MOST_QUERY_TOKENS and those around them."""

    logits: torch.Tensor  # (n,)
    wanted: torch.Tensor  # (n, T): `training.target.found`, 0 behind the query's end
    found: torch.Tensor  # (n, T): the coordinate that is to say so


def see(model: Any, pairs: Sequence[tuple[list[int], int]], marks: Marks, averages: float) -> Seen:
    """The pairs, through the model, and what the layers that compare are to make of them."""
    order, parts = [], []
    for part in read(model, pairs):
        match, last = compare(model, part)
        wanted = target.found(part, marks, averages)
        width = wanted.shape[1]
        tokens = torch.stack([wanted, (match[..., marks.one].float() * part.queries)[:, :width]], -1)
        order += part.indices
        parts.append((head(model, last), torch.nn.functional.pad(tokens, (0, 0, 0, QUERY_WIDTH - width))))
    logits, tokens = (in_order(order, torch.cat(columns)) for columns in zip(*parts, strict=True))
    return Seen(logits, tokens[..., 0], tokens[..., 1])


def token_loss(groups: Sequence[Group], seen: Seen) -> torch.Tensor:
    """1 + the correlation, between the texts of a group, of what each token of the query is worth and the coordinate that falls with it."""
    sizes = [len(group["texts"]) for group in groups]
    wanted, found = (torch.cat([part - part.mean(0) for part in torch.split(all_of, sizes)]) for all_of in (seen.wanted, seen.found))
    return 1 + (wanted * found).sum() / (wanted.norm() * found.norm())


def with_target(groups: Sequence[Group], seen: Seen, goal: Goal) -> list[Group]:
    """The groups, their logits as the goal has them."""
    exact = SCALE * seen.wanted.sum(1) / (seen.wanted != 0).sum(1)
    made = []
    for group, own in zip(groups, torch.split(exact, [len(group["texts"]) for group in groups]), strict=True):
        logits = goal.teacher * torch.tensor(group["logits"]) + (1 - goal.teacher) * own
        if group["kind"] != "sentences":  # of those nobody knows which one answers
            logits[0] += goal.label
        made.append({**group, "logits": logits.tolist()})
    return made


def _comparing(work: Path, begin: Sequence[Path]) -> Any:
    model = build_student(work, "start")
    if begin:
        model.load_state_dict(average(begin))
    for part in (model.bert.embeddings, model.bert.encoder.layer[:READING_LAYERS]):
        part.requires_grad_(False)
    return model


def train(work: Path, out: Path, steps: int, begin: Sequence[Path] = (), after: int = 0) -> None:
    """Train from the last checkpoint to the last step; a later run begins with the mean of some weights, after so many steps of others."""
    tokens = Tokens(work)
    groups = read_groups(work)
    marks = read_marks(work)
    planned = plan(groups, tokens, SEED)
    schedule = [sum(planned[at : at + STEPS_TOGETHER], []) for at in range(0, len(planned), STEPS_TOGETHER)]  # noqa: RUF017 # two short lists
    schedule = schedule[after : after + steps]
    run, since, pairs, sums = Run(lambda: _comparing(work, begin), out), time.monotonic(), 0, torch.zeros(3)
    fall_from, peak = (0, LATER_RATE) if begin else (len(schedule) // 3, LEARNING_RATE)
    print(f"{len(groups)} groups, {len(schedule)} steps, beginning at {run.step}", flush=True)
    while run.step < len(schedule):
        chosen = [groups[index] for index in schedule[run.step]]
        texts = [pair for group in chosen for pair in pairs_of(group, tokens)]
        goal = WITH_LABELS if begin else WITH_TEACHER if run.step < len(schedule) - ALONE_STEPS else ALONE
        seen = see(run.model, texts, marks, goal.averages)
        parts = torch.stack([*losses(with_target(chosen, seen, goal), seen.logits), token_loss(chosen, seen)])
        run.update((parts * torch.tensor(WEIGHTS)).sum(), rate(run.step, fall_from, len(schedule), peak))
        pairs, sums = pairs + len(texts), sums + parts.detach()
        if run.step % PRINT_STEPS == 0:
            speed, means = pairs / (time.monotonic() - since), (sums / PRINT_STEPS).tolist()
            shown = ", ".join(f"{name} {mean:.4f}" for name, mean in zip(("listwise", "pointwise", "tokens"), means, strict=True))
            print(f"{time.strftime('%H:%M:%S')} {run.step}/{len(schedule)}: {shown}, {speed:.0f} pairs/s", flush=True)
            sums.zero_()
        run.save(last=run.step == len(schedule))


def main() -> None:
    """Parse the command line and train."""
    parser = command_line(__doc__, STEPS)
    parser.add_argument("--begin", type=Path, nargs="+", default=[], help="weights-N.pt of earlier runs: a later run begins with their mean")
    parser.add_argument("--after", type=int, default=0, help="steps that those took: it goes on with the groups after them")
    options = parser.parse_args()
    train(options.work, options.out, options.steps, options.begin, options.after)


if __name__ == "__main__":
    main()
