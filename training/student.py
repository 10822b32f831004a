"""The cross-encoder while it is trained: the backbone with a pruned vocabulary and a head, and its forward pass."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from transformers import AttentionInterface, AutoModelForSequenceClassification

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

READING_LAYERS, LAYERS = 6, 8
PASS_TOKENS = 4000  # of one forward pass: cache-sized on a CPU
MOST_QUERY_TOKENS = 64
WINDOW_STRIDE = 8
MARKS_FILE = "marks.json"
_MASKED = -10_000.0


class Marks(NamedTuple):
    """Coordinates of the hidden state with a meaning of their own."""

    plus: int
    minus: int
    one: int


class Read(NamedTuple):
    """What the layers that read made of n pairs of like length."""

    indices: list[int]
    states: torch.Tensor  # (n, L, width)
    bias: torch.Tensor | None  # (n, 1, 1, L), added to the logarithms of the attention
    queries: torch.Tensor  # (n, L) bool: the query's tokens
    documents: torch.Tensor  # (n, L) bool: the document's


def read_marks(work: Path) -> Marks:
    """The coordinates that `training.joined` set apart."""
    return Marks(*json.loads((work / MARKS_FILE).read_text(encoding="utf-8")))


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """What will be left of weights that are stored as float8."""
    return weight.to(torch.float8_e4m3fn).to(weight.dtype)


def is_stored_as_float8(name: str) -> bool:
    """Word embeddings and the feed-forward weights are: two thirds of the model."""
    return name.endswith(("word_embeddings.weight", "intermediate.dense.weight")) or (
        name.endswith("output.dense.weight") and "attention" not in name
    )


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float, **_: Any
) -> tuple[torch.Tensor, None]:
    """Attention with scale and mask in one product: the backward pass of torch's own is slow in bf16 on CPUs."""
    batch, heads, length, width = query.shape
    rows, columns, values = (part.reshape(batch * heads, length, width) for part in (query, key, value))
    bias = query.new_zeros(1, 1, 1) if mask is None else mask.expand(batch, heads, 1, length).reshape(batch * heads, 1, length)
    scores = torch.baddbmm(bias, rows, columns.transpose(1, 2), alpha=scaling)
    mixed = torch.bmm(torch.softmax(scores, -1), values).view(batch, heads, length, width)
    return mixed.transpose(1, 2).contiguous(), None


def with_plain_attention() -> None:
    """Let models be loaded with `attn_implementation="plain"`."""
    AttentionInterface.register("plain", _attention)


def build_student(work: Path, name: str = "start") -> Any:
    """What `training.joined` ("joined"), `training.reading` ("read") or `training.matching` ("start") made, float32, no dropout; word embeddings are
    rounded to what will be stored, and frozen."""
    with_plain_attention()
    model = AutoModelForSequenceClassification.from_pretrained(
        str(work / name),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="plain",
        dtype=torch.float32,
    )
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    return model


class Tokens:
    """Token ids of the stored texts, joined to pairs."""

    def __init__(self, work: Path) -> None:
        stored = np.load(work / "tokens.npz")
        self._tokens, self._ends = stored["tokens"], stored["ends"]
        vocabulary = json.loads((work / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
        counts = np.bincount(self._tokens, minlength=len(vocabulary))
        self._rarity = np.log(counts.sum() / (counts + 1.0))
        self.begin, self._sep, self._doc = (vocabulary[name] for name in ("[CLS]", "[SEP]", "[DOC]"))

    def length(self, text: int) -> int:
        """Tokens of a text."""
        return int(self._ends[text + 1] - self._ends[text])

    def pair(self, query: int, text: int, limit: int, *, window: bool = False) -> tuple[list[int], int]:
        """(ids, where the second text begins). The second text is cut to fit: at its end, or to the window that shares most with the first."""
        first = self._tokens[self._ends[query] : self._ends[query + 1]][:MOST_QUERY_TOKENS]
        second = self._tokens[self._ends[text] : self._ends[text + 1]]
        room = limit - len(first) - 4
        begin = self._window(first, second, room) if window and len(second) > room else 0
        ids = [self.begin, *first.tolist(), self._sep]
        return [*ids, self._doc, *second[begin : begin + room].tolist(), self._sep], len(ids)

    def _window(self, first: Any, second: Any, room: int) -> int:
        """Where the run of `room` tokens begins that holds the rarest tokens of the query."""
        shared = np.concatenate([[0.0], np.cumsum(self._rarity[second] * np.isin(second, first))])
        starts = np.append(np.arange(0, len(second) - room, WINDOW_STRIDE), len(second) - room)
        return int(starts[np.argmax(shared[starts + room] - shared[starts])])


def pairs_of(group: dict[str, Any], tokens: Tokens) -> list[tuple[list[int], int]]:
    """The token ids of a group's pairs."""
    return [tokens.pair(group["query"], text, group["length"], window=group["short"]) for text in group["texts"]]


def by_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices, from the shortest to the longest, in parts that hold about PASS_TOKENS when padded to their longest."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * lengths[order[end]] <= PASS_TOKENS:
            end += 1
        yield order[start:end]
        start = end


def logits_of(model: Any, pairs: Sequence[tuple[list[int], int]]) -> torch.Tensor:
    """(n,) float32: the logits of n pairs."""
    order, parts = [], []
    for part in read(model, pairs):
        order += part.indices
        parts.append(head(model, compare(model, part)[-1]))
    return in_order(order, torch.cat(parts))


def in_order(indices: Sequence[int], rows: torch.Tensor) -> torch.Tensor:
    """Rows that came in the order of `indices`, in that of the pairs."""
    return rows[torch.from_numpy(np.argsort(indices))]


def read(model: Any, pairs: Sequence[tuple[list[int], int]]) -> Iterator[Read]:
    """The layers that read, in passes of like length."""
    learns = next(model.bert.encoder.layer[0].parameters()).requires_grad
    for part in by_length([len(ids) for ids, _ in pairs]):
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            done = _read([pairs[index] for index in part], part, model)
        yield done


def read_alone(model: Any, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """For each text (tokens, width), what a BertModel makes of it alone."""
    found = [torch.empty(0)] * len(texts)
    for part in by_length([len(text) for text in texts]):
        ids = torch.zeros(len(part), len(texts[part[-1]]), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(part):
            ids[row, : len(texts[index])] = torch.tensor(texts[index])
            mask[row, : len(texts[index])] = 1
        hidden = model.embeddings(input_ids=ids)
        bias = None if bool(mask.all()) else ((1.0 - mask[:, None, None, :]) * _MASKED).to(hidden.dtype)
        for layer in model.encoder.layer:
            hidden = _through(layer, hidden, bias)
        for row, index in enumerate(part):
            found[index] = hidden[row, : len(texts[index])]
    return found


def compare(model: Any, part: Read) -> list[torch.Tensor]:
    """(n, L, width) for each of the layers that follow those that read: its states."""
    states, bias = part.states.to(model.dtype), None if part.bias is None else part.bias.to(model.dtype)
    made = []
    for layer in model.bert.encoder.layer[READING_LAYERS:]:
        states = _through(layer, states, bias)
        made.append(states)
    return made


def head(model: Any, last: torch.Tensor) -> torch.Tensor:
    """(n,) float32: the logits of the last states."""
    logits: torch.Tensor = model.classifier(model.bert.pooler(last)).squeeze(-1).float()
    return logits


def _through(layer: Any, hidden: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    result = layer(hidden, bias)
    states: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return states


def _read(pairs: Sequence[tuple[list[int], int]], indices: list[int], model: Any) -> Read:
    shortest, longest = len(pairs[0][0]), len(pairs[-1][0])
    ids = np.zeros((len(pairs), longest), np.int64)
    types = np.zeros_like(ids)
    mask = np.zeros((len(pairs), 1, 1, longest), np.float32)
    for row, (tokens, second) in enumerate(pairs):
        ids[row, : len(tokens)] = tokens
        types[row, second : len(tokens)] = 1
        mask[row, :, :, len(tokens) :] = _MASKED
    bias = None if shortest == longest else torch.from_numpy(mask).to(model.dtype)
    hidden = model.bert.embeddings(input_ids=torch.from_numpy(ids), token_type_ids=torch.from_numpy(types))
    for layer in model.bert.encoder.layer[:READING_LAYERS]:
        hidden = _through(layer, hidden, bias)
    length = torch.tensor([len(tokens) for tokens, _ in pairs])[:, None]
    second, place = torch.tensor([second for _, second in pairs])[:, None], torch.arange(longest)
    return Read(indices, hidden, bias, place < second, (place >= second) & (place < length))
