"""Pairs of texts to token ids with a fast tokenizer, at a cost that the model's length bounds and not the texts'.

A 10 MB document takes half a minute and 2 GB to tokenize (measured), although at most some hundred of its tokens are used. So a long
text is cut to a prefix first, and the prefix is accepted only when the ids that are kept are the same as those of the whole text:
tokenizers work word by word, so every word that ends well before the cut is what it would have been. If too few such words are left,
the prefix grows. What lies behind `LONGEST_PREFIX_CHARS` is not looked at: a text that has no more words than fit in so many characters
(a megabyte of blanks, a book in one word) would cost seconds and gigabytes, so its document is cut there and its query refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reranker_worker.backends import Pair, Tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

# The first prefix: about twice what a pair of this many tokens needs in most languages (English has 4 to 5 characters per token).
_CHARS_PER_TOKEN = 8
# Tokens this near to the cut are not trusted: normalizers and pre-tokenizers look a little ahead.
_MARGIN_CHARS = 1024
# Each further prefix is so many times longer, so that a text without words costs little more than tokenizing it once.
_GROWTH = 8
# The longest prefix, or four times the first one where a model takes long pairs: 20 to 90 ms for the worst texts (measured).
LONGEST_PREFIX_CHARS = 131_072


@dataclass(frozen=True, slots=True)
class PairIds:
    """One tokenized pair, special tokens included, without padding. `type_ids` has the same length as `ids`."""

    ids: list[int]
    type_ids: list[int]


class PairTokenizer:
    """Tokenizes (query, document) pairs with a `tokenizers.Tokenizer`, cutting only the document, and that from its end.

    `prompt` is put before every query. The tokenizer's own truncation and padding are switched off.
    """

    def __init__(self, tokenizer: Any, prompt: str = "") -> None:
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._specials: int = tokenizer.num_special_tokens_to_add(True)
        self._after_document = specials_of_pair(tokenizer)[2]

    def tokenize(self, pairs: Sequence[Pair]) -> list[Tokens]:
        """One `Tokens` per pair, in order; `inputs` is a `PairIds`, or None where the query leaves no room."""
        # Whoever else holds this tokenizer (the library's `predict`) may have switched them on again.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        longest = max((pair.max_length for pair in pairs), default=0)
        counts = {query: self._count(self._prompt + query, longest) for query in {pair.query for pair in pairs}}
        pairs = [self._with_document_limit(pair, counts[pair.query]) if pair.max_document_tokens else pair for pair in pairs]
        results = [Tokens(None, 0, fits=False)] * len(pairs)
        # A pair whose query leaves no room at all is settled; the others, also an empty document beside a full query, are tokenized.
        waiting = [i for i, pair in enumerate(pairs) if counts[pair.query] + self._specials <= pair.max_length]
        sizes = {i: _first_prefix(pairs[i].max_length) for i in waiting}
        while waiting:
            uncertain = []
            for i, encoding in self._encode(pairs, waiting, sizes):
                tokens = self._finish(encoding, pairs[i], counts[pairs[i].query], sizes[i])
                if tokens is None:
                    uncertain.append(i)
                    sizes[i] = _next_prefix(sizes[i], pairs[i].max_length)
                else:
                    results[i] = tokens
            waiting = uncertain
        return results

    def _with_document_limit(self, pair: Pair, query_tokens: int) -> Pair:
        """The same limit for the document alone, said as a limit for the pair."""
        return pair._replace(max_length=min(pair.max_length, query_tokens + self._specials + pair.max_document_tokens))

    def _encode(self, pairs: Sequence[Pair], waiting: list[int], sizes: dict[int, int]) -> list[tuple[int, Any]]:
        """(index, encoding) of each waiting pair; offsets are computed (slower) only for those that are cut."""
        whole = [i for i in waiting if len(pairs[i].document) <= sizes[i]]
        cut = [i for i in waiting if len(pairs[i].document) > sizes[i]]
        texts = {i: (self._prompt + pairs[i].query, pairs[i].document[: sizes[i]]) for i in waiting}
        done = list(zip(whole, self._tokenizer.encode_batch_fast([texts[i] for i in whole]), strict=True)) if whole else []
        if cut:
            done += zip(cut, self._tokenizer.encode_batch([texts[i] for i in cut]), strict=True)
        return done

    def _finish(self, encoding: Any, pair: Pair, query_tokens: int, size: int) -> Tokens | None:
        """The pair cut to its `max_length`; None when the prefix was too short to be sure of its tokens."""
        ids, type_ids = encoding.ids, encoding.type_ids
        room = pair.max_length - query_tokens - self._specials
        keep = pair.max_length - self._after_document
        end = len(ids) - self._after_document
        cut = len(pair.document) > size
        if cut and size < _longest_prefix(pair.max_length) and not self._is_certain(encoding, keep, end, size):
            return None
        if end <= keep:
            return Tokens(PairIds(ids, type_ids), len(ids), truncated=cut)
        if room < 1:
            return Tokens(None, 0, fits=False)
        return Tokens(PairIds(ids[:keep] + ids[end:], type_ids[:keep] + type_ids[end:]), pair.max_length, truncated=True)

    def _count(self, query: str, limit: int) -> int:
        """Tokens of a query without special ones: exact below `limit`, `limit` for all that have more or are too long to tell."""
        size = _first_prefix(limit)
        while len(query) > size:
            encoding = self._tokenizer.encode(query[:size], add_special_tokens=False)
            if size >= _longest_prefix(limit) or self._is_certain(encoding, limit, len(encoding.ids), size):
                return limit
            size = _next_prefix(size, limit)
        return len(self._tokenizer.encode(query, add_special_tokens=False).ids)

    @staticmethod
    def _is_certain(encoding: Any, index: int, end: int, size: int) -> bool:
        """Whether the whole text has the token at `index` just as this prefix of `size` characters has, and all before it.

        True when the token's word is not the last of the prefix (that one may go on behind the cut) and ends before the margin.
        """
        if index >= end:
            return False
        word = encoding.token_to_word(index)
        behind = index + 1
        while behind < end and encoding.token_to_word(behind) == word:
            behind += 1
        return bool(behind < end and encoding.token_to_chars(behind - 1)[1] <= size - _MARGIN_CHARS)


def supports_pairs(tokenizer: Any) -> bool:
    """Whether the tokenizer writes a pair as one run of query tokens and then one of document tokens, as PairTokenizer assumes."""
    sequence = [number for number in tokenizer.encode("a b c", "1 2 3").sequence_ids if number is not None]
    return 0 in sequence and 1 in sequence and sequence == sorted(sequence)


def specials_of_pair(tokenizer: Any) -> tuple[int, int, int]:
    """How many special tokens it writes before the query, between the texts, and after the document. For tokenizers that support pairs."""
    owners = tokenizer.encode("a b c", "1 2 3").sequence_ids
    query, document = owners.index(0), owners.index(1)
    behind = next(count for count, owner in enumerate(reversed(owners)) if owner is not None)
    return query, document - query - owners.count(0), behind


def _first_prefix(max_length: int) -> int:
    return max_length * _CHARS_PER_TOKEN + 2 * _MARGIN_CHARS


def _next_prefix(size: int, max_length: int) -> int:
    return min(size * _GROWTH, _longest_prefix(max_length))


def _longest_prefix(max_length: int) -> int:
    return max(LONGEST_PREFIX_CHARS, 4 * _first_prefix(max_length))
