"""Step 3: the student at its beginning (`python -m training.joined`): the bi-encoder folded into a cross-encoder, before any training.

A cross-encoder that begins as a plain language model has to learn from pairs what the bi-encoder knows already. Here its weights are set by hand so
that nothing has to be learnt anew:

- One coordinate of the hidden state (the one that matters least) says which text a token belongs to: +3 the query, -3 the document. It
  enters with the token types; four units of each feed-forward layer (again the least used) pull it back to its size.
- Each attention head gives up one of its 32 dimensions (the one that changes its scores least on real text, by a singular value
  decomposition) for the product of two tokens' marks, so that tokens attend to their own text and barely to the other. Training can open or
  close this gate.
- A seventh layer compares: half of the heads average the query's tokens, half the document's, in their 190 principal components; its
  feed-forward layer takes the two averages' scalar product, by x erf(x / sqrt 2) = gelu(x) + gelu(-x), which is 0.8 x^2 for small x, and
  (a + b)^2 - (a - b)^2 = 4ab.

On 128 pairs of training groups its logit and the cosine correlate by 0.93 (within a group by 0.94).
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification

from training.backbone import backbone_directory
from training.sets import SEED

LAYERS = 7
GATE = 3.0  # half of what a token of the own text is worth more than one of the other, as logarithm of the attention
_SAMPLE_TEXTS, _SAMPLE_TOKENS, _QUERY_TOKENS = 600, 96, 18
MARK = 3.0  # its size: large beside what the normalizations' means add to it
# Before the comparison, in deviations of a token: so large that the normalization depends little on the token; that tokens of small
# deviation then enter their text's average too quietly is made good by the attention that they get for their larger mark.
_LAST_MARK, _POOL_LOGIT = 21.0, 2.9
_SHARPNESS, _HALF_WIDTH = 10.0, 0.2  # of the ramp that pulls the mark back to its size
_LOUDNESS = 300.0  # of the two averages beside what the first token held
_INPUT_SCALE, _OUTPUT_SCALE = 0.25, 0.25  # of the feed-forward layer that multiplies
_POOLER_SCALE, _SLOPE, _SHIFT = 0.1, 26.0, -11.0

Tensor = torch.Tensor


def joined_student(work: Path, seed: int) -> Any:
    """A BertForSequenceClassification of seven layers, float32, whose word embeddings are rounded to float8 as they will be stored."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(str(backbone_directory()), num_labels=1, dtype=torch.float32).eval()
    rows = torch.tensor(json.loads((work / "rows.json").read_text(encoding="utf-8")))
    words = model.bert.embeddings.word_embeddings
    words.weight.data = words.weight.data[rows]
    words.num_embeddings = model.config.vocab_size = len(rows)
    seen = _Seen(model, work, seed)
    with torch.no_grad():
        mark, balance = seen.least_coordinates()
        _mark_embeddings(model, mark, seen)
        for number, layer in enumerate(model.bert.encoder.layer):
            _gate_attention(layer, mark, seen, number)
            _renew_mark(layer, mark, seen, number)
        _enlarge_mark(model.bert.encoder.layer[-1].output, mark, balance, seen)
        _add_comparison(model, mark, balance, seen)
        words.weight.data = words.weight.data.to(torch.float8_e4m3fn).float()
    words.weight.requires_grad_(False)
    return model


class _Seen:
    """What passes through the bi-encoder for a sample of training texts."""

    def __init__(self, model: Any, work: Path, seed: int) -> None:
        self.model = model
        layers = model.bert.encoder.layer
        self.inputs: list[list[Tensor]] = [[] for _ in layers]  # of each layer
        self.middles: list[list[Tensor]] = [[] for _ in layers]  # what its feed-forward part reads
        self.units: list[Tensor] = [torch.zeros(model.config.intermediate_size) for _ in layers]
        self.before: dict[Any, list[Tensor]] = {}  # what a normalization reads
        self.pooled: list[Tensor] = []
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
                self.pooled.append(self.model.bert(input_ids=ids).last_hidden_state[0].mean(0))
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

    def least_coordinates(self) -> tuple[int, int]:
        """The two coordinates whose variation moves the layers that read them least."""
        moved = torch.zeros(self.model.config.hidden_size)
        for number, layer in enumerate(self.model.bert.encoder.layer):
            attention = layer.attention.self
            readers = torch.cat([attention.query.weight, attention.key.weight, attention.value.weight])
            moved += torch.cat(self.inputs[number]).var(0) * readers.square().sum(0)
            moved += torch.cat(self.middles[number]).var(0) * layer.intermediate.dense.weight.square().sum(0)
        first, second = moved.argsort()[:2].tolist()
        return first, second

    def statistics(self, norm: Any) -> tuple[float, float]:
        """(standard deviation, mean / standard deviation) over a token's coordinates, averaged over tokens, of what a normalization reads."""
        rows = torch.cat(self.before[norm])
        deviation = rows.std(1, unbiased=False)
        return float(deviation.median()), float((rows.mean(1) / deviation).median())

    def passed(self, number: int) -> Tensor:
        """For each token, what part of the mark reaches a layer: less where a few huge coordinates fill the state, as in [CLS]."""
        norm = self.model.bert.embeddings.LayerNorm if number == 0 else self.model.bert.encoder.layer[number - 1].output.LayerNorm
        return self.statistics(norm)[0] / torch.cat(self.before[norm]).std(1, unbiased=False)


def _mark_norm(norm: Any, mark: int, seen: _Seen, *, gain: float) -> None:
    """A normalization that lets the mark pass: `gain` times its share of the deviation, freed of the mean."""
    norm.weight.data[mark] = gain
    norm.bias.data[mark] = gain * seen.statistics(norm)[1]


def _mark_embeddings(model: Any, mark: int, seen: _Seen) -> None:
    embeddings = model.bert.embeddings
    size = seen.statistics(embeddings.LayerNorm)[0]
    types = embeddings.token_type_embeddings.weight.data
    types[1] = types[0]
    for table in (embeddings.word_embeddings, embeddings.position_embeddings, embeddings.token_type_embeddings):
        table.weight.data[:, mark] = 0.0
    types[0, mark], types[1, mark] = MARK * size, -MARK * size
    _mark_norm(embeddings.LayerNorm, mark, seen, gain=1.0)


def _forget(linear: Any, mark: int, mean: float) -> None:
    """A linear layer no longer reads the coordinate, but its mean."""
    linear.bias.data += linear.weight.data[:, mark] * mean
    linear.weight.data[:, mark] = 0.0


def _gate_attention(layer: Any, mark: int, seen: _Seen, number: int) -> None:
    attention, output = layer.attention.self, layer.attention.output
    given = torch.cat(seen.inputs[number])
    for linear in (attention.query, attention.key, attention.value):
        _forget(linear, mark, float(given[:, mark].mean()))
    width = attention.attention_head_size
    rows = torch.cat([given, torch.ones(len(given), 1)], 1).double()
    root = torch.linalg.cholesky(rows.T @ rows / len(rows) + 1e-6 * torch.eye(rows.shape[1], dtype=torch.double))
    for head in range(attention.num_attention_heads):
        part = slice(head * width, (head + 1) * width)
        pair = [
            torch.cat([linear.weight.data[part], linear.bias.data[part, None]], 1).double() for linear in (attention.query, attention.key)
        ]
        (_, first), (_, second) = (torch.linalg.qr(root.T @ one.T) for one in pair)
        left, values, right = torch.linalg.svd(first @ second.T)
        turned = (
            (torch.linalg.solve(first, left * values.sqrt())).T @ pair[0],
            (torch.linalg.solve(second, right.T * values.sqrt())).T @ pair[1],
        )
        # What its small mark takes from a token is given back through the query's bias, so that [CLS] stays what every token may rest on.
        keys = rows @ turned[1].T[:, :-1]
        lost = GATE * np.sqrt(width) * (1 - seen.passed(number)).double()
        ridge = 1e-3 * keys.square().mean() * len(keys) * torch.eye(width - 1, dtype=torch.double)
        turned[0][:-1, -1] += torch.linalg.solve(keys.T @ keys + ridge, keys.T @ (lost - lost.mean()))
        for linear, one in zip((attention.query, attention.key), turned, strict=True):
            one[-1] = 0.0
            one[-1, mark] = float(np.sqrt(GATE * np.sqrt(width))) / MARK
            linear.weight.data[part], linear.bias.data[part] = one[:, :-1].float(), one[:, -1].float()
    output.dense.weight.data[mark] = 0.0
    output.dense.bias.data[mark] = 0.0
    _mark_norm(output.LayerNorm, mark, seen, gain=seen.statistics(output.LayerNorm)[0])


def _renew_mark(layer: Any, mark: int, seen: _Seen, number: int) -> None:
    inner, output = layer.intermediate.dense, layer.output
    _forget(inner, mark, float(torch.cat(seen.middles[number])[:, mark].mean()))
    units = (seen.units[number] * output.dense.weight.data.square().sum(0)).argsort()[:4]
    inner.weight.data[units] = 0.0
    output.dense.weight.data[:, units] = 0.0
    output.dense.weight.data[mark] = 0.0
    inner.weight.data[units, mark] = torch.tensor([1.0, -1.0, _SHARPNESS, _SHARPNESS])
    inner.bias.data[units] = torch.tensor([0.0, 0.0, _SHARPNESS * _HALF_WIDTH, -_SHARPNESS * _HALF_WIDTH])
    step = MARK / (_SHARPNESS * _HALF_WIDTH)
    output.dense.weight.data[mark, units] = torch.tensor([-1.0, 1.0, step, -step])
    output.dense.bias.data[mark] = -MARK
    _mark_norm(output.LayerNorm, mark, seen, gain=seen.statistics(output.LayerNorm)[0])


def _enlarge_mark(output: Any, mark: int, balance: int, seen: _Seen) -> None:
    """Before the comparison the mark is large, and another coordinate its opposite, so that the mean of all stays what it was."""
    norm, weight = output.LayerNorm, output.dense.weight.data
    deviation = seen.statistics(norm)[0]
    ratio = _LAST_MARK * deviation / MARK
    units = weight[mark].nonzero().flatten()
    ramp = units[weight[mark, units].abs() < 1.0] if MARK < _SHARPNESS * _HALF_WIDTH else units[weight[mark, units].abs() > 1.0]
    assert len(ramp) == 2
    weight[balance] = 0.0
    weight[mark, ramp] *= ratio
    weight[balance, ramp] = -weight[mark, ramp]
    output.dense.bias.data[mark] *= ratio
    output.dense.bias.data[balance] = -output.dense.bias.data[mark]
    louder = float(np.sqrt(1 + 2 * _LAST_MARK**2 / len(norm.weight)))  # of a usual token's deviation
    norm.weight.data *= louder
    norm.weight.data[[mark, balance]] = louder / _LAST_MARK
    norm.bias.data[[mark, balance]] = 0.0


def _add_comparison(model: Any, mark: int, balance: int, seen: _Seen) -> None:
    """The seventh layer, the pooler and the classifier."""
    layers = model.bert.encoder.layer
    layer = copy.deepcopy(layers[-1])
    layers.append(layer)
    model.config.num_hidden_layers = LAYERS
    attention, width, size = layer.attention.self, model.config.hidden_size, model.config.hidden_size // 2
    for linear in (attention.query, attention.key, attention.value, layer.attention.output.dense, layer.intermediate.dense, layer.output.dense):
        linear.weight.data.zero_()
        linear.bias.data.zero_()
    layer.intermediate.dense.weight.data.normal_(0.0, model.config.initializer_range)  # units that are not needed yet
    for norm in (layer.attention.output.LayerNorm, layer.output.LayerNorm):
        norm.weight.data.fill_(1.0)
        norm.bias.data.zero_()
    strength = float(np.sqrt(_POOL_LOGIT * np.sqrt(attention.attention_head_size)))
    firsts = torch.arange(attention.num_attention_heads) * attention.attention_head_size
    attention.query.bias.data[firsts] = strength
    attention.key.weight.data[firsts, mark] = torch.tensor([strength] * (len(firsts) // 2) + [-strength] * (len(firsts) // 2))
    free = size - 1  # the last coordinate of each half stays empty; the first of these two takes the product
    basis = _basis(seen, (mark, balance), free)
    # Their product is the cosine only where both are equally long: the averages of few tokens are longer than those of many.
    lengths = torch.tensor([(len(rows), float((basis @ pooled).norm())) for rows, pooled in zip(seen.inputs[0], seen.pooled, strict=True)])
    few = lengths[:, 0] <= _QUERY_TOKENS
    attention.value.weight.data[:free] = basis / lengths[few, 1].mean()
    attention.value.weight.data[size : size + free] = basis / lengths[~few, 1].mean()
    layer.attention.output.dense.weight.data.copy_(_LOUDNESS * torch.eye(width))
    multiply(layer, size, free)
    model.bert.pooler.dense.weight.data.copy_(_POOLER_SCALE * torch.eye(width))
    model.bert.pooler.dense.bias.data.zero_()
    model.classifier.weight.data.zero_()
    model.classifier.weight.data[0, free] = _SLOPE
    model.classifier.bias.data.fill_(_SHIFT)


def _basis(seen: _Seen, unused: tuple[int, int], free: int) -> Tensor:
    """(free, width): the principal components of the averages, turned so that the coordinates of what they give sum to zero (the
    normalization takes the mean away)."""
    vectors = torch.nn.functional.normalize(torch.stack(seen.pooled), dim=1).double()
    vectors[:, list(unused)] = 0.0
    components = torch.linalg.eigh(vectors.T @ vectors).eigenvectors[:, -(free - 1) :]
    turn = torch.linalg.qr(torch.cat([torch.ones(free, 1), torch.randn(free, free - 1)], 1).double())[0][:, 1:]
    return (turn @ components.T).float()


def multiply(layer: Any, size: int, free: int) -> None:
    """The scalar product of the two halves into coordinate `free`."""
    inner, outer = layer.intermediate.dense.weight.data, layer.output.dense.weight.data
    number = torch.arange(free)
    for block, (sign, other) in enumerate(((1.0, 1.0), (-1.0, -1.0), (1.0, -1.0), (-1.0, 1.0))):
        units = block * free + number
        inner[units] = 0.0
        inner[units, number], inner[units, size + number] = sign * _INPUT_SCALE, other * _INPUT_SCALE
        outer[free, units] = _OUTPUT_SCALE if block < 2 else -_OUTPUT_SCALE


def main() -> None:
    """Parse the command line and write WORK/start."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="directory that training.build has filled")
    options = parser.parse_args()
    joined_student(options.work, SEED).save_pretrained(options.work / "start")


if __name__ == "__main__":
    main()
