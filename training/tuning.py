"""Step 3: fine-tune the bi-encoder so that its single tokens rank, not only their average (`python -m training.tuning`).

all-MiniLM-L6-v2 was trained through the average of a text's tokens alone; what its tokens say one by one is a by-product. Here queries and documents
are read apart, as it always does, and scored by exact late interaction (`training.target`): each group of eight texts is to be ranked as its teacher
ranks them, and the first, which answers the query, above the texts of the other groups of a step too. It resumes when started again.
"""

from __future__ import annotations

import copy
import json
import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModel

from training.backbone import backbone_directory
from training.joined import ignored_coordinates
from training.run import Run, command_line
from training.sets import SEED
from training.student import Tokens, pairs_of, read_alone, rounded, with_plain_attention
from training.target import scores, units
from training.train import SCALE, listwise_loss, plan, rate, read_groups

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

LEARNING_RATE = 2e-5
CONTRAST = 0.5  # of the loss: the other groups' texts
KINDS_WITHOUT = {"sentences", "long"}  # of groups: their texts are parts of one document, or hold parts of others
STEPS, PRINT_STEPS = 500, 25

Tensor = torch.Tensor


class Tuned:
    """The bi-encoder with the pruned vocabulary, whose last normalization does nothing but normalize, as `training.joined` will have it."""

    def __init__(self, work: Path) -> None:
        self.work = work
        with_plain_attention()
        self._before = AutoModel.from_pretrained(
            str(backbone_directory()), attn_implementation="plain", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, dtype=torch.float32
        )
        rows = torch.tensor(json.loads((work / "rows.json").read_text(encoding="utf-8")))
        words = self._before.embeddings.word_embeddings
        words.weight = torch.nn.Parameter(rounded(words.weight.data[rows]), requires_grad=False)
        words.num_embeddings = self._before.config.vocab_size = len(rows)
        self.ignored = ignored_coordinates(_last_norm(self._before))

    def build(self) -> Any:
        """float32, no dropout."""
        model = copy.deepcopy(self._before)
        norm = _last_norm(model).requires_grad_(False)
        norm.weight.data.fill_(1.0)
        norm.bias.data.zero_()
        return model

    def save(self, model: Any) -> None:
        """Write WORK/tuned, a BertModel as the bi-encoder was: half way from it to this model, which ranks better than either on text unlike that it
        was trained on (Wortsman et al. 2022, arXiv:2109.01903)."""
        for own, before in zip(model.parameters(), self._before.parameters(), strict=True):
            own.data.lerp_(before.data, 0.5)
        _last_norm(model).load_state_dict(_last_norm(self._before).state_dict())
        model.save_pretrained(self.work / "tuned")


def _last_norm(model: Any) -> Any:
    return model.encoder.layer[-1].output.LayerNorm


def losses(groups: Sequence[dict[str, Any]], queries: Sequence[Tensor], documents: Sequence[Tensor]) -> Tensor:
    """(2,): how far each group's distribution is from its teacher's; how far the first text is from being above all other groups' too."""
    own, contrast, start = list[Tensor](), list[Tensor](), 0
    for group, query in zip(groups, queries, strict=True):
        logits = SCALE * scores(query, documents)
        own.append(logits[start : start + len(group["texts"])])
        if group["kind"] not in KINDS_WITHOUT:
            contrast.append(torch.logsumexp(logits, 0) - logits[start])
        start += len(group["texts"])
    return torch.stack([listwise_loss(groups, own), torch.stack(contrast).mean() if contrast else torch.zeros(())])


def tune(work: Path, out: Path, steps: int) -> None:
    """Train from the last checkpoint to the last step, and write WORK/tuned."""
    tokens, groups, tuned = Tokens(work), read_groups(work), Tuned(work)
    schedule = plan(groups, tokens, SEED + 2)[:steps]
    run, begin, sums = Run(tuned.build, out), time.monotonic(), torch.zeros(2)
    first = run.step
    while run.step < len(schedule):
        chosen = [groups[index] for index in schedule[run.step]]
        pairs = [pairs_of(group, tokens) for group in chosen]
        queries = [ids[:second] for (ids, second), *_ in pairs]
        documents = [[tokens.begin, *ids[second + 1 :]] for group in pairs for ids, second in group]
        states = [units(one, tuned.ignored) for one in read_alone(run.model, queries + documents)]
        parts = losses(chosen, states[: len(queries)], states[len(queries) :])
        run.update(parts[0] + CONTRAST * parts[1], rate(run.step, steps // 3, steps, LEARNING_RATE))
        sums += parts.detach()
        if run.step % PRINT_STEPS == 0:
            listwise, contrast = (sums / PRINT_STEPS).tolist()
            pace = (time.monotonic() - begin) / (run.step - first)
            shown = f"listwise {listwise:.4f}, contrast {contrast:.4f}, {pace:.2f} s a step"
            print(f"{time.strftime('%H:%M:%S')} {run.step}/{steps}: {shown}", flush=True)
            sums.zero_()
        run.save(last=run.step == len(schedule))
    tuned.save(run.master)


def main() -> None:
    """Parse the command line and tune."""
    options = command_line(__doc__, STEPS).parse_args()
    tune(options.work, options.out, options.steps)


if __name__ == "__main__":
    main()
