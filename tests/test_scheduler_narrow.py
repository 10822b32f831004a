"""On a slow machine a batch is one or few passes: it is made of pairs of like length, whoever asked, and nobody is forgotten."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from scheduling import check_scores, make_job, pairs_of, result_of, run_dry, texts

from reranker_worker.jobs import longest_first
from reranker_worker.protocol import Group
from reranker_worker.scheduler import Batch, Job, Scheduler

PASS_TOKENS = 1000


def make() -> Scheduler:
    """A scheduler whose batches hold one pass: four characters a token, 1,000 tokens."""
    scheduler = Scheduler(max_batch_pairs=256, batch_target_ms=1.0)
    scheduler.pace.pass_tokens = PASS_TOKENS
    return scheduler


def sizes(batch: Batch) -> list[int]:
    return [len(pair[1]) for pair in pairs_of(batch)]


def mixed(number: int) -> Job:
    """Eight documents of 100 to 1,500 characters, longest first."""
    return make_job(number, *(f"{number}.{size}".ljust(size, ".") for size in range(1500, 0, -200)))


def test_pairs_of_like_length_of_several_requests_meet_in_one_batch() -> None:
    scheduler = make()
    for number in range(1, 17):
        scheduler.add(mixed(number))
    padded = held = 0
    while batch := scheduler.next_batch(0.0):
        padded += max(sizes(batch)) * batch.num_pairs
        held += sum(sizes(batch))
        scheduler.complete(batch, result_of(batch, tokens=100, ms=1000.0))
    # Request by request the padding would be 1500 * 8 for every 6,400 characters: 1.9 times.
    assert padded <= 1.3 * held


def test_a_request_of_short_pairs_is_not_padded_to_the_long_ones_of_another_when_its_turn_comes() -> None:
    scheduler = make()
    scheduler.add(make_job(1, *texts("long", 100, 1900)))
    assert scheduler.next_batch(0.0) is not None
    scheduler.add(make_job(2, *texts("short", 400, 40)))
    both, short = scheduler.next_batch(0.0), scheduler.next_batch(0.0)
    assert both is not None
    assert short is not None
    assert set(sizes(both)) == {1900, 40}
    assert set(sizes(short)) == {40}


def test_a_batch_is_about_one_pass_although_the_machine_would_score_less_in_its_target_time() -> None:
    scheduler = make()
    scheduler.add(make_job(1, *texts("a", 100, 400)))
    batch = scheduler.next_batch(0.0)
    assert batch is not None
    assert 0.7 * PASS_TOKENS <= batch.estimated_tokens <= 1.1 * PASS_TOKENS


def test_a_small_request_behind_a_large_one_starts_with_the_next_batch_whatever_its_lengths() -> None:
    for size in (8, 400, 1900):
        scheduler = make()
        scheduler.add(make_job(1, *texts("a", 1000, 400)))
        for _ in range(3):
            assert scheduler.next_batch(0.0) is not None
        scheduler.add(make_job(2, *texts("b", 10, size)))
        batch = scheduler.next_batch(0.0)
        assert batch is not None
        assert any(pair[1].startswith("b") for pair in pairs_of(batch)), size


def test_a_better_priority_is_the_head_of_every_batch() -> None:
    scheduler = make()
    scheduler.add(make_job(1, *texts("late", 100, 400), priority=5))
    scheduler.add(make_job(2, *texts("soon", 20, 400), priority=0))
    first = scheduler.next_batch(0.0)
    assert first is not None
    assert pairs_of(first)[0][1].startswith("soon")


@given(st.lists(st.lists(st.integers(0, 3000), min_size=1, max_size=12), min_size=1, max_size=12), st.integers(0, 2))
def test_every_pair_is_scored_once_and_lands_in_its_place(requests: list[list[int]], repeats: int) -> None:
    scheduler = make()
    jobs = []
    for number, lengths in enumerate(requests, 1):
        documents = tuple(f"{number if not repeats else ''}.{size}".ljust(size, ".") for size in lengths)
        groups, order = longest_first([Group("q", documents)])
        job = Job(number, groups, 1e9, priority=number % 2, order=order)
        jobs.append((job, documents))
        scheduler.add(job)
    finished = run_dry(scheduler, most=sum(map(len, requests)) + 1)
    assert {job.number for job in finished} == {job.number for job, _ in jobs}
    assert (scheduler.waiting_pairs, scheduler.waiting_bytes, scheduler.waiting_jobs) == (0, 0, 0)
    for job, documents in jobs:
        check_scores(job)
        by_document = dict(zip(job.groups[0][1], job.logits, strict=True))
        assert job.in_input_order(job.logits) == [by_document[document] for document in documents]


@given(st.lists(st.integers(1, 60), min_size=2, max_size=12))
def test_no_job_waits_longer_for_its_first_pair_than_there_are_jobs_before_it(counts: list[int]) -> None:
    scheduler = make()
    for number, count in enumerate(counts, 1):
        scheduler.add(make_job(number, *texts(f"{number}.", count, 40 + 150 * (number % 7))))
    seen: set[str] = set()
    for place in range(1, len(counts) + 1):
        batch = scheduler.next_batch(0.0)
        if batch is None:
            break
        seen |= {pair[1].split(".")[0] for pair in pairs_of(batch)}
        assert {str(number) for number in range(1, place + 1)} <= seen
