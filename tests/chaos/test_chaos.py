"""500 random runs of a host and a worker with faults of every kind; and the proof that the ledger sees what it is there to see."""

from __future__ import annotations

import json

import pytest

from reranker_worker.backends.fake import fake_probability
from tests.chaos.chaos import Report, play_parallel
from tests.chaos.expected import Expected, Ledger, ViolationError
from tests.chaos.scenario import Generator

RUNS = 500
SEED = 20_000


@pytest.mark.timeout(400)
def test_random_runs_with_faults_lose_double_swap_or_tear_nothing() -> None:
    report: Report = play_parallel(SEED, RUNS, jobs=2)
    assert not report.failures, "\n" + "\n".join(report.failures)
    assert report.runs == RUNS
    assert len(report.faults) >= 40, report.faults


def test_the_same_seed_makes_the_same_scenario() -> None:
    def bytes_of(seed: int) -> list[bytes]:
        return [line.data for step in Generator(seed).scenario().steps for line in step.lines]

    for seed in range(200):
        assert bytes_of(seed) == bytes_of(seed)
    assert bytes_of(1) != bytes_of(2)


def _ledger(*expected: Expected) -> Ledger:
    ledger = Ledger()
    for item in expected:
        ledger.sent(item)
    return ledger


def _request(number: str | None, document: str = "d") -> Expected:
    return Expected("rerank", number, pairs=[("q", document)])


def _answer(number: str | None, document: str = "d", **more: object) -> bytes:
    body: dict[str, object] = {"scores": [fake_probability("q", document)], "num_documents": 1, "latency_ms": 1.0, **more}
    return json.dumps(body if number is None else {"id": number, **body}).encode()


def test_right_answers_are_accepted_and_close_the_ledger() -> None:
    ledger = _ledger(_request("a", "x"), _request("b", "y"), _request(None, "1"), _request(None, "2"))
    for line in (_answer("b", "y"), _answer(None, "1"), _answer("a", "x"), _answer(None, "2")):
        ledger.answered(line)
    assert not ledger.open


def test_a_lost_answer_stays_open() -> None:
    ledger = _ledger(_request("a"), _request(None))
    assert ledger.open == ["id-less rerank", "rerank a"]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (_answer("a", "y"), "its own pair's"),
        (_answer("c", "x"), "no line with this id is open"),
        (_answer(None, "2"), "its own pair's"),
        (_answer("a", "x", num_documents=2), "scores for"),
        (_answer("a", "x")[:-5], "not ASCII JSON"),
        (_answer("a", "x", error="e", code="INFERENCE_ERROR"), "only"),
        (b'{"id":"a","scores":[NaN],"num_documents":1}', "NaN"),
        (b'{"id":"a","scores":[null],"num_documents":1,"complete":false,"unscored":[0]}', "incomplete"),
        (b'{"type":"heartbeat","status":"alive"}', "nobody asked for"),
        ('{"id":"\u00e4"}'.encode(), "not ASCII JSON"),
    ],
)
def test_a_wrong_answer_is_a_violation(line: bytes, why: str) -> None:
    ledger = _ledger(_request("a", "x"), _request(None, "1"), _request(None, "2"))
    with pytest.raises(ViolationError, match=why):
        ledger.answered(line)


def test_a_doubled_answer_is_a_violation() -> None:
    ledger = _ledger(_request("a"))
    ledger.answered(_answer("a"))
    with pytest.raises(ViolationError, match="doubled"):
        ledger.answered(_answer("a"))


def test_a_cancel_that_was_acknowledged_but_not_done_is_a_violation() -> None:
    ledger = _ledger(_request("a"), Expected("cancel", "c", target="a"))
    ledger.answered(_answer("a"))
    with pytest.raises(ViolationError, match="acknowledged"):
        ledger.answered(b'{"type":"cancel","id":"c","target":"a","status":"cancelled"}')
