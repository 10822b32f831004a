"""The second opinion: what a line is, by the standard library's JSON with strict settings and the wire as the README tells it.

It is written from the contract and shares no code with `reranker_worker.protocol`; it is slow, and good only for comparison.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTROLS = {"heartbeat", "stats", "live", "ready", "health", "metrics", "info", "shutdown"}
_MAX_DEPTH = 16
_DIGITS = 20  # longer integers are as good as floats: none is a valid id or option


class RefusedError(Exception):
    """Why a line is not a request: an error code."""


def verdict(line: bytes, max_line_bytes: int) -> tuple[str, dict[str, Any] | None]:
    """("blank" | "served" | an error code, the object if it is one)."""
    line = line.removesuffix(b"\r")
    if len(line) > max_line_bytes:
        return "REQUEST_TOO_LARGE", None
    if not line.strip(b" \t\r"):
        return "blank", None
    body = None
    try:
        body = _object(line)
        _request(body)
    except RefusedError as reason:
        return str(reason), body
    return "served", body


def _object(line: bytes) -> dict[str, Any]:
    try:
        text = line.decode("utf-8", "strict")
        body = json.loads(text, parse_constant=_refuse, parse_int=_integer, parse_float=_float)
    except (ValueError, RecursionError):
        raise RefusedError("INVALID_JSON") from None
    if _depth(body) > _MAX_DEPTH or _has_surrogate(body):
        raise RefusedError("INVALID_JSON")
    if not isinstance(body, dict):
        raise RefusedError("INVALID_REQUEST")
    return body


def _refuse(name: str) -> float:
    raise ValueError(name)


def _integer(text: str) -> int | float:
    return int(text) if len(text) < _DIGITS else _float(text)


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError("a number beyond all floats is infinity by another name")
    return value


def _depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list) else 0


def _has_surrogate(value: Any) -> bool:
    if isinstance(value, str):
        return bool(_SURROGATE.search(value))
    if isinstance(value, dict):
        return any(_has_surrogate(item) for pair in value.items() for item in pair)
    return isinstance(value, list) and any(map(_has_surrogate, value))


def _need(condition: bool) -> None:
    if not condition:
        raise RefusedError("INVALID_REQUEST")


def is_id(value: Any) -> bool:
    """A string of at most 128 bytes, an integer below 2^53, or nothing."""
    if isinstance(value, str):
        return len(value.encode()) <= 128
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53)


def _request(body: dict[str, Any]) -> None:
    _need(is_id(body.get("id")))
    kind = body.get("type")
    if kind in _CONTROLS if isinstance(kind, str) else False:
        return
    if kind == "batch":
        _need(isinstance(body.get("requests"), list))
        _options(body)
    elif kind == "cancel":
        _need(body.get("target") is not None and is_id(body["target"]))
    elif kind == "configure":
        level = body.get("log_level")
        _need(level is None or (isinstance(level, str) and level.upper() in ("DEBUG", "INFO", "WARNING", "ERROR")))
    else:
        _need(kind in (None, "rerank", "score", "v1/rerank"))
        _scorable(body, kind)


def _scorable(body: dict[str, Any], kind: str | None) -> None:
    if kind == "score":
        pairs = body.get("pairs")
        _need(isinstance(pairs, list))
        _need(all(isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs))
    else:
        documents = body.get("documents")
        _need(isinstance(body.get("query"), str) and isinstance(documents, list))
        for item in documents:
            _need(isinstance(item, str) or (isinstance(item, dict) and isinstance(item.get("text"), str) and is_id(item.get("id"))))
    if kind == "v1/rerank":
        _numbers(body, {"top_n": (1, 2**53), "max_tokens_per_doc": (1, 2**30), "timeout_ms": (1, 3_600_000), "priority": (0, 999)})
        _switches(body, "return_documents")
    else:
        _options(body)


def _options(body: dict[str, Any]) -> None:
    _numbers(body, {"top_k": (1, 2**53), "max_length": (1, 2**20), "timeout_ms": (1, 3_600_000), "priority": (0, 999)})
    _switches(body, "return_documents", "raw_scores", "normalize", "partial", "details")
    _need(not (body.get("raw_scores") and body.get("normalize")))
    _need(body.get("instruction") is None or isinstance(body["instruction"], str))


def _numbers(body: dict[str, Any], ranges: dict[str, tuple[int, int]]) -> None:
    for name, (low, high) in ranges.items():
        value = body.get(name)
        _need(value is None or (isinstance(value, int) and not isinstance(value, bool) and low <= value <= high))


def _switches(body: dict[str, Any], *names: str) -> None:
    _need(all(body.get(name) is None or isinstance(body[name], bool) for name in names))
