"""Lines are cut at 0x0A and nowhere else, whatever the chunks; a long one costs nothing but its own answer."""

from __future__ import annotations

import random
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wire_cases import ACCEPTED, LIMITS, REFUSED

from reranker_worker.protocol import Decoder, LineReader, Oversize, Refusal

CAP = 100


def read(data: bytes, cuts: list[int], cap: int = CAP) -> list[bytes | Oversize]:
    """The lines of `data`, fed in pieces that end at `cuts`."""
    reader = LineReader(cap)
    lines: list[bytes | Oversize] = []
    for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
        lines += reader.feed(data[start:end])
    return lines + reader.finish()


@pytest.mark.parametrize("name", [*ACCEPTED, *REFUSED])
def test_every_case_gives_the_same_message_in_every_chunk_size(name: str) -> None:
    case = ACCEPTED[name][0] if name in ACCEPTED else REFUSED[name][0]
    data = case + b"\n" + b'{"type":"live"}\n'
    expected = Decoder(LIMITS).feed(data)
    assert len(expected) == 2
    sizes = range(1, len(data) + 1) if len(data) <= 120 else [1, 2, 7, 64, len(data) - 1]
    for size in sizes:
        decoder = Decoder(LIMITS)
        messages = [message for start in range(0, len(data), size) for message in decoder.feed(data[start : start + size])]
        assert messages == expected, size
        assert decoder.finish() == []


def test_all_cases_in_one_stream_are_answered_in_order_at_random_cuts() -> None:
    data = b"".join(case + b"\n" for case, _ in [*ACCEPTED.values(), *REFUSED.values()])
    expected = Decoder(LIMITS).feed(data)
    assert len(expected) == len(ACCEPTED) + len(REFUSED)
    chance = random.Random(1)
    for _ in range(30):
        cuts = sorted(chance.sample(range(len(data)), chance.randrange(1, 400)))
        decoder = Decoder(LIMITS)
        assert [m for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True) for m in decoder.feed(data[start:end])] == expected


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"", b"\r"])
@pytest.mark.parametrize(("length", "fits"), [(CAP - 1, True), (CAP, True), (CAP + 1, False), (CAP + 2, False), (10 * CAP, False)])
def test_the_limit_counts_the_line_without_its_end(length: int, fits: bool, end: bytes) -> None:
    text = b"x" * length
    for size in range(1, length + 3):
        data = text + end
        lines = read(data, list(range(size, len(data), size)))
        assert lines == [text if fits else Oversize()], size


@pytest.mark.parametrize("after", [b"next", b"y" * CAP, b"\r\nnext\r"])
def test_the_line_after_a_long_one_is_read(after: bytes) -> None:
    data = b"x" * (3 * CAP) + b"\n" + after + b"\n" + b"x" * (CAP + 1) + b"\nlast\n"
    wanted: list[bytes | Oversize] = [Oversize(), after.strip(b"\r\n"), Oversize(), b"last"]
    for size in range(1, len(data)):
        assert read(data, list(range(size, len(data), size))) == wanted, size


def test_a_long_line_is_discarded_as_it_arrives() -> None:
    reader = LineReader(1 << 16)
    tracemalloc.start()
    for number in range(200):
        assert reader.feed(b"%05d" % number * 13_000) == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 16
    assert reader.feed(b"\nok\n") == [Oversize(), b"ok"]


def test_a_long_line_is_answered_once_and_names_the_limit() -> None:
    decoder = Decoder(LIMITS)
    messages = decoder.feed(b"x" * 10_000 + b"\n" + b'{"type":"live","id":1}\n')
    assert [type(message).__name__ for message in messages] == ["Refusal", "Control"]
    assert isinstance(messages[0], Refusal)
    assert messages[0].code.value == "REQUEST_TOO_LARGE"
    assert str(LIMITS.max_line_bytes) in messages[0].error


@pytest.mark.parametrize("blank", [b"", b"\r", b" ", b"\t", b" \t \r", b"\r\r"])
def test_blank_lines_get_no_answer(blank: bytes) -> None:
    assert read(blank + b"\n" + blank + b"\nx\n" + blank, []) == [b"x"]


@pytest.mark.parametrize("other", ["\r", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"])
def test_only_a_line_feed_ends_a_line(other: str) -> None:
    text = f"a{other}b".encode()
    assert read(text + b"\n", []) == [text]


def test_one_carriage_return_is_taken_away_and_no_more() -> None:
    assert read(b"a\r\r\nb\r", []) == [b"a\r", b"b"]


@given(st.lists(st.binary(max_size=40), max_size=8), st.data())
def test_what_is_read_does_not_depend_on_the_cuts(parts: list[bytes], data: st.DataObject) -> None:
    stream = b"\n".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    assert read(stream, cuts, 20) == read(stream, [], 20)
