"""Engines that die, hang, talk nonsense or never start: what a host sees of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hall import Hall, expected, scored


def codes(lines: list[dict[str, Any]]) -> list[Any]:
    return [line.get("code", line.get("type", "scored")) for line in lines]


def test_an_engine_gets_two_batches_and_the_next_when_it_has_answered_one() -> None:
    hall = Hall(max_batch_pairs=1)
    hall.rerank("a", "b", "c")
    assert hall.in_flight() == ["a", "b"]
    hall.score()
    assert hall.in_flight() == ["b", "c"]


def test_a_small_request_is_sent_at_once_though_parts_of_a_long_one_wait_in_the_engine() -> None:
    hall = Hall(start=False, max_documents=5000)
    hall.ready(packed=True)
    hall.lines()
    hall.rerank(*(f"{number}".ljust(400, ".") for number in range(2000)), id="long")
    assert len(hall.links[0].frames) == 3
    hall.rerank("small", id="small")
    *parts, small = hall.links[0].frames
    assert hall.in_flight()[-1] == "small"
    assert small["order"] < min(part["order"] for part in parts)
    hall.links[0].frames = [small, *parts]
    hall.score()
    assert hall.line()["id"] == "small"
    hall.score_all()
    assert len(hall.line()["scores"]) == 2000


def test_a_request_of_three_batches_is_sent_whole_to_an_engine_of_several_threads_alone() -> None:
    for parallel, whole in ((1, False), (2, True)):
        hall = Hall(start=False)
        hall.ready(packed=True, parallel_passes=parallel)
        hall.rerank(*(f"{number}".ljust(300, ".") for number in range(20)))
        assert (len(hall.links[0].frames) == 1) == whole


def test_a_long_request_of_a_better_priority_is_sent_beside_parts_of_a_longer_one() -> None:
    hall = Hall(start=False, max_documents=5000)
    hall.ready(packed=True, parallel_passes=2)
    hall.rerank(*(f"{number}".ljust(400, ".") for number in range(2000)), id="longer", priority=5)
    assert len(hall.links[0].frames) == 3
    for number in range(2):
        hall.rerank(*(f"{number}.{document}".ljust(300, ".") for document in range(20)), id=number)
    *parts, first, second = hall.links[0].frames
    assert len(parts) == 3
    assert first["order"] < second["order"]
    assert first["order"] < max(part["order"] for part in parts)


def test_an_engine_gets_no_more_than_three_batches_of_a_long_request_however_small_they_are() -> None:
    for documents in (24, 2000):  # whole and in parts, if a batch might hold more
        hall = Hall(start=False, max_batch_pairs=1, max_documents=5000)
        hall.ready(packed=True, parallel_passes=2)
        hall.rerank(*(f"{number}".ljust(300, ".") for number in range(documents)))
        assert len(hall.links[0].frames) == 3


def test_every_engine_gets_its_first_batch_before_any_gets_its_second() -> None:
    hall = Hall(engines=3)
    hall.rerank(*(f"{number}" for number in range(96)))
    assert [len(hall.in_flight(number)) for number in range(3)] == [32, 32, 32]


def test_what_a_dead_engine_owed_is_scored_after_its_restart() -> None:
    hall = Hall(max_batch_pairs=2)
    hall.rerank("a", "b", "c", "d", id=1)
    hall.rerank("e", id=2)
    hall.die()
    assert hall.lines() == []
    hall.revive()
    hall.score_all()
    lines = {line["id"]: line["scores"] for line in hall.lines()}
    assert lines == {1: expected("a", "b", "c", "d"), 2: expected("e")}


def test_another_engine_takes_over_at_once() -> None:
    hall = Hall(engines=2)
    hall.rerank("a", id=1)
    hall.die(number=0)
    assert hall.in_flight(1) == ["a"]
    hall.score(1)
    assert hall.line()["scores"] == expected("a")


def test_a_request_that_kills_twice_is_poisoned_and_its_mates_are_scored() -> None:
    hall = Hall()
    hall.rerank("first", id=0)  # keeps the others together in the queue
    hall.rerank("busy", id=9)
    hall.rerank("good", id=1)
    hall.rerank("kill", id=2)
    hall.rerank("fine", id=3)
    deaths = 0
    for _ in range(20):
        if not hall.links[0].frames:
            break
        if any("kill" in group[4] for group in hall.links[0].frames[0]["groups"]):
            deaths += 1
            hall.die()
            hall.revive()
        else:
            hall.score()
    lines = {line["id"]: line for line in hall.lines()}
    assert deaths == 2
    assert lines[2]["code"] == "POISONED"
    assert not lines[2]["retryable"]
    assert all("scores" in lines[number] for number in (0, 9, 1, 3))


def poisoned(hall: Hall) -> None:
    """Let the request ["kill"] die twice."""
    hall.rerank("kill", id="p")
    for _ in range(2):
        hall.die()
        hall.revive()
    assert codes(hall.lines()) == ["POISONED"]


def test_a_poisoned_request_is_refused_for_ten_minutes_and_others_are_not() -> None:
    hall = Hall()
    poisoned(hall)
    hall.rerank("kill", id=1)
    assert codes(hall.lines()) == ["POISONED"]
    hall.rerank("kill", "other", id=2)
    assert sorted(hall.in_flight()) == ["kill", "other"]
    hall.score()
    hall.later(601)
    hall.rerank("kill", id=3)
    hall.score()
    assert codes(hall.lines()) == ["scored", "scored"]


def test_waiting_copies_of_a_poisoned_request_cost_no_further_engine() -> None:
    hall = Hall()
    for number in range(5):
        hall.rerank("kill", id=number)
    hall.rerank("fine", id=9)
    for _ in range(2):
        hall.die()
        hall.revive()
    hall.score_all()
    assert {line["id"]: line.get("code", "scored") for line in hall.lines()} == {**dict.fromkeys(range(5), "POISONED"), 9: "scored"}
    assert hall.worker.counters.engine_deaths == 2


def test_one_death_with_two_batches_of_a_request_in_flight_does_not_poison_it() -> None:
    hall = Hall(max_batch_pairs=1)
    hall.rerank("a", "b", "c", id=1)
    assert hall.in_flight() == ["a", "b"]
    hall.die()
    hall.revive()
    hall.score_all()
    assert hall.line()["scores"] == expected("a", "b", "c")


def test_a_dead_engine_starts_again_later_and_later() -> None:
    hall = Hall()
    waits = []
    for _ in range(7):
        hall.die()
        before = hall.now
        hall.revive()
        waits.append(round(hall.now - before, 3))
    assert waits == [0.0, 0.1, 0.5, 2.0, 5.0, 30.0, 30.0]


def test_a_storm_refuses_what_waits_and_what_comes_and_says_when_to_try_again() -> None:
    hall = Hall()
    for _ in range(4):
        hall.die()
        hall.revive()
    hall.rerank("a", id=1)
    hall.die()
    assert codes(hall.lines()) == ["ENGINE_UNAVAILABLE"]
    hall.rerank("b", id=2)
    answer = hall.line()
    assert (answer["code"], answer["retryable"], answer["retry_after_ms"]) == ("ENGINE_UNAVAILABLE", True, 5000)
    assert hall.worker.exit_code is None
    hall.later(5)  # it is loading now
    hall.rerank("c", id=3)
    assert hall.line()["retry_after_ms"] >= 1000
    hall.ready()
    hall.rerank("d", id=4)
    hall.score()
    assert hall.line()["scores"] == expected("d")


def test_with_one_good_engine_a_storm_of_another_refuses_nothing() -> None:
    hall = Hall(engines=2)
    for _ in range(6):
        hall.die(number=1)
        hall.revive(1)
    hall.die(number=1)
    hall.rerank("a")
    hall.score(0)
    assert hall.line()["scores"] == expected("a")


def test_an_engine_that_hangs_is_killed_a_second_after_the_deadline() -> None:
    hall = Hall()
    hall.rerank("hang", id=1, timeout_ms=500)
    hall.rerank("next", id=2)
    hall.wait(0.6)
    assert codes(hall.lines()) == ["DEADLINE_EXCEEDED"]
    assert hall.links[0].alive
    hall.wait(1.0)
    assert not hall.links[0].alive
    hall.die(-9)
    hall.revive()
    hall.score_all()
    assert hall.line()["scores"] == expected("next")


def test_an_engine_that_works_on_is_not_killed() -> None:
    hall = Hall(request_timeout_ms=100_000)
    hall.rerank("slow")
    batch = hall.links[0].frames[0]["batch"]
    for _ in range(90):
        hall.wait(1.0)
        hall.frame(event="progress", batch=batch)
    assert hall.links[0].alive
    hall.score()
    assert hall.line()["scores"] == expected("slow")


def test_an_engine_without_progress_is_killed_after_the_stall_limit() -> None:
    hall = Hall(request_timeout_ms=100_000, engine_stall_ms=5000)
    hall.rerank("hang")
    hall.wait(4.9)
    assert hall.links[0].alive
    hall.wait(0.2)
    assert not hall.links[0].alive


def test_an_idle_engine_is_never_taken_for_hung() -> None:
    hall = Hall()
    hall.wait(100_000)
    assert hall.links[0].alive
    assert hall.worker.next_wakeup() == math.inf


GOOD = scored({"batch": 1, "groups": [["q", 0, 0, "", ["a"]]]})
NONSENSE: dict[str, dict[str, Any]] = {
    "no event": {},
    "unknown event": {"event": "hello"},
    "scored without a batch": {"event": "scored"},
    "another batch": GOOD | {"batch": 77},
    "batch of another kind": GOOD | {"batch": [1]},
    "too few scores": GOOD | {"logits": []},
    "too many scores": GOOD | {"probabilities": [0.1, 0.2]},
    "scores that are no list": GOOD | {"logits": None},
    "a null for a score": GOOD | {"logits": [None]},
    "no times": {name: value for name, value in GOOD.items() if name != "tokenize_ms"},
    "no failures": {name: value for name, value in GOOD.items() if name != "failures"},
    "failures of another shape": GOOD | {"failures": [1]},
    "ready without info": {"event": "ready"},
    "load_failed without a code": {"event": "load_failed", "error": "x"},
    "loading without a stage": {"event": "loading"},
}


@pytest.mark.parametrize("name", NONSENSE)
def test_an_engine_that_talks_nonsense_is_killed_and_its_work_is_done_by_the_next(name: str) -> None:
    hall = Hall()
    hall.rerank("a")
    hall.frame(**NONSENSE[name])
    assert not hall.links[0].alive, name
    hall.die(-9)
    hall.revive()
    hall.score_all()
    assert hall.line()["scores"] == expected("a")


@pytest.mark.parametrize("code", [65, 66, 69, 71, 78])
def test_a_model_that_cannot_be_loaded_is_told_first_and_ends_the_worker_with_its_code(code: int) -> None:
    hall = Hall(start=False)
    hall.rerank("a", id=1)
    hall.frame(event="load_failed", error="There is no model.", exit_code=code)
    hall.die(code)
    first, second = hall.lines()
    assert (first["error"], first["code"], "id" in first) == ("There is no model.", "MODEL_LOAD_ERROR", False)
    assert (second["id"], second["code"]) == (1, "NOT_READY")
    assert hall.worker.exit_code == code


def test_the_first_start_is_tried_five_times_before_it_is_given_up() -> None:
    hall = Hall(start=False)
    hall.rerank("a", id=1)
    for attempt in range(4):
        hall.die()
        hall.wait(6)
        assert hall.links[0].starts == attempt + 2
        assert hall.lines() == []
    hall.die()
    assert codes(hall.lines()) == ["MODEL_LOAD_ERROR", "NOT_READY"]
    assert hall.worker.exit_code == 70


def test_a_start_without_progress_is_given_up_and_one_with_progress_is_not() -> None:
    hall = Hall(start=False, start_timeout_ms=10_000)
    for done in range(5):
        hall.wait(9)
        hall.frame(event="loading", stage="download", done=done, total=9)
    assert hall.links[0].alive
    hall.wait(10.1)
    assert not hall.links[0].alive
    hall.die(-9)
    assert codes(hall.lines()) == ["MODEL_LOAD_ERROR"]
    assert hall.worker.exit_code == 70


def test_an_illegal_instruction_at_the_first_start_means_an_unfit_machine() -> None:
    hall = Hall(start=False)
    hall.die(-4)
    assert codes(hall.lines()) == ["MODEL_LOAD_ERROR"]
    assert hall.worker.exit_code == 71


def test_a_machine_that_cannot_start_a_process_is_a_load_error() -> None:
    from reranker_worker.config import Config
    from reranker_worker.worker import Worker

    hall = Hall(start=False)
    hall.links[0].cannot_start = OSError(12, "Cannot allocate memory")
    hall.worker = Worker(Config(backend="fake"), hall.links, now=hall.now, wall_clock=lambda: 0.0, pid=1)
    hall.later(0)
    assert hall.line()["error"] == "The engine process cannot be started: Cannot allocate memory."
    assert hall.worker.exit_code == 71


def test_a_permanent_failure_after_ready_keeps_the_worker_up() -> None:
    hall = Hall()
    hall.die()
    hall.later(0)
    hall.frame(event="load_failed", error="The file is gone.", exit_code=66)
    hall.die(66)
    hall.wait(1000)
    assert hall.links[0].starts == 2
    hall.rerank("a")
    answer = hall.line()
    assert (answer["code"], "retry_after_ms" in answer) == ("ENGINE_UNAVAILABLE", False)
    assert hall.worker.exit_code is None


def test_readiness_follows_the_engine() -> None:
    hall = Hall()

    def reason() -> str | None:
        hall.ask(type="ready")
        told: str | None = hall.line().get("reason")
        return told

    assert reason() is None
    hall.die()
    assert reason() == "restarting the engine"
    hall.revive()
    assert reason() is None
    hall.rerank("a")
    hall.score(logits=[None], probabilities=[None], failures=[[0, "INFERENCE_ERROR", "No."]])
    hall.lines()
    assert reason() == "the last batch failed"
    hall.rerank("a")
    hall.score()
    hall.lines()
    assert reason() is None


def test_what_comes_after_the_load_was_given_up_is_refused_too() -> None:
    hall = Hall(start=False, start_timeout_ms=1000)
    hall.later(2)
    hall.die(-9)
    hall.rerank("a", id=1)
    assert codes(hall.lines()) == ["MODEL_LOAD_ERROR", "SHUTTING_DOWN"]
