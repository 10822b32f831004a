"""What the backends' tests compare with: pairs, the library's own predictions, and how far two columns of scores are apart."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from tiny_models import WORDS

from reranker_worker.backends import Pair

if TYPE_CHECKING:
    from pathlib import Path

    from reranker_worker.backends import Backend

PARITY = 1e-4
# The architectures that the fast paths know.
FAMILIES = ("bert", "roberta", "xlm-roberta", "distilbert", "electra")


def predicted(path: Path, pairs: list[tuple[str, str]], **options: Any) -> Any:
    """What `CrossEncoder.predict` gives, without activation unless `options` say so."""
    import torch
    from sentence_transformers import CrossEncoder

    return CrossEncoder(str(path), device="cpu", local_files_only=True).predict(pairs, **{"activation_fn": torch.nn.Identity(), **options})


def logits_of(backend: Backend, pairs: list[tuple[str, str]]) -> list[float]:
    """One pass over all pairs."""
    return backend.score(backend.tokenize([Pair(query, document, backend.info.max_length) for query, document in pairs]))


def some_pairs(seed: int, count: int) -> list[tuple[str, str]]:
    """Pairs of up to 7 and 39 words, and three that lack one side or both."""
    chance = random.Random(seed)

    def words(most: int) -> str:
        return " ".join(chance.choice(WORDS) for _ in range(chance.randrange(most)))

    return [(words(8), words(40)) for _ in range(count - 3)] + [("where is the boat", ""), ("", "the boat"), ("", "")]


def farthest(left: Any, right: Any) -> float:
    """The largest difference of two columns of equal length."""
    assert len(left) == len(right)
    return max(abs(float(a) - float(b)) for a, b in zip(left, right, strict=True))
