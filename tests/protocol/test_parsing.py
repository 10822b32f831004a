"""Bytes in, messages out: every case of the table, and what no table can hold."""

from __future__ import annotations

import json
import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wire_cases import ACCEPTED, LIMITS, REFUSED, line, with_option

from reranker_worker.protocol import Batch, Code, Decoder, Limits, Message, Refusal, Rerank

LARGE = Limits(max_line_bytes=4 << 20, max_documents=1000)


def parse(data: bytes, limits: Limits = LIMITS) -> Message:
    """The one message of a line."""
    (message,) = Decoder(limits).feed(data + b"\n")
    return message


def refusal(data: bytes, limits: Limits = LIMITS) -> Refusal:
    message = parse(data, limits)
    assert isinstance(message, Refusal), message
    return message


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_good_line_becomes_its_message(name: str) -> None:
    data, expected = ACCEPTED[name]
    assert parse(data) == expected


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_line_becomes_one_refusal_that_says_why(name: str) -> None:
    data, expected = REFUSED[name]
    message = refusal(data)
    assert message.code is expected.code
    assert message.id == expected.id
    assert type(message.id) is type(expected.id)
    assert expected.words in message.error


@pytest.mark.parametrize("field", ["query", "document", "id"])
def test_every_lone_surrogate_is_refused(field: str) -> None:
    for unit in range(0xD800, 0xE000):
        escape = f"\\u{unit:04x}"
        texts = {"query": "q", "document": "d", "id": "i"} | {field: escape}
        data = '{{"id":"{id}","query":"{query}","documents":["{document}"]}}'.format(**texts).encode()
        message = refusal(data)
        assert message.code is Code.INVALID_JSON, escape
        assert "lone surrogate" in message.error
        assert message.id is None


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"a":'])
@pytest.mark.parametrize("depth", [1_000, 100_000, 1_000_000])
def test_deep_nesting_is_refused_before_anything_is_built(opening: bytes, depth: int) -> None:
    data = (opening * depth)[: LARGE.max_line_bytes]
    assert refusal(data, LARGE).code in (Code.INVALID_JSON, Code.REQUEST_TOO_LARGE)


def test_sixteen_levels_pass_and_seventeen_do_not() -> None:
    def nested(levels: int) -> bytes:
        return b'{"query":"q","documents":["a"],"x":' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"

    assert isinstance(parse(nested(16)), Rerank)
    assert refusal(nested(17)).code is Code.INVALID_JSON


@pytest.mark.parametrize("text", ["[" * 30_000, "{[" * 30_000, '\\"[' * 20_000, "\\\\" * 20_000 + "[" * 100, '"[{' * 9000, "\\[" * 9000])
def test_brackets_inside_strings_do_not_count(text: str) -> None:
    message = parse(json.dumps({"query": text, "documents": [text, "x"]}).encode(), LARGE)
    assert isinstance(message, Rerank)
    assert message.groups[0].query == message.groups[0].documents[0] == text


@given(st.text(st.sampled_from('[]{}"\\a,'), min_size=20, max_size=60), st.text(st.sampled_from('[]{}"\\a,'), max_size=60))
def test_texts_full_of_brackets_quotes_and_backslashes_always_pass(query: str, document: str) -> None:
    message = parse(json.dumps({"query": query, "documents": [document] * 3}).encode())
    assert isinstance(message, Rerank)
    assert message.groups[0].documents == (document,) * 3


BOMBS = {
    "arrays": b"[],",
    "objects": b"{},",
    "filled objects": b'{"a":0},',
    "mixed": b'[{"a":[]}],',
    "arrays behind strings": b'"[",[],',
    "arrays behind escapes": b'"\\"",[],',
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_container_bomb_at_the_line_limit_is_refused_without_being_built(name: str) -> None:
    unit = BOMBS[name]
    data = b'{"documents":[' + unit * ((LARGE.max_line_bytes - 20) // len(unit)) + b"1]}"
    decoder = Decoder(LARGE)
    tracemalloc.start()
    (message,) = decoder.feed(data + b"\n")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(message, Refusal)
    assert message.code is Code.REQUEST_TOO_LARGE
    assert peak < 8 * LARGE.max_line_bytes  # built, it would be twenty times the line


@pytest.mark.parametrize("unit", [b'\\"', b'"', b'"\\', b'["a', b'"\\\\', b'"\\\\\\', b"\\", b'"[', b'"a\\"b",[],'])
def test_no_line_takes_longer_than_in_proportion_to_its_length(unit: bytes) -> None:
    prefix = b'{"x":' + b"[" * 17
    begin = time.process_time()
    parse(prefix + unit * (400_000 // len(unit)), LARGE)
    assert time.process_time() - begin < 2.0  # hours, if each quote began a new search


@pytest.mark.parametrize("name", ACCEPTED)
def test_each_prefix_of_a_request_at_the_end_of_input_is_refused_once(name: str) -> None:
    data = ACCEPTED[name][0].strip()
    for end in range(1, len(data)) if len(data) < 200 else (1, 2, 50, len(data) // 2, len(data) - 1):
        decoder = Decoder(LIMITS)
        assert decoder.feed(data[:end]) == []
        (message,) = decoder.finish()
        assert isinstance(message, Refusal), data[:end]
        assert message.code is Code.INVALID_JSON
        assert message.id is None
        assert "middle of a line" in message.error
        assert decoder.finish() == []


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_whole_request_at_the_end_of_input_is_served_without_its_newline(name: str) -> None:
    data, expected = ACCEPTED[name]
    decoder = Decoder(LIMITS)
    assert decoder.feed(data) == []
    assert decoder.finish() == [expected]


def test_a_million_documents_are_refused_and_the_next_line_is_served() -> None:
    decoder = Decoder(LARGE)
    data = b'{"query":"q","documents":[' + b'"",' * 1_000_000 + b'""]}\n'
    (message,) = decoder.feed(data)
    assert isinstance(message, Refusal)
    assert message.code is Code.REQUEST_TOO_LARGE
    assert isinstance(decoder.feed(with_option() + b"\n")[0], Rerank)


VALUES = [None, True, 0, 1.5, -0.0, 1e300, "", "x", "\0", [], [[]], {}, {"text": 1}, {"text": None}, [None], [1], ["a", None], {"a": {"b": []}}]


@pytest.mark.parametrize("field", ["id", "type", "query", "documents", "pairs", "requests", "target", "top_k", "log_level"])
def test_any_value_in_any_field_gives_one_message(field: str) -> None:
    for value in VALUES:
        for kind in ("rerank", "score", "batch", "v1/rerank", "cancel", "configure", "live"):
            body: dict[str, Any] = {"type": kind, "query": "q", "documents": ["a"], "pairs": [["q", "a"]], "requests": [], "target": 1}
            parse(json.dumps(body | {field: value}).encode())


SECRET = "s3cr3t"
SECRETIVE = st.recursive(
    st.sampled_from([SECRET, SECRET + "\n", None, True, 1, 1.5, "", "score"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([SECRET, "text", "id", "query", "documents"]), inner, max_size=3),
    max_leaves=8,
)
NAMES = ["id", "type", "query", "documents", "pairs", "requests", "target", "top_k", "max_length", "instruction", "priority", "log_level", SECRET]


def sentences(message: Message) -> list[str]:
    if isinstance(message, Refusal):
        return [message.error]
    return [part.error for part in message.requests if isinstance(part, Refusal)] if isinstance(message, Batch) else []


@given(st.dictionaries(st.sampled_from(NAMES), SECRETIVE, max_size=6), st.integers(0, 200))
def test_no_error_ever_holds_text_of_the_request(body: dict[str, Any], cut: int) -> None:
    data = json.dumps(body).encode()
    decoder = Decoder(LIMITS)
    messages = decoder.feed(data + b"\n" + data[:cut])
    for message in [*messages, *decoder.finish(), parse(line(type="batch", requests=[body])), parse(b"\xff" + data)]:
        for sentence in sentences(message):
            assert SECRET not in sentence
            assert sentence.isascii()


@pytest.mark.parametrize("end", [b"}", b",", b"\xff", b'"', b" x", b"[" * 20])
@pytest.mark.parametrize("name", ["id", "type", "query", "documents", "pairs", "requests", "target", "top_k", "priority", "log_level", "normalize"])
@pytest.mark.parametrize("value", [SECRET, SECRET * 40, [SECRET], {SECRET: SECRET}, [[SECRET]], [{SECRET: 1}], [{"text": "a", "id": [SECRET]}]])
def test_no_value_in_any_field_is_quoted(name: str, value: Any, end: bytes) -> None:
    for kind in ("rerank", "score", "batch", "v1/rerank", "cancel", "configure"):
        data = line(**{"type": kind, "query": "q", "documents": [], "pairs": [], "requests": [], "target": 1} | {name: value})
        for message in (parse(data), parse(data + end), parse(line(type="batch", requests=[value]))):
            assert not any(SECRET in sentence for sentence in sentences(message))


@given(st.binary(max_size=300))
def test_no_bytes_make_the_decoder_raise(data: bytes) -> None:
    decoder = Decoder(LIMITS)
    messages = decoder.feed(data) + decoder.finish()
    assert len(messages) == sum(bool(text.removesuffix(b"\r").strip(b" \t\r")) for text in data.split(b"\n"))
