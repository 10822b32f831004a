"""Step 6: the two layers that compare (`python -m training.matching`), late interaction, as weights of a cross-encoder.

The seventh layer lets every token of the query look for its equal in the document: each head's query and key are principal components of the
tokens' states (the first ones in every head, of the later ones a mixture of its own), sharp enough that a token attends to few others. Its values are
the states themselves, a part in each head, so that the attention adds to a token what is most like it in the document. Two vectors of one length
are the longer together the more alike they are, and the normalization divides by that length: a coordinate that was constant before says afterwards
how well the token was found (the lower, the better). A token of the document attends to its own text, finds itself, and stays as it is.

The eighth layer averages the query's tokens into [CLS]; pooler and classifier make a logit of that coordinate. The sum over the query's tokens of the
best cosine in the document is MaxSim (ColBERT, Khattab and Zaharia 2020, arXiv:2004.12832). `training.train` teaches both layers which tokens matter.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from training.joined import GATE, HEAD_WIDTH, MARK, renew
from training.sets import SEED
from training.student import Marks, Tokens, build_student, compare, in_order, pairs_of, read, read_marks
from training.train import losses, read_groups

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from training.student import Read

SHARPNESS = 15.0  # of the attention: the product of a usual token with itself, as logarithm
SHARED_COMPONENTS, COMPONENTS = 10, 150  # in every head; those that the rest of each head is a mixture of
SHARE = 0.3  # of the document's tokens that is added to one of the query's: their own length, which says nothing, counts by its square
_GROUPS = 200  # whose tokens the components come from, and whose texts the head is fitted to
_FIT_STEPS, _FIT_RATE = 500, 0.05
_SMALL = 0.02  # deviation of weights that are not needed yet
_CONSTANT = 8.0  # is added to the coordinate that is divided: what the layers that read left there is not quite constant
_SPREAD = 0.7  # deviation of how well tokens are found, after the seventh layer
_LOUD = 4.0  # how much larger it is made for the average
_QUIET = 0.2  # and how much smaller all else: it changes the length that the sum is divided by
_PEAK = 0.5  # of the pooler's unit that reads it: far from where tanh is flat

Tensor = torch.Tensor


def add_layers(model: Any, states: Tensor, marks: Marks) -> None:
    """Append both layers to a model of six; `states` (tokens, width) is what they will read."""
    layers, config = model.bert.encoder.layer, model.config
    for _ in range(2):
        layers.append(_neutral_layer(layers[-1], config.initializer_range))
    config.num_hidden_layers = len(layers)
    match, average = layers[-2], layers[-1]
    known = torch.ones(config.hidden_size)
    known[list(marks)] = 0.0
    own = match.attention.self
    for head, projection in enumerate(_projections(states, known, config.num_attention_heads)):
        part = slice(head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH - 1)
        center = projection @ states.mean(0)
        for linear in (own.query, own.key):
            linear.weight.data[part], linear.bias.data[part] = projection, -center
        _attend_to(own, head, marks, text=1, dimension=HEAD_WIDTH - 1)
    own.value.weight.data = torch.diag(known)
    match.attention.output.dense.weight.data = SHARE * torch.eye(config.hidden_size)
    match.attention.output.dense.bias.data[marks.one] = _CONSTANT
    renew(match, [marks.plus, marks.minus], marks, MARK, range(match.output.dense.in_features))
    for head in range(config.num_attention_heads):
        text = 0 if head == marks.one // HEAD_WIDTH else head % 2
        _attend_to(average.attention.self, head, marks, text, dimension=0)
    average.attention.self.value.weight.data = torch.eye(config.hidden_size)
    average.attention.output.dense.weight.data = _QUIET * torch.eye(config.hidden_size)
    average.attention.output.dense.weight.data[marks.one, marks.one] = _LOUD
    model.bert.pooler.dense.weight.data.normal_(0.0, _SMALL)
    model.bert.pooler.dense.bias.data.zero_()
    model.classifier.weight.data.zero_()
    model.classifier.bias.data.zero_()
    model.bert.pooler.dense.weight.data[0] = 0.0


def _neutral_layer(like: nn.Module, deviation: float) -> Any:
    """A layer that changes nothing but the length; its feed-forward part has units that are read by nothing yet."""
    layer: Any = copy.deepcopy(like)
    for linear in (module for module in layer.modules() if isinstance(module, torch.nn.Linear)):
        linear.weight.data.zero_()
        linear.bias.data.zero_()
    layer.intermediate.dense.weight.data.normal_(0.0, deviation)
    for norm in (layer.attention.output.LayerNorm, layer.output.LayerNorm):
        norm.weight.data.fill_(1.0)
        norm.bias.data.zero_()
    return layer


def _projections(states: Tensor, known: Tensor, heads: int) -> list[Tensor]:
    """(HEAD_WIDTH - 1, width) for each head: components divided by the fourth root of their variance, all scaled so that a usual token's product with
    itself, over attention's own scale, is SHARPNESS."""
    centered = ((states - states.mean(0)) * known).double()
    values, vectors = torch.linalg.eigh(centered.T @ centered / len(centered))
    values, vectors = values.flip(0)[:COMPONENTS], vectors.flip(1)[:, :COMPONENTS]
    directions = (vectors / values**0.25).T.float()
    found = []
    for _ in range(heads):
        turn = torch.linalg.qr(torch.randn(COMPONENTS - SHARED_COMPONENTS, COMPONENTS - SHARED_COMPONENTS))[0]
        rest = HEAD_WIDTH - 1 - SHARED_COMPONENTS
        projection = torch.cat([directions[:SHARED_COMPONENTS], turn[:rest] @ directions[SHARED_COMPONENTS:]])
        usual = (centered.float() @ projection.T).square().sum(1).mean()
        found.append(projection * torch.sqrt(SHARPNESS * HEAD_WIDTH**0.5 / usual))
    return found


def _attend_to(attention: Any, head: int, marks: Marks, text: int, dimension: int) -> None:
    """Let every token attend to one text's tokens alone, the query's (0) or the document's (1)."""
    row, sign = head * HEAD_WIDTH + dimension, 1.0 if text == 0 else -1.0
    root = float(np.sqrt(GATE * HEAD_WIDTH**0.5))
    attention.query.bias.data[row] = root
    attention.key.weight.data[row, marks.plus] = sign * root / MARK / 4
    attention.key.weight.data[row, marks.minus] = -sign * root / MARK / 4


class Sample:
    """Some groups, and what the layers that read make of their pairs."""

    @torch.no_grad()
    def __init__(self, model: Any, work: Path, count: int) -> None:
        tokens, groups = Tokens(work), read_groups(work)
        self.groups = [groups[at] for at in np.random.default_rng(SEED).choice(len(groups), count, replace=False)]
        pairs = [pair for group in self.groups for pair in pairs_of(group, tokens)]
        self.parts = list(read(model, pairs))

    def states(self) -> Tensor:
        """(tokens, width) float32, of every pair's tokens."""
        rows = [part.states.flatten(0, 1) if part.bias is None else part.states[part.bias[:, 0, 0] == 0] for part in self.parts]
        return torch.cat(rows).float()

    @torch.no_grad()
    def last(self, model: Any) -> Iterator[tuple[Read, Tensor]]:
        """Each part, and its last states."""
        for part in self.parts:
            yield part, compare(model, part)[-1]


def center(model: Any, sample: Sample, marks: Marks) -> None:
    """Center what counts wherever it is written, so that bfloat16's three digits are enough for it."""
    match, average = (layer.attention.output for layer in model.bert.encoder.layer[-2:])
    seen, summed = list[Tensor](), list[Tensor]()
    hooks = [
        match.LayerNorm.register_forward_hook(lambda _, __, made: seen.append(made[..., marks.one])),
        average.LayerNorm.register_forward_hook(lambda _, given, __: summed.append(given[0][:, 0, marks.one])),
    ]
    found = torch.cat([seen.pop()[part.queries] for part, _ in sample.last(model)])
    gain = _SPREAD / float(found.std())
    match.LayerNorm.weight.data[marks.one], match.LayerNorm.bias.data[marks.one] = gain, -gain * found.mean()
    summed.clear()
    for _ in sample.last(model):
        pass
    average.dense.bias.data[marks.one] = -torch.cat(summed).mean()
    for hook in hooks:
        hook.remove()


def fit_head(model: Any, sample: Sample, marks: Marks) -> None:
    """Fit pooler and classifier to the groups."""
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    order = [index for part in sample.parts for index in part.indices]
    seen = in_order(order, torch.cat([last[:, 0, marks.one] for _, last in sample.last(narrow)]).float())
    middle, spread = float(seen.mean()), float(seen.std())
    weight, bias = torch.nn.Parameter(torch.tensor(-1.0)), torch.nn.Parameter(torch.tensor(-2.0))
    optimizer = torch.optim.Adam([weight, bias], lr=_FIT_RATE)
    for _ in range(_FIT_STEPS):
        listwise, pointwise = losses(sample.groups, weight * torch.tanh(_PEAK * (seen - middle) / spread) + bias)
        optimizer.zero_grad()
        (listwise + pointwise).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    pooler = model.bert.pooler.dense
    pooler.weight.data[0, marks.one] = _PEAK / spread
    pooler.bias.data[0] = -_PEAK * middle / spread
    model.classifier.weight.data[0, 0], model.classifier.bias.data[0] = weight.data, bias.data
    print(f"head fitted: weight {weight.item():.2f}, bias {bias.item():.2f}, listwise loss {listwise.item():.3f}", flush=True)


def main() -> None:
    """Parse the command line and write WORK/start."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="directory that training.reading has filled")
    options = parser.parse_args()
    torch.manual_seed(SEED)
    model = build_student(options.work, "read")
    marks = read_marks(options.work)
    sample = Sample(copy.deepcopy(model).to(torch.bfloat16), options.work, _GROUPS)
    add_layers(model, sample.states(), marks)
    center(model, sample, marks)
    fit_head(model, sample, marks)
    model.save_pretrained(options.work / "start")


if __name__ == "__main__":
    main()
