"""A stand-in for engines: results whose scores tell which pair they belong to."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

from reranker_worker.scheduler import Batch, Job, Result, Scheduler

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def score_of(query: str, document: str, max_length: int = 0, document_tokens: int = 0, instruction: str = "") -> float:
    """The score of a pair under its options: a mixed-up answer shows."""
    return zlib.crc32(repr((query, document, max_length, document_tokens, instruction)).encode()) / 2**32


def make_job(number: int, *documents: str, query: str = "q", deadline: float = 1e9, **options: Any) -> Job:
    return Job(number, [(query, documents)], deadline, **options)


def texts(prefix: str, count: int, size: int = 8) -> list[str]:
    """`count` different documents of `size` characters."""
    return [f"{prefix}{index}".ljust(size, ".") for index in range(count)]


def pairs_of(batch: Batch) -> list[tuple[Any, ...]]:
    """(query, document, options...) of each pair that travels, in order."""
    found = [
        (query, document, length, tokens, instruction) for query, length, tokens, instruction, documents in groups_of(batch) for document in documents
    ]
    assert len(found) == batch.num_pairs
    return found


def groups_of(batch: Batch) -> list[Any]:
    return list(batch.groups)


def result_of(
    batch: Batch, *, ms: float = 10.0, tokens: int = 10, failing: Iterable[int] = (), truncated: Sequence[int] = (), code: str = "INFERENCE_ERROR"
) -> Result:
    """What a good engine reports; pairs at `failing` have no score."""
    bad = set(failing)
    values: list[float | None] = [None if index in bad else score_of(*pair) for index, pair in enumerate(pairs_of(batch))]
    return Result(
        logits=values,
        probabilities=[None if value is None else value + 1 for value in values],
        model_scores=[None if value is None else value + 2 for value in values],
        tokens=[tokens] * len(values),
        truncated=truncated,
        failures=[(index, code, "It failed.") for index in sorted(bad)],
        tokenize_ms=0.0,
        inference_ms=ms,
    )


def check_scores(job: Job) -> None:
    """A finished job has the score of each of its pairs, in its own order, in every column."""
    options = (job.max_length, job.max_document_tokens, job.instruction)
    expected = [score_of(query, document, *options) for query, documents in job.groups for document in documents]
    assert job.logits == expected
    assert job.probabilities == [value + 1 for value in expected]
    assert job.model_scores == [value + 2 for value in expected]


def run_dry(scheduler: Scheduler, now: float = 0.0, most: int = 10_000, **options: Any) -> list[Job]:
    """Score until nothing waits; the finished jobs in order."""
    finished: list[Job] = []
    for _ in range(most):
        batch = scheduler.next_batch(now)
        if batch is None:
            return finished
        finished += scheduler.complete(batch, result_of(batch, **options))
    raise AssertionError("it never ends")
