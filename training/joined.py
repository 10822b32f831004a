"""Step 4: the bi-encoder folded into the layers that read a pair, by hand-set weights and before any training (`python -m training.joined`).

A cross-encoder that begins as a plain language model has to learn from pairs what the bi-encoder knows already, and to count shared words, which is
what BM25 knows. Here its weights are set so that neither has to be learnt:

- **Two texts, each read alone.** A pair is `[CLS] query [SEP] [DOC] document [SEP]`. Three coordinates of the hidden state (the ones that matter
  least) say which text a token belongs to: (M, -M, M) the query's, (-M, M, M) the document's. They enter with the token types; eight units of
  each feed-forward layer (again the least used) renew them. Half the difference of the first two is +M or -M, the third less half their sum is M,
  both over the token's deviation and whatever its mean: each attention head gives up two of its 32 dimensions (those that change its scores least on
  real text, by a singular value decomposition) for the product of the former minus the product of the latter: 0 within a text, -GATE across.
  `[DOC]` has the sum of `[CLS]` and of the first position, less its own: a text knows that it begins.
- **Every token of one length.** Three coordinates of the bi-encoder's last state hold half of its size and are multiplied by zero. They are taken
  away before the last normalization, whose own weights become one: the product of two tokens is their cosine.
- **Two more layers compare**: `training.matching`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification

from training.sets import SEED
from training.student import MARKS_FILE, Marks, rounded

if TYPE_CHECKING:
    from collections.abc import Sequence

MARK = 2.0  # its size, in deviations of a usual token
GATE = 24.0  # what a token of the other text is worth less, as logarithm of the attention, between usual tokens
HEAD_WIDTH = 32
_SAMPLE_TEXTS, _SAMPLE_TOKENS = 600, 96
_USUAL_SHIFT = slice(8, 24)  # positions at which documents begin
_SHARPNESS, _HALF_WIDTH = 10.0, 0.2  # of the ramp that renews the marks
_SPARE_DIMENSIONS = 2
_IGNORED = 0.05  # a coordinate that the last normalization multiplies by less says nothing
_MARK_UNITS = 8  # of each feed-forward layer

Tensor = torch.Tensor


class Seen:
    """What passes through the bi-encoder for a sample of training texts."""

    def __init__(self, model: Any, work: Path, seed: int) -> None:
        self.model = model
        layers = model.bert.encoder.layer
        self.inputs: list[list[Tensor]] = [[] for _ in layers]  # of each layer
        self.middles: list[list[Tensor]] = [[] for _ in layers]  # what its feed-forward part reads
        self.units: list[Tensor] = [torch.zeros(model.config.intermediate_size) for _ in layers]
        self.before: dict[Any, list[Tensor]] = {}  # what a normalization reads
        self._read(work, seed)

    def _read(self, work: Path, seed: int) -> None:
        stored = np.load(work / "tokens.npz")
        tokens, ends = stored["tokens"], stored["ends"]
        vocabulary = json.loads((work / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
        hooks = self._hooks()
        with torch.no_grad():
            for text in np.random.default_rng(seed).choice(len(ends) - 1, _SAMPLE_TEXTS, replace=False):
                part = tokens[ends[text] : ends[text + 1]][:_SAMPLE_TOKENS].tolist()
                ids = torch.tensor([[vocabulary["[CLS]"], *part, vocabulary["[SEP]"]]])
                self.model.bert(input_ids=ids)
        for hook in hooks:
            hook.remove()

    def _hooks(self) -> list[Any]:
        norms = [self.model.bert.embeddings.LayerNorm]
        hooks = []
        for number, layer in enumerate(self.model.bert.encoder.layer):
            norms += [layer.attention.output.LayerNorm, layer.output.LayerNorm]
            hooks.append(layer.attention.self.query.register_forward_hook(lambda _, given, __, n=number: self.inputs[n].append(given[0][0])))
            hooks.append(layer.intermediate.dense.register_forward_hook(lambda _, given, __, n=number: self.middles[n].append(given[0][0])))
            hooks.append(layer.output.dense.register_forward_hook(lambda _, given, __, n=number: self._count(n, given[0][0])))
        for norm in norms:
            self.before[norm] = []
            hooks.append(norm.register_forward_hook(lambda which, given, __: self.before[which].append(given[0][0])))
        return hooks

    def _count(self, number: int, units: Tensor) -> None:
        self.units[number] += units.square().sum(0)

    def least_coordinates(self, count: int) -> list[int]:
        """The coordinates whose variation moves the layers that read them least."""
        moved = torch.zeros(self.model.config.hidden_size)
        for number, layer in enumerate(self.model.bert.encoder.layer):
            attention = layer.attention.self
            readers = torch.cat([attention.query.weight, attention.key.weight, attention.value.weight])
            moved += torch.cat(self.inputs[number]).var(0) * readers.square().sum(0)
            moved += torch.cat(self.middles[number]).var(0) * layer.intermediate.dense.weight.square().sum(0)
        return [int(at) for at in moved.argsort()[:count]]

    def least_units(self, number: int) -> list[int]:
        """Units of a feed-forward layer, from the one that writes least."""
        outer = self.model.bert.encoder.layer[number].output.dense.weight.data
        return [int(at) for at in (self.units[number] * outer.square().sum(0)).argsort()]

    def deviation(self, norm: Any) -> float:
        """The standard deviation over a token's coordinates, the median over tokens, of what a normalization reads."""
        return float(torch.cat(self.before[norm]).std(1, unbiased=False).median())


def joined_encoder(work: Path, seed: int) -> tuple[Any, Marks]:
    """A BertForSequenceClassification of six layers, float32, that reads two texts apart; word embeddings and feed-forward weights are rounded to
    float8, as they will be stored."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(str(work / "tuned"), num_labels=1, dtype=torch.float32).eval()
    words = model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    words.data = rounded(words.data)
    seen = Seen(model, work, seed)
    marks = Marks(*seen.least_coordinates(len(Marks._fields)))
    with torch.no_grad():
        _mark_embeddings(model.bert.embeddings, marks, seen)
        for number, layer in enumerate(model.bert.encoder.layer):
            spare = seen.least_units(number)
            given = torch.cat(seen.inputs[number])
            for linear in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value):
                _forget(linear, marks, given.mean(0))
            _gate_attention(layer, marks, seen, given)
            if number == len(model.bert.encoder.layer) - 1:
                _keep_directions(layer, seen, spare[_MARK_UNITS:])
            _renew_marks(layer, marks, seen, number, spare[:_MARK_UNITS])
            for linear in (layer.intermediate.dense, layer.output.dense):
                linear.weight.data = rounded(linear.weight.data)
        _begin_documents(model.bert.embeddings, work, marks)
    return model, marks


def _make_room(norm: Any, seen: Seen, size: float) -> None:
    """The other coordinates stay what they were, although marks of this size add to the deviation that they are divided by."""
    norm.weight.data *= float(np.sqrt(1 + 3 * size**2 / len(norm.weight) / seen.deviation(norm) ** 2))


def _mark_embeddings(embeddings: Any, marks: Marks, seen: Seen) -> None:
    size = MARK * seen.deviation(embeddings.LayerNorm)
    types = embeddings.token_type_embeddings.weight.data
    types[1] = types[0]
    for table in (embeddings.word_embeddings, embeddings.position_embeddings, embeddings.token_type_embeddings):
        table.weight.data[:, list(marks)] = 0.0
    types[0, list(marks)] = torch.tensor([size, -size, size])
    types[1, list(marks)] = torch.tensor([-size, size, size])
    _make_room(embeddings.LayerNorm, seen, size)
    embeddings.LayerNorm.weight.data[list(marks)] = 1.0
    embeddings.LayerNorm.bias.data[list(marks)] = 0.0


def _begin_documents(embeddings: Any, work: Path, marks: Marks) -> None:
    vocabulary = json.loads((work / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    words, positions = embeddings.word_embeddings.weight.data, embeddings.position_embeddings.weight.data
    words[vocabulary["[DOC]"]] = rounded(words[vocabulary["[CLS]"]] + positions[0] - positions[_USUAL_SHIFT].mean(0))
    words[vocabulary["[DOC]"], list(marks)] = 0.0


def _forget(linear: Any, marks: Marks, mean: Tensor) -> None:
    """A linear layer no longer reads the marks' coordinates, but their mean."""
    linear.bias.data += linear.weight.data[:, list(marks)] @ mean[list(marks)]
    linear.weight.data[:, list(marks)] = 0.0


def gate(first: Tensor, second: Tensor, marks: Marks, strength: float) -> None:
    """Let two rows each of a query's and a key's weights tell the texts apart: their product is 0 between tokens of one text and minus `strength`
    between those of two, for usual tokens and before attention's own scale is undone."""
    root = float(np.sqrt(strength / 2 * np.sqrt(HEAD_WIDTH))) / MARK
    for rows, own, size in ((first, root, root), (second, root, -root)):
        rows[0, marks.plus], rows[0, marks.minus] = own / 2, -own / 2
        rows[1, marks.one], rows[1, marks.plus], rows[1, marks.minus] = size, -size / 2, -size / 2


def _gate_attention(layer: Any, marks: Marks, seen: Seen, given: Tensor) -> None:
    attention, output = layer.attention.self, layer.attention.output
    rows = torch.cat([given, torch.ones(len(given), 1)], 1).double()
    root = torch.linalg.cholesky(rows.T @ rows / len(rows) + 1e-6 * torch.eye(rows.shape[1], dtype=torch.double))
    for head in range(attention.num_attention_heads):
        part = slice(head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH)
        pair = [torch.cat([one.weight.data[part], one.bias.data[part, None]], 1).double() for one in (attention.query, attention.key)]
        (_, first), (_, second) = (torch.linalg.qr(root.T @ one.T) for one in pair)
        left, values, right = torch.linalg.svd(first @ second.T)
        turned = (
            (torch.linalg.solve(first, left * values.sqrt())).T @ pair[0],
            (torch.linalg.solve(second, right.T * values.sqrt())).T @ pair[1],
        )
        for one in turned:
            one[-_SPARE_DIMENSIONS:] = 0.0
        gate(turned[0][-_SPARE_DIMENSIONS:], turned[1][-_SPARE_DIMENSIONS:], marks, GATE)
        for linear, one in zip((attention.query, attention.key), turned, strict=True):
            linear.weight.data[part], linear.bias.data[part] = one[:, :-1].float(), one[:, -1].float()
    output.dense.weight.data[list(marks)] = 0.0
    output.dense.bias.data[list(marks)] = 0.0
    _make_room(output.LayerNorm, seen, MARK)
    norm = output.LayerNorm  # divides by the deviation of a usual token: multiplied by it again, the marks pass
    norm.weight.data[list(marks)] = seen.deviation(norm)
    norm.bias.data[list(marks)] = 0.0


def ignored_coordinates(norm: Any) -> list[int]:
    """Coordinates that a normalization multiplies by nearly zero."""
    return [int(at) for at in (norm.weight.data.abs() < _IGNORED).nonzero()]


def _keep_directions(layer: Any, seen: Seen, spare: list[int]) -> None:
    """Take away what the normalization will ignore, by gelu(x) - gelu(-x) = x, and let it do nothing else but normalize."""
    inner, outer, norm = layer.intermediate.dense, layer.output.dense, layer.output.LayerNorm
    ignored = ignored_coordinates(norm)
    outer.weight.data[ignored] = 0.0
    outer.bias.data[ignored] = 0.0
    for place, at in enumerate(ignored):
        units = spare[2 * place : 2 * place + 2]
        inner.weight.data[units] = 0.0
        inner.bias.data[units] = 0.0
        outer.weight.data[:, units] = 0.0
        inner.weight.data[units, at] = torch.tensor([1.0, -1.0])
        outer.weight.data[at, units] = torch.tensor([-1.0, 1.0])
    for rows in seen.before[norm]:
        rows[:, ignored] = 0.0
    norm.weight.data.fill_(1.0)
    norm.bias.data.zero_()


def _renew_marks(layer: Any, marks: Marks, seen: Seen, number: int, spare: list[int]) -> None:
    """Put the marks back at their full size, and make room for them in the normalization."""
    output = layer.output
    _forget(layer.intermediate.dense, marks, torch.cat(seen.middles[number]).mean(0))
    output.dense.weight.data[list(marks)] = 0.0
    size = MARK * seen.deviation(output.LayerNorm)
    renew(layer, list(marks), marks, size, spare)
    _make_room(output.LayerNorm, seen, size)
    output.LayerNorm.weight.data[list(marks)] = 1.0
    output.LayerNorm.bias.data[list(marks)] = 0.0


def renew(layer: Any, places: Sequence[int], marks: Marks, size: float, spare: Sequence[int]) -> None:
    """Let two units for each of these marks, and two more, take the marks away, by gelu(x) - gelu(-x) = x, and put them back at this size, by a
    ramp and the bias."""
    inner, outer = layer.intermediate.dense, layer.output.dense
    units = list(spare[: 2 * len(places) + 2])
    *away, up, down = units
    for linear_rows in (inner.weight.data, inner.bias.data):
        linear_rows[units] = 0.0
    outer.weight.data[:, units] = 0.0
    for block, mark in enumerate(places):
        pair = away[2 * block : 2 * block + 2]
        inner.weight.data[pair, mark] = torch.tensor([1.0, -1.0])
        outer.weight.data[mark, pair] = torch.tensor([-1.0, 1.0])
    for unit, sign in ((up, 1.0), (down, -1.0)):
        inner.weight.data[unit, [marks.plus, marks.minus]] = torch.tensor([_SHARPNESS / 2, -_SHARPNESS / 2])
        inner.bias.data[unit] = sign * _SHARPNESS * _HALF_WIDTH
    step = size / (_SHARPNESS * _HALF_WIDTH)
    outer.weight.data[marks.plus, [up, down]] = torch.tensor([step, -step])
    outer.weight.data[marks.minus, [up, down]] = torch.tensor([-step, step])
    outer.bias.data[places] = torch.tensor([-size, size, size][: len(places)])


def main() -> None:
    """Parse the command line and write WORK/joined."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="directory that training.build has filled")
    options = parser.parse_args()
    model, marks = joined_encoder(options.work, SEED)
    model.save_pretrained(options.work / "joined")
    (options.work / MARKS_FILE).write_text(json.dumps(marks), encoding="utf-8")


if __name__ == "__main__":
    main()
