"""The seventh layer of the beginning (`training.beginning`): it compares the two texts, and the head judges what it finds.

Half of its heads average the query's tokens, half the document's: their principal components, and the query's shared and own rarity. What
[CLS] held is drowned by them. The feed-forward layer takes the two averages' scalar product and the square of the query's, by
x erf(x / sqrt 2) = gelu(x) + gelu(-x), which is 0.8 x^2 for small x, and (a + b)^2 - (a - b)^2 = 4ab. Pooler and classifier, a perceptron with one
hidden layer, make a logit of these five numbers; they are fitted to the groups with the loss of the training.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from training.joined import GATE, HEAD_WIDTH, MARK, gate
from training.lexical import SIZE
from training.sets import SEED
from training.student import LAYERS, Tokens, pairs_of, passes
from training.train import POINTWISE_WEIGHT, losses, read_groups

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from training.joined import Marks, Seen

COMPONENTS = 184  # coordinates of an average; one less is independent, because they sum to zero
# The averages are 20 times what makes their squares sum to one, and again 15 times louder than what the first token held: in one factor of 300 they
# would move far by each step of the training.
_AVERAGE, _LOUDNESS = 20.0, 15.0
_RARITY_WEIGHT, _SIZE_WEIGHT = 0.1 * _AVERAGE, 0.07 * _AVERAGE
_INPUT_SCALE, _OUTPUT_SCALE = 0.2, 0.25  # of the feed-forward units that multiply
_FEW_TOKENS = 18
_GROUPS, _HELD_OUT, _STEPS, _GROUPS_PER_STEP = 1500, 300, 3000, 32
_LEARNING_RATE = 3e-3

Tensor = torch.Tensor


class Places(NamedTuple):
    """Where the last hidden state of [CLS] holds what is judged. The last three come with their negatives in the next coordinate, so that the mean
    of all coordinates, which the normalization takes away, stays zero."""

    product: int
    square: int
    matched: int
    rarity: int
    size: int


PLACES = Places(product=COMPONENTS + 6, square=COMPONENTS + 7, matched=COMPONENTS, rarity=COMPONENTS + 2, size=COMPONENTS + 4)


def add_comparison(model: Any, seen: Seen, marks: Marks) -> None:
    """Add the layer; pooler and classifier are set to zero."""
    layers = model.bert.encoder.layer
    layer = copy.deepcopy(layers[-1])
    layers.append(layer)
    model.config.num_hidden_layers = LAYERS
    attention, half = layer.attention.self, model.config.hidden_size // 2
    everything = (attention.query, attention.key, attention.value, layer.attention.output.dense, layer.intermediate.dense, layer.output.dense)
    for linear in (*everything, model.bert.pooler.dense, model.classifier):
        linear.weight.data.zero_()
        linear.bias.data.zero_()
    layer.intermediate.dense.weight.data.normal_(0.0, model.config.initializer_range)  # units that are not needed yet
    for norm in (layer.attention.output.LayerNorm, layer.output.LayerNorm):
        norm.weight.data.fill_(1.0)
        norm.bias.data.zero_()
    _average(attention, marks)
    value = attention.value.weight.data
    value[:COMPONENTS], value[half : half + COMPONENTS] = _components(seen, marks)
    for place, row in (
        (PLACES.matched, {marks.matched: _RARITY_WEIGHT / SIZE}),
        (PLACES.rarity, {marks.rarity: _RARITY_WEIGHT / SIZE}),
        (PLACES.size, {marks.one: _SIZE_WEIGHT / MARK, marks.plus: -_SIZE_WEIGHT / MARK / 2, marks.minus: -_SIZE_WEIGHT / MARK / 2}),
    ):
        for mark, weight in row.items():
            value[place, mark], value[place + 1, mark] = weight, -weight
    layer.attention.output.dense.weight.data.copy_(_LOUDNESS * torch.eye(model.config.hidden_size))
    multiply(layer, half)


def _average(attention: Any, marks: Marks) -> None:
    """Every token attends evenly to all of the query's tokens, or, in the other half of the heads, of the document's."""
    for head in range(attention.num_attention_heads):
        rows, columns = (torch.zeros(2, attention.key.weight.shape[1]) for _ in range(2))
        gate(rows, columns, marks, GATE)
        first = head * HEAD_WIDTH
        strength = float(rows[1, marks.one]) * MARK
        is_query = head < attention.num_attention_heads // 2
        attention.query.bias.data[first], attention.query.bias.data[first + 1] = strength if is_query else -strength, strength
        attention.key.weight.data[first : first + 2] = columns


def _components(seen: Seen, marks: Marks) -> tuple[Tensor, Tensor]:
    """(COMPONENTS, width) twice: the principal components of texts' averages, turned so that they sum to zero; for the query divided by the usual
    length of few tokens' average, for the document of many tokens', which is less: their product is the cosine only where both are equally long."""
    vectors = torch.nn.functional.normalize(torch.stack(seen.pooled), dim=1).double()
    vectors[:, list(marks)] = 0.0
    components = torch.linalg.eigh(vectors.T @ vectors).eigenvectors[:, -(COMPONENTS - 1) :]
    turn = torch.linalg.qr(torch.cat([torch.ones(COMPONENTS, 1), torch.randn(COMPONENTS, COMPONENTS - 1)], 1).double())[0][:, 1:]
    basis = (turn @ components.T).float()
    lengths = torch.tensor([(len(rows), float((basis @ pooled).norm())) for rows, pooled in zip(seen.inputs[0], seen.pooled, strict=True)])
    few = lengths[:, 0] <= _FEW_TOKENS
    return _AVERAGE * basis / lengths[few, 1].mean(), _AVERAGE * basis / lengths[~few, 1].mean()


def multiply(layer: Any, half: int) -> None:
    """The scalar product of the two averages, and the square of the first, into their places."""
    inner, outer = layer.intermediate.dense.weight.data, layer.output.dense.weight.data
    number = torch.arange(COMPONENTS)
    for block, (sign, other) in enumerate(((1.0, 1.0), (-1.0, -1.0), (1.0, -1.0), (-1.0, 1.0), (1.0, 0.0), (-1.0, 0.0))):
        units = block * COMPONENTS + number
        inner[units] = 0.0
        inner[units, number], inner[units, half + number] = sign * _INPUT_SCALE, other * _INPUT_SCALE
        if block < 4:
            outer[PLACES.product, units] = _OUTPUT_SCALE if block < 2 else -_OUTPUT_SCALE
        else:
            outer[PLACES.square, units] = 2 * _OUTPUT_SCALE


def fit_judgement(model: Any, work: Path) -> None:
    """Fit pooler and classifier to groups, by what the comparing layer says of them."""
    tokens, groups = Tokens(work), read_groups(work)
    chosen = [groups[at] for at in np.random.default_rng(1).choice(len(groups), _GROUPS, replace=False)]
    features = _features(copy.deepcopy(model).to(torch.bfloat16), chosen, tokens)
    center, spread = features.mean(0), features.std(0)
    torch.manual_seed(SEED)
    width = model.config.hidden_size
    weight, bias, outer = (torch.nn.Parameter(torch.randn(*shape) * size) for shape, size in (((width, 5), 0.4), ((width,), 0.5), ((width,), 0.02)))
    shift = torch.nn.Parameter(torch.tensor(-2.0))
    ends = np.cumsum([0, *(len(group["texts"]) for group in chosen)])
    standard = (features - center) / spread

    def loss(numbers: Sequence[int]) -> Tensor:
        rows = torch.cat([standard[ends[at] : ends[at + 1]] for at in numbers])
        listwise, pointwise = losses([chosen[at] for at in numbers], torch.tanh(rows @ weight.T + bias) @ outer + shift)
        return listwise + POINTWISE_WEIGHT * pointwise

    optimizer, random = torch.optim.AdamW([weight, bias, outer, shift], lr=_LEARNING_RATE, weight_decay=1e-3), np.random.default_rng(0)
    for step in range(_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * (1 - step / _STEPS)
        now = loss(random.choice(_GROUPS - _HELD_OUT, _GROUPS_PER_STEP, replace=False).tolist())
        optimizer.zero_grad()
        now.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        print(f"judgement: loss {loss(range(_GROUPS - _HELD_OUT, _GROUPS)):.3f} on groups held out", flush=True)
        pooler = model.bert.pooler.dense
        scaled = weight / spread
        for column, place in enumerate(PLACES):
            paired = column >= 2
            pooler.weight.data[:, place] = scaled[:, column] / (2 if paired else 1)
            if paired:
                pooler.weight.data[:, place + 1] = -scaled[:, column] / 2
        pooler.bias.data.copy_(bias - scaled @ center)
        model.classifier.weight.data[0], model.classifier.bias.data[0] = outer, shift


@torch.inference_mode()
def _features(model: Any, groups: Sequence[dict[str, Any]], tokens: Tokens) -> Tensor:
    """(pairs, 5): what is judged."""
    found: list[Tensor] = []
    for start in range(0, len(groups), 16):
        pairs = [pair for group in groups[start : start + 16] for pair in pairs_of(group, tokens)]
        states = passes(model, pairs).first
        columns = [states[:, place] for place in PLACES[:2]] + [(states[:, place] - states[:, place + 1]) / 2 for place in PLACES[2:]]
        found.append(torch.stack(columns, 1))
    return torch.cat(found)
