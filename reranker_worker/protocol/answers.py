"""Answers to bytes: ASCII-escaped JSON, never NaN, padded away from the line lengths that stall `fgets` hosts."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from reranker_worker.protocol.messages import RETRYABLE, Refusal, Rerank

if TYPE_CHECKING:
    from collections.abc import Sequence

_STDIO_BUFFER_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Scores:
    """What is known of a scored request. `values` is in input order; None marks a pair that was not scored in time.

    `latency_ms` counts from the moment the line was read; `timings` is (queue_ms, tokenize_ms, inference_ms).
    """

    values: Sequence[float | None]
    latency_ms: float
    truncated: Sequence[int] = ()
    total_tokens: int = 0
    timings: tuple[float, float, float] = (0.0, 0.0, 0.0)
    model: str = ""
    score_kind: str = ""
    shared: int = 0  # pairs whose score came from an identical pair in flight


def serialize(body: dict[str, Any]) -> bytes:
    """One whole line with its `\\n`. NaN and infinity never leave: orjson makes them null, json a ValueError; the engine checks first."""
    return _pad(json_text(body) + b"\n")


def json_text(body: dict[str, Any]) -> bytes:
    """The body as ASCII JSON without a line end."""
    text = orjson.dumps(body)
    # orjson writes non-finite floats as null (so the engine's checks come first) and non-ASCII text as UTF-8.
    if text.isascii():
        return text
    return json.dumps(body, separators=(",", ":"), allow_nan=False).encode("ascii")


def _pad(line: bytes) -> bytes:
    """Keep away from the lengths that hang a host which polls the descriptor but reads by `fgets` through a 4,096-byte buffer."""
    whole = (len(line) - 1) // (_STDIO_BUFFER_BYTES - 1)
    if whole >= 1 and len(line) <= _STDIO_BUFFER_BYTES * whole:
        return line[:-1].ljust(_STDIO_BUFFER_BYTES * whole) + b"\n"
    return line


def error_answer(refusal: Refusal, timestamp: float, retry_after_ms: int | None = None) -> dict[str, Any]:
    """The flat error object."""
    body: dict[str, Any] = {} if refusal.id is None else {"id": refusal.id}
    body |= {"error": refusal.error, "code": refusal.code.value, "retryable": refusal.code in RETRYABLE and not refusal.final}
    if retry_after_ms is not None:
        body["retry_after_ms"] = retry_after_ms
    body["timestamp"] = round(timestamp, 3)
    return body


def rerank_answer(request: Rerank, scores: Scores, _fallback_id: str = "") -> dict[str, Any]:
    """The answer to a `rerank` or `score` request; unlike `v1_answer` it never makes up an id."""
    body: dict[str, Any] = {} if request.id is None else {"id": request.id}
    body |= {"scores": scores.values, "latency_ms": round(scores.latency_ms, 3), "num_documents": len(scores.values)}
    options = request.options
    if options.top_k is not None or options.return_documents:
        body["results"] = [_result(request, index, score) for index, score in _ranked(scores.values, options.top_k)]
    if scores.truncated:
        body["truncated"] = list(scores.truncated)
    unscored = [index for index, score in enumerate(scores.values) if score is None]
    if unscored:
        body |= {"complete": False, "unscored": unscored}
    if options.details:
        body |= _details(scores)
    return body


def v1_answer(request: Rerank, scores: Scores, fallback_id: str) -> dict[str, Any]:
    """The answer in the shape of Cohere's and Jina's `v1/rerank`."""
    texts = _texts(request)
    results = []
    for index, score in _ranked(scores.values, request.options.top_k):
        item: dict[str, Any] = {"index": index, "relevance_score": score}
        if request.options.return_documents:
            item["document"] = {"text": texts[index]}
        results.append(item)
    return {
        "id": fallback_id if request.id is None else request.id,
        "model": scores.model,
        "results": results,
        "usage": {"total_tokens": scores.total_tokens},
        "meta": {"api_version": {"version": "1.0.0"}},
    }


def _details(scores: Scores) -> dict[str, Any]:
    queue_ms, tokenize_ms, inference_ms = (round(value, 3) for value in scores.timings)
    return {
        "model": scores.model,
        "score_kind": scores.score_kind,
        "timings": {"queue_ms": queue_ms, "tokenize_ms": tokenize_ms, "inference_ms": inference_ms},
        "usage": {"total_tokens": scores.total_tokens},
        "shared": scores.shared,
    }


def _ranked(values: Sequence[float | None], top_k: int | None) -> list[tuple[int, float]]:
    """(index, score), best first, ties by index; pairs without a score are left out."""
    scored = [(index, value) for index, value in enumerate(values) if value is not None]
    scored.sort(key=lambda item: (-item[1], item[0]))
    return scored[:top_k]


def _result(request: Rerank, index: int, score: float) -> dict[str, Any]:
    item: dict[str, Any] = {"index": index, "score": score}
    if request.document_ids is not None and request.document_ids[index] is not None:
        item["id"] = request.document_ids[index]
    if request.options.return_documents:
        item["document"] = _texts(request)[index]
    return item


def _texts(request: Rerank) -> Sequence[str]:
    if len(request.groups) == 1:
        return request.groups[0].documents
    return [document for group in request.groups for document in group.documents]


def is_finite(values: Sequence[float]) -> bool:
    """True when no value is NaN or infinite."""
    return all(map(math.isfinite, values))
