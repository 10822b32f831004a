"""Identical pairs in flight are scored once; a dead engine costs the culprit its request and its mates only time."""

from __future__ import annotations

import pytest
from scheduling import check_scores, groups_of, make_job, pairs_of, result_of, run_dry, texts

from reranker_worker.scheduler import Batch, Job, Scheduler


def make(max_batch_pairs: int = 256) -> Scheduler:
    return Scheduler(max_batch_pairs=max_batch_pairs, batch_target_ms=1e9)


def take(scheduler: Scheduler, *, idle: bool = True) -> Batch:
    batch = scheduler.next_batch(0.0, idle=idle)
    assert batch is not None
    return batch


def owner_and_follower() -> tuple[Scheduler, Job, Job, Batch]:
    """Two jobs with one pair in common, which travels for the first."""
    scheduler = make()
    owner, follower = make_job(1, "a", "same"), make_job(2, "same", "b")
    scheduler.add(owner)
    first = take(scheduler)
    scheduler.add(follower)
    return scheduler, owner, follower, first


def test_an_identical_pair_in_flight_is_not_sent_again() -> None:
    scheduler, owner, follower, first = owner_and_follower()
    second = take(scheduler)
    assert [pair[1] for pair in pairs_of(second)] == ["b"]
    assert scheduler.complete(second, result_of(second)) == []
    assert scheduler.complete(first, result_of(first)) == [owner, follower]
    check_scores(owner)
    check_scores(follower)
    assert (owner.shared, follower.shared) == (0, 1)


def test_a_pair_that_is_no_longer_in_flight_is_sent_again() -> None:
    scheduler, owner, follower, first = owner_and_follower()
    assert scheduler.complete(first, result_of(first)) == [owner]
    assert [pair[1] for pair in pairs_of(take(scheduler))] == ["same", "b"]
    assert follower.shared == 0


def test_duplicates_within_one_job_travel_once() -> None:
    scheduler = make()
    job = make_job(1, "a", "b", "a", "a", "b")
    scheduler.add(job)
    batch = take(scheduler)
    assert [pair[1] for pair in pairs_of(batch)] == ["a", "b"]
    assert scheduler.complete(batch, result_of(batch)) == [job]
    check_scores(job)
    assert job.shared == 3


def engine_that(packs: str) -> Scheduler:
    scheduler = Scheduler(max_batch_pairs=64, batch_target_ms=50.0)
    scheduler.pace.assume(2.0)
    scheduler.pace.packed = packs == "packs"
    scheduler.pace.pass_tokens = 0 if packs == "has passes to fill" else 256
    return scheduler


KINDS = ["packs", "pads", "has passes to fill"]


@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_copies_in_one_request_travel_once(kind: str) -> None:
    scheduler = engine_that(kind)
    scheduler.add(make_job(1, *["word " * 50] * 5000))
    scheduler.add(make_job(2, "another"))
    batches = [batch for batch in (scheduler.next_batch(0.0), scheduler.next_batch(0.0)) if batch is not None]
    assert sum(batch.num_pairs for batch in batches) == 2
    assert scheduler.next_batch(0.0) is None
    whole = [job for batch in batches for job in scheduler.complete(batch, result_of(batch))]
    assert sorted(job.number for job in whole) == [1, 2]
    for job in whole:
        check_scores(job)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_new_behind_what_is_being_scored_already_is_found(kind: str) -> None:
    scheduler = engine_that(kind)
    same = ["x" * size for size in (8, 100, 400)]
    for number, document in enumerate(same):
        scheduler.add(make_job(number, document))
    while scheduler.next_batch(0.0) is not None:
        pass
    for number, document in enumerate([*same, "y" * 900], 10):
        scheduler.add(make_job(number, document))
    batch = scheduler.next_batch(0.0)
    assert batch is not None
    assert [pair[1] for pair in pairs_of(batch)] == ["y" * 900]


@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_equal_requests_travel_once(kind: str) -> None:
    scheduler = engine_that(kind)
    for number in range(3000):
        scheduler.add(make_job(number, "the same"))
    batch = scheduler.next_batch(0.0)
    assert batch is not None
    assert batch.num_pairs == 1
    assert scheduler.next_batch(0.0) is None
    assert len(scheduler.complete(batch, result_of(batch))) == 3000


@pytest.mark.parametrize("options", [{"query": "other"}, {"max_length": 5}, {"max_document_tokens": 5}, {"instruction": "x"}])
def test_pairs_with_other_options_are_other_pairs(options: dict[str, str]) -> None:
    scheduler = make()
    jobs = [make_job(1, "a"), make_job(2, "a", **options)]
    for job in jobs:
        scheduler.add(job)
    assert take(scheduler).num_pairs == 2


def test_a_follower_gets_its_score_although_the_owner_was_cancelled() -> None:
    scheduler, owner, follower, first = owner_and_follower()
    second = take(scheduler)
    scheduler.drop(owner)
    assert scheduler.complete(second, result_of(second)) == []
    assert scheduler.complete(first, result_of(first)) == [follower]
    check_scores(follower)


def test_a_follower_gets_its_score_although_the_owner_expired_or_failed() -> None:
    scheduler, owner, follower, first = owner_and_follower()
    take(scheduler)
    assert scheduler.complete(first, result_of(first, failing=[0])) == [owner]
    assert follower.missing == 1


def test_a_follower_of_a_pair_that_failed_fails_too() -> None:
    scheduler, owner, follower, first = owner_and_follower()
    take(scheduler)
    assert scheduler.complete(first, result_of(first, failing=[1])) == [owner, follower]
    assert follower.failure is not None


def test_a_cancelled_follower_gets_nothing() -> None:
    scheduler, owner, follower, first = owner_and_follower()
    second = take(scheduler)
    scheduler.drop(follower)
    assert scheduler.complete(first, result_of(first)) == [owner]
    assert scheduler.complete(second, result_of(second)) == []


@pytest.mark.parametrize("cancel", [False, True])
def test_a_follower_is_scored_after_the_owners_engine_died(cancel: bool) -> None:
    scheduler, owner, follower, first = owner_and_follower()
    second = take(scheduler)
    if cancel:
        scheduler.drop(owner)
    assert scheduler.requeue(first) == []
    finished = scheduler.complete(second, result_of(second)) + run_dry(scheduler)
    assert set(finished) == ({follower} if cancel else {owner, follower})
    check_scores(follower)
    assert follower.shared == 0
    assert scheduler.waiting_jobs == 0


def test_after_a_death_each_job_of_the_batch_is_tried_alone() -> None:
    scheduler = make()
    jobs = [make_job(number, f"{number}") for number in range(3)]
    later = make_job(9, "later")
    for job in jobs:
        scheduler.add(job)
    assert scheduler.requeue(take(scheduler)) == []
    scheduler.add(later)
    for job in jobs:
        assert scheduler.next_batch(0.0, idle=False) is None
        batch = take(scheduler)
        assert batch.alone
        assert [pair[1] for pair in pairs_of(batch)] == [str(job.number)]
        assert scheduler.complete(batch, result_of(batch)) == [job]
    batch = take(scheduler)
    assert not batch.alone
    assert scheduler.complete(batch, result_of(batch)) == [later]


def test_the_culprit_is_poisoned_at_the_second_death_and_its_mates_survive() -> None:
    scheduler = make()
    jobs = [make_job(number, f"{number}", "kill" if number == 1 else "fine") for number in range(4)]
    for job in jobs:
        scheduler.add(job)
    deaths, finished = 0, []
    while batch := scheduler.next_batch(0.0):
        if any(pair[1] == "kill" for pair in pairs_of(batch)):
            deaths += 1
            finished += scheduler.requeue(batch)
        else:
            finished += scheduler.complete(batch, result_of(batch))
    assert deaths == 2
    assert sorted(job.number for job in finished) == [0, 1, 2, 3]
    assert [job.number for job in finished if job.failure] == [1]
    assert jobs[1].failure is not None
    assert jobs[1].failure[0] == "POISONED"
    for job in (jobs[0], jobs[2], jobs[3]):
        check_scores(job)
    assert (scheduler.waiting_pairs, scheduler.waiting_bytes, scheduler.waiting_jobs) == (0, 0, 0)


def test_one_death_counts_once_for_a_job_that_was_in_both_batches() -> None:
    scheduler = make(max_batch_pairs=4)
    job = make_job(1, *texts("a", 10))
    scheduler.add(job)
    first, second = take(scheduler), take(scheduler, idle=False)
    assert scheduler.requeue(first, second) == []
    assert run_dry(scheduler) == [job]
    check_scores(job)


def test_a_requeued_job_loses_and_doubles_no_pair() -> None:
    scheduler = make(max_batch_pairs=5)
    job = Job(1, [("q", texts("a", 7)), ("r", texts("b", 7))], 1e9)
    scheduler.add(job)
    kept, lost = take(scheduler), take(scheduler)
    scheduler.complete(kept, result_of(kept))
    assert scheduler.requeue(lost) == []
    assert run_dry(scheduler) == [job]
    check_scores(job)


def test_a_job_that_ends_before_its_second_try_is_not_tried() -> None:
    scheduler = make()
    job, other = make_job(1, "a"), make_job(2, "b")
    scheduler.add(job)
    batch = take(scheduler)
    scheduler.requeue(batch)
    scheduler.add(other)
    scheduler.drop(job)
    assert groups_of(take(scheduler)) == [["q", 0, 0, "", ["b"]]]


def test_those_who_waited_for_a_pair_that_killed_are_suspects_too() -> None:
    scheduler = make()
    copies = [make_job(number, "kill") for number in range(2)]
    mate = make_job(5, "fine")
    scheduler.add(copies[0])
    batch = take(scheduler)
    scheduler.add(copies[1])
    scheduler.next_batch(0.0)
    scheduler.add(mate)
    deaths = 1
    finished = scheduler.requeue(batch)
    while batch := scheduler.next_batch(0.0):
        if "kill" in [pair[1] for pair in pairs_of(batch)]:
            assert batch.alone
            deaths += 1
            finished += scheduler.requeue(batch)
        else:
            finished += scheduler.complete(batch, result_of(batch))
    assert deaths == 3
    assert [job.failure is None for job in finished] == [False, False, True]
