"""The inner wire between front and engine: a 4-byte little-endian length, then JSON. Bounded; no pickle, so neither side can run the other's bytes.

Front to engine: {"op": "load", "config": {...}}, then {"op": "score", "batch": n, "order": n, "groups": [[query, max_length,
max_document_tokens, instruction, [document, ...]], ...]}; what waits with the lowest order is scored first.
Engine to front: {"event": "loading" | "ready" | "load_failed" | "progress" | "scored" | "failed", ...}.
"""

from __future__ import annotations

import struct
from typing import Any

import orjson

_HEADER = struct.Struct("<I")
MAX_FRAME_BYTES = 512 * 1024 * 1024


class FrameError(Exception):
    """The other side broke the inner wire."""


def pack(body: dict[str, Any]) -> bytes:
    """One frame."""
    text = orjson.dumps(body)
    return _HEADER.pack(len(text)) + text


class FrameReader:
    """Bytes in, frames out; holds one unfinished frame, whose size is known from its first four bytes."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """The frames that `data` completes; raises FrameError for a frame that cannot be one of ours."""
        self._buffer += data
        frames: list[dict[str, Any]] = []
        start = 0
        while len(self._buffer) - start >= _HEADER.size:
            (size,) = _HEADER.unpack_from(self._buffer, start)
            if size > MAX_FRAME_BYTES:
                raise FrameError(f"frame of {size} bytes")
            end = start + _HEADER.size + size
            if len(self._buffer) < end:
                break
            frames.append(self._parse(start + _HEADER.size, end))
            start = end
        del self._buffer[:start]
        return frames

    def _parse(self, start: int, end: int) -> dict[str, Any]:
        try:
            body = orjson.loads(memoryview(self._buffer)[start:end])
        except orjson.JSONDecodeError as reason:
            raise FrameError("frame is not JSON") from reason
        if not isinstance(body, dict):
            raise FrameError("frame is not an object")
        return body
