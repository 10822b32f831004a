"""For an engine that pads nothing: small requests overtake large ones, nobody starves, and every pair is scored once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduling import check_scores, make_job, result_of, run_dry, texts

from reranker_worker.scheduler import Batch, Job, Room, Scheduler

TARGET_MS = 50.0
CHARS = 300  # of a document: about 78 tokens
PAIRS_A_BATCH = 6


def make() -> Scheduler:
    """A scheduler that knows a slow engine: 20 tokens a millisecond, so that a batch of half the target time holds about 6 pairs."""
    scheduler = Scheduler(max_batch_pairs=256, batch_target_ms=TARGET_MS)
    scheduler.pace.assume(20.0)
    scheduler.pace.packed = True
    return scheduler


def score(scheduler: Scheduler, batch: Batch) -> list[Job]:
    return scheduler.complete(batch, result_of(batch, ms=3.9 * batch.num_pairs, tokens=78))


def batches_until(scheduler: Scheduler, wanted: int) -> int:
    """Batches from now until the job of that number is whole, with one more always in flight, as the engine has it."""
    count = 0
    flying = [batch for batch in (scheduler.next_batch(0.0), scheduler.next_batch(0.0)) if batch]
    while flying:
        count += 1
        if any(job.number == wanted for job in score(scheduler, flying.pop(0))):
            return count
        if batch := scheduler.next_batch(0.0):
            flying.append(batch)
    raise AssertionError("it never became whole")


def test_two_batches_take_about_the_target_time() -> None:
    scheduler = make()
    scheduler.add(make_job(1, *texts("a", 100, CHARS)))
    batch = scheduler.next_batch(0.0)
    assert batch is not None
    assert abs(batch.num_pairs - PAIRS_A_BATCH) <= 1


def test_a_small_request_behind_a_large_one_waits_for_little_more_than_its_own_work() -> None:
    scheduler = make()
    scheduler.add(make_job(1, *texts("large", 1000, CHARS)))
    for _ in range(2):
        assert scheduler.next_batch(0.0) is not None  # in flight
    scheduler.add(make_job(2, *texts("small", 10, CHARS)))
    own = -(-10 // PAIRS_A_BATCH)
    assert batches_until(scheduler, 2) <= own + 2


def test_a_request_of_less_than_two_batches_is_sent_whole() -> None:
    scheduler = make()
    scheduler.add(make_job(1, *texts("large", 1000, CHARS)))
    scheduler.add(make_job(2, *texts("small", 3 * PAIRS_A_BATCH, CHARS)))
    batch = scheduler.next_batch(0.0)
    assert batch is not None
    assert {item.job.number for item in batch.slices} == {2}
    assert batch.num_pairs == 3 * PAIRS_A_BATCH


def test_a_request_of_less_than_four_batches_is_sent_whole_where_short_ones_overtake_its_passes() -> None:
    for parallel, whole in ((1, False), (2, True)):
        scheduler = make()
        scheduler.pace.parallel = parallel
        scheduler.add(make_job(1, *texts("large", 1000, CHARS)))
        scheduler.add(make_job(2, *texts("longer", 7 * PAIRS_A_BATCH, CHARS)))
        batch = scheduler.next_batch(0.0)
        assert batch is not None
        assert {item.job.number for item in batch.slices} == {2}
        assert (batch.num_pairs == 7 * PAIRS_A_BATCH) == whole
        assert batch.long


def test_what_is_sooner_done_overtakes_what_takes_longer() -> None:
    scheduler = make()
    scheduler.pace.parallel = 2
    orders = []
    for number, pairs in ((1, 1000), (2, 6 * PAIRS_A_BATCH), (3, 2)):
        scheduler.add(make_job(number, *texts(f"{number}.", pairs, CHARS)))
        batch = scheduler.next_batch(0.0)
        assert batch is not None
        assert {item.job.number for item in batch.slices} == {number}
        orders.append(batch.order)
    assert orders == sorted(orders, reverse=True)


def test_a_request_that_is_too_small_for_a_batch_waits_only_for_as_much_of_a_long_one_as_keeps_the_engine_busy() -> None:
    scheduler = make()
    scheduler.pace.pass_tokens = 4 * 78
    scheduler.add(make_job(1, *texts("large", 1000, CHARS)))
    scheduler.add(make_job(2, *texts("small", 2, CHARS)))
    batch = scheduler.next_batch(0.0)
    assert batch is not None
    assert batch.slices[0].job.number == 2
    assert 2 < batch.num_pairs <= 4


def test_a_large_request_that_has_just_had_batches_lets_a_newcomer_pass_at_once() -> None:
    for before in range(1, 9):
        scheduler = make()
        scheduler.add(make_job(1, *texts("large", 1000, CHARS)))
        for _ in range(before):
            assert scheduler.next_batch(0.0) is not None
        scheduler.add(make_job(2, *texts("small", 2, CHARS)))
        batch = scheduler.next_batch(0.0)
        assert batch is not None
        assert batch.slices[0].job.number == 2


def test_a_stream_of_small_requests_does_not_starve_a_large_one() -> None:
    scheduler = make()
    scheduler.add(make_job(1, *texts("large", 30, CHARS)))
    for number in range(2, 100):
        scheduler.add(make_job(number, *texts(f"small{number}.", PAIRS_A_BATCH, CHARS)))
    assert batches_until(scheduler, 1) <= 4 * (30 // (PAIRS_A_BATCH - 1) + 1)


def test_without_room_for_a_long_request_only_short_ones_are_sent() -> None:
    for before in range(5):  # also when it is the turn of the oldest
        scheduler = make()
        scheduler.add(make_job(1, *texts("large", 1000, CHARS)))
        assert scheduler.next_batch(0.0, room=Room.SHORT) is None
        scheduler.pace.parallel = 2
        scheduler.add(make_job(3, *texts("longer", 6 * PAIRS_A_BATCH, CHARS)))  # it would be whole with a batch, but a long one
        assert scheduler.next_batch(0.0, room=Room.SHORT) is None
        for number in range(before):
            scheduler.add(make_job(10 + number, *texts(f"{number}.", 2, CHARS)))
            assert scheduler.next_batch(0.0, room=Room.SHORT) is not None
        scheduler.add(make_job(2, *texts("small", 2, CHARS)))
        batch = scheduler.next_batch(0.0, room=Room.SHORT)
        assert batch is not None
        assert batch.slices[0].job.number == 2
        assert not batch.long
        last = scheduler.next_batch(0.0)
        assert last is not None
        assert last.long


@pytest.mark.parametrize(("priority", "waits"), [(4, False), (5, True), (6, True)])
def test_a_long_request_waits_for_parts_of_a_longer_one_unless_its_priority_is_better(priority: int, waits: bool) -> None:
    scheduler = make()
    scheduler.pace.parallel = 2
    scheduler.add(make_job(1, *texts("large", 1000, CHARS), priority=5))
    part = scheduler.next_batch(0.0)
    assert part is not None
    assert part.part
    scheduler.add(make_job(2, *texts("longer", 6 * PAIRS_A_BATCH, CHARS), priority=priority))
    long = scheduler.next_batch(0.0, room=Room.LONG)
    assert (long is None) == waits
    if long is not None:
        assert (long.long, long.part, long.num_pairs) == (True, False, 6 * PAIRS_A_BATCH)
        assert long.order < part.order


def test_a_part_of_a_long_request_is_never_sent_for_its_priority_alone() -> None:
    scheduler = make()
    scheduler.add(make_job(1, *texts("large", 1000, CHARS), priority=5))
    assert scheduler.next_batch(0.0) is not None
    scheduler.add(make_job(2, *texts("better", 1000, CHARS)))
    assert scheduler.next_batch(0.0, room=Room.LONG) is None


def test_a_bite_of_a_long_request_is_no_part_of_a_longer_one() -> None:
    """However much less than expected fits: else the engine's room would never end."""
    scheduler = Scheduler(max_batch_pairs=16, batch_target_ms=TARGET_MS)
    scheduler.pace.assume(20.0)
    scheduler.pace.packed, scheduler.pace.parallel, scheduler.pace.tokens_per_pair = True, 2, 78.0
    scheduler.add(make_job(1, *texts("long", 40, CHARS)))
    batch = scheduler.next_batch(0.0)
    assert batch is not None
    assert (batch.num_pairs, batch.long, batch.part) == (16, True, False)


@pytest.mark.parametrize(("priority", "smaller"), [(4, True), (5, False)])
@pytest.mark.parametrize("parallel", [1, 2, 4])
def test_parts_of_a_long_request_are_smaller_while_others_of_a_better_priority_come(parallel: int, priority: int, smaller: bool) -> None:
    scheduler = make()
    scheduler.pace.parallel, scheduler.pace.pass_tokens = parallel, 3 * 78
    scheduler.add(make_job(1, *texts("large", 1000, CHARS), priority=5))
    sizes = []
    for number, now in enumerate((10.0, 10.5, 11.1)):
        if number == 1:
            scheduler.add(make_job(2, *texts("small", 4, CHARS), priority=priority))
            while scheduler.jobs()[1].unsent:
                assert scheduler.next_batch(10.0) is not None
        part = scheduler.next_batch(now)
        assert part is not None
        assert part.part
        sizes.append(part.num_pairs)
    before, beside, after = sizes
    assert beside == (before // 2 if smaller else before)
    assert after == before


def test_smaller_parts_still_keep_every_thread_busy() -> None:
    sizes = []
    for parallel in (2, 4):
        scheduler = make()
        scheduler.pace.parallel, scheduler.pace.pass_tokens = parallel, 8 * 78
        scheduler.add(make_job(1, *texts("large", 1000, CHARS), priority=5))
        scheduler.add(make_job(2, *texts("small", 4, CHARS)))
        for _ in range(2):
            batch = scheduler.next_batch(0.0)
            assert batch is not None
        sizes.append(batch.num_pairs)
    assert sizes == [3, 7]  # three of one pass are enough for two threads


def test_the_end_of_a_long_request_is_no_other() -> None:
    scheduler = make()
    scheduler.add(make_job(1, *texts("large", 2 * PAIRS_A_BATCH + 60, CHARS)))
    scheduler.add(make_job(2, *texts("larger", 1000, CHARS), priority=5))
    while scheduler.jobs()[0].unsent:
        assert scheduler.next_batch(0.0) is not None
    batch = scheduler.next_batch(0.0)
    assert batch is not None
    assert batch.part
    assert batch.num_pairs >= PAIRS_A_BATCH - 1


def test_a_small_request_overtakes_a_part_of_a_long_one_unless_its_priority_is_worse() -> None:
    for priority, overtakes in ((0, True), (3, True), (4, False)):
        scheduler = make()
        scheduler.add(make_job(1, *texts("large", 60, CHARS), priority=3))
        part = None
        while scheduler.jobs()[0].unsent:
            batch = scheduler.next_batch(0.0)
            assert batch is not None
            part = batch if batch.long else part
        assert part is not None
        scheduler.add(make_job(2, *texts("small", 2, CHARS), priority=priority))
        small = scheduler.next_batch(0.0)
        assert small is not None
        assert (small.order < part.order) == overtakes


def test_a_small_request_does_not_overtake_a_long_one_of_a_better_priority_behind_which_another_was_sent() -> None:
    scheduler = make()
    scheduler.pace.parallel = 2
    batches = []
    for number, priority, count in ((1, 0, 36), (2, 5, 36), (3, 3, 2)):
        scheduler.add(make_job(number, *texts(f"{number}.", count, CHARS), priority=priority))
        batches.append(scheduler.next_batch(0.0))
    best, worst, small = [batch for batch in batches if batch is not None]
    assert best.long
    assert worst.long
    assert best.order < small.order


@pytest.mark.parametrize("lost", [False, True])
def test_a_long_request_that_is_no_longer_in_flight_holds_nobody_back(lost: bool) -> None:
    scheduler = make()
    scheduler.pace.parallel = 2
    scheduler.add(make_job(1, *texts("best", 36, CHARS), priority=0))
    best = scheduler.next_batch(0.0)
    scheduler.add(make_job(2, *texts("worst", 36, CHARS), priority=5))
    worst = scheduler.next_batch(0.0)
    assert best is not None
    assert worst is not None
    if lost:
        scheduler.requeue(best)
        scheduler.drop(scheduler.jobs()[0])
    else:
        score(scheduler, best)
    scheduler.add(make_job(3, *texts("small", 2, CHARS), priority=3))
    small = scheduler.next_batch(0.0)
    assert small is not None
    assert small.order < worst.order


def test_a_few_long_documents_take_no_more_than_a_short_batch_may() -> None:
    """The estimate of a request goes by the average document."""
    scheduler = make()
    scheduler.pace.parallel = 2
    scheduler.add(make_job(1, *texts("long", 20, 2048)))
    batch = scheduler.next_batch(0.0)
    assert batch is not None
    assert not batch.long
    assert batch.expected_ms < 2.5 * TARGET_MS


def test_the_time_until_there_is_room_counts_the_smallest_requests_first() -> None:
    scheduler = make()
    for number, count in enumerate((100, 5, 10)):
        scheduler.add(make_job(number, *texts(f"{number}.", count, CHARS)))
    work = [scheduler.ms_until_free(0, 0, requests, 1) - TARGET_MS for requests in (1, 2, 3)]
    assert work == pytest.approx([5 * work[2] / 115, 15 * work[2] / 115, work[2]], rel=0.02)


def test_a_batch_that_makes_a_request_whole_is_no_part() -> None:
    scheduler = make()
    scheduler.add(make_job(1, *texts("short", 60, 8)))  # in pairs of the usual length it would be far too long for one batch
    batch = scheduler.next_batch(0.0)
    assert batch is not None
    assert not scheduler.jobs()[0].unsent
    assert not batch.long


def test_a_better_priority_comes_before_a_smaller_request() -> None:
    scheduler = make()
    scheduler.add(make_job(1, *texts("small", 2, CHARS), priority=5))
    scheduler.add(make_job(2, *texts("large", 30, CHARS), priority=1))
    batch = scheduler.next_batch(0.0)
    assert batch is not None
    assert {item.job.number for item in batch.slices} == {2}


def test_small_requests_share_a_batch() -> None:
    scheduler = make()
    for number in range(1, 5):
        scheduler.add(make_job(number, *texts(f"{number}.", 1, CHARS)))
    batch = scheduler.next_batch(0.0)
    assert batch is not None
    assert batch.num_pairs == 4
    assert scheduler.next_batch(0.0) is None


def test_requests_for_the_same_pairs_are_scored_once_and_both_answered() -> None:
    scheduler = make()
    jobs = [make_job(number, *texts("same", 20, CHARS)) for number in (1, 2)]
    for job in jobs:
        scheduler.add(job)
    flying = []
    while batch := scheduler.next_batch(0.0):
        flying.append(batch)
    assert sum(batch.num_pairs for batch in flying) == 20
    for batch in flying:
        score(scheduler, batch)
    for job in jobs:
        check_scores(job)


@pytest.mark.parametrize("same", [2 * PAIRS_A_BATCH, 3 * PAIRS_A_BATCH], ids=["almost a batch", "more than a batch"])
def test_what_follows_a_request_that_is_being_scored_already_has_a_batch_of_its_usual_size(same: int) -> None:
    scheduler = make()
    scheduler.add(make_job(1, *texts("same", same, CHARS)))
    scheduler.next_batch(0.0)
    scheduler.add(make_job(2, *texts("same", same, CHARS)))  # nothing of it travels
    scheduler.add(make_job(3, *texts("large", 1000, CHARS)))
    batch = scheduler.next_batch(0.0)
    assert batch is not None
    assert {item.job.number for item in batch.slices} == {3}
    assert batch.num_pairs >= PAIRS_A_BATCH - 1


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 3)), min_size=1, max_size=12))
def test_every_request_gets_the_score_of_each_of_its_pairs(sizes: list[tuple[int, int]]) -> None:
    scheduler = make()
    jobs = [make_job(number, *texts(f"{number}.", count, CHARS), priority=priority) for number, (count, priority) in enumerate(sizes)]
    for job in jobs:
        scheduler.add(job)
    assert len(run_dry(scheduler)) == len(jobs)
    for job in jobs:
        check_scores(job)
