"""Which pairs are scored together, and when a request is whole. Pure: no clock, no thread, no I/O; time is an argument.

Work is taken in rounds: each waiting job gives a share of its pairs to a batch in turn, so that a small request behind a large
one starts with the next batch. A batch is bounded by pairs and by estimated tokens; the estimate follows what the engines report.
Identical pairs in flight are scored once. After a crash the jobs concerned are tried again alone, so that only the culprit pays twice.
"""

from __future__ import annotations

import heapq
import sys
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Few pairs of every job in each round: below this the per-job overhead outweighs fairness.
_LEAST_SHARE_PAIRS = 8
_CHARS_PER_TOKEN = 4.0  # English prose under a WordPiece vocabulary; corrected by what the engines report
_TOKENS_PER_MS = 4.0  # a slow CPU; corrected by what the engines report
_SPECIAL_TOKENS = 3
_TOKENS_PER_PAIR = 80.0  # passages; corrected by what the engines report
_LONG_TOKENS = 512  # a longer pair is cut to the model's limit, so that it costs no more than this; `ready` corrects it
_STR_OVERHEAD_BYTES = sys.getsizeof("")
_BLEND = 0.3  # weight of the newest report
_MOST_CRASHES = 2


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


@dataclass(slots=True, eq=False)
class _Slice:
    """Neighbouring pairs of one job inside a batch: pairs start..stop-1 of the job, all of group `group`."""

    job: Job
    group: int
    start: int
    stop: int
    documents: Sequence[str]


@dataclass(slots=True, eq=False)
class Batch:
    """One send to an engine. `groups` is what travels: [query, max_length, max_document_tokens, instruction, documents]."""

    number: int
    slices: list[_Slice]
    estimated_tokens: int
    expected_ms: float = 0.0
    alone: bool = False

    @property
    def num_pairs(self) -> int:
        return sum(item.stop - item.start for item in self.slices)

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


class Scheduler:
    """Jobs in, batches out, results in, whole jobs out. The caller owns the clock and the engines."""

    def __init__(self, *, max_batch_pairs: int, batch_target_ms: float) -> None:
        self._max_batch_pairs = max_batch_pairs
        self._batch_target_ms = batch_target_ms
        self._tokens_per_ms = _TOKENS_PER_MS
        self._tokens_per_char = 1.0 / _CHARS_PER_TOKEN
        self._tokens_per_pair = _TOKENS_PER_PAIR
        self.longest_tokens = _LONG_TOKENS
        self._rotations: dict[int, deque[Job]] = {}
        self._suspects: deque[Job] = deque()
        self._open: dict[int, Job] = {}
        self._deadlines: list[tuple[float, int]] = []
        # (query, options) -> document -> the pairs that wait for the copy in flight
        self._scoring: dict[tuple[object, ...], dict[str, list[tuple[Job, int]] | None]] = {}
        self._batch_number = 0
        self.waiting_pairs = 0
        self.waiting_bytes = 0
        self.waiting_jobs = 0

    def add(self, job: Job) -> None:
        """Admit a job. A job without pairs is whole at once and must not be added."""
        self.waiting_pairs += job.num_pairs
        self.waiting_bytes += job.num_bytes
        self.waiting_jobs += 1
        self._open[job.number] = job
        # Most jobs are done long before their deadline: without this the heap would hold 30 s of traffic.
        if len(self._deadlines) > 2 * len(self._open) + 64:
            self._deadlines = [(other.deadline, other.number) for other in self._open.values()]
            heapq.heapify(self._deadlines)
        else:
            heapq.heappush(self._deadlines, (job.deadline, job.number))
        self._rotations.setdefault(job.priority, deque()).append(job)

    def next_batch(self, now: float, *, idle: bool = True, max_pairs: int | None = None) -> Batch | None:
        """The next batch for an engine, or None. `idle`: that engine has nothing in flight (suspects are only sent to such)."""
        if self._suspects:
            return self._suspect_batch(now) if idle else None
        limit = min(self._max_batch_pairs, max_pairs or self._max_batch_pairs)
        budget = self._budget_tokens
        slices: list[_Slice] = []
        tokens = 0.0
        for job in self._round():
            fair = min(limit, int(budget / self._tokens_per_pair)) // max(1, len(self._rotations[job.priority]))
            taken, count, cost = self._take(job, min(max(_LEAST_SHARE_PAIRS, fair), limit), budget - tokens, now, force=not slices)
            slices += taken
            tokens += cost
            limit -= count
            if count:
                self._rotations[job.priority].rotate(-1)  # also when this fills the batch, else it would be first again
            if not count or limit <= 0 or tokens >= budget:
                break
        return self._batch(slices, tokens) if slices else None

    def complete(self, batch: Batch, result: Result) -> list[Job]:
        """Hand a batch's result to its jobs and to those that waited for the same pairs; the jobs that are now whole or failed."""
        self._learn(batch, result)
        finished: list[Job] = []
        failures = {pair: (code, text) for pair, code, text in result.failures}
        truncated = set(result.truncated)
        offset = 0
        for item in batch.slices:
            size = item.stop - item.start
            if item.job.done or (failures and not failures.keys().isdisjoint(range(offset, offset + size))):
                followers = self._release(item, range(size))
                if not item.job.done:
                    first = next(pair for pair in range(offset, offset + size) if pair in failures)
                    self._fail(item.job, failures[first], finished)
            else:
                followers = self._release(item, range(size))
                self._store(item.job, item.start, result, offset, size, truncated)
                if item.job.last_batch != batch.number:
                    item.job.last_batch = batch.number
                    item.job.tokenize_ms += result.tokenize_ms
                    item.job.inference_ms += result.inference_ms
                self._settle(item.job, finished)
            for position, job, index in followers:
                self._follow(job, index, offset + position, result, failures, truncated, finished)
            offset += size
        return finished

    def requeue(self, *batches: Batch) -> list[Job]:
        """Take back what one dead engine had in flight. The jobs, and those that waited for the same pairs, are suspects: tried again
        alone; a job to which this happens the second time is returned as finished (failure POISONED). One death counts once for a
        job, however many batches it was in."""
        finished: list[Job] = []
        jobs: dict[int, Job] = {}
        for item in (item for batch in batches for item in batch.slices):
            for _, job, index in self._release(item, range(item.stop - item.start)):
                if not job.done:
                    job._again.append(index)
                    job.shared -= 1
                    jobs[job.number] = job
            if not item.job.done:
                item.job._again.extend(range(item.start, item.stop))
                jobs[item.job.number] = item.job
        for job in jobs.values():
            job.crashes += 1
            if job.crashes >= _MOST_CRASHES:
                self._fail(job, ("POISONED", "The engine died twice while it scored this request; it is not tried again."), finished)
            else:
                self._suspects.append(job)
        return finished

    def drop(self, job: Job) -> None:
        """Forget a job (cancelled, expired, refused at drain); what is in flight for it is discarded when it comes."""
        if job.done:
            return
        job.done = True
        del self._open[job.number]
        self.waiting_pairs -= job.num_pairs
        self.waiting_bytes -= job.num_bytes
        self.waiting_jobs -= 1
        # Else a stream of cancelled requests would pile up uncounted while the engines are busy.
        for queue in (self._suspects, self._rotations.get(job.priority)):
            if job.unsent and queue and job in queue:
                queue.remove(job)

    def expire(self, now: float) -> list[Job]:
        """Drop and return the jobs whose deadline has passed."""
        expired: list[Job] = []
        while (deadline := self.next_deadline) is not None and deadline <= now:
            job = self._open[heapq.heappop(self._deadlines)[1]]
            self.drop(job)
            expired.append(job)
        return expired

    def jobs(self) -> list[Job]:
        """The jobs not yet answered, oldest first."""
        return list(self._open.values())

    @property
    def oldest(self) -> Job | None:
        """The job that has waited longest."""
        return next(iter(self._open.values()), None)

    @property
    def next_deadline(self) -> float | None:
        """The earliest deadline of a job that is not done."""
        while self._deadlines and self._deadlines[0][1] not in self._open:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    @property
    def has_unsent(self) -> bool:
        """True when a batch could be formed."""
        return bool(self._suspects) or bool(self._rotations)

    @property
    def tokens_per_ms(self) -> float:
        """The speed of one engine, as learned."""
        return self._tokens_per_ms

    def assume_speed(self, tokens_per_ms: float) -> None:
        """Start from a speed that an engine measured, before any batch was scored."""
        self._tokens_per_ms = max(0.1, tokens_per_ms)

    def estimate_ms(self, engines: int) -> float:
        """About how long the waiting work takes."""
        chars = max(0, self.waiting_bytes - self.waiting_pairs * _STR_OVERHEAD_BYTES)
        tokens = chars * self._tokens_per_char + self.waiting_pairs * _SPECIAL_TOKENS
        return tokens / self._tokens_per_ms / max(1, engines)

    @property
    def _budget_tokens(self) -> float:
        return max(1.0, self._tokens_per_ms * self._batch_target_ms)

    def _round(self) -> Iterator[Job]:
        """Jobs with unsent pairs: best priority first, in turn within one. The caller moves each to the end after its turn."""
        for priority in sorted(self._rotations):
            rotation = self._rotations[priority]
            while rotation:
                job = rotation[0]
                if job.done or not job.unsent:
                    rotation.popleft()
                    continue
                yield job
            del self._rotations[priority]

    def _suspect_batch(self, now: float) -> Batch | None:
        while self._suspects:
            job = self._suspects[0]
            if job.done or not job.unsent:
                self._suspects.popleft()
                continue
            slices, _, tokens = self._take(job, self._max_batch_pairs, self._budget_tokens, now, force=True)
            if slices:
                return self._batch(slices, tokens, alone=True)
        return self.next_batch(now)

    def _batch(self, slices: list[_Slice], tokens: float, *, alone: bool = False) -> Batch:
        self._batch_number += 1
        return Batch(self._batch_number, slices, round(tokens), tokens / self._tokens_per_ms, alone)

    def _take(self, job: Job, most: int, budget: float, now: float, *, force: bool) -> tuple[list[_Slice], int, float]:
        """Up to `most` unsent pairs of a job within a token budget (at least one with `force`): slices, pairs, estimated tokens."""
        slices: list[_Slice] = []
        spent = 0.0
        count = 0
        while count < most and job.unsent and (spent < budget or (force and not count)):
            group, start, run = self._run(job, most - count)
            cost, size = self._affordable(job, group, run, budget - spent, force=force and not count)
            if not size:
                break
            self._advance(job, start, size)
            slices += self._claim(job, group, start, run[:size])
            spent += cost
            count += size
        if count and job.dispatched_at is None:
            job.dispatched_at = now
        return slices, count, spent

    def _run(self, job: Job, most: int) -> tuple[int, int, Sequence[str]]:
        """The next neighbouring unsent pairs: (group, first pair, documents)."""
        again = job._again
        start = position = again[0] if again else job._cursor
        group = 0
        while position >= len(job.groups[group][1]):
            position -= len(job.groups[group][1])
            group += 1
        if again:
            run = 1
            while run < min(most, len(again)) and again[run] == start + run:
                run += 1
            most = run
        return group, start, job.groups[group][1][position : position + most]

    def _advance(self, job: Job, start: int, size: int) -> None:
        if job._again:
            for _ in range(size):
                job._again.popleft()
        else:
            job._cursor = start + size

    def _affordable(self, job: Job, group: int, run: Sequence[str], budget: float, *, force: bool) -> tuple[float, int]:
        """(estimated tokens, number) of the leading documents that fit the budget."""
        longest = job.max_length or self.longest_tokens
        fixed = len(job.groups[group][0]) * self._tokens_per_char + _SPECIAL_TOKENS
        total = 0.0
        for size, document in enumerate(run):
            cost = min(longest, fixed + len(document) * self._tokens_per_char)
            if total + cost > budget and (size or not force):
                return total, size
            total += cost
        return total, len(run)

    def _claim(self, job: Job, group: int, start: int, documents: Sequence[str]) -> list[_Slice]:
        """Mark pairs as being scored; those that already are wait for the copy in flight instead of travelling."""
        key = (job.groups[group][0], job.max_length, job.max_document_tokens, job.instruction)
        scoring = self._scoring.setdefault(key, {})
        if len(set(documents)) == len(documents) and scoring.keys().isdisjoint(documents):
            scoring.update(dict.fromkeys(documents))
            return [_Slice(job, group, start, start + len(documents), documents)]
        slices: list[_Slice] = []
        for index, document in enumerate(documents, start):
            if document in scoring:
                waiters = scoring[document]
                if waiters is None:
                    waiters = scoring[document] = []
                waiters.append((job, index))
                job.shared += 1
            else:
                scoring[document] = None
                slices.append(_Slice(job, group, index, index + 1, (document,)))
        return slices

    def _release(self, item: _Slice, positions: range) -> list[tuple[int, Job, int]]:
        """Unmark a slice's pairs; (position in the slice, job, pair) of those that waited for them."""
        job = item.job
        key = (job.groups[item.group][0], job.max_length, job.max_document_tokens, job.instruction)
        scoring = self._scoring.get(key, {})
        followers: list[tuple[int, Job, int]] = []
        for position in positions:
            waiters = scoring.pop(item.documents[position], None)
            if waiters:
                followers += [(position, waiter, index) for waiter, index in waiters]
        if not scoring:
            self._scoring.pop(key, None)
        return followers

    def _store(self, job: Job, start: int, result: Result, offset: int, size: int, truncated: set[int]) -> None:
        job.logits[start : start + size] = result.logits[offset : offset + size]
        job.probabilities[start : start + size] = result.probabilities[offset : offset + size]
        if result.model_scores is not None:
            if job.model_scores is None:
                job.model_scores = [None] * job.num_pairs
            job.model_scores[start : start + size] = result.model_scores[offset : offset + size]
        if truncated:
            job.truncated += [start + pair - offset for pair in range(offset, offset + size) if pair in truncated]
        job.total_tokens += sum(result.tokens[offset : offset + size])
        job.missing -= size

    def _follow(
        self,
        job: Job,
        index: int,
        pair: int,
        result: Result,
        failures: dict[int, tuple[str, str]],
        truncated: set[int],
        finished: list[Job],
    ) -> None:
        if job.done:
            return
        if pair in failures:
            self._fail(job, failures[pair], finished)
            return
        self._store(job, index, result, pair, 1, truncated)
        # `_store` numbers truncated pairs from `index`, which is right for a slice of one.
        self._settle(job, finished)

    def _settle(self, job: Job, finished: list[Job]) -> None:
        if not job.missing and not job.done:
            job.truncated.sort()
            self.drop(job)
            finished.append(job)

    def _fail(self, job: Job, failure: tuple[str, str], finished: list[Job]) -> None:
        if not job.done:
            job.failure = failure
            self.drop(job)
            finished.append(job)

    def _learn(self, batch: Batch, result: Result) -> None:
        tokens = sum(result.tokens)
        elapsed = result.tokenize_ms + result.inference_ms
        if tokens <= 0:
            return
        chars = sum(len(s.job.groups[s.group][0]) * len(s.documents) + sum(map(len, s.documents)) for s in batch.slices)
        # Cut documents would make characters look cheap.
        if chars and not result.truncated:
            text_tokens = max(1, tokens - _SPECIAL_TOKENS * batch.num_pairs)
            self._tokens_per_char += _BLEND * (min(2.0, text_tokens / chars) - self._tokens_per_char)
        self._tokens_per_pair += _BLEND * (tokens / batch.num_pairs - self._tokens_per_pair)
        speed = tokens / max(elapsed, 0.01)
        # A small batch says little of the speed of a full one; grow at most twofold at a time.
        self._tokens_per_ms += _BLEND * (min(speed, 4 * self._tokens_per_ms) - self._tokens_per_ms)
