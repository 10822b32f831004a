"""What one line must be answered with, and the ledger that holds a run to it: nothing lost, doubled, swapped or out of order."""

from __future__ import annotations

import json
import math
import re
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from reranker_worker.backends.fake import fake_logit

_FALLBACK_ID = re.compile(r"rerank-\d+")


class ViolationError(AssertionError):
    """A promise of the wire was broken."""


@dataclass(slots=True)
class Expected:
    """One line's answer. `kind` is rerank, v1, batch, error or the type of a control answer. `codes`: errors that are permitted."""

    kind: str
    id: str | int | None = None
    pairs: list[tuple[str, str]] = field(default_factory=list)
    codes: set[str] = field(default_factory=set)
    raw: bool = False
    partial: bool = False
    top_k: int | None = None
    results: bool = False
    target: str | None = None
    parts: list[Expected] = field(default_factory=list)
    optional: bool = False  # sent when the worker may already be leaving
    must_fail: bool = False  # a score would be wrong
    too_early: bool = False  # a cancel that was sent before its target

    def every(self) -> list[Expected]:
        """This and its parts."""
        return [self, *self.parts]

    def fault(self, body: dict[str, Any]) -> str | None:
        """What is wrong with an answer; None when it is right."""
        if self.kind not in ("rerank", "v1", "batch", "error"):
            return None if body.get("type") == self.kind else f"type {body.get('type')!r} where {self.kind!r} was asked"
        if "error" in body:
            return self._error_fault(body)
        if self.kind == "error" or self.must_fail:
            return f"an answer where only {sorted(self.codes)} is right: {sorted(body)}"
        if self.kind == "batch":
            return self._batch_fault(body)
        return self._v1_fault(body) if self.kind == "v1" else self._scores_fault(body)

    def _error_fault(self, body: dict[str, Any]) -> str | None:
        if body.get("code") not in self.codes:
            return f"error {body.get('code')!r} ({body.get('error')!r}) where only {sorted(self.codes)} are permitted"
        if not (isinstance(body["error"], str) and isinstance(body.get("retryable"), bool) and isinstance(body.get("timestamp"), float)):
            return "an error without its text, retryable or timestamp"
        if body["code"] == "OVERLOADED" and not body.get("retry_after_ms", 0) >= 1:
            return "OVERLOADED without retry_after_ms"
        return None

    def _score(self, index: int) -> float:
        query, document = self.pairs[index]
        logit = fake_logit("" if document.startswith("fake:") else query, document)
        return logit if self.raw else 1.0 / (1.0 + math.exp(-logit))

    def _scores_fault(self, body: dict[str, Any]) -> str | None:
        scores = body.get("scores")
        if not isinstance(scores, list) or len(scores) != len(self.pairs) or body.get("num_documents") != len(self.pairs):
            return f"{len(scores) if isinstance(scores, list) else 'no'} scores for {len(self.pairs)} pairs"
        unscored = [index for index, score in enumerate(scores) if score is None]
        if (unscored or "complete" in body) and not (self.partial and body.get("unscored") == unscored and body.get("complete") is False):
            return "an incomplete answer that was not asked for, or that hides what it lacks"
        for index, score in enumerate(scores):
            if score is not None and not _close(score, self._score(index)):
                return f"score {index} is {score}, but its own pair's is {self._score(index)}"
        if self.results != ("results" in body):
            return "results without being asked, or asked and missing"
        return self._results_fault(body, "score", scores) if self.results else None

    def _v1_fault(self, body: dict[str, Any]) -> str | None:
        return self._results_fault(body, "relevance_score", [self._score(index) for index in range(len(self.pairs))])

    def _results_fault(self, body: dict[str, Any], name: str, scores: list[float | None]) -> str | None:
        ranked = sorted((index for index, score in enumerate(scores) if score is not None), key=lambda index: (-(scores[index] or 0.0), index))
        if [item.get("index") for item in body["results"]] != ranked[: self.top_k]:
            return "results are not the best first, ties by index"
        bad = [item for item in body["results"] if not _close(item.get(name), self._score(item["index"]))]
        return f"{len(bad)} results carry another pair's score" if bad else None

    def _batch_fault(self, body: dict[str, Any]) -> str | None:
        answers = body.get("responses")
        if not isinstance(answers, list) or len(answers) != len(self.parts):
            return "a batch with a wrong number of responses"
        for part, answer in zip(self.parts, answers, strict=True):
            if part.id is not None and answer.get("id") != part.id:
                return "a batch part with another part's id"
            if fault := part.fault(answer):
                return f"in a batch: {fault}"
        return None


def _close(score: Any, wanted: float) -> bool:
    return isinstance(score, float | int) and math.isclose(score, wanted, rel_tol=1e-12, abs_tol=1e-15)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} on the wire")


def parse_answer(line: bytes) -> dict[str, Any]:
    """One stdout line, strictly: ASCII, a JSON object, no NaN."""
    try:
        body = json.loads(line.decode("ascii"), parse_constant=_no_constant)
    except ValueError as reason:
        raise ViolationError(f"a stdout line is not ASCII JSON ({reason}): {line[:200]!r}") from None
    if not isinstance(body, dict):
        raise ViolationError(f"a stdout line is not an object: {line[:200]!r}")
    return body


class Ledger:
    """All lines of one run and their answers."""

    def __init__(self) -> None:
        self._by_id: dict[str | int, list[Expected]] = {}
        self._ordered: deque[Expected] = deque()
        self._controls: dict[str, int] = {}
        self._optional_controls: dict[str, int] = {}
        self._outcome: dict[str | int, str] = {}
        self.answers = 0
        self.shutting_down = 0

    def sent(self, expected: Expected) -> None:
        """A line is being written."""
        expected.too_early = expected.target is not None and expected.target not in self._by_id
        if expected.id is not None:
            self._by_id.setdefault(expected.id, []).append(expected)
        elif expected.kind in ("rerank", "v1", "batch", "error"):
            self._ordered.append(expected)
        else:
            counts = self._optional_controls if expected.optional else self._controls
            counts[expected.kind] = counts.get(expected.kind, 0) + 1

    def excuse_all(self) -> None:
        """From now on, what is pending may stay unanswered (the process was killed)."""
        for expected in (*self._ordered, *(item for items in self._by_id.values() for item in items)):
            expected.optional = True
        self._optional_controls.update(self._controls)
        self._controls.clear()

    @property
    def open(self) -> list[str]:
        """What still needs an answer."""
        return [
            *(f"id-less {item.kind}" for item in self._ordered if not item.optional),
            *(f"{item.kind} {item.id}" for items in self._by_id.values() for item in items if not item.optional),
            *(f"{count} x {kind}" for kind, count in self._controls.items() if count),
        ]

    def answered(self, line: bytes) -> None:
        """A line came out; raises ViolationError when it is not the right answer to exactly one line."""
        body = parse_answer(line)
        self.answers += 1
        if body.get("code") == "SHUTTING_DOWN" or any(part.get("code") == "SHUTTING_DOWN" for part in body.get("responses", [])):
            self.shutting_down += 1
        number = body.get("id")
        fallback = "results" in body and "usage" in body and isinstance(number, str) and _FALLBACK_ID.fullmatch(number)
        if number is not None and not fallback:
            self._with_id(number, body)
        elif "type" in body:
            self._control(body)
        else:
            self._in_order(body)

    def _with_id(self, number: str | int, body: dict[str, Any]) -> None:
        candidates = self._by_id.get(number, [])
        faults = [candidate.fault(body) for candidate in candidates]
        if None not in faults:
            why = "; ".join(filter(None, faults)) or "no line with this id is open (doubled, or of another run)"
            raise ViolationError(f"answer to {number!r}: {why}")
        right = [index for index, fault in enumerate(faults) if fault is None]
        # Of two lines with one id, the later one is refused.
        expected = candidates.pop(right[-1] if body.get("code") == "INVALID_REQUEST" else right[0])
        if not candidates:
            del self._by_id[number]
        self._outcome[number] = str(body.get("code", "scored"))
        if expected.kind == "cancel":
            self._cancelled(expected, body)

    def _cancelled(self, expected: Expected, body: dict[str, Any]) -> None:
        target = expected.target or ""
        if body.get("target") != target:
            raise ViolationError("a cancel that names another target")
        if body.get("status") == "cancelled" and self._outcome.get(target) != "CANCELLED":
            raise ViolationError(f"cancel of {target} was acknowledged, but its answer was {self._outcome.get(target)}")
        if body.get("status") == "not_found" and target in self._by_id and not expected.too_early:
            raise ViolationError(f"cancel of {target} said not_found while it is not answered")

    def _control(self, body: dict[str, Any]) -> None:
        kind = body["type"]
        for counts in (self._controls, self._optional_controls):
            if counts.get(kind):
                counts[kind] -= 1
                return
        raise ViolationError(f"a {kind!r} line that nobody asked for")

    def _in_order(self, body: dict[str, Any]) -> None:
        if not self._ordered:
            raise ViolationError(f"an answer without id that nobody waits for: {sorted(body)} {body.get('error', '')}")
        fault = self._ordered.popleft().fault(body)
        if fault:
            raise ViolationError(f"the next answer without id: {fault}")
