"""Heads that find a token of one text in the other: the part of the beginning (`training.beginning`) that counts shared words, as BM25 does.

Each matching head's query and key are fitted, by gradient descent on the embeddings alone, so that a token attends to its equals in the other
text, or, where it has none, to that text's special tokens. Its value is how rare the token is, by a linear regression; so is what two units of
the feed-forward layer write beside it for every token. The comparing layer averages both over the query: their quotient is the share of the
query, by rarity, that the document has.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from training.joined import HEAD_WIDTH, MATCHING_HEADS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from training.joined import Marks, Seen

FEATURES = HEAD_WIDTH - 2  # two dimensions hold the gate
SIZE = 0.4  # of the average token's rarity in the hidden state
_STEPS, _PAIRS, _HELD_OUT = 1400, 24, 100
_LEARNING_RATE = 6e-3
_EVERY, _TEXTS = 29, 3  # which groups, and how many of their texts
_QUERY_TOKENS, _DOCUMENT_TOKENS = 40, 120
_QUERY_WEIGHT, _LEAST_RARITY = 4.0, 0.1
_ELSEWHERE = -30.0
_REGRESSION_PAIRS = 600
_RIDGE = 0.1

Tensor = torch.Tensor
Pair = tuple[list[int], list[int]]


class Sample:
    """Pairs of training groups, and how rare tokens are (1 on average over running text)."""

    def __init__(self, model: Any, work: Path) -> None:
        self._embeddings = model.bert.embeddings
        vocabulary = json.loads((work / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
        self._begin, self._end, self._doc = (vocabulary[name] for name in ("[CLS]", "[SEP]", "[DOC]"))
        stored = np.load(work / "tokens.npz")
        self._tokens, self._ends = stored["tokens"], stored["ends"]
        self.rarity = self._rarities(len(vocabulary))
        self.pairs = list(self._read(work))

    def _text(self, number: int, limit: int) -> list[int]:
        tokens: list[int] = self._tokens[self._ends[number] : self._ends[number + 1]][:limit].tolist()
        return tokens

    def _read(self, work: Path) -> Iterator[Pair]:
        with (work / "groups.jsonl").open(encoding="utf-8") as lines:
            for group in (json.loads(line) for number, line in enumerate(lines) if number % _EVERY == _TEXTS):
                for text in group["texts"][:_TEXTS]:
                    yield self._text(group["query"], _QUERY_TOKENS), self._text(text, _DOCUMENT_TOKENS)

    def _rarities(self, size: int) -> Tensor:
        texts = np.zeros(size)
        for number in range(0, len(self._ends) - 1, 3):
            texts[np.unique(self._text(number, len(self._tokens)))] += 1
        rarity = torch.tensor(np.log((texts.max() * 1.5 + 1) / (texts + 1)), dtype=torch.float32)
        return rarity / rarity[torch.tensor(self._tokens[:200_000].astype(np.int64))].mean()

    def is_special(self, ids: Tensor) -> Tensor:
        """Which are no tokens of the texts."""
        return (ids == self._begin) | (ids == self._end) | (ids == self._doc)

    @torch.no_grad()
    def batch(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Token ids (n, L), which are the query's, which the document's, and the embeddings (n, L, width)."""
        longest = max(len(query) + len(document) + 4 for query, document in pairs)
        ids, types = torch.zeros(len(pairs), longest, dtype=torch.long), torch.ones(len(pairs), longest, dtype=torch.long)
        first, second = (torch.zeros(len(pairs), longest, dtype=torch.bool) for _ in range(2))
        for row, (query, document) in enumerate(pairs):
            whole = [self._begin, *query, self._end, self._doc, *document, self._end]
            begin = len(query) + 2
            ids[row, : len(whole)] = torch.tensor(whole)
            types[row, :begin] = 0
            first[row, :begin] = True
            second[row, begin : len(whole)] = True
        return ids, first, second, self._embeddings(input_ids=ids, token_type_ids=types)


class _Heads:
    """Query and key of every matching head, (heads, FEATURES, width)."""

    def __init__(self, width: int, marks: Marks) -> None:
        self.query = torch.nn.Parameter(torch.randn(len(MATCHING_HEADS), FEATURES, width) * 0.08)
        self.key = torch.nn.Parameter(self.query.data.clone())
        self.query_bias, self.key_bias = (torch.nn.Parameter(torch.zeros(len(MATCHING_HEADS), FEATURES)) for _ in range(2))
        self.known = torch.ones(width)
        self.known[list(marks)] = 0.0

    def parameters(self) -> list[torch.nn.Parameter]:
        return [self.query, self.key, self.query_bias, self.key_bias]

    def scores(self, states: Tensor) -> Tensor:
        """(n, heads, L, L)."""
        states = states * self.known
        rows = torch.einsum("blc,hdc->bhld", states, self.query) + self.query_bias[None, :, None]
        columns = torch.einsum("blc,hdc->bhld", states, self.key) + self.key_bias[None, :, None]
        return rows @ columns.transpose(2, 3) / HEAD_WIDTH**0.5


def _loss(heads: _Heads, sample: Sample, pairs: Sequence[Pair]) -> Tensor:
    """Minus the logarithm of the attention that goes where it should: to equal tokens, or else to special ones."""
    ids, first, second, states = sample.batch(pairs)
    across = (first[:, :, None] & second[:, None, :]) | (second[:, :, None] & first[:, None, :])
    logs = torch.log_softmax(heads.scores(states).masked_fill(~across[:, None], _ELSEWHERE), -1)
    special = sample.is_special(ids)
    equal = (ids[:, :, None] == ids[:, None, :]) & across & ~special[:, None, :]
    good = torch.where(equal.any(-1)[:, :, None], equal, across & special[:, None, :])
    right = torch.logsumexp(logs.masked_fill(~good[:, None], -1e4), -1).mean(1)
    weight = torch.where(first, _QUERY_WEIGHT, 1.0) * ((first | second) & ~special) * sample.rarity[ids].clamp(_LEAST_RARITY)
    return -(right * weight).sum() / weight.sum()


def _fit(heads: _Heads, sample: Sample) -> None:
    optimizer = torch.optim.Adam(heads.parameters(), lr=_LEARNING_RATE)
    random = np.random.default_rng(0)
    for step in range(_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * min(1.0, (_STEPS - step) / _STEPS * 1.5)
        chosen = [sample.pairs[at] for at in random.choice(len(sample.pairs) - _HELD_OUT, _PAIRS, replace=False)]
        loss = _loss(heads, sample, chosen)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        print(f"matching heads: loss {_loss(heads, sample, sample.pairs[-_HELD_OUT:]):.3f} on pairs held out", flush=True)


def regress(states: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and bias of the linear function of (n, width) states that is nearest to (n,) wanted values."""
    rows = torch.cat([states, torch.ones(len(states), 1)], 1).double()
    found = torch.linalg.solve(rows.T @ rows + _RIDGE * torch.eye(rows.shape[1], dtype=torch.double), rows.T @ wanted.double()).float()
    return found[:-1], found[-1]


def add_matching(model: Any, seen: Seen, marks: Marks, work: Path) -> None:
    """Fit the matching heads and let them, and two units of the first layer, write their coordinates."""
    sample = Sample(model, work)
    layer = model.bert.encoder.layer[0]
    heads = _Heads(model.config.hidden_size, marks)
    _fit(heads, sample)
    with torch.no_grad():
        own = layer.attention.self
        for number, head in enumerate(MATCHING_HEADS):
            part = slice(head * HEAD_WIDTH, head * HEAD_WIDTH + FEATURES)
            own.query.weight.data[part], own.query.bias.data[part] = heads.query[number] * heads.known, heads.query_bias[number]
            own.key.weight.data[part], own.key.bias.data[part] = heads.key[number] * heads.known, heads.key_bias[number]
        weight, bias = regress(*_states(layer, sample, heads.known, middle=False))
        for head in MATCHING_HEADS:
            own.value.weight.data[head * HEAD_WIDTH], own.value.bias.data[head * HEAD_WIDTH] = weight, bias
            layer.attention.output.dense.weight.data[marks.matched, head * HEAD_WIDTH] = SIZE / len(MATCHING_HEADS)
        weight, bias = regress(*_states(layer, sample, heads.known, middle=True))
        inner, outer = layer.intermediate.dense, layer.output.dense
        free = [unit for unit in seen.least_units(0) if not outer.weight.data[marks.signs, unit].any()]  # the others renew the marks
        for unit, sign in zip(free[:2], (1.0, -1.0), strict=True):
            inner.weight.data[unit], inner.bias.data[unit] = sign * weight, sign * bias
            outer.weight.data[:, unit] = 0.0
            outer.weight.data[marks.rarity, unit] = sign * SIZE


def _states(layer: Any, sample: Sample, known: Tensor, *, middle: bool) -> tuple[Tensor, Tensor]:
    """What the attention reads, or the feed-forward part, and how rare each of these tokens is: special ones not at all."""
    states, wanted = [], []
    hook = layer.intermediate.dense.register_forward_hook(lambda _, given, __: middles.append(given[0]))
    for start in range(0, _REGRESSION_PAIRS, 40):
        ids, first, second, embedded = sample.batch(sample.pairs[start : start + 40])
        real, middles = first | second, list[Tensor]()
        if middle:
            layer(embedded, torch.zeros(len(ids), 1, 1, ids.shape[1]).masked_fill(~real[:, None, None], -1e4))
        states.append(((middles[0] if middle else embedded) * known)[real])
        wanted.append(torch.where(sample.is_special(ids), 0.0, sample.rarity[ids])[real])
    hook.remove()
    return torch.cat(states), torch.cat(wanted)
