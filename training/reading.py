"""Step 4: teach the joined encoder to read a text wherever it stands as the bi-encoder reads it alone (`python -m training.reading`).

A document of a pair stands behind the query, at positions at which the bi-encoder never saw a text begin: that alone costs more of the ranking than
all else that `training.joined` gives up. It is made good by regression: the averages of both texts' tokens, in the pair, are to be those of
the bi-encoder with the same vocabulary for each text alone. It resumes when started again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModel

from training.backbone import backbone_directory
from training.comparison import fit_judgement
from training.joined import rounded
from training.run import MARKS_FILE, Run
from training.sets import SEED
from training.student import Tokens, by_length, pairs_of, passes
from training.train import plan, rate, read_groups

if TYPE_CHECKING:
    from collections.abc import Sequence

LEARNING_RATE = 2e-5
STEPS, PRINT_STEPS = 1500, 20
_LOSS_WEIGHT = 5.0


class BiEncoderAverages:
    """The bi-encoder with the student's vocabulary, bf16, which reads each text alone, from the first position on."""

    def __init__(self, work: Path) -> None:
        self._model = AutoModel.from_pretrained(str(backbone_directory())).eval()
        rows = torch.tensor(json.loads((work / "rows.json").read_text(encoding="utf-8")))
        words = self._model.embeddings.word_embeddings
        words.weight.data = rounded(words.weight.data[rows])
        self._model.to(torch.bfloat16)

    @torch.inference_mode()
    def of(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """(texts, width) float32: the mean over the tokens, special ones included, of each text's last hidden state."""
        found = torch.zeros(len(texts), self._model.config.hidden_size)
        for part in by_length([len(text) for text in texts]):
            ids = torch.zeros(len(part), len(texts[part[-1]]), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(part):
                ids[row, : len(texts[index])] = torch.tensor(texts[index])
                mask[row, : len(texts[index])] = 1
            hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state.float() * mask[:, :, None]
            found[part] = hidden.sum(1) / mask.sum(1, keepdim=True)
        return found


def error(read: torch.Tensor, pairs: Sequence[tuple[list[int], int]], bi_encoder: BiEncoderAverages, known: torch.Tensor) -> torch.Tensor:
    """(2,): how far the averages of queries and of documents are from the bi-encoder's: squared, relative, over all coordinates but the marks."""
    begin = pairs[0][0][0]
    alone = [ids[:second] for ids, second in pairs] + [[begin, *ids[second + 1 :]] for ids, second in pairs]
    wanted = bi_encoder.of(alone)[:, known]
    own = torch.cat([read[:, 0], read[:, 1]])[:, known]
    return ((own - wanted).square().sum(1) / wanted.square().sum(1)).view(2, -1).mean(1)


def teach(work: Path, out: Path, steps: int) -> Any:
    """Train the layers that read, from the last checkpoint to the last step; the model."""
    tokens, groups, bi_encoder = Tokens(work), read_groups(work), BiEncoderAverages(work)
    schedule = plan(groups, tokens, SEED + 1)[:steps]
    run, begin, sums = Run(work, "start", out, 1.0, 0.0), time.monotonic(), torch.zeros(2)
    marks = json.loads((work / MARKS_FILE).read_text(encoding="utf-8"))
    known = torch.tensor([at for at in range(run.model.config.hidden_size) if at not in marks])
    first = run.step
    while run.step < len(schedule):
        pairs = [pair for index in schedule[run.step] for pair in pairs_of(groups[index], tokens)]
        errors = error(passes(run.model, pairs).read, pairs, bi_encoder, known)
        run.update(_LOSS_WEIGHT * errors.mean(), rate(run.step, steps // 3, steps, LEARNING_RATE))
        sums += errors.detach()
        if run.step % PRINT_STEPS == 0:
            query, document = (sums / PRINT_STEPS).tolist()
            pace = (time.monotonic() - begin) / (run.step - first)
            print(f"{time.strftime('%H:%M:%S')} {run.step}/{steps}: query {query:.4f}, document {document:.4f}, {pace:.2f} s a step", flush=True)
            sums.zero_()
        run.save(last=run.step == len(schedule))
    return run.master


def main() -> None:
    """Parse the command line, teach, fit the judgement to what is read now, and write WORK/read."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="directory that training.beginning has filled")
    parser.add_argument("--out", type=Path, required=True, help="directory for checkpoints")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    model = teach(options.work, options.out, options.steps)
    fit_judgement(model, options.work)
    model.save_pretrained(options.work / "read")


if __name__ == "__main__":
    main()
