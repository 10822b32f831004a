"""Frames between front and engine survive every cut; what cannot be a frame is refused."""

from __future__ import annotations

import contextlib
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reranker_worker.engine.frames import MAX_FRAME_BYTES, FrameError, FrameReader, pack

BODIES: list[dict[str, Any]] = [
    {},
    {"op": "score", "batch": 1, "groups": [["q", 0, 0, "", ["a", "é\u2028😀\n\0"]]]},
    {"event": "scored", "logits": [1.5, None, -8.0]},
    {"x": "y" * 300},
]


def test_frames_come_out_whole_in_every_chunk_size() -> None:
    stream = b"".join(map(pack, BODIES))
    for size in range(1, len(stream) + 1):
        reader = FrameReader()
        frames = [frame for start in range(0, len(stream), size) for frame in reader.feed(stream[start : start + size])]
        assert frames == BODIES, size


def test_a_frame_is_given_as_soon_as_its_last_byte_is_there() -> None:
    reader = FrameReader()
    data = pack({"a": 1})
    assert reader.feed(data[:-1]) == []
    assert reader.feed(data[-1:] + pack({"b": 2})[:3]) == [{"a": 1}]
    assert reader.feed(pack({"b": 2})[3:]) == [{"b": 2}]
    assert reader.feed(b"") == []


def framed(text: bytes) -> bytes:
    return struct.pack("<I", len(text)) + text


@pytest.mark.parametrize("text", [b"", b"x", b"{", b"[]", b"1", b"null", b'"x"', b'{"a":NaN}', b'{"a":"\xff"}', b"{}{}", b"\0\0"])
def test_what_is_not_a_json_object_is_refused(text: bytes) -> None:
    with pytest.raises(FrameError):
        FrameReader().feed(framed(text))


@pytest.mark.parametrize("size", [MAX_FRAME_BYTES + 1, 2**32 - 1])
def test_a_size_beyond_the_limit_is_refused_from_its_first_four_bytes(size: int) -> None:
    with pytest.raises(FrameError, match=str(size)):
        FrameReader().feed(struct.pack("<I", size))


def test_a_size_at_the_limit_is_waited_for() -> None:
    assert FrameReader().feed(struct.pack("<I", MAX_FRAME_BYTES) + b"{") == []


def test_text_on_the_inner_wire_is_refused() -> None:
    with pytest.raises(FrameError):
        FrameReader().feed(b"Traceback (most recent call last):\n")


@given(st.lists(st.dictionaries(st.text(max_size=3), st.none() | st.text() | st.integers(-(2**53), 2**53)), max_size=6), st.data())
def test_any_frames_come_out_as_they_went_in(bodies: list[dict[str, Any]], data: st.DataObject) -> None:
    stream = b"".join(map(pack, bodies))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    reader = FrameReader()
    frames = [frame for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True) for frame in reader.feed(stream[start:end])]
    assert frames == bodies


@given(st.binary(max_size=60))
def test_no_garbage_raises_anything_but_a_frame_error(data: bytes) -> None:
    with contextlib.suppress(FrameError):
        FrameReader().feed(data)
