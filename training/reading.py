"""Step 5: teach the joined encoder to read a text wherever it stands as the bi-encoder reads it alone (`python -m training.reading`).

A document of a pair stands behind the query, at positions at which the bi-encoder never saw a text begin: that alone costs more of the ranking than
all else that `training.joined` gives up. It is made good by regression: every token's state, in the pair, is to have the direction that the
bi-encoder gives it where its text stands alone. It resumes when started again.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModel

from training.joined import ignored_coordinates
from training.run import Run, command_line
from training.sets import SEED
from training.student import Tokens, build_student, pairs_of, read, read_alone, read_marks
from training.train import plan, rate, read_groups

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

LEARNING_RATE = 3e-5
STEPS, PRINT_STEPS = 1200, 20


class BiEncoderStates:
    """The bi-encoder, bf16, which reads each text alone, from the first position on."""

    def __init__(self, work: Path) -> None:
        self._model = AutoModel.from_pretrained(str(work / "tuned")).eval()
        norm = self._model.encoder.layer[-1].output.LayerNorm
        self.known = torch.tensor(sorted({*range(len(norm.weight))} - {*ignored_coordinates(norm), *read_marks(work)}))
        norm.weight.data.fill_(1.0)
        norm.bias.data.zero_()
        self._model.to(torch.bfloat16)

    @torch.no_grad()
    def of(self, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """For each text (tokens, known coordinates), unit vectors."""
        return [self.directions(states) for states in read_alone(self._model, texts)]

    def directions(self, states: torch.Tensor) -> torch.Tensor:
        """(..., known coordinates): unit vectors without a mean."""
        known = states[..., self.known].float()
        return torch.nn.functional.normalize(known - known.mean(-1, keepdim=True), dim=-1)


def error(model: Any, pairs: Sequence[tuple[list[int], int]], bi_encoder: BiEncoderStates) -> torch.Tensor:
    """(2,): one less the cosine between a token's state and the bi-encoder's, the averages over queries' tokens and over documents'."""
    begin = pairs[0][0][0]
    alone = dict.fromkeys(tuple(ids[:second]) for ids, second in pairs)
    alone |= dict.fromkeys((begin, *ids[second + 1 :]) for ids, second in pairs)
    wanted = dict(zip(alone, bi_encoder.of(list(alone)), strict=True))
    sums, counts = [torch.zeros(()), torch.zeros(())], [0, 0]
    for part in read(model, pairs):
        own = bi_encoder.directions(part.states)
        for row, index in enumerate(part.indices):
            ids, second = pairs[index]
            for text, states, target in (
                (0, own[row, :second], wanted[tuple(ids[:second])]),
                (1, own[row, second : len(ids)], wanted[(begin, *ids[second + 1 :])]),
            ):
                sums[text] = sums[text] + (1 - (states * target).sum(1)).sum()
                counts[text] += len(target)
    return torch.stack([total / count for total, count in zip(sums, counts, strict=True)])


def teach(work: Path, out: Path, steps: int) -> Any:
    """Train the layers that read, from the last checkpoint to the last step; the model."""
    tokens, groups, bi_encoder = Tokens(work), read_groups(work), BiEncoderStates(work)
    schedule = plan(groups, tokens, SEED + 1)[:steps]
    run, begin, sums = Run(lambda: build_student(work, "joined"), out, read_marks(work)), time.monotonic(), torch.zeros(2)
    first = run.step
    while run.step < len(schedule):
        pairs = [pair for index in schedule[run.step] for pair in pairs_of(groups[index], tokens)]
        errors = error(run.model, pairs, bi_encoder)
        run.update(errors.mean(), rate(run.step, steps // 4, steps, LEARNING_RATE))
        sums += errors.detach()
        if run.step % PRINT_STEPS == 0:
            query, document = (sums / PRINT_STEPS).tolist()
            pace = (time.monotonic() - begin) / (run.step - first)
            print(f"{time.strftime('%H:%M:%S')} {run.step}/{steps}: query {query:.4f}, document {document:.4f}, {pace:.2f} s a step", flush=True)
            sums.zero_()
        run.save(last=run.step == len(schedule))
    return run.master


def main() -> None:
    """Parse the command line, teach, and write WORK/read."""
    options = command_line(__doc__.partition("\n")[0], STEPS).parse_args()
    teach(options.work, options.out, options.steps).save_pretrained(options.work / "read")


if __name__ == "__main__":
    main()
