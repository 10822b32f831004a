"""How good an order is: ir_measures computes, over questions that have a relevant candidate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.quality.sets import Question

NAMES = ("NDCG@10", "MRR@10", "MAP")


@dataclass(frozen=True, slots=True)
class Threshold:
    """Precision and recall over all pairs when a score of `at` or more means relevant. None: nothing to divide by."""

    at: float
    precision: float | None
    recall: float | None


def measure(questions: Sequence[Question], scores: Sequence[Sequence[float]]) -> dict[str, float] | None:
    """The mean of each measure, or None when no question has a relevant candidate."""
    import ir_measures  # type: ignore[import-not-found,import-untyped,unused-ignore]  # optional: only this benchmark needs it
    from ir_measures import AP, RR, nDCG  # type: ignore[import-not-found,import-untyped,unused-ignore]

    judged, run = [], []
    for number, (question, given) in enumerate(zip(questions, scores, strict=True)):
        if not any(question.labels):
            continue
        judged += [ir_measures.Qrel(str(number), str(index), label) for index, label in enumerate(question.labels)]
        # Ranks instead of scores: equal scores keep the order of the file rather than what the library does with ties.
        run += [ir_measures.ScoredDoc(str(number), str(index), -float(rank)) for rank, index in enumerate(order(given))]
    if not judged:
        return None
    found = ir_measures.calc_aggregate([nDCG @ 10, RR @ 10, AP], judged, run)
    return dict(zip(NAMES, (found[nDCG @ 10], found[RR @ 10], found[AP]), strict=True))


def order(scores: Sequence[float]) -> list[int]:
    """Indices, best first; equal scores keep their order."""
    return sorted(range(len(scores)), key=lambda index: -scores[index])


def threshold(questions: Sequence[Question], scores: Sequence[Sequence[float]], at: float) -> Threshold:
    """Precision and recall over all pairs of all questions."""
    pairs = [pair for question, given in zip(questions, scores, strict=True) for pair in zip(question.labels, given, strict=True)]
    taken = sum(score >= at for _, score in pairs)
    relevant = sum(label > 0 for label, _ in pairs)
    right = sum(label > 0 and score >= at for label, score in pairs)
    return Threshold(at, right / taken if taken else None, right / relevant if relevant else None)
