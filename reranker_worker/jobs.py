"""What the scheduler moves: jobs (requests as numbered pairs), slices of them, batches, and an engine's results. Pure."""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reranker_worker.protocol import Group


def in_input_order(groups: Sequence[Group]) -> tuple[list[tuple[str, Sequence[str]]], None]:
    """A request's groups as they stand."""
    return [(group.query, group.documents) for group in groups], None


def longest_first(groups: Sequence[Group]) -> tuple[list[tuple[str, Sequence[str]]], list[int]]:
    """A request's groups with each one's documents by falling length, and where each pair stood."""
    sorted_groups: list[tuple[str, Sequence[str]]] = []
    order: list[int] = []
    for group in groups:
        base = len(order)
        lengths = list(map(len, group.documents))
        places = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        sorted_groups.append((group.query, [group.documents[place] for place in places]))
        order += [base + place for place in places]
    return sorted_groups, order


@dataclass(slots=True, eq=False)
class Job:
    """One scorable request: groups of (query, documents) flattened into numbered pairs, and what came back for them."""

    number: int
    groups: Sequence[tuple[str, Sequence[str]]]
    deadline: float  # seconds on the caller's clock
    priority: int = 0  # lower is sooner
    max_length: int = 0
    max_document_tokens: int = 0
    instruction: str = ""
    order: Sequence[int] | None = None  # where each pair stood in the request; None: where it stands here
    num_pairs: int = field(init=False)
    num_bytes: int = field(init=False)
    logits: list[float | None] = field(init=False)
    probabilities: list[float | None] = field(init=False)
    model_scores: list[float | None] | None = None
    truncated: list[int] = field(default_factory=list)
    total_tokens: int = 0
    shared: int = 0
    dispatched_at: float | None = None
    tokenize_ms: float = 0.0
    inference_ms: float = 0.0
    last_batch: int = 0
    failure: tuple[str, str] | None = None  # (code, sentence)
    crashes: int = 0
    done: bool = False
    missing: int = field(init=False)
    _cursor: int = 0
    _again: deque[int] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.num_pairs = self.missing = sum(len(documents) for _, documents in self.groups)
        self.num_bytes = sum(sys.getsizeof(query) + sum(map(sys.getsizeof, documents)) for query, documents in self.groups)
        self.logits = [None] * self.num_pairs
        self.probabilities = [None] * self.num_pairs

    @property
    def unsent(self) -> int:
        """Pairs that wait to be sent."""
        return len(self._again) + self.num_pairs - self._cursor

    def in_input_order(self, column: Sequence[float | None]) -> Sequence[float | None]:
        """A column of results in the order of the request."""
        if self.order is None:
            return column
        values: list[float | None] = [None] * len(column)
        for place, value in zip(self.order, column, strict=True):
            values[place] = value
        return values

    def next_run(self, most: int) -> tuple[int, int, Sequence[str]]:
        """The next neighbouring unsent pairs, at most `most`, all of one group: (group, first pair, documents)."""
        again = self._again
        start = position = again[0] if again else self._cursor
        group = 0
        while position >= len(self.groups[group][1]):
            position -= len(self.groups[group][1])
            group += 1
        if again:
            run = 1
            while run < min(most, len(again)) and again[run] == start + run:
                run += 1
            most = run
        return group, start, self.groups[group][1][position : position + most]

    def advance(self, start: int, size: int) -> None:
        """Those pairs are sent."""
        if self._again:
            for _ in range(size):
                self._again.popleft()
        else:
            self._cursor = start + size

    def take_back(self, pairs: Sequence[int]) -> None:
        """Sent pairs that must be sent again."""
        self._again.extend(pairs)

    def note_times(self, batch: int, result: Result) -> None:
        """Add a batch's times, once however many of its slices are this job's."""
        if self.last_batch != batch:
            self.last_batch = batch
            self.tokenize_ms += result.tokenize_ms
            self.inference_ms += result.inference_ms

    def store(self, start: int, result: Result, offset: int, size: int, truncated: set[int]) -> None:
        """Results offset..offset+size-1 are those of the pairs from `start` on."""
        self.logits[start : start + size] = result.logits[offset : offset + size]
        self.probabilities[start : start + size] = result.probabilities[offset : offset + size]
        if result.model_scores is not None:
            if self.model_scores is None:
                self.model_scores = [None] * self.num_pairs
            self.model_scores[start : start + size] = result.model_scores[offset : offset + size]
        if truncated:
            self.truncated += [start + pair - offset for pair in range(offset, offset + size) if pair in truncated]
        self.total_tokens += sum(result.tokens[offset : offset + size])
        self.missing -= size


@dataclass(slots=True, eq=False)
class Slice:
    """Neighbouring pairs of one job inside a batch: pairs start..stop-1 of the job, all of group `group`."""

    job: Job
    group: int
    start: int
    stop: int
    documents: Sequence[str]


class Room(IntEnum):
    """What may be sent to an engine: nothing; a short batch; that or a long request, whole, that overtakes; anything."""

    NONE, SHORT, LONG, PART = range(4)


@dataclass(slots=True, eq=False)
class Batch:
    """One send to an engine. `groups` is what travels: [query, max_length, max_document_tokens, instruction, documents].

    `alone`: nothing may be sent beside it. `long`: it takes more than two batches' time, or is a `part` of a request that takes more than it may
    whole. `overtaken`: so many later batches at most are scored before it.
    """

    number: int
    slices: list[Slice]
    estimated_tokens: int
    expected_ms: float = 0.0
    alone: bool = False
    long: bool = False
    part: bool = False
    overtaken: int = 0

    @property
    def num_pairs(self) -> int:
        return sum(item.stop - item.start for item in self.slices)

    @property
    def order(self) -> int:
        """Its place among the batches that wait in the engine, lowest first."""
        return self.number + (self.overtaken + 1 if self.overtaken else 0)

    @property
    def groups(self) -> list[list[object]]:
        groups: list[list[object]] = []
        last: list[object] = []
        documents: list[str] = []
        for s in self.slices:
            head: list[object] = [s.job.groups[s.group][0], s.job.max_length, s.job.max_document_tokens, s.job.instruction]
            if head != last:  # neighbours with one query share it: a long one would be sent once for every pair
                last, documents = head, []
                groups.append([*head, documents])
            documents.extend(s.documents)
        return groups

    @property
    def first_deadline(self) -> float:
        """The earliest deadline of its jobs (seconds): an engine that makes no progress beyond it is taken for hung."""
        return min(item.job.deadline for item in self.slices)


@dataclass(frozen=True, slots=True)
class Result:
    """What an engine reports for a batch; every list is flat, in the order of the batch's pairs."""

    logits: Sequence[float | None]
    probabilities: Sequence[float | None]
    model_scores: Sequence[float | None] | None
    tokens: Sequence[int]
    truncated: Sequence[int]
    failures: Sequence[tuple[int, str, str]]  # (pair, code, sentence)
    tokenize_ms: float
    inference_ms: float
