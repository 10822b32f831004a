"""Which pairs are scored together, and when a request is whole. Pure: no clock, no thread, no I/O; time is an argument.

Where the engine pads, work is taken in rounds: each waiting job gives a share of its pairs to a batch in turn, so that a small request
behind a large one starts with the next batch. Where it packs, the requests with the least left come first. A batch is bounded by pairs
and by estimated tokens (`pace`); identical pairs in flight are scored once (`sharing`). After a crash the jobs concerned are tried again
alone, so that only the culprit pays twice.
"""

from __future__ import annotations

import heapq
from collections import deque
from typing import TYPE_CHECKING

from reranker_worker.jobs import Batch, Job, Result, Room, Slice
from reranker_worker.pace import Pace
from reranker_worker.sharing import Sharing

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Few pairs of every job in each round: below this the per-job overhead outweighs fairness.
_LEAST_SHARE_PAIRS = 8
# Below so many passes in a batch it matters which pairs meet in one.
_FEW_PASSES = 4
_ROOM_FOR_PADDING = 0.9
_LIKE_LENGTH = 1.25
_MOST_CRASHES = 2
# Of so many batches one begins with the oldest job, the others with the job that has the least left.
_TURNS = 4
# In times of the target, what a batch may take if that makes a request whole, and, where the engine lets short ones overtake its passes, a long
# request: ten passages in float32 are 2.2 of them on two cores with AVX2, and in parts of single passes took 10 % longer (measured in turns).
_SHORT, _LONG = 2.0, 4.0
# For so long after a request was sent whole others of its priority are expected: a part of a longer one of a worse priority is then a single small
# pass, so that they wait for less, at a cost of 4 %. Of the same priority it is not: beside one request after the other it would have a fifth of the
# machine and not a third.
_MIXED_SECONDS = 1.0
# So many later batches at most overtake a part of a request that is longer than that, or a long one that waits in the engine.
_OVERTAKE_PART, _OVERTAKE_LONG = 4, 2

__all__ = ["Batch", "Job", "Result", "Room", "Scheduler", "Slice"]


class Scheduler:
    """Jobs in, batches out, results in, whole jobs out. The caller owns the clock and the engines."""

    def __init__(self, *, max_batch_pairs: int, batch_target_ms: float) -> None:
        self._max_batch_pairs = max_batch_pairs
        self._batch_target_ms = batch_target_ms
        self.pace = Pace()
        self._sharing = Sharing()
        self._rotations: dict[int, deque[Job]] = {}
        self._suspects: deque[Job] = deque()
        self._open: dict[int, Job] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._batch_number = 0
        self._long_priorities: dict[int, int] = {}  # of the batches in flight that are long, by number
        self._whole_sent: dict[int, float] = {}  # when a request of a priority was last sent whole
        self._batches_past_oldest = 0  # without a pair of the one that has waited longest
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

    def next_batch(self, now: float, *, idle: bool = True, max_pairs: int | None = None, room: Room = Room.PART) -> Batch | None:
        """The next batch for an engine, or None. `idle`: that engine has nothing in flight (suspects are only sent to such).

        `room`: what it may be (asked only where the engine packs).
        """
        if self._suspects:
            if not idle:
                return None
            if (batch := self._suspect_batch(now)) is not None:
                return batch
        limit = min(self._max_batch_pairs, max_pairs or self._max_batch_pairs)
        budget = self.pace.budget_tokens(self._batch_target_ms)
        if self.pace.packed:
            return self._packed_batch(now, limit, budget, room)
        if budget < _FEW_PASSES * self.pace.pass_tokens:
            return self._narrow_batch(now, limit, _ROOM_FOR_PADDING * budget)
        slices: list[Slice] = []
        tokens = 0.0
        for job in self._round():
            fair = min(limit, int(budget / self.pace.tokens_per_pair)) // max(1, len(self._rotations[job.priority]))
            taken, count, cost = self._take(job, min(max(_LEAST_SHARE_PAIRS, fair), limit), budget - tokens, now, force=not slices)
            slices += taken
            tokens += cost
            limit -= count
            if count:
                self._rotations[job.priority].rotate(-1)  # also when this fills the batch, else it would be first again
            if (not count and job.unsent) or limit <= 0 or tokens >= budget:
                break
        return self._batch(slices, tokens) if slices else None

    def complete(self, batch: Batch, result: Result) -> list[Job]:
        """Hand a batch's result to its jobs and to those that waited for the same pairs; the jobs that are now whole or failed."""
        self.pace.learn(batch, result)
        self._long_priorities.pop(batch.number, None)
        finished: list[Job] = []
        failures = {pair: (code, text) for pair, code, text in result.failures}
        truncated = set(result.truncated)
        offset = 0
        for item in batch.slices:
            size = item.stop - item.start
            failed = next((pair for pair in range(offset, offset + size) if pair in failures), None) if failures else None
            if failed is not None:
                self._fail(item.job, failures[failed], finished)
            elif not item.job.done:
                item.job.store(item.start, result, offset, size, truncated)
                item.job.note_times(batch.number, result)
                self._settle(item.job, finished)
            for position, job, index in self._sharing.release(item):
                self._follow(job, index, offset + position, result, failures, truncated, finished)
            offset += size
        return finished

    def requeue(self, *batches: Batch) -> list[Job]:
        """Take back what one dead engine had in flight. The jobs, and those that waited for the same pairs, are suspects: tried again
        alone; a job to which this happens the second time is returned as finished (failure POISONED). One death counts once for a
        job, however many batches it was in."""
        finished: list[Job] = []
        jobs: dict[int, Job] = {}
        for batch in batches:
            self._long_priorities.pop(batch.number, None)
        for item in (item for batch in batches for item in batch.slices):
            for _, job, index in self._sharing.release(item):
                if not job.done:
                    job.take_back([index])
                    job.shared -= 1
                    jobs[job.number] = job
            if not item.job.done:
                item.job.take_back(range(item.start, item.stop))
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

    def ms_until_free(self, pairs: int, num_bytes: int, jobs: int, engines: int) -> float:
        """About how long until so many pairs, bytes and places in the queue are free. A job frees its own when it is whole. The one with the
        fewest pairs left is whole first: where the engine packs after its own work, else in rounds, when each of the others has had as many."""
        left = sorted(self._open.values(), key=lambda job: job.missing)
        scored = before = 0
        for position, job in enumerate(left):
            scored += job.missing if self.pace.packed else (job.missing - before) * (len(left) - position)
            before = job.missing
            pairs, num_bytes, jobs = pairs - job.num_pairs, num_bytes - job.num_bytes, jobs - 1
            if pairs <= 0 and num_bytes <= 0 and jobs <= 0:
                break
        # Scores come a batch at a time.
        return self.pace.wait_ms(self.waiting_bytes * scored // max(1, self.waiting_pairs), scored, engines) + self._batch_target_ms

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
            slices, _, tokens = self._take(job, self._max_batch_pairs, self.pace.budget_tokens(self._batch_target_ms), now, force=True)
            if slices:
                return self._batch(slices, tokens, alone=True)
        return None

    def _batch(
        self, slices: list[Slice], tokens: float, *, alone: bool = False, long: bool = False, part: bool = False, overtaken: int = 0
    ) -> Batch:
        self._batch_number += 1
        return Batch(self._batch_number, slices, round(tokens), tokens / self.pace.tokens_per_ms, alone, long, part, overtaken)

    def _packed_batch(self, now: float, limit: int, target: float, room: Room) -> Batch | None:
        """A batch for an engine that pads nothing: requests with the fewest pairs left come first, so that a small one behind a large one is
        whole after its own work; but of four batches in a row one begins with the oldest, so that a stream of small ones starves none."""
        jobs = self._waiting_jobs()
        if not jobs:
            return None
        oldest = min(jobs, key=lambda job: (job.priority, job.number))
        if self._batches_past_oldest < _TURNS - 1 or room < Room.PART:
            jobs.sort(key=lambda job: (job.priority, job.missing))
        else:
            jobs.sort(key=lambda job: (job.priority, job.number))
        slices: list[Slice] = []
        tokens, left, budget, is_long, is_cut, is_new_whole = 0.0, limit, target, False, False, False
        short, whole = _SHORT * target, (_LONG if self.pace.parallel > 1 else _SHORT) * target
        unsent = oldest.unsent
        head = jobs[0]  # what the batch begins with: all before it were being scored already
        for job in jobs:
            expected = job.unsent * self.pace.tokens_per_pair
            if not slices:
                head, is_long, is_cut = job, expected > short, expected > whole
                overtakes = not is_cut and self._is_better(job)
                if is_long and room < (Room.LONG if overtakes else Room.PART):
                    return None
                is_new_whole = not is_cut and job.dispatched_at is None
                budget = self._part_tokens(job, now) if is_cut else target
                most = budget if is_cut else whole if is_long else short
            else:
                if expected > budget - tokens:
                    # What is whole with this batch need not wait for a part of what is not, but for as much as keeps the engine busy.
                    budget = min(budget, self.pace.pass_tokens)
                most = budget
            if tokens >= budget:
                break
            taken, count, cost = self._take(job, left, most - tokens, now, force=not slices)
            slices, left, tokens = slices + taken, left - count, tokens + cost
            if left <= 0:
                break
        self._batches_past_oldest = self._batches_past_oldest + 1 if oldest.unsent == unsent else 0
        if not slices:
            return None
        if is_new_whole:
            self._whole_sent[head.priority] = now
        is_part = is_long and all(item.job.unsent for item in slices)
        is_long = is_long and (is_part or tokens > short)
        # What is sooner done overtakes what takes longer, but not that of a better priority.
        yields = is_part or head.priority > min(self._long_priorities.values(), default=head.priority)
        overtaken = _OVERTAKE_PART if yields else _OVERTAKE_LONG if is_long else 0
        batch = self._batch(slices, tokens, long=is_long, part=is_part and is_cut, overtaken=overtaken)
        if is_long:
            self._long_priorities[batch.number] = head.priority
        return batch

    def _is_better(self, job: Job) -> bool:
        """Whether a long request in flight, or a part of one, has a worse priority."""
        return any(priority > job.priority for priority in self._long_priorities.values())

    def _part_tokens(self, job: Job, now: float) -> float:
        """What a part of a long request may hold. Two are being scored: they take the target time together, so that a newcomer waits for little, or
        half of it where others of a better priority come."""
        gives_way = any(priority < job.priority and now - sent < _MIXED_SECONDS for priority, sent in self._whole_sent.items())
        if not gives_way:
            return self.pace.budget_tokens(self._batch_target_ms / 2)
        # Three of a single pass keep two threads busy, but not four.
        return self.pace.budget_tokens(self._batch_target_ms / 4, 2 if self.pace.parallel == 2 else 1)

    def _narrow_batch(self, now: float, limit: int, budget: float) -> Batch | None:
        """A batch of one or few passes, on a slow machine: too small for the engine to sort, so it is made of pairs of like length.

        The job whose turn it is says which length; half of the room goes to the first job that has had none yet.
        """
        while jobs := self._waiting_jobs():  # again when all that was taken is being scored already
            head = jobs[0]
            self._rotations[head.priority].rotate(-1)
            others_first = head.dispatched_at is not None and any(job.dispatched_at is None for job in jobs)
            slices, count, tokens = self._window(head, jobs, limit, budget / 2 if others_first else budget, now)
            waiting = [job for job in jobs if job.unsent]
            if waiting and count < limit and tokens < budget:
                fresh = (job for job in waiting if job.dispatched_at is None and job.priority == head.priority)
                anchor = next(fresh, head if head.unsent else waiting[0])
                more, _, cost = self._window(anchor, waiting, limit - count, budget - tokens, now)
                slices, tokens = slices + more, tokens + cost
            if slices:
                return self._batch(slices, tokens)
        return None

    def _window(self, anchor: Job, jobs: Sequence[Job], limit: int, budget: float, now: float) -> tuple[list[Slice], int, float]:
        """The anchor's next pair and then, of all jobs' next pairs, always the longest that is not much longer: slices, pairs, tokens."""
        longest = self.pace.next_tokens(anchor) * _LIKE_LENGTH
        slices, count, tokens = self._take(anchor, 1, budget, now, force=True)
        queue = [(-self.pace.next_tokens(job), place, job) for place, job in enumerate(jobs) if job.unsent]
        queue = [item for item in queue if -item[0] <= longest]
        heapq.heapify(queue)
        while queue and count < limit and tokens < budget:
            _, place, job = heapq.heappop(queue)
            taken, size, cost = self._take(job, 1, budget, now, force=True)
            slices, count, tokens = slices + taken, count + size, tokens + cost
            if job.unsent:
                heapq.heappush(queue, (-self.pace.next_tokens(job), place, job))
        return slices, count, tokens

    def _waiting_jobs(self) -> list[Job]:
        """Jobs with unsent pairs, best priority first, in turn within one."""
        jobs: list[Job] = []
        for priority in sorted(self._rotations):
            waiting = [job for job in self._rotations[priority] if job.unsent and not job.done]
            jobs += waiting
            if waiting:
                self._rotations[priority] = deque(waiting)
            else:
                del self._rotations[priority]
        return jobs

    def _take(self, job: Job, most: int, budget: float, now: float, *, force: bool) -> tuple[list[Slice], int, float]:
        """Up to `most` unsent pairs of a job within a token budget (at least one with `force`): slices, pairs, estimated tokens.

        Those that are being scored already do not travel and count for nothing: after them more are taken.
        """
        slices: list[Slice] = []
        spent = 0.0
        count = 0
        while count < most and job.unsent and (spent < budget or (force and not count)):
            group, start, run = job.next_run(most - count)
            cost, size = self.pace.affordable(job, group, run, budget - spent, force=force and not count)
            if not size:
                break
            job.advance(start, size)
            travelling = self._sharing.claim(job, group, start, run[:size])
            pairs = sum(item.stop - item.start for item in travelling)
            slices += travelling
            spent += cost * pairs / size
            count += pairs
            if job.dispatched_at is None:
                job.dispatched_at = now
        return slices, count, spent

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
        job.store(index, result, pair, 1, truncated)
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
