"""BM25 over the passages of one set, scaled by the best score that a query could reach."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from collections.abc import Sequence

_K1, _B = 1.2, 0.75
_WORD = re.compile(r"\w+")
_STOP = frozenset(
    "a an and are as at be been but by can did do does for from had has have how i if in into is it its me my no not of on or s so that the "
    "their them then there these they this to was we were what when where which who why will with would you your".split()
)


def words(text: str) -> list[str]:
    """Lower-case words without function words and the plural's s."""
    plain = (word for word in _WORD.findall(text.lower()) if word not in _STOP)
    return [word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in plain]


class BM25:
    """Scores in [0, 1]: 1 would be every word of the query, each infinitely often."""

    def __init__(self, passages: Sequence[str]) -> None:
        self._words = CountVectorizer(analyzer=words, dtype=np.float32)
        counts = self._words.fit_transform(passages).tocsr()
        self._passages = counts.shape[0]
        frequency = np.bincount(counts.indices, minlength=counts.shape[1])
        self._idf = np.log(1 + (self._passages - frequency + 0.5) / (frequency + 0.5)).astype(np.float32)
        self._weights = self._weigh(counts)

    def score(self, queries: Sequence[str], texts: Sequence[str] | None = None) -> np.ndarray[Any, Any]:
        """A row per query; its columns are the passages, or `texts` when given."""
        weights = self._weights if texts is None else self._weigh(self._words.transform(texts).tocsr())
        asked = self._words.transform(queries)
        asked.data[:] = 1
        best = np.asarray(asked @ self._idf[:, None]).ravel()
        unknown = np.array([len(set(words(query))) for query in queries]) - np.diff(asked.indptr)
        best = (best + unknown * np.log(1 + self._passages)) * (_K1 + 1)
        scores: np.ndarray[Any, Any] = np.asarray((asked @ weights.T).todense()) / np.maximum(best, 1e-3)[:, None]
        return scores

    def _weigh(self, counts: Any) -> Any:
        weights = counts.copy().astype(np.float32)
        lengths = np.asarray(weights.sum(1)).ravel()
        damping = _K1 * (1 - _B + _B * lengths / max(lengths.mean(), 1))
        damping = np.repeat(damping, np.diff(weights.indptr))
        weights.data = weights.data * (_K1 + 1) / (weights.data + damping) * self._idf[weights.indices]
        return weights
