"""Which pairs travel together: nothing lost, nothing twice, fair shares, bounded batches."""

from __future__ import annotations

import gc
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduling import check_scores, groups_of, make_job, pairs_of, result_of, run_dry, texts

from reranker_worker.scheduler import Job, Scheduler


def make(max_batch_pairs: int = 256, batch_target_ms: float = 1e9) -> Scheduler:
    return Scheduler(max_batch_pairs=max_batch_pairs, batch_target_ms=batch_target_ms)


def waiting(scheduler: Scheduler) -> tuple[int, int, int]:
    return scheduler.waiting_pairs, scheduler.waiting_bytes, scheduler.waiting_jobs


def test_a_small_job_is_one_batch_and_is_whole_when_it_is_scored() -> None:
    scheduler = make()
    job = make_job(1, "a", "b")
    scheduler.add(job)
    assert scheduler.has_unsent
    batch = scheduler.next_batch(5.0)
    assert batch is not None
    assert groups_of(batch) == [["q", 0, 0, "", ["a", "b"]]]
    assert job.dispatched_at == 5.0
    assert scheduler.next_batch(5.0) is None
    assert scheduler.complete(batch, result_of(batch, ms=7.0, tokens=3)) == [job]
    check_scores(job)
    assert (job.total_tokens, job.inference_ms, job.shared, job.failure) == (6, 7.0, 0, None)
    assert waiting(scheduler) == (0, 0, 0)
    assert not scheduler.has_unsent


def test_a_batch_never_holds_more_pairs_than_the_limit_or_the_callers_limit() -> None:
    scheduler = make(max_batch_pairs=10)
    scheduler.add(make_job(1, *texts("a", 35)))
    sizes = []
    for limit in (None, 3, 100, None, None, None):
        batch = scheduler.next_batch(0.0, max_pairs=limit)
        sizes.append(batch.num_pairs if batch else 0)
    assert sizes == [10, 3, 10, 10, 2, 0]


@given(st.lists(st.lists(st.integers(0, 3000), min_size=1, max_size=12), min_size=1, max_size=5), st.integers(1, 400), st.integers(1, 20))
def test_estimated_tokens_stay_within_the_budget_unless_a_pair_is_alone(sizes: list[list[int]], target_ms: int, most: int) -> None:
    scheduler = make(most, target_ms)
    count = 0
    for number, lengths in enumerate(sizes):
        scheduler.add(make_job(number, *(f"{number}.{index}." + "x" * length for index, length in enumerate(lengths))))
    while batch := scheduler.next_batch(0.0):
        count += batch.num_pairs
        assert batch.num_pairs <= most
        assert batch.num_pairs == 1 or batch.estimated_tokens <= scheduler.pace.tokens_per_ms * target_ms + 1
    assert count == sum(map(len, sizes))


def test_ten_documents_behind_a_thousand_start_with_the_next_batch() -> None:
    scheduler = make(max_batch_pairs=64)
    large, small = make_job(1, *texts("a", 1000)), make_job(2, *texts("b", 10))
    scheduler.add(large)
    assert scheduler.next_batch(0.0)
    scheduler.add(small)
    batch = scheduler.next_batch(0.0)
    assert batch is not None
    assert sum(document.startswith("b") for _, document, *_ in pairs_of(batch)) == 10


@pytest.mark.parametrize("target_ms", [1, 10, 50])
def test_on_a_slow_engine_too_every_job_has_its_turn(target_ms: int) -> None:
    scheduler = make(batch_target_ms=target_ms)
    jobs = [make_job(number, *texts(f"{number}.", 200, 400)) for number in range(6)]
    for job in jobs:
        scheduler.add(job)
    for turn in range(4):
        seen = set()
        for _ in range(6):
            batch = scheduler.next_batch(0.0)
            assert batch is not None
            seen |= {document.split(".")[0] for _, document, *_ in pairs_of(batch)}
        assert len(seen) == 6, turn


@given(st.lists(st.integers(1, 300), min_size=2, max_size=12), st.integers(8, 64))
def test_no_job_waits_longer_for_its_first_pair_than_there_are_jobs_before_it(sizes: list[int], most: int) -> None:
    scheduler = make(most, 50)
    jobs = [make_job(number, *texts(f"{number}.", size, 30)) for number, size in enumerate(sizes)]
    for job in jobs:
        scheduler.add(job)
    batches = 0
    while any(job.dispatched_at is None for job in jobs):
        assert scheduler.next_batch(float(batches)) is not None
        batches += 1
    assert batches <= len(jobs)


def test_a_small_job_is_finished_long_before_the_large_one_before_it() -> None:
    scheduler = make(max_batch_pairs=32)
    scheduler.add(make_job(1, *texts("a", 1000)))
    scheduler.add(make_job(2, *texts("b", 40)))
    assert [job.number for job in run_dry(scheduler)] == [2, 1]


def test_a_lower_priority_number_goes_first() -> None:
    scheduler = make(max_batch_pairs=8)
    for number, priority in enumerate([5, 0, 9, 0]):
        scheduler.add(make_job(number, *texts(f"{number}", 8), priority=priority))
    assert [job.number for job in run_dry(scheduler)] == [1, 3, 0, 2]


def test_the_pairs_of_one_job_travel_in_order() -> None:
    scheduler = make(max_batch_pairs=7)
    job = Job(1, [("q", texts("a", 5)), ("r", texts("b", 9)), ("q", texts("c", 3))], 1e9)
    scheduler.add(job)
    order = []
    while batch := scheduler.next_batch(0.0):
        order += [(pair[0], pair[1]) for pair in pairs_of(batch)]
        scheduler.complete(batch, result_of(batch))
    assert order == [(query, document) for query, documents in job.groups for document in documents]
    check_scores(job)


def test_options_travel_with_the_pairs() -> None:
    scheduler = make()
    scheduler.add(make_job(1, "a", max_length=9, max_document_tokens=5, instruction="judge"))
    batch = scheduler.next_batch(0.0)
    assert batch is not None
    assert groups_of(batch) == [["q", 9, 5, "judge", ["a"]]]


def test_a_query_travels_once_even_when_some_of_its_pairs_are_shared() -> None:
    scheduler = make()
    scheduler.add(make_job(1, "a", "x", "b", "x", "c", "x", "d"))
    batch = scheduler.next_batch(0.0)
    assert batch is not None
    assert groups_of(batch) == [["q", 0, 0, "", ["a", "x", "b", "c", "d"]]]


def test_truncated_pairs_are_numbered_within_their_own_job() -> None:
    scheduler = make()
    first, second = make_job(1, "a", "b", "b"), make_job(2, "c", "b", "d")
    scheduler.add(first)
    scheduler.add(second)
    batch = scheduler.next_batch(0.0)
    assert batch is not None
    assert [pair[1] for pair in pairs_of(batch)] == ["a", "b", "c", "d"]
    scheduler.complete(batch, result_of(batch, truncated=[1, 3]))
    assert (first.truncated, second.truncated) == ([1, 2], [1, 2])


def test_one_failed_pair_fails_its_job_and_no_other() -> None:
    scheduler = make()
    bad, good = make_job(1, "a", "b"), make_job(2, "c")
    scheduler.add(bad)
    scheduler.add(good)
    batch = scheduler.next_batch(0.0)
    assert batch is not None
    assert scheduler.complete(batch, result_of(batch, failing=[1], code="INVALID_REQUEST")) == [bad, good]
    assert bad.failure == ("INVALID_REQUEST", "It failed.")
    assert good.failure is None
    check_scores(good)
    assert waiting(scheduler) == (0, 0, 0)


def test_a_job_that_failed_sends_nothing_more() -> None:
    scheduler = make(max_batch_pairs=2)
    job = make_job(1, *texts("a", 6))
    scheduler.add(job)
    first, second = scheduler.next_batch(0.0), scheduler.next_batch(0.0)
    assert first is not None
    assert second is not None
    assert scheduler.complete(first, result_of(first, failing=[0])) == [job]
    assert scheduler.next_batch(0.0) is None
    assert scheduler.complete(second, result_of(second, failing=[0])) == []


def test_jobs_expire_at_their_deadline_and_not_before() -> None:
    scheduler = make()
    jobs = [make_job(number, "a", deadline=deadline) for number, deadline in enumerate([3.0, 1.0, 2.0])]
    for job in jobs:
        scheduler.add(job)
    assert scheduler.oldest is jobs[0]
    assert scheduler.next_deadline == 1.0
    assert scheduler.expire(0.99) == []
    assert scheduler.expire(2.0) == [jobs[1], jobs[2]]
    assert scheduler.jobs() == [jobs[0]]
    assert scheduler.next_deadline == 3.0
    scheduler.drop(jobs[0])
    scheduler.drop(jobs[0])
    assert scheduler.next_deadline is None
    assert scheduler.oldest is None
    assert waiting(scheduler) == (0, 0, 0)
    assert scheduler.next_batch(0.0) is None


class Text(str):
    """A string whose end can be seen."""

    __slots__ = ("__weakref__",)


def test_a_dropped_jobs_texts_are_freed_while_the_engines_are_busy() -> None:
    scheduler = make()
    alive = weakref.WeakSet[Text]()
    for number in range(50):
        text = Text(f"document {number}")
        alive.add(text)
        job = make_job(number, text)
        scheduler.add(job)
        scheduler.drop(job)
    del text, job
    gc.collect()
    assert not alive


def test_memory_for_deadlines_does_not_grow_with_finished_jobs() -> None:
    import tracemalloc

    scheduler = make()
    tracemalloc.start()
    for number in range(3_000):
        scheduler.add(make_job(number, "a"))
        run_dry(scheduler)
        if number == 500:
            before = tracemalloc.get_traced_memory()[0]
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 50_000


def test_a_batch_behind_the_last_suspect_keeps_within_what_the_engine_was_given_room_for() -> None:
    scheduler = make()
    scheduler.add(make_job(1, "a"))
    batch = scheduler.next_batch(0.0)
    assert batch is not None
    scheduler.requeue(batch)
    again = scheduler.next_batch(0.0)
    assert again is not None
    assert again.alone
    scheduler.add(make_job(2, "b", "c"))
    batch = scheduler.next_batch(0.0, max_pairs=1)
    assert batch is not None
    assert batch.num_pairs == 1


def test_the_speed_is_learned_and_bounds_the_next_batches() -> None:
    scheduler = make(10_000, 50)
    scheduler.pace.assume(1000.0)
    assert scheduler.pace.tokens_per_ms == 1000.0
    for number in range(30):  # the engine does 10 tokens a millisecond
        scheduler.add(make_job(number, *texts(str(number), 400, 40)))
        while batch := scheduler.next_batch(0.0):
            scheduler.complete(batch, result_of(batch, tokens=10, ms=batch.num_pairs))
    assert scheduler.pace.tokens_per_ms == pytest.approx(10, rel=0.1)
    scheduler.add(make_job(99, *texts("x", 400, 40)))
    last = scheduler.next_batch(0.0)
    assert last is not None
    assert 35 <= last.num_pairs <= 65  # 50 ms of it


def test_batches_that_end_at_once_do_not_make_the_engine_look_faster() -> None:
    scheduler = make()
    scheduler.pace.assume(10.0)
    for number in range(30):  # two side by side take 100 ms: the second is charged next to nothing
        scheduler.add(make_job(number, *texts(str(number), 50)))
        run_dry(scheduler, ms=0.1 if number % 2 else 100.0, tokens=10)
        assert 5 <= scheduler.pace.tokens_per_ms <= 20


def test_a_machine_that_stood_still_does_not_look_slow_for_long() -> None:
    scheduler = make()
    scheduler.pace.assume(10.0)
    for number in range(10):
        scheduler.add(make_job(number, *texts(str(number), 50)))
        run_dry(scheduler, ms=60_000.0 if number == 4 else 50.0, tokens=10)
        assert scheduler.pace.tokens_per_ms > 2
    assert scheduler.pace.tokens_per_ms > 6


def test_a_growing_speed_is_believed_step_by_step() -> None:
    scheduler = make()
    scheduler.pace.assume(1.0)
    scheduler.add(make_job(1, "a"))
    run_dry(scheduler, ms=0.0, tokens=1_000_000)
    assert scheduler.pace.tokens_per_ms < 2.0


def test_the_time_until_there_is_room_follows_the_rounds_and_the_engines() -> None:
    scheduler = make(batch_target_ms=0)
    scheduler.pace.assume(10.0)
    assert scheduler.ms_until_free(1, 1, 1, 1) == 0.0
    for number in range(4):
        scheduler.add(make_job(number, *texts(f"{number}.", 100, 400)))
    one = scheduler.ms_until_free(100, 0, 0, 1)
    assert one == pytest.approx(400 * 103 / 10, rel=0.1)  # in rounds the first is whole when all nearly are
    assert scheduler.ms_until_free(100, 0, 0, 2) == pytest.approx(one / 2)
    assert scheduler.ms_until_free(100, 0, 0, 0) == one
    scheduler.add(make_job(9, *texts("9.", 5, 400)))
    assert scheduler.ms_until_free(0, 0, 1, 1) == pytest.approx(25 * 103 / 10, rel=0.1)

