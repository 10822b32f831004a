"""How far a backend's scores are from the reference's: largest difference, rank correlation, ranking quality on the bundled sample."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from reranker_worker.engine.scoring import Scorer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from reranker_worker.backends import Backend
    from reranker_worker.config import Config
    from reranker_worker.prewarm.sample import Question

# Exact means equal but for rounding. Reduced may move scores, not rankings: among the sample's irrelevant passages nearly equal scores change
# places (int8 of a good model: tau 0.90), and the mean over so few queries moves by 0.01 when nothing is wrong.
EXACT_DIFFERENCE = 1e-3
LEAST_KENDALL_TAU = 0.8
MOST_NDCG_LOSS = 0.02
_TOP = 10


@dataclass(frozen=True, slots=True)
class Parity:
    """A comparison with the reference. Differences are in logits; NDCG@10 is the mean over the sample's queries."""

    max_difference: float
    mean_difference: float
    kendall_tau: float
    ndcg: float
    reference_ndcg: float

    def problem(self, *, exact: bool) -> str | None:
        """Why the backend must not stand in for the reference; None when it may."""
        if not np.isfinite(self.max_difference):
            return "it gives scores that are not finite"
        if exact and self.max_difference > EXACT_DIFFERENCE:
            return f"a logit differs by {self.max_difference:.2g}, and exact means at most {EXACT_DIFFERENCE:.0e}"
        if self.kendall_tau < LEAST_KENDALL_TAU:
            return f"it orders the sample differently (Kendall's tau {self.kendall_tau:.3f}, at least {LEAST_KENDALL_TAU} is needed)"
        if self.reference_ndcg - self.ndcg > MOST_NDCG_LOSS:
            return f"NDCG@10 on the sample falls from {self.reference_ndcg:.4f} to {self.ndcg:.4f}, and at most {MOST_NDCG_LOSS} may be lost"
        return None


def score_questions(
    backend: Backend, config: Config, questions: Sequence[Question], progress: Callable[[int, int], None]
) -> tuple[list[list[float]], float]:
    """(logits of each question's documents, pairs per second) as the engine would score them; raises ValueError for a pair that fails."""
    scorer = Scorer(backend, config, lambda text: None)
    logits: list[list[float]] = []
    begin = time.perf_counter()
    for number, question in enumerate(questions):
        groups = [[question.query, 0, 0, "", question.documents]]
        frame = scorer.score(scorer.prepare({"batch": number, "groups": groups}), lambda batch: None)
        if frame["failures"]:
            raise ValueError(frame["failures"][0][2])
        logits.append(frame["logits"])
        progress(number + 1, len(questions))
    return logits, sum(map(len, logits)) / (time.perf_counter() - begin)


def compare(questions: Sequence[Question], logits: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]) -> Parity:
    """The parity of `logits` with those of the reference, question by question."""
    differences = np.abs(np.concatenate([np.subtract(a, b) for a, b in zip(logits, reference, strict=True)]))
    return Parity(
        max_difference=float(differences.max()),
        mean_difference=float(differences.mean()),
        kendall_tau=float(np.mean([kendall_tau(a, b) for a, b in zip(logits, reference, strict=True)])),
        ndcg=float(np.mean([ndcg(question, scores) for question, scores in zip(questions, logits, strict=True)])),
        reference_ndcg=float(np.mean([ndcg(question, scores) for question, scores in zip(questions, reference, strict=True)])),
    )


def kendall_tau(left: Sequence[float], right: Sequence[float]) -> float:
    """Kendall's tau-a of two scorings of the same documents: 1 for the same order, -1 for the reverse. Two or more documents."""
    upper = np.triu_indices(len(left), 1)
    signs = [np.sign(np.subtract.outer(scores, scores))[upper] for scores in (np.asarray(left), np.asarray(right))]
    return float(np.mean(signs[0] * signs[1]))


def ndcg(question: Question, scores: Sequence[float]) -> float:
    """NDCG@10 with gains of 0 and 1; documents of equal score keep their order."""
    order = np.argsort(-np.asarray(scores), kind="stable")[:_TOP]
    discounts = 1.0 / np.log2(np.arange(2, _TOP + 2))
    gain = sum(discounts[place] for place, index in enumerate(order) if index in question.relevant)
    return float(gain / discounts[: len(question.relevant)].sum())
