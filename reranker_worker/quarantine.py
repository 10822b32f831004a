"""Requests that killed an engine twice are refused for a while, by a keyed fingerprint that tells nothing of the text. Pure."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SECONDS = 600.0
_MOST_ENTRIES = 1024


class Quarantine:
    """Remembers up to 1,024 fingerprints for ten minutes each."""

    def __init__(self) -> None:
        self._key = os.urandom(16)
        self._until: dict[bytes, float] = {}

    def add(self, groups: Iterable[tuple[str, Sequence[str]]], now: float) -> None:
        """Quarantine a request's pairs from `now` (seconds)."""
        if len(self._until) >= _MOST_ENTRIES:
            del self._until[next(iter(self._until))]
        self._until[self._fingerprint(groups)] = now + SECONDS

    def holds(self, groups: Iterable[tuple[str, Sequence[str]]], now: float) -> bool:
        """True while the same request is in quarantine. Free of cost while nothing is."""
        if not self._until:
            return False
        return self._until.get(self._fingerprint(groups), 0.0) > now

    def _fingerprint(self, groups: Iterable[tuple[str, Sequence[str]]]) -> bytes:
        digest = hashlib.blake2b(key=self._key, digest_size=16)
        for query, documents in groups:
            for text in (query, *documents):
                data = text.encode()
                digest.update(len(data).to_bytes(8, "little") + data)
        return digest.digest()
