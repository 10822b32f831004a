"""Lines to messages: strict JSON, then types. Every failure is a `Refusal`; no dict leaves this module."""

from __future__ import annotations

from typing import Any

import orjson

from reranker_worker.protocol.framing import LineReader, Oversize
from reranker_worker.protocol.messages import Batch, Cancel, Code, Configure, Control, Group, Id, Limits, Message, Options, Refusal, Rerank

MAX_DEPTH = 16
MAX_ID_BYTES = 128
MAX_ID_INTEGER = 2**53
MAX_TIMEOUT_MS = 3_600_000
MAX_PRIORITY = 999
CONTROLS = frozenset({"heartbeat", "stats", "live", "ready", "health", "metrics", "info", "shutdown"})
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
_NOT_STRUCTURE = bytes(set(range(256)) - set(b'"[]{}'))
_PIECE_BYTES = 1 << 16
_BOM = b"\xef\xbb\xbf"


class _InvalidError(Exception):
    """Inside this module only: why a field is refused."""

    def __init__(self, error: str, code: Code = Code.INVALID_REQUEST) -> None:
        super().__init__(error)
        self.error = error
        self.code = code


class Decoder:
    """Bytes in, messages out. `feed` may be called with chunks of any size; the result does not depend on the cuts."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._lines = LineReader(limits.max_line_bytes)

    def feed(self, data: bytes) -> list[Message]:
        """The messages that `data` completes, one for each non-blank line, in order. Never raises."""
        return [self._parse(line) for line in self._lines.feed(data)]

    def finish(self) -> list[Message]:
        """At end of input: a last line without `\\n` is served if it is a whole JSON object (no proper prefix of one is), else refused."""
        messages: list[Message] = []
        for line in self._lines.finish():
            message = self._parse(line)
            if isinstance(message, Refusal) and message.code is Code.INVALID_JSON:
                message = Refusal(None, Code.INVALID_JSON, "The input ended in the middle of a line; end each request with a newline.")
            messages.append(message)
        return messages

    def _parse(self, line: bytes | Oversize) -> Message:
        if isinstance(line, Oversize):
            text = f"The line is longer than max_line_bytes ({self._limits.max_line_bytes}); send fewer or shorter documents at a time."
            return Refusal(None, Code.REQUEST_TOO_LARGE, text)
        request_id: Id = None
        try:
            body = _load(line, self._limits)
            request_id = _id(body.get("id"), "id")
            return _message(body, request_id, self._limits)
        except _InvalidError as reason:
            return Refusal(request_id, reason.code, reason.error)


def _load(line: bytes, limits: Limits) -> dict[str, Any]:
    if line.startswith(_BOM):
        raise _InvalidError("The line begins with a byte order mark; send plain UTF-8 without one.", Code.INVALID_JSON)
    _check_structure(line, limits)
    try:
        body = orjson.loads(line)
    except orjson.JSONDecodeError as reason:
        raise _InvalidError(_json_error(line, reason), Code.INVALID_JSON) from None
    if not isinstance(body, dict):
        raise _InvalidError("A request is a JSON object, such as {\"query\": \"...\", \"documents\": [\"...\"]}.")
    return body


def _json_error(line: bytes, reason: orjson.JSONDecodeError) -> str:
    """A sentence without request text: orjson's own message can quote a character."""
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as bad:
        return f"The line is not valid UTF-8 at byte {bad.start}."
    if "surrogate" in str(reason):
        return "The line contains a lone surrogate (\\ud800 to \\udfff); send complete characters."
    return f"The line is not valid JSON at character {reason.pos}."


def _check_structure(line: bytes, limits: Limits) -> None:
    """Refuse deep nesting and container bombs before anything is built (4 MiB of `[],` would become 200 MiB of objects)."""
    openers = line.count(b"[") + line.count(b"{")
    if openers <= MAX_DEPTH:
        return
    brackets = _brackets(line)
    if len(brackets) > 8 * limits.max_documents + 128:
        text = f"The line has too many arrays and objects (about {len(brackets) // 2}; the limit is four for each of max_documents)."
        raise _InvalidError(text, Code.REQUEST_TOO_LARGE)
    depth = 0
    for bracket in brackets:
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            raise _InvalidError(f"The line is nested deeper than {MAX_DEPTH} levels.", Code.INVALID_JSON)


def _brackets(line: bytes) -> bytes:
    """The brackets outside strings. In pieces, because 4 MiB of `{"a":0},` would become 60 MiB of matches of a regular expression."""
    # Without its escapes a string begins and ends at each quote; two adjacent quotes change nothing for what follows.
    rest = line.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NOT_STRUCTURE).replace(b'""', b"")
    outside: list[bytes] = []
    in_string = False
    for start in range(0, len(rest), _PIECE_BYTES):
        parts = rest[start : start + _PIECE_BYTES].split(b'"')
        outside.append(b"".join(parts[in_string::2]))
        in_string ^= len(parts) % 2 == 0
    return b"".join(outside)


def _message(body: dict[str, Any], request_id: Id, limits: Limits) -> Message:
    kind = body.get("type")
    if kind is not None and not isinstance(kind, str):
        raise _InvalidError("type must be a string.")
    if kind is None or kind in ("rerank", "score", "v1/rerank"):
        return _rerank(body, request_id, kind or "rerank", limits)
    if kind in CONTROLS:
        return Control(request_id, kind)
    if kind == "batch":
        return _batch(body, request_id, limits)
    if kind == "cancel":
        if body.get("target") is None:
            raise _InvalidError("cancel needs target: the id of the request to cancel.")
        return Cancel(request_id, _id(body["target"], "target"))
    if kind == "configure":
        return Configure(request_id, _log_level(body))
    raise _InvalidError(f"Unknown type; known are rerank, score, batch, v1/rerank, cancel, configure, {', '.join(sorted(CONTROLS))}.")


def _batch(body: dict[str, Any], request_id: Id, limits: Limits) -> Batch:
    requests = _list(body, "requests")
    if len(requests) > limits.max_documents:
        raise _InvalidError(f"requests has {len(requests)} entries; the limit is max_documents ({limits.max_documents}).", Code.REQUEST_TOO_LARGE)
    shared = _options(body)
    parts: list[Rerank | Refusal] = []
    for index, item in enumerate(requests):
        part_id: Id = None
        try:
            if not isinstance(item, dict):
                raise _InvalidError("must be an object with query and documents.")
            part_id = _id(item.get("id"), "id")
            if item.get("type") not in (None, "rerank", "score", "v1/rerank"):
                raise _InvalidError("only rerank, score and v1/rerank requests can stand in a batch.")
            kind = item.get("type") or "rerank"
            merged = item if item.get("timeout_ms") is not None else {**item, "timeout_ms": shared.timeout_ms}
            parts.append(_rerank(merged, part_id, kind, limits))
        except _InvalidError as reason:
            parts.append(Refusal(part_id, reason.code, f"requests[{index}]: {reason.error}"))
    return Batch(request_id, tuple(parts))


def _rerank(body: dict[str, Any], request_id: Id, shape: str, limits: Limits) -> Rerank:
    if shape == "score":
        return Rerank(request_id, shape, _pairs(body, limits), None, _options(body))
    query = _string(body, "query")
    texts, ids = _documents(body, limits)
    options = _v1_options(body) if shape == "v1/rerank" else _options(body)
    model = body.get("model")
    return Rerank(request_id, shape, (Group(query, texts),), ids, options, model if isinstance(model, str) else "")


def _documents(body: dict[str, Any], limits: Limits) -> tuple[tuple[str, ...], tuple[Id, ...] | None]:
    documents = _list(body, "documents")
    _check_count(len(documents), "documents", limits)
    # The usual case, all strings, costs one pass in C: 0.02 microseconds a document.
    if set(map(type, documents)) <= {str}:
        return tuple(documents), None
    texts: list[str] = []
    ids: list[Id] = []
    for index, item in enumerate(documents):
        if isinstance(item, str):
            texts.append(item)
            ids.append(None)
        elif isinstance(item, dict) and isinstance(item.get("text"), str):
            texts.append(item["text"])
            ids.append(_id(item.get("id"), f"documents[{index}].id"))
        else:
            raise _InvalidError(f'documents[{index}] must be a string or an object with a string "text".')
    return tuple(texts), tuple(ids)


def _pairs(body: dict[str, Any], limits: Limits) -> tuple[Group, ...]:
    """Pairs grouped by runs of the same query, so that scores stay in input order."""
    pairs = _list(body, "pairs")
    _check_count(len(pairs), "pairs", limits)
    runs: list[tuple[str, list[str]]] = []
    for index, pair in enumerate(pairs):
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], str)):
            raise _InvalidError(f"pairs[{index}] must be an array of two strings: query and document.")
        if not runs or runs[-1][0] != pair[0]:
            runs.append((pair[0], []))
        runs[-1][1].append(pair[1])
    return tuple(Group(query, tuple(documents)) for query, documents in runs)


def _check_count(count: int, name: str, limits: Limits) -> None:
    if count > limits.max_documents:
        text = f"{name} has {count} entries; the limit is max_documents ({limits.max_documents})."
        raise _InvalidError(text, Code.REQUEST_TOO_LARGE)


def _options(body: dict[str, Any]) -> Options:
    # An option is rare: 11 look-ups of absent keys would cost more than the rest of parsing a small request.
    if body.keys() <= {"id", "type", "query", "documents", "pairs", "requests"}:
        return Options()
    return Options(
        top_k=_integer(body, "top_k", 1, MAX_ID_INTEGER),
        return_documents=_switch(body, "return_documents"),
        scale=_scale(body),
        max_length=_integer(body, "max_length", 1, 1 << 20) or 0,
        timeout_ms=_integer(body, "timeout_ms", 1, MAX_TIMEOUT_MS),
        priority=_integer(body, "priority", 0, MAX_PRIORITY) or 0,
        partial=_switch(body, "partial"),
        details=_switch(body, "details"),
        instruction=_string(body, "instruction") if body.get("instruction") is not None else "",
    )


def _v1_options(body: dict[str, Any]) -> Options:
    return Options(
        top_k=_integer(body, "top_n", 1, MAX_ID_INTEGER),
        return_documents=_switch(body, "return_documents"),
        max_document_tokens=_integer(body, "max_tokens_per_doc", 1, 1 << 30) or 0,
        timeout_ms=_integer(body, "timeout_ms", 1, MAX_TIMEOUT_MS),
        priority=_integer(body, "priority", 0, MAX_PRIORITY) or 0,
        details=True,
    )


def _scale(body: dict[str, Any]) -> str | None:
    raw = _optional_switch(body, "raw_scores")
    normalize = _optional_switch(body, "normalize")
    if raw and normalize:
        raise _InvalidError("raw_scores and normalize exclude each other; send one of them.")
    if raw or normalize is False:
        return "logit"
    return "probability" if normalize else None


def _log_level(body: dict[str, Any]) -> str | None:
    level = body.get("log_level")
    if level is None:
        return None
    if not isinstance(level, str) or level.upper() not in LOG_LEVELS:
        raise _InvalidError(f"log_level must be one of {', '.join(LOG_LEVELS)}.")
    return level.upper()


def _id(value: Any, name: str) -> Id:
    if value is None or (type(value) is int and abs(value) < MAX_ID_INTEGER):
        return value
    if isinstance(value, str) and len(value.encode()) <= MAX_ID_BYTES:
        return value
    raise _InvalidError(f"{name} must be a string of at most {MAX_ID_BYTES} bytes or an integer below 2^53.")


def _string(body: dict[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str):
        raise _InvalidError(f"{name} must be a string." if value is not None else f"{name} is missing; it must be a string.")
    return value


def _list(body: dict[str, Any], name: str) -> list[Any]:
    value = body.get(name)
    if not isinstance(value, list):
        raise _InvalidError(f"{name} must be an array." if value is not None else f"{name} is missing; it must be an array.")
    return value


def _integer(body: dict[str, Any], name: str, low: int, high: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if type(value) is not int or not low <= value <= high:
        raise _InvalidError(f"{name} must be an integer from {low} to {high}.")
    return value


def _optional_switch(body: dict[str, Any], name: str) -> bool | None:
    value = body.get(name)
    if value is None or isinstance(value, bool):
        return value
    raise _InvalidError(f"{name} must be true or false.")


def _switch(body: dict[str, Any], name: str) -> bool:
    return bool(_optional_switch(body, name))
