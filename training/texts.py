"""Texts made out of texts: sentences of a passage, and queries as people also type them."""

from __future__ import annotations

import re
import string
from typing import TYPE_CHECKING

from training.bm25 import words

if TYPE_CHECKING:
    import random

_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[A-Z0-9\"'(])")
_NO_PUNCTUATION = str.maketrans(string.punctuation, " " * len(string.punctuation))
_SENTENCE_WORDS = range(3, 81)
_PLAIN_SHARE, _KEYWORD_SHARE, _KEYWORDS = 0.2, 0.06, 3


def sentences(passage: str) -> list[str]:
    """Its sentences, without fragments and endless ones."""
    return [part.strip() for part in _END.split(passage) if len(part.split()) in _SENTENCE_WORDS]


def vary(query: str, rng: random.Random) -> str:
    """Now and then without case and punctuation, or its content words alone."""
    chance = rng.random()
    if chance < _PLAIN_SHARE:
        return query.lower().translate(_NO_PUNCTUATION).strip() or query
    if chance < _PLAIN_SHARE + _KEYWORD_SHARE and len(content := words(query)) >= _KEYWORDS:
        return " ".join(content)
    return query
