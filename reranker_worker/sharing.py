"""Identical pairs in flight are scored once: the later copy waits for the earlier one's score. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reranker_worker.jobs import Job, Slice

if TYPE_CHECKING:
    from collections.abc import Sequence


class Sharing:
    """Knows which pairs are in flight and who else waits for them."""

    def __init__(self) -> None:
        # (query, options) -> document -> the pairs that wait for the copy in flight
        self._scoring: dict[tuple[object, ...], dict[str, list[tuple[Job, int]] | None]] = {}

    def claim(self, job: Job, group: int, start: int, documents: Sequence[str]) -> list[Slice]:
        """Mark pairs as being scored; those that already are wait for the copy in flight instead of travelling."""
        key = _key(job, group)
        scoring = self._scoring.setdefault(key, {})
        if len(set(documents)) == len(documents) and scoring.keys().isdisjoint(documents):
            scoring.update(dict.fromkeys(documents))
            return [Slice(job, group, start, start + len(documents), documents)]
        slices: list[Slice] = []
        for index, document in enumerate(documents, start):
            if document in scoring:
                waiters = scoring[document]
                if waiters is None:
                    waiters = scoring[document] = []
                waiters.append((job, index))
                job.shared += 1
            else:
                scoring[document] = None
                slices.append(Slice(job, group, index, index + 1, (document,)))
        return slices

    def release(self, item: Slice) -> list[tuple[int, Job, int]]:
        """Unmark a slice's pairs; (position in the slice, job, pair) of those that waited for them."""
        key = _key(item.job, item.group)
        scoring = self._scoring.get(key, {})
        followers: list[tuple[int, Job, int]] = []
        for position, document in enumerate(item.documents):
            waiters = scoring.pop(document, None)
            if waiters:
                followers += [(position, waiter, index) for waiter, index in waiters]
        if not scoring:
            self._scoring.pop(key, None)
        return followers


def _key(job: Job, group: int) -> tuple[object, ...]:
    return (job.groups[group][0], job.max_length, job.max_document_tokens, job.instruction)
