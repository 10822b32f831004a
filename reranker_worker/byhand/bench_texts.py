"""The requests that `bench` sends: made of the sample's texts, or of the user's own queries and documents (JSON lines)."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from reranker_worker.byhand.failures import BAD_DATA, NO_INPUT, Failure
from reranker_worker.byhand.sample import QUERY, passages

if TYPE_CHECKING:
    from collections.abc import Iterator

_SAMPLE_DOCUMENTS = 997  # a prime: the same documents seldom meet twice


class Questions:
    """Makes requests. The query of each is numbered, so that no two have a pair in common: identical pairs are scored once."""

    def __init__(self, known: list[tuple[str, list[str]]] | None, options: dict[str, Any]) -> None:
        self._known = known
        self._options = options
        self._sample = passages(_SAMPLE_DOCUMENTS) if known is None else []
        self._numbers = itertools.count(1)  # threads may share it

    def __call__(self, documents: int) -> dict[str, Any]:
        """The next request, of so many documents."""
        number = next(self._numbers)
        query, source, start = QUERY, self._sample, number * documents
        if self._known is not None:
            query, source = self._known[number % len(self._known)]
            start = 0
        texts = [source[(start + step) % len(source)] for step in range(documents)]
        if documents > len(source):
            # Asked for more than there are: the rest is told apart by a number.
            texts = [text if step < len(source) else f"{text} {step}" for step, text in enumerate(texts)]
        return {"query": f"{query} ({number})", "documents": texts, **self._options}


def read_queries(name: str) -> list[tuple[str, list[str]]]:
    """The queries and documents of a file of JSON lines; raises Failure."""
    try:
        data = Path(name).read_bytes()
    except OSError as error:
        raise Failure(f"{name}: {error.strerror}.", NO_INPUT) from None
    found = list(_queries(data, name))
    if not found:
        raise Failure(f"{name}: the file holds no queries.", NO_INPUT)
    return found


def _queries(data: bytes, name: str) -> Iterator[tuple[str, list[str]]]:
    expected = 'expected an object such as {"query": "...", "documents": ["...", "..."]}'
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            body = orjson.loads(line)
        except orjson.JSONDecodeError:
            raise Failure(f"{name}:{number}: this line is not valid JSON; {expected}.", BAD_DATA) from None
        query, documents = (body.get("query"), body.get("documents")) if isinstance(body, dict) else (None, None)
        if not isinstance(query, str) or not isinstance(documents, list) or not documents:
            raise Failure(f"{name}:{number}: {expected}.", BAD_DATA)
        whole = [item.get("text") if isinstance(item, dict) else item for item in documents]
        texts = [text for text in whole if isinstance(text, str)]
        if not query.strip() or len(texts) < len(whole):
            raise Failure(f"{name}:{number}: {expected}.", BAD_DATA)
        yield query, texts
