"""Answers out: the table of shapes, the padding rule, ASCII only, never NaN, ties by index."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wire_cases import rerank

from reranker_worker.protocol import Code, Group, Id, Options, Refusal, Rerank, Scores, error_answer, json_text, rerank_answer, serialize, v1_answer

BUFFER = 4096
PAIR = (0.25, 0.75)


def scores(*values: float | None, **more: Any) -> Scores:
    return Scores(values, latency_ms=1.23456, **more)


def with_ids(*ids: Id, **options: Any) -> Rerank:
    return Rerank(None, "rerank", (Group("q", ("a",) * len(ids)),), ids, Options(**options))


PAIRS = Rerank(0, "score", (Group("q", ("a",)), Group("r", ("b", "c"))), None, Options(return_documents=True, top_k=2))
DETAILS = Scores(PAIR, 1.0, total_tokens=9, timings=(1.00049, 2.0, 3.0), model="m", score_kind="probability", shared=1)

# name: (answer, the line it must be, without its end)
RERANK: dict[str, tuple[dict[str, Any], str]] = {
    "plain": (rerank_answer(rerank(), scores(*PAIR)), '{"scores":[0.25,0.75],"latency_ms":1.235,"num_documents":2}'),
    "no documents": (rerank_answer(rerank(documents=()), scores()), '{"scores":[],"latency_ms":1.235,"num_documents":0}'),
    "id first": (rerank_answer(rerank(request_id="x"), scores(1.0)), '{"id":"x","scores":[1.0],"latency_ms":1.235,"num_documents":1}'),
    "id zero": (rerank_answer(rerank(request_id=0), scores(1.0)), '{"id":0,"scores":[1.0],"latency_ms":1.235,"num_documents":1}'),
    "empty id": (rerank_answer(rerank(request_id=""), scores(1.0)), '{"id":"","scores":[1.0],"latency_ms":1.235,"num_documents":1}'),
    "top_k": (
        rerank_answer(rerank(top_k=1), scores(*PAIR)),
        '{"scores":[0.25,0.75],"latency_ms":1.235,"num_documents":2,"results":[{"index":1,"score":0.75}]}',
    ),
    "top_k beyond the end": (
        rerank_answer(rerank(top_k=9), scores(0.5)),
        '{"scores":[0.5],"latency_ms":1.235,"num_documents":1,"results":[{"index":0,"score":0.5}]}',
    ),
    "documents back": (
        rerank_answer(rerank(return_documents=True), scores(*PAIR)),
        (
            '{"scores":[0.25,0.75],"latency_ms":1.235,"num_documents":2,'
            '"results":[{"index":1,"score":0.75,"document":"b"},{"index":0,"score":0.25,"document":"a"}]}'
        ),
    ),
    "document ids": (
        rerank_answer(with_ids(0, None, top_k=2), scores(*PAIR)),
        '{"scores":[0.25,0.75],"latency_ms":1.235,"num_documents":2,"results":[{"index":1,"score":0.75},{"index":0,"score":0.25,"id":0}]}',
    ),
    "documents of pairs": (
        rerank_answer(PAIRS, scores(0.1, 0.2, 0.3)),
        (
            '{"id":0,"scores":[0.1,0.2,0.3],"latency_ms":1.235,"num_documents":3,'
            '"results":[{"index":2,"score":0.3,"document":"c"},{"index":1,"score":0.2,"document":"b"}]}'
        ),
    ),
    "truncated": (
        rerank_answer(rerank(), scores(*PAIR, truncated=[1])),
        '{"scores":[0.25,0.75],"latency_ms":1.235,"num_documents":2,"truncated":[1]}',
    ),
    "partial": (
        rerank_answer(rerank(top_k=2), scores(None, 0.5)),
        '{"scores":[null,0.5],"latency_ms":1.235,"num_documents":2,"results":[{"index":1,"score":0.5}],"complete":false,"unscored":[0]}',
    ),
    "details": (
        rerank_answer(rerank(details=True), DETAILS),
        (
            '{"scores":[0.25,0.75],"latency_ms":1.0,"num_documents":2,"model":"m","score_kind":"probability",'
            '"timings":{"queue_ms":1.0,"tokenize_ms":2.0,"inference_ms":3.0},"usage":{"total_tokens":9},"shared":1}'
        ),
    ),
    "v1": (
        v1_answer(Rerank(None, "v1/rerank", (Group("q", ("a", "b")),), None, Options()), DETAILS, "f"),
        (
            '{"id":"f","model":"m","results":[{"index":1,"relevance_score":0.75},{"index":0,"relevance_score":0.25}],'
            '"usage":{"total_tokens":9},"meta":{"api_version":{"version":"1.0.0"}}}'
        ),
    ),
    "v1 with everything": (
        v1_answer(Rerank(0, "v1/rerank", (Group("q", ("a", "b")),), None, Options(top_k=1, return_documents=True)), DETAILS, "f"),
        (
            '{"id":0,"model":"m","results":[{"index":1,"relevance_score":0.75,"document":{"text":"b"}}],'
            '"usage":{"total_tokens":9},"meta":{"api_version":{"version":"1.0.0"}}}'
        ),
    ),
    "error": (
        error_answer(Refusal(None, Code.INVALID_JSON, "No."), 12.34567),
        '{"error":"No.","code":"INVALID_JSON","retryable":false,"timestamp":12.346}',
    ),
    "error with id and wait": (
        error_answer(Refusal(0, Code.OVERLOADED, "Later."), 1.0, 250),
        '{"id":0,"error":"Later.","code":"OVERLOADED","retryable":true,"retry_after_ms":250,"timestamp":1.0}',
    ),
}


@pytest.mark.parametrize("name", RERANK)
def test_an_answer_has_exactly_these_bytes(name: str) -> None:
    body, expected = RERANK[name]
    assert serialize(body) == expected.encode() + b"\n"


def stalls(length: int) -> bool:
    """A line of this length, with its end, hangs a host that polls and reads with fgets."""
    whole = (length - 1) // (BUFFER - 1)
    return whole >= 1 and length <= BUFFER * whole


def test_no_line_of_any_length_stalls_a_host_that_polls_and_reads_by_fgets() -> None:
    empty = len(serialize({"x": ""}))
    padded = 0
    for length in range(empty, 20_001):
        line = serialize({"x": "y" * (length - empty)})
        assert line.endswith(b"\n")
        assert line.count(b"\n") == 1
        assert not stalls(len(line))
        if stalls(length):
            padded += 1
            assert len(line) == BUFFER * ((length - 1) // (BUFFER - 1)) + 1
            assert line.rstrip(b" \n") == line[: length - 1]
        else:
            assert len(line) == length
    assert padded == sum(map(stalls, range(1, 20_001))) == 1 + 2 + 3 + 4


@given(st.dictionaries(st.text(max_size=5), st.text() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**53), 2**53) | st.none()))
def test_every_answer_is_one_ascii_line_that_says_the_same(body: dict[str, Any]) -> None:
    line = serialize(body)
    assert line.isascii()
    assert line.index(b"\n") == len(line) - 1
    assert json.loads(line) == body


@pytest.mark.parametrize("text", ["é", "\u2028", "😀", "\x7f", "\0", "\r\n", "\x1b[31m"])
def test_no_text_can_break_a_line_or_leave_ascii(text: str) -> None:
    line = serialize({"id": text, "document": text * 3})
    assert line.isascii()
    assert not any(byte < 32 for byte in line[:-1])
    assert json.loads(line)["id"] == text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("beside", ["", "é"])
def test_nan_and_infinity_never_leave(value: float, beside: str) -> None:
    try:
        text = json_text({"scores": [0.5, value], "beside": beside})
    except ValueError:
        return
    for name in (b"NaN", b"Infinity", b"inf"):
        assert name not in text


@given(st.lists(st.sampled_from([0.0, -0.0, 0.25, 0.5, 1.0]) | st.none(), max_size=12), st.none() | st.integers(1, 14))
def test_results_are_best_first_and_ties_keep_their_order(values: list[float | None], top_k: int | None) -> None:
    answer = rerank_answer(with_ids(*[None] * len(values), return_documents=True, top_k=top_k), scores(*values))
    expected = sorted((index for index, value in enumerate(values) if value is not None), key=lambda index: (-(values[index] or 0.0), index))
    assert [item["index"] for item in answer["results"]] == expected[:top_k]
    assert all(item["score"] == values[item["index"]] for item in answer["results"])


RETRYABLE_CODES = {"OVERLOADED", "RATE_LIMITED", "DEADLINE_EXCEEDED", "SHUTTING_DOWN", "NOT_READY", "ENGINE_UNAVAILABLE", "SERVER_ERROR"}


@pytest.mark.parametrize("code", Code)
def test_each_error_code_says_whether_the_same_line_may_succeed_later(code: Code) -> None:
    body = error_answer(Refusal(None, code, "Text."), 1.0)
    assert body["retryable"] is (code.value in RETRYABLE_CODES)
    assert body["code"] == code.value
