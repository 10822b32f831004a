"""Pairs to token ids through sentence-transformers' own preprocessing: chat templates (Qwen3 rerankers) and unusual tokenizers.

Slower than `texts` (each pair is rendered by the template), which such large models hide. Only the document is cut, so that the
template's instruction and its last tokens, where the score is read, stay whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from reranker_worker.backends import Pair, Tokens
from reranker_worker.backends.texts import LONGEST_PREFIX_CHARS, PairIds

if TYPE_CHECKING:
    from collections.abc import Sequence

_CHARS_PER_TOKEN = 16
_GROWTH = 8
# Cutting text at a token's edge may give a token more or less when tokenized again; two rounds have always been enough.
_ROUNDS = 8


class MessageTokenizer:
    """Tokenizes pairs with `CrossEncoder.preprocess`. `prompt` is used for pairs that bring no instruction of their own."""

    def __init__(self, model: Any, prompt: str = "") -> None:
        self._model = model
        self._prompt = prompt

    def tokenize(self, pairs: Sequence[Pair]) -> list[Tokens]:
        """One `Tokens` per pair, in order; `inputs` is a `PairIds`, or None where the query leaves no room."""
        return [self._one(pair) for pair in pairs]

    def _one(self, pair: Pair) -> Tokens:
        query = pair.query
        # A query that goes on behind its prefix is refused unrendered; it has too many tokens or is too long to tell.
        if self._prefix_chars(query, pair.max_length) < len(query):
            return Tokens(None, 0, fits=False)
        overhead = len(self._render(query, "", pair.instruction).ids)
        if overhead > pair.max_length:
            return Tokens(None, 0, fits=False)
        if pair.max_document_tokens:
            pair = pair._replace(max_length=min(pair.max_length, overhead + pair.max_document_tokens))
        text = pair.document[: self._prefix_chars(pair.document, pair.max_length)]
        rendered = self._render(query, text, pair.instruction)
        if len(text) == len(pair.document) and len(rendered.ids) <= pair.max_length:
            return Tokens(rendered, len(rendered.ids))
        room = pair.max_length - overhead
        for _ in range(_ROUNDS):
            if room < 1:
                break
            rendered = self._render(query, self._first_tokens(text, room), pair.instruction)
            if len(rendered.ids) <= pair.max_length:
                return Tokens(rendered, len(rendered.ids), truncated=True)
            room -= len(rendered.ids) - pair.max_length
        return Tokens(None, 0, fits=False)

    def _render(self, query: str, document: str, instruction: str) -> PairIds:
        """The whole rendered pair, however long."""
        features = self._model.preprocess(
            [(query, document)], prompt=instruction or self._prompt or None, processing_kwargs={"text": {"truncation": False}}
        )
        ids = features["input_ids"][0].tolist()
        type_ids = features["token_type_ids"][0].tolist() if "token_type_ids" in features else [0] * len(ids)
        return PairIds(ids, type_ids)

    def _prefix_chars(self, text: str, tokens: int) -> int:
        """Characters of `text` that hold more than `tokens` tokens, or all of them, within the bound of `texts`."""
        size, most = tokens * _CHARS_PER_TOKEN, max(LONGEST_PREFIX_CHARS, 4 * tokens * _CHARS_PER_TOKEN)
        while size < min(most, len(text)) and self._count(text[:size]) <= tokens + tokens // 8:
            size = min(size * _GROWTH, most)
        return min(size, len(text))

    def _count(self, text: str) -> int:
        return len(self._model.tokenizer(text, add_special_tokens=False, truncation=False)["input_ids"])

    def _first_tokens(self, text: str, count: int) -> str:
        """The characters of the first `count` tokens of a text."""
        encoding = self._model.tokenizer(text, add_special_tokens=False, truncation=False, return_offsets_mapping=True)
        ends = [end for _, end in encoding["offset_mapping"]]
        return text[: ends[count - 1]] if len(ends) > count else text
