"""The transcripts are documentation that is true: each is played against a real worker, and together they show the whole wire."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from reranker_worker.protocol.messages import Code
from reranker_worker.protocol.parsing import CONTROLS
from tests.transcripts.matcher import mismatch
from tests.transcripts.replay import DEFAULT_COMMAND, Replay, ReplayError, load, transcripts

if TYPE_CHECKING:
    from pathlib import Path

# Kept for later features, or for what no host can provoke at will.
NOT_OVER_THE_WIRE = {Code.RATE_LIMITED, Code.PROCESSING_ERROR, Code.SERVER_ERROR}
OPTIONS = "top_k return_documents raw_scores normalize max_length timeout_ms priority partial details instruction top_n max_tokens_per_doc".split()


@pytest.mark.parametrize("path", transcripts(), ids=lambda path: path.stem)
def test_the_worker_behaves_as_the_transcript_says(path: Path) -> None:
    Replay(load(path), DEFAULT_COMMAND).run()


def test_a_worker_that_answers_otherwise_is_found_out() -> None:
    path = transcripts()[0]
    steps = load(path)
    wrong = json.loads(json.dumps(steps).replace('"num_documents": 3', '"num_documents": 4'))
    with pytest.raises(ReplayError, match="num_documents: 4 is expected, not 3"):
        Replay(wrong, DEFAULT_COMMAND).run()
    with pytest.raises(ReplayError, match="exit code 9 is expected, not 0"):
        Replay([*steps[:-1], {"exit": 9}], DEFAULT_COMMAND).run()


def test_every_request_type_every_option_and_every_error_code_is_shown() -> None:
    sent = [step["send"] for path in transcripts() for step in load(path) if "send" in step]
    sent += [part for request in sent for part in request.get("requests", []) if isinstance(part, dict)]
    types = {request.get("type") for request in sent}
    assert {"rerank", "score", "batch", "v1/rerank", "cancel", "configure", None} | CONTROLS <= types
    assert not set(OPTIONS) - {name for request in sent for name in request}
    expected = json.dumps([step for path in transcripts() for step in load(path) if "expect" in step or "expect_any_order" in step])
    assert [code.value for code in Code if f'"code": "{code.value}"' not in expected] == [code.value for code in Code if code in NOT_OVER_THE_WIRE]


@pytest.mark.parametrize(
    ("expected", "actual", "matches"),
    [
        ({"a": 1}, {"a": 1, "b": 2}, True),
        ({"a": 1}, {"b": 1}, False),
        ({"a": 1}, [1], False),
        ({"a": "$absent"}, {"b": 1}, True),
        ({"a": "$absent"}, {"a": None}, False),
        ({"a": "$any"}, {"a": None}, True),
        ({"a": "$any"}, {}, False),
        ("$number", 1.5, True),
        ("$number", True, False),
        ("$number", "1", False),
        ("$string", "", True),
        ("$string", 1, False),
        ([1, 2], [1, 2], True),
        ([1, 2], [1, 2, 3], False),
        ([1, 2], [2, 1], False),
        (0.5, 0.5 + 1e-12, True),
        (0.5, 0.5001, False),
        (1, 1.0, True),
        (1, True, False),
        (None, 0, False),
        ("a", "b", False),
    ],
)
def test_the_matcher_keeps_its_few_rules(expected: object, actual: object, matches: bool) -> None:
    assert (mismatch(expected, actual) is None) is matches


def test_an_unknown_placeholder_is_an_error_of_the_transcript() -> None:
    with pytest.raises(ValueError, match="unknown placeholder"):
        mismatch("$float", 1.0)
