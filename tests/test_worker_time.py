"""Time as the worker sees it: deadlines at every place, partial answers, the silence around `ready`, loading, draining, leaving."""

from __future__ import annotations

import json

import pytest
from hall import Hall, expected

READY_SILENCE_SECONDS = 0.02


def test_a_request_is_refused_at_its_deadline_and_never_scored_after_it() -> None:
    hall = Hall()
    hall.rerank("a", id=1, timeout_ms=100)
    assert hall.worker.next_wakeup() == pytest.approx(hall.now + 0.1)
    hall.later(0.0999)
    assert hall.lines() == []
    hall.later(0.0002)
    answer = hall.line()
    assert (answer["id"], answer["code"], answer["retryable"]) == (1, "DEADLINE_EXCEEDED", True)
    hall.score()
    hall.wait(5)
    assert hall.lines() == []
    assert hall.worker.scheduler.waiting_jobs == 0


def test_a_score_that_comes_after_the_deadline_is_not_sent() -> None:
    hall = Hall()
    hall.rerank("a", timeout_ms=100)
    hall.now += 0.2  # nobody called tick in time
    hall.score()
    assert hall.line()["code"] == "DEADLINE_EXCEEDED"


def test_an_expired_request_is_not_sent_to_an_engine() -> None:
    hall = Hall(start=False)
    hall.rerank("a", timeout_ms=100)
    hall.now += 0.2
    hall.ready()
    assert hall.in_flight() == []
    hall.rerank("b", timeout_ms=100)
    hall.score_all()
    assert [line.get("code", line.get("type", "scored")) for line in hall.lines()] == ["ready", "DEADLINE_EXCEEDED", "scored"]


def test_an_expired_request_is_not_sent_again_when_its_engine_dies() -> None:
    hall = Hall(engines=2)
    hall.rerank("a", timeout_ms=100)
    hall.now += 0.2
    hall.die(number=0)
    assert hall.in_flight(1) == []
    assert hall.line()["code"] == "DEADLINE_EXCEEDED"


def test_what_is_left_of_an_expired_request_is_not_sent_after_its_first_batch() -> None:
    hall = Hall(max_batch_pairs=1)
    hall.rerank("a", "b", "c", timeout_ms=100)
    assert hall.in_flight() == ["a", "b"]
    hall.now += 0.2
    hall.rerank("d", id=1)
    hall.score_all()
    assert [line.get("code", "scored") for line in hall.lines()] == ["DEADLINE_EXCEEDED", "scored"]
    assert "c" not in hall.in_flight()


def test_the_deadline_counts_from_the_moment_the_line_was_read() -> None:
    hall = Hall(start=False, request_timeout_ms=1000)
    hall.rerank("a")
    hall.later(0.6)
    hall.ready()
    hall.later(0.41)
    assert [line.get("code", line.get("type")) for line in hall.lines()] == ["ready", "DEADLINE_EXCEEDED"]


def test_the_setting_is_the_default_and_the_request_wins() -> None:
    hall = Hall(request_timeout_ms=200)
    hall.rerank("a", id=1)
    hall.rerank("b", id=2, timeout_ms=400)
    hall.rerank("c", id=3, timeout_ms=100)
    found = []
    for _ in range(5):
        hall.later(0.1)
        found += [(line["id"], round(hall.now - 100, 1)) for line in hall.lines()]
    assert [number for number, _ in found] == [3, 1, 2]


def test_a_partial_answer_holds_what_was_scored_in_time() -> None:
    hall = Hall(max_batch_pairs=2)
    hall.rerank("a", "b", "c", partial=True, timeout_ms=100, top_k=9)
    hall.score()
    hall.later(0.2)
    answer = hall.line()
    assert answer["scores"] == [*expected("a", "b"), None]
    assert (answer["complete"], answer["unscored"], len(answer["results"])) == (False, [2], 2)
    hall.score_all()
    assert hall.lines() == []


def test_a_whole_answer_says_nothing_of_being_partial() -> None:
    hall = Hall()
    hall.rerank("a", partial=True)
    hall.score()
    assert "complete" not in hall.line()


def test_parts_of_a_batch_expire_on_their_own() -> None:
    hall = Hall(max_batch_pairs=1)
    hall.ask(type="batch", timeout_ms=300, requests=[{"query": "q", "documents": ["a"], "timeout_ms": 100}, {"query": "q", "documents": ["b"]}])
    hall.later(0.2)
    assert hall.lines() == []
    hall.score_all()
    assert [part.get("code", "scored") for part in hall.line()["responses"]] == ["DEADLINE_EXCEEDED", "scored"]


def test_before_ready_control_requests_are_answered_and_requests_wait() -> None:
    hall = Hall(start=False)
    hall.rerank("a", id=1)
    hall.frame(event="loading", stage="download", done=5, total=10)
    for kind in ("heartbeat", "live", "health", "info", "stats", "metrics", "ready"):
        hall.ask(type=kind, id=kind)
    lines = {line["id"]: line for line in hall.lines()}
    assert lines["heartbeat"]["status"] == "alive"
    assert lines["live"]["live"] is True
    assert (lines["health"]["ready"], lines["health"]["status"]) == (False, "loading")
    assert lines["health"]["engines"][0] == {"state": "loading", "stage": "download", "in_flight_batches": 0, "progress_ms": 0.0, "starts": 1}
    assert (lines["ready"]["type"], lines["ready"]["ready"], lines["ready"]["reason"]) == ("readiness", False, "loading")
    assert lines["info"]["protocol"] == 1
    assert lines["stats"]["waiting_requests"] == 1
    assert "reranking_ready 0.0" in lines["metrics"]["body"]
    hall.later(0.1)
    hall.ready()
    hall.score()
    assert [line.get("type", "scored") for line in hall.lines()] == ["ready", "scored"]


def test_ready_goes_out_alone_with_silence_before_and_after() -> None:
    hall = Hall(start=False)
    hall.rerank("a")
    hall.ask(type="heartbeat")
    assert len(hall.take()) == 1
    hall.now += 0.001
    hall.ready()
    hall.score()
    hall.ask(type="heartbeat")
    assert hall.take() == []
    assert hall.worker.next_wakeup() <= hall.now + READY_SILENCE_SECONDS
    hall.now += READY_SILENCE_SECONDS
    assert [line["type"] for line in hall.take()] == ["ready"]
    hall.now += READY_SILENCE_SECONDS * 0.9
    assert hall.take() == []
    hall.now += READY_SILENCE_SECONDS * 0.2
    assert len(hall.take()) == 2
    assert not hall.worker.has_lines


def test_ready_is_said_once_and_after_it_nothing_that_was_not_asked() -> None:
    hall = Hall()
    hall.die()
    hall.revive()
    hall.wait(1000)
    assert hall.lines() == []


def test_ready_tells_the_model_the_limits_and_the_capabilities() -> None:
    hall = Hall(start=False)
    hall.later(1.5)
    hall.ready()
    hello = hall.line()
    assert (hello["type"], hello["protocol"], hello["model"], hello["device"], hello["load_time_ms"], hello["pid"]) == (
        "ready", 1, "tiny", "cpu", 1500, 42,
    )  # fmt: skip
    assert hello["score_kind"] == "probability"
    assert hello["limits"]["max_documents"] == 1000
    assert {"rerank", "score", "batch", "v1/rerank", "cancel"} <= set(hello["capabilities"])


def drained(hall: Hall) -> int | None:
    hall.later(0)
    return hall.worker.exit_code


@pytest.mark.parametrize("how", ["end of input", "shutdown", "signal"])
def test_an_idle_worker_leaves_at_once_with_code_zero(how: str) -> None:
    hall = Hall()
    if how == "end of input":
        hall.worker.end_of_input(hall.now)
    elif how == "shutdown":
        hall.ask(type="shutdown", id=1)
        assert hall.line() == {"type": "shutdown", "id": 1, "status": "acknowledged"}
    else:
        hall.worker.drain(hall.now)
    assert drained(hall) == 0
    assert hall.lines() == []


def test_draining_finishes_what_was_accepted_and_refuses_the_rest() -> None:
    hall = Hall()
    hall.rerank("a", id=1)
    hall.ask(type="shutdown")
    hall.rerank("b", id=2)
    assert [line.get("code", line.get("type")) for line in hall.lines()] == ["shutdown", "SHUTTING_DOWN"]
    hall.ask(type="ready")
    assert hall.line()["reason"] == "draining"
    assert drained(hall) is None
    hall.score()
    assert hall.line()["id"] == 1
    assert drained(hall) == 0


def test_what_the_drain_time_does_not_suffice_for_is_refused_and_the_code_is_75() -> None:
    hall = Hall(drain_timeout_ms=400)
    hall.rerank("a", id=1)
    hall.ask(type="batch", id=2, requests=[{"query": "q", "documents": ["b"]}])
    hall.worker.end_of_input(hall.now)
    assert hall.worker.next_wakeup() == pytest.approx(hall.now + 0.4)
    hall.later(0.39)
    assert hall.lines() == []
    assert drained(hall) is None
    hall.later(0.02)
    first, second = hall.lines()
    assert (first["id"], first["code"]) == (1, "SHUTTING_DOWN")
    assert second["responses"][0]["code"] == "SHUTTING_DOWN"
    assert hall.worker.exit_code == 75


def test_a_second_order_to_stop_does_not_prolong_the_drain() -> None:
    hall = Hall(drain_timeout_ms=1000)
    hall.rerank("a")
    hall.worker.drain(hall.now)
    hall.later(0.9)
    hall.worker.drain(hall.now)
    hall.later(0.2)
    assert hall.worker.exit_code == 75


def test_input_that_ends_before_ready_is_served_and_the_drain_time_counts_from_ready() -> None:
    hall = Hall(start=False, drain_timeout_ms=1000)
    hall.rerank("a")
    hall.worker.end_of_input(hall.now)
    hall.later(20)
    assert hall.worker.exit_code is None
    hall.ready()
    hall.later(0.9)
    hall.score()
    assert [line.get("type", "scored") for line in hall.lines()] == ["ready", "scored"]
    assert drained(hall) == 0


def test_input_that_ends_before_ready_is_refused_when_the_drain_time_after_ready_is_over() -> None:
    hall = Hall(start=False, drain_timeout_ms=1000)
    hall.rerank("a")
    hall.worker.end_of_input(hall.now)
    hall.later(20)
    hall.ready()
    hall.later(1.1)
    assert hall.worker.exit_code == 75


@pytest.mark.parametrize("whole", [True, False])
def test_a_last_line_without_its_newline_gets_its_one_answer(whole: bool) -> None:
    hall = Hall()
    data = json.dumps({"query": "q", "documents": ["a"]}).encode()
    hall.send(data if whole else data[:-1])
    hall.worker.end_of_input(hall.now)
    if whole:
        hall.later(0)
        hall.score()
    assert hall.line().get("code", "scored") == ("scored" if whole else "INVALID_JSON")
    assert drained(hall) == 0
