"""Any order of adding, sending, scoring, failing, dying, cancelling and expiring leaves the scheduler's promises true."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from scheduling import check_scores, pairs_of, result_of

from reranker_worker.scheduler import Batch, Job, Room, Scheduler

DOCUMENTS = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=7)
GROUPS = st.lists(st.tuples(st.sampled_from("qr"), DOCUMENTS), min_size=1, max_size=3)
MOST_PAIRS = 5


class SchedulerMachine(RuleBasedStateMachine):
    """The model: which jobs are open, and how often an engine has died with each."""

    batches = Bundle("batches")

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(max_batch_pairs=MOST_PAIRS, batch_target_ms=50)
        self.now = 0.0
        self.open: dict[int, Job] = {}
        self.deaths: dict[int, int] = {}
        self.numbers = 0
        self.in_flight: list[Batch] = []

    def ended(self, jobs: list[Job]) -> None:
        for job in jobs:
            assert self.open.pop(job.number) is job, "finished twice, or never added"
            assert job.done
            if job.failure is None:
                check_scores(job)
            elif job.failure[0] == "POISONED":
                assert job.crashes == 2
                assert self.deaths[job.number] >= 2

    @initialize(packed=st.booleans(), parallel=st.sampled_from([1, 2, 4]), speed=st.sampled_from([0.2, 4.0]))
    def know_the_engine(self, packed: bool, parallel: int, speed: float) -> None:
        pace = self.scheduler.pace
        pace.packed, pace.parallel = packed, parallel
        pace.assume(speed)

    @rule(groups=GROUPS, priority=st.sampled_from([0, 0, 3]), wait=st.floats(0.5, 20), length=st.sampled_from([0, 0, 9]))
    def add(self, groups: list[tuple[str, list[str]]], priority: int, wait: float, length: int) -> None:
        self.numbers += 1
        job = Job(self.numbers, groups, self.now + wait, priority, length)
        self.open[job.number] = job
        self.deaths[job.number] = 0
        self.scheduler.add(job)

    @rule(target=batches, idle=st.booleans(), most=st.none() | st.integers(1, 9), room=st.sampled_from([Room.SHORT, Room.LONG, Room.PART]))
    def send(self, idle: bool, most: int | None, room: Room) -> Batch | None:
        batch = self.scheduler.next_batch(self.now, idle=idle, max_pairs=most, room=room)
        if batch is not None:
            assert room >= (Room.PART if batch.part else Room.LONG if batch.long else Room.SHORT)
            assert 1 <= batch.num_pairs <= min(MOST_PAIRS, most or MOST_PAIRS) or batch.alone
            flying = [pair for other in self.in_flight for pair in pairs_of(other)]
            pairs = pairs_of(batch)
            assert len(set(pairs)) == len(pairs), "a pair twice in a batch"
            assert not set(pairs) & set(flying), "a pair that is in flight already"
            assert not batch.alone or (idle and len({id(item.job) for item in batch.slices}) == 1)
            self.in_flight.append(batch)
        return batch

    def landed(self, batch: Batch | None) -> bool:
        if batch is None or batch not in self.in_flight:
            return False
        self.in_flight.remove(batch)
        return True

    @rule(batch=consumes(batches), failing=st.sets(st.integers(0, 4), max_size=1), fail=st.booleans())
    def score(self, batch: Batch | None, failing: set[int], fail: bool) -> None:
        if batch is not None and self.landed(batch):
            bad = {pair for pair in failing if fail and pair < batch.num_pairs}
            self.ended(self.scheduler.complete(batch, result_of(batch, failing=bad)))

    @rule(batch=consumes(batches), other=consumes(batches))
    def die(self, batch: Batch | None, other: Batch | None) -> None:
        lost = [one for one in (batch, other) if one is not None and self.landed(one)]
        for number in self.open:
            self.deaths[number] += 1
        self.ended(self.scheduler.requeue(*lost))

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.open:
            job = self.open.pop(data.draw(st.sampled_from(sorted(self.open))))
            self.scheduler.drop(job)

    @rule(seconds=st.floats(0, 5))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        for job in self.scheduler.expire(self.now):
            assert self.open.pop(job.number) is job
            assert job.deadline <= self.now

    @invariant()
    def the_counters_tell_what_is_open(self) -> None:
        scheduler, jobs = self.scheduler, list(self.open.values())
        assert scheduler.jobs() == jobs
        assert scheduler.waiting_jobs == len(jobs)
        assert scheduler.waiting_pairs == sum(job.num_pairs for job in jobs)
        assert scheduler.waiting_bytes == sum(job.num_bytes for job in jobs)
        assert scheduler.next_deadline == min((job.deadline for job in jobs), default=None)
        assert scheduler.oldest is (jobs[0] if jobs else None)

    def teardown(self) -> None:
        """Everything that is open can still be scored, and then nothing is left."""
        for batch in self.in_flight:
            self.ended(self.scheduler.complete(batch, result_of(batch)))
        for _ in range(1000):
            batch = self.scheduler.next_batch(self.now)
            if batch is None:
                break
            self.ended(self.scheduler.complete(batch, result_of(batch)))
        assert not self.open
        assert not self.scheduler.has_unsent
        assert self.scheduler.waiting_pairs == self.scheduler.waiting_bytes == self.scheduler.waiting_jobs == 0


TestAnyOrderOfEvents = SchedulerMachine.TestCase
TestAnyOrderOfEvents.settings = settings(max_examples=150, stateful_step_count=40)
