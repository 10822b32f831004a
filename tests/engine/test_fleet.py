"""The engines' book-keeping, without a worker: who is ready, what each owes, when each is woken. (What a host sees: test_worker_engines.)"""

from __future__ import annotations

import math

import pytest
from hall import MemoryLink, scored
from scheduling import make_job

from reranker_worker.config import Config
from reranker_worker.engine.fleet import Fleet, LoadFailed, Loading, Lost, Ready, Scored
from reranker_worker.scheduler import Batch, Room, Scheduler

INFO = {"max_length": 512}


def make(engines: int = 1, *, ready: bool = True, **settings: int) -> tuple[Fleet, list[MemoryLink]]:
    links = [MemoryLink() for _ in range(engines)]
    fleet = Fleet(Config(**settings), links)
    fleet.tick(0.0)
    if ready:
        for engine in fleet.engines:
            assert fleet.on_frame(engine, {"event": "ready", "info": INFO}, 0.0) == Ready(INFO)
    return fleet, links


def batches(*documents: str, deadline: float = 10.0) -> list[Batch]:
    """One batch for each document."""
    scheduler = Scheduler(max_batch_pairs=1, batch_target_ms=1e9)
    scheduler.add(make_job(1, *documents, deadline=deadline))
    made = []
    while batch := scheduler.next_batch(0.0):
        made.append(batch)
    return made


def test_an_engine_starts_at_the_first_tick_and_is_ready_when_it_says_so() -> None:
    fleet, links = make(2, ready=False)
    assert [link.starts for link in links] == [1, 1]
    assert fleet.ready == []
    assert not fleet.ever_ready
    assert fleet.unavailable(0.0) is None
    fleet.on_frame(fleet.engines[1], {"event": "ready", "info": INFO}, 1.0)
    assert fleet.ready == [fleet.engines[1]]
    assert fleet.ever_ready


def test_loading_is_told_and_counts_as_progress() -> None:
    fleet, _ = make(ready=False, start_timeout_ms=1000)
    assert fleet.on_frame(fleet.engines[0], {"event": "loading", "stage": "download", "done": 1, "total": 2}, 0.9) == Loading("download", 1, 2)
    assert fleet.next_wakeup() == pytest.approx(1.9)
    status = fleet.engines[0].status(1.4)
    assert (status.state, status.stage, status.progress_ms, status.starts) == ("loading", "download", 500.0, 1)


def test_the_least_busy_engine_comes_first_and_two_batches_fill_one() -> None:
    fleet, links = make(2)
    first, second, third = batches("a", "b", "c")
    fleet.send(fleet.engines[0], first, 0.0)
    assert fleet.ready == [fleet.engines[1], fleet.engines[0]]
    fleet.send(fleet.engines[0], second, 0.0)
    assert [engine.room for engine in fleet.engines] == [Room.NONE, Room.PART]
    fleet.send(fleet.engines[1], third, 0.0)
    assert [[frame["batch"] for frame in link.frames] for link in links] == [[first.number, second.number], [third.number]]


def test_parts_of_a_long_request_leave_room_for_a_whole_one_that_overtakes_them() -> None:
    fleet, links = make()
    (engine,) = fleet.engines
    *parts, whole, second = batches("a", "b", "c", "d", "e")
    for part in parts:
        assert engine.room == Room.PART
        part.long, part.part, part.overtaken = True, True, 4
        fleet.send(engine, part, 0.0)
    assert engine.room == Room.LONG
    fleet.send(engine, whole, 0.0)
    assert engine.room == Room.LONG
    fleet.send(engine, second, 0.0)
    assert engine.room == Room.NONE
    orders = [frame["order"] for frame in links[0].frames]
    assert max(orders[3:]) < min(orders[:3])


def test_long_requests_leave_room_for_short_ones() -> None:
    fleet, _ = make()
    (engine,) = fleet.engines
    for request in batches("a", "b", "c"):
        assert engine.room == Room.PART
        request.long = True
        fleet.send(engine, request, 0.0)
    assert engine.room == Room.SHORT


def test_no_more_than_four_later_batches_overtake_a_part_of_a_long_request() -> None:
    fleet, links = make()
    (part, *others) = batches(*"abcdefg")
    part.long, part.overtaken = True, 4
    for batch in (part, *others):
        fleet.send(fleet.engines[0], batch, 0.0)
    first, *rest = (frame["order"] for frame in links[0].frames)
    assert sum(order < first for order in rest) <= 4
    assert rest == sorted(rest)


def test_a_batch_that_hangs_is_noticed_by_its_own_deadline_though_others_were_sent_before() -> None:
    fleet, _ = make()
    fleet.engines[0].info = INFO | {"parallel_passes": 2}
    (patient,), (urgent,) = batches("a", deadline=1000.0), batches("b", deadline=10.0)
    urgent.number += 1
    fleet.send(fleet.engines[0], patient, 5.0)
    fleet.send(fleet.engines[0], urgent, 5.0)
    assert fleet.next_wakeup() == pytest.approx(11.0, abs=0.5)


def test_nothing_is_sent_beside_a_batch_that_is_tried_alone() -> None:
    fleet, _ = make()
    (batch,) = batches("a")
    batch.alone = True
    fleet.send(fleet.engines[0], batch, 0.0)
    assert fleet.engines[0].room == Room.NONE


def test_a_scored_batch_is_handed_back_once_with_its_result() -> None:
    fleet, links = make()
    (batch,) = batches("a")
    fleet.send(fleet.engines[0], batch, 0.0)
    frame = scored(links[0].frames[0], truncated=[0])
    event = fleet.on_frame(fleet.engines[0], frame, 1.0)
    assert isinstance(event, Scored)
    assert event.batch is batch
    assert (event.result.logits, event.result.truncated, event.result.tokens) == (frame["logits"], [0], [10])
    assert fleet.engines[0].status(1.0).in_flight_batches == 0
    assert fleet.on_frame(fleet.engines[0], frame, 1.0) is None
    assert not links[0].alive


def test_a_death_hands_back_everything_that_was_in_flight() -> None:
    fleet, _ = make()
    owed = batches("a", "b")
    for batch in owed:
        fleet.send(fleet.engines[0], batch, 0.0)
    assert fleet.on_death(fleet.engines[0], -9, 1.0) == [Lost(owed, "it was killed by SIGKILL")]
    assert fleet.engines[0].in_flight == {}
    assert fleet.ready == []


@pytest.mark.parametrize(("code", "words"), [(-11, "killed by SIGSEGV"), (-99, "killed by signal 99"), (0, "with code 0"), (70, "with code 70")])
def test_the_reason_of_a_death_is_named(code: int, words: str) -> None:
    fleet, _ = make()
    (lost,) = fleet.on_death(fleet.engines[0], code, 1.0)
    assert isinstance(lost, Lost)
    assert words in lost.reason


def test_a_hang_is_seen_at_the_deadline_plus_grace_and_the_kill_is_asked_for_once() -> None:
    fleet, links = make()
    (batch,) = batches("a", deadline=10.0)
    fleet.send(fleet.engines[0], batch, 5.0)
    wakeup = fleet.next_wakeup()
    assert wakeup == pytest.approx(11.0, abs=0.5)
    fleet.tick(wakeup - 0.01)
    assert links[0].alive
    fleet.tick(wakeup)
    assert not links[0].alive
    assert fleet.next_wakeup() == math.inf
    (lost,) = fleet.on_death(fleet.engines[0], -9, wakeup)
    assert isinstance(lost, Lost)
    assert "hung" in lost.reason


def test_a_deadline_of_a_batch_that_cannot_be_under_way_says_nothing_of_a_hang() -> None:
    fleet, _ = make()  # one pass at a time
    (patient,), (waiting,) = batches("a", deadline=1000.0), batches("b", deadline=6.0)
    waiting.number += 1
    fleet.send(fleet.engines[0], patient, 5.0)
    fleet.send(fleet.engines[0], waiting, 5.0)
    assert fleet.next_wakeup() > 20


def test_a_batch_that_hangs_is_noticed_while_others_are_scored_beside_it() -> None:
    fleet, links = make()
    (engine,) = fleet.engines
    engine.info = INFO | {"parallel_passes": 2}
    hung, *others = batches(*"abcdefghijklmnopqrst", deadline=2.0)
    fleet.send(engine, hung, 0.0)
    for number, batch in enumerate(others):
        now = 0.5 * number
        fleet.send(engine, batch, now)
        fleet.on_frame(engine, scored(links[0].frames.pop()), now)
        fleet.tick(now)
        if not links[0].alive:
            break
    assert not links[0].alive
    assert now == pytest.approx(3.0, abs=0.6)  # a second after its deadline


def test_a_part_that_is_overtaken_does_not_look_hung() -> None:
    fleet, links = make(engine_stall_ms=1000)
    (engine,) = fleet.engines
    part, *others = batches(*"abcde", deadline=1000.0)
    part.long, part.overtaken = True, 4
    fleet.send(engine, part, 0.0)
    for number, batch in enumerate(others):
        now = 0.9 * (number + 1)
        fleet.send(engine, batch, now)
        fleet.on_frame(engine, scored(links[0].frames.pop()), now)
        fleet.tick(now)
        assert links[0].alive


def test_an_engine_known_to_be_slow_is_given_longer() -> None:
    fleet, links = make()
    first, second = batches("a", "b", deadline=1.0)
    fleet.send(fleet.engines[0], first, 0.0)
    fleet.on_frame(fleet.engines[0], scored(links[0].frames.pop()), 3.0)
    fleet.send(fleet.engines[0], second, 3.0)
    assert fleet.next_wakeup() == pytest.approx(3.0 + 4 * 3.0)


def test_garbage_kills_the_engine() -> None:
    fleet, links = make()
    fleet.on_garbage(fleet.engines[0])
    assert not links[0].alive


def test_a_failed_load_is_told_before_its_consequences() -> None:
    fleet, _ = make(ready=False)
    fleet.on_frame(fleet.engines[0], {"event": "load_failed", "error": "No model.", "exit_code": 66}, 1.0)
    events = fleet.on_death(fleet.engines[0], 66, 1.0)
    assert events[0] == LoadFailed("No model.", 66)
    assert fleet.unavailable(1.0) == math.inf
    assert fleet.next_wakeup() == math.inf


def test_at_exit_every_running_engine_is_killed() -> None:
    fleet, links = make(2)
    fleet.on_death(fleet.engines[0], -9, 0.0)
    fleet.kill_all()
    assert [link.alive for link in links] == [True, False]  # the first is dead already, and its link is not touched


def test_an_engine_is_not_taken_for_hung_after_the_whole_machine_stood_still() -> None:
    fleet, links = make(engine_stall_ms=1000)
    (batch,) = batches("a", deadline=1e9)
    fleet.send(fleet.engines[0], batch, 0.0)
    fleet.forgive(60.0)
    fleet.tick(60.5)
    assert links[0].alive
    fleet.tick(61.1)
    assert not links[0].alive
