"""The worker as a host sees it: scores, order, ids, admission, batches, cancelling, control requests."""

from __future__ import annotations

import pytest
from hall import WALL_CLOCK, Hall, expected
from scheduling import score_of

from reranker_worker.protocol import Code


def codes(lines: list[dict[str, object]]) -> list[object]:
    return [line.get("code", "scored") for line in lines]


def test_a_request_is_scored_and_answered_once() -> None:
    hall = Hall()
    hall.rerank("a", "b", id="x")
    assert hall.lines() == []
    hall.later(0.25)
    hall.score()
    assert hall.line() == {"id": "x", "scores": expected("a", "b"), "latency_ms": 250.0, "num_documents": 2}
    hall.wait(120)
    assert hall.lines() == []


def test_no_documents_are_answered_at_once_without_an_engine() -> None:
    hall = Hall(start=False)
    hall.rerank()
    assert hall.line()["scores"] == []


@pytest.mark.parametrize(
    ("setting", "option", "shift"),
    [("probability", {}, 0), ("logit", {}, 1), ("model", {}, 2), ("probability", {"raw_scores": True}, 1), ("logit", {"normalize": True}, 0)],
)
def test_the_scale_is_the_settings_unless_the_request_says_so(setting: str, option: dict[str, bool], shift: int) -> None:
    hall = Hall(scores=setting)
    hall.rerank("a", "b", **option)
    hall.score(model_scores=[value + 2 for value in expected("a", "b")])
    assert hall.line()["scores"] == [value + shift for value in expected("a", "b")]


def test_answers_without_ids_keep_the_order_of_their_requests_errors_too() -> None:
    hall = Hall(max_batch_pairs=1, max_documents=2)
    hall.rerank("a")
    hall.send(b"nonsense\n")
    hall.rerank("b", timeout_ms=50)
    hall.rerank("c", "d", "e")
    hall.rerank("f", priority=0)
    hall.ask(type="unknown")
    assert hall.lines() == []
    hall.later(0.1)
    assert hall.lines() == []
    hall.score_all()
    assert codes(hall.lines()) == ["scored", "INVALID_JSON", "DEADLINE_EXCEEDED", "REQUEST_TOO_LARGE", "scored", "INVALID_REQUEST"]


def test_answers_with_ids_come_as_they_complete() -> None:
    hall = Hall(max_batch_pairs=1)
    hall.rerank("a")
    hall.rerank("b", id=2)
    hall.ask(type="unknown", id=3)
    assert [line["id"] for line in hall.lines()] == [3]
    hall.links[0].frames.reverse()
    hall.score()
    assert hall.line()["id"] == 2


def test_control_requests_do_not_wait_in_the_order() -> None:
    hall = Hall()
    hall.rerank("a")
    hall.ask(type="heartbeat")
    assert hall.line() == {"type": "heartbeat", "status": "alive", "requests_processed": 0}


def test_an_id_in_flight_cannot_be_used_again_until_it_is_answered() -> None:
    hall = Hall()
    hall.rerank("a", id="x")
    hall.rerank("b", id="x")
    hall.ask(type="batch", id="x", requests=[{"query": "q", "documents": ["c"]}])
    assert [(line["id"], line["code"]) for line in hall.lines()] == [("x", "INVALID_REQUEST")] * 2
    hall.score()
    assert hall.line()["scores"] == expected("a")
    hall.rerank("b", id="x")
    hall.score()
    assert hall.line()["scores"] == expected("b")


def test_a_number_and_a_text_are_different_ids() -> None:
    hall = Hall()
    hall.rerank("a", id=1)
    hall.rerank("b", id="1")
    hall.score_all()
    assert sorted(repr(line["id"]) for line in hall.lines()) == ["'1'", "1"]


@pytest.mark.parametrize("ending", ["cancel", "expire", "batch"])
def test_an_id_is_free_again_after_every_ending(ending: str) -> None:
    hall = Hall()
    if ending == "batch":
        hall.ask(type="batch", id="x", requests=[{"query": "q", "documents": ["c"]}])
        hall.score()
    else:
        hall.rerank("a", id="x", timeout_ms=100)
        if ending == "cancel":
            hall.ask(type="cancel", target="x")
        hall.later(0.2)
    hall.lines()
    hall.rerank("b", id="x")
    hall.score_all()
    assert codes(hall.lines()) == ["scored"]


def test_a_batch_is_one_line_with_every_part_in_order() -> None:
    hall = Hall(max_documents=3)
    parts = [
        {"query": "q", "documents": ["a"], "id": 1},
        {"query": "q"},
        {"type": "score", "pairs": [["r", "b"]], "raw_scores": True},
        {"type": "v1/rerank", "query": "q", "documents": ["c"]},
    ]
    hall.ask(type="batch", id="b", requests=parts[:3])
    hall.score_all()
    answer = hall.line()
    assert answer["id"] == "b"
    first, second, third = answer["responses"]
    assert (first["id"], first["scores"]) == (1, expected("a"))
    assert second["code"] == "INVALID_REQUEST"
    assert third["scores"] == [score_of("r", "b") + 1]
    hall.ask(type="batch", requests=parts[3:])
    hall.score_all()
    assert hall.line()["responses"][0]["results"] == [{"index": 0, "relevance_score": score_of("q", "c")}]


def test_an_empty_batch_and_one_of_refusals_are_answered_at_once() -> None:
    hall = Hall()
    hall.ask(type="batch", id=1, requests=[])
    hall.ask(type="batch", requests=[{}, {}])
    first, second = hall.lines()
    assert first == {"id": 1, "responses": []}
    assert codes(second["responses"]) == ["INVALID_REQUEST"] * 2


def test_v1_answers_have_their_own_shape_and_an_id() -> None:
    hall = Hall()
    hall.ask(type="v1/rerank", model="m", query="q", documents=["a", {"text": "b"}], top_n=1, return_documents=True)
    hall.score()
    answer = hall.line()
    best = max((score, index) for index, score in enumerate(expected("a", "b")))[1]
    assert answer["results"] == [{"index": best, "relevance_score": expected("a", "b")[best], "document": {"text": "ab"[best]}}]
    assert isinstance(answer["id"], str)
    assert (answer["model"], answer["usage"]) == ("tiny", {"total_tokens": 20})
    assert answer["meta"] == {"api_version": {"version": "1.0.0"}}


def test_details_tell_the_times_of_the_request() -> None:
    hall = Hall(max_batch_pairs=1)
    hall.rerank("a", id=1)
    hall.rerank("b", id=2)
    hall.rerank("c", id=3, details=True)
    hall.later(0.5)
    hall.score()
    hall.later(0.5)
    hall.score()
    hall.score()
    answer = hall.lines()[-1]
    assert answer["timings"] == {"queue_ms": 500.0, "tokenize_ms": 1.0, "inference_ms": 1.0}
    assert (answer["model"], answer["score_kind"], answer["shared"], answer["usage"]) == ("tiny", "probability", 0, {"total_tokens": 10})


def test_truncated_documents_are_named() -> None:
    hall = Hall()
    hall.rerank("a", "b", "c")
    hall.score(truncated=[0, 2])
    assert hall.line()["truncated"] == [0, 2]


def test_a_failed_pair_fails_its_request_with_the_engines_code() -> None:
    hall = Hall()
    hall.rerank("a", "b", id=1)
    values = expected("a", "b")
    hall.score(logits=[None, 1.0], probabilities=[None, values[1]], failures=[[0, "INVALID_REQUEST", "Too long."]])
    answer = hall.line()
    assert (answer["id"], answer["code"], answer["error"], answer["timestamp"]) == (1, "INVALID_REQUEST", "Too long.", WALL_CLOCK)


def test_cancel_answers_the_target_and_the_canceller_and_frees_the_queue() -> None:
    hall = Hall()
    hall.rerank("a", id="x")
    hall.ask(type="cancel", target="x", id="c")
    first, second = hall.lines()
    assert (first["id"], first["code"]) == ("x", "CANCELLED")
    assert second == {"type": "cancel", "id": "c", "target": "x", "status": "cancelled"}
    assert hall.worker.scheduler.waiting_jobs == 0
    hall.score()
    hall.wait(60)
    assert hall.lines() == []


def test_cancel_of_a_batch_gives_one_line_for_it() -> None:
    hall = Hall()
    hall.ask(type="batch", id="x", requests=[{"query": "q", "documents": ["a"]}, {"query": "q", "documents": ["b"]}, {}])
    hall.ask(type="cancel", target="x")
    assert [line.get("code", line.get("status")) for line in hall.lines()] == ["CANCELLED", "cancelled"]
    hall.score_all()
    hall.wait(60)
    assert hall.lines() == []
    assert hall.worker.scheduler.waiting_jobs == 0


def test_cancel_of_nothing_is_acknowledged_as_not_found() -> None:
    hall = Hall()
    hall.ask(type="cancel", target="x")
    assert hall.line() == {"type": "cancel", "target": "x", "status": "not_found"}


def test_configure_sets_the_log_level_and_tells_it() -> None:
    hall = Hall()
    hall.ask(type="configure", log_level="debug", id=1)
    assert hall.line() == {"type": "configure", "id": 1, "log_level": "DEBUG"}
    assert hall.worker.log_level == "DEBUG"
    hall.ask(type="configure")
    assert hall.line()["log_level"] == "DEBUG"
    hall.ask(type="info")
    assert hall.line()["settings"]["log_level"] == "DEBUG"


def test_overload_by_requests_pairs_or_bytes_is_refused_at_once() -> None:
    for settings, documents in [
        ({"max_waiting_requests": 1}, ["a"]),
        ({"max_waiting_pairs": 3}, ["a", "b"]),
        ({"max_waiting_bytes": 1024}, ["a" * 700]),
    ]:
        hall = Hall(**settings)
        hall.rerank(*documents, id=1)
        hall.rerank(*documents, id=2)
        answer = hall.line()
        assert (answer["id"], answer["code"], answer["retryable"]) == (2, "OVERLOADED", True)
        assert answer["retry_after_ms"] >= 1
        hall.score_all()
        assert hall.line()["id"] == 1
        hall.rerank(*documents, id=2)
        hall.score_all()
        assert "scores" in hall.line()


def test_what_can_never_fit_is_too_large_and_not_overload() -> None:
    hall = Hall(max_waiting_pairs=3, max_waiting_bytes=1024)
    hall.rerank("a", "b", "c", "d")
    hall.rerank("x" * 2000)
    assert codes(hall.lines()) == ["REQUEST_TOO_LARGE"] * 2


def test_parts_of_a_batch_are_admitted_by_the_same_rule() -> None:
    hall = Hall(max_waiting_pairs=3)
    part = {"query": "q", "documents": ["a", "b"]}
    hall.ask(type="batch", requests=[part, part, {"type": "score", "pairs": [["q", "x"]] * 4}])
    hall.score_all()
    assert codes(hall.line()["responses"]) == ["scored", "OVERLOADED", "REQUEST_TOO_LARGE"]


@pytest.mark.parametrize("jobs", [1, 10, 50])
def test_whoever_retries_after_the_time_that_an_overload_names_is_admitted(jobs: int) -> None:
    hall = Hall(max_waiting_pairs=1000)
    for number in range(jobs):
        hall.rerank(*(f"{number}.{index}".ljust(28) for index in range(1000 // jobs)), id=number)
    for _ in range(8):  # the engine does ten tokens of ten a millisecond: the worker has learned that
        hall.later(0.001 * len(hall.links[0].frames[0]["groups"][0][4]))
        hall.score()
    hall.lines()
    hall.rerank(*map(str, range(300)), id="late")
    (line,) = [line for line in hall.lines() if line["id"] == "late"]
    assert line["code"] == "OVERLOADED"
    until = hall.now + line["retry_after_ms"] / 1e3
    while hall.links[0].frames:
        seconds = sum(len(group[4]) for group in hall.links[0].frames[0]["groups"]) / 1e3
        if hall.now + seconds > until:
            break
        hall.later(seconds)
        hall.score()
    hall.lines()
    hall.rerank(*map(str, range(300)), id="again")
    assert hall.lines() == []


def test_every_error_code_that_is_sent_is_counted() -> None:
    hall = Hall(max_waiting_requests=1)
    hall.send(b"x\n")
    hall.rerank("a", id=1)
    hall.rerank("a", id=1)
    hall.rerank("a", id=2)
    hall.ask(type="batch", requests=[{}])
    hall.ask(type="cancel", target=1)
    hall.lines()
    hall.ask(type="stats")
    told = hall.line()["errors"]
    assert told == {"INVALID_JSON": 1, "INVALID_REQUEST": 2, "OVERLOADED": 1, "CANCELLED": 1}
    assert set(told) <= {code.value for code in Code}
