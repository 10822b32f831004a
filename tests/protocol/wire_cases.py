"""One table of cases for the wire: lines in, messages out; and lines that are refused, with the code and words of the sentence."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from reranker_worker.protocol import Batch, Cancel, Code, Configure, Control, Group, Id, Limits, Message, Options, Refusal, Rerank

LIMITS = Limits(max_line_bytes=4096, max_documents=20)
CONTROLS = ("heartbeat", "stats", "live", "ready", "health", "metrics", "info", "shutdown")
LARGEST_ID = 2**53 - 1


def line(**fields: Any) -> bytes:
    """A request as a host would write it."""
    return json.dumps(fields).encode()


def rerank(query: str = "q", documents: tuple[str, ...] = ("a", "b"), request_id: Id = None, **options: Any) -> Rerank:
    """The message of an ordinary request."""
    return Rerank(request_id, "rerank", (Group(query, documents),), None, Options(**options))


def with_option(**options: Any) -> bytes:
    return line(query="q", documents=["a", "b"], **options)


@dataclass(frozen=True)
class Refused:
    """What a bad line must give: code, words that the sentence holds, and the id."""

    code: Code
    words: str = ""
    id: Id = None


V1 = line(type="v1/rerank", model="m", query="q", documents=["a", {"text": "b"}], top_n=1, return_documents=True, max_tokens_per_doc=9)

ACCEPTED: dict[str, tuple[bytes, Message]] = {
    "the known host's request": (b'{"documents":["a","b"],"query":"q"}', rerank()),
    "explicit type": (line(type="rerank", query="q", documents=["a", "b"]), rerank()),
    "null type": (line(type=None, query="q", documents=["a", "b"]), rerank()),
    "no documents": (line(query="q", documents=[]), rerank(documents=())),
    "empty texts": (line(query="", documents=["", " "]), rerank("", ("", " "))),
    "unknown field": (line(query="q", documents=["a", "b"], colour={"deep": [1]}), rerank()),
    "blanks around": (b' \t{ "query" : "q" , "documents" : [ "a" , "b" ] }  \t', rerank()),
    "carriage return at the end": (b'{"query":"q","documents":["a","b"]}\r', rerank()),
    "carriage return as blank": (b'{"query":"q",\r"documents":["a","b"]}', rerank()),
    "two-byte characters": ('{"query":"ä","documents":["ß","é"]}'.encode(), rerank("ä", ("ß", "é"))),
    "line separators as data": (
        '{"query":"\u2028\u2029\u0085","documents":["\u2028","\x7f"]}'.encode(),
        rerank("\u2028\u2029\u0085", ("\u2028", "\x7f")),
    ),
    "escaped line separators": (rb'{"query":"\u2028\r\n\u0085","documents":["\u0000","b"]}', rerank("\u2028\r\n\u0085", ("\0", "b"))),
    "surrogate pair": (rb'{"query":"\ud83d\ude00","documents":["a","b"]}', rerank("😀")),
    "last duplicate wins": (b'{"query":"x","query":"q","documents":["x"],"documents":["a","b"]}', rerank()),
    "brackets inside strings": (line(query="[{" * 400, documents=['"[[', '\\"{{{{']), rerank("[{" * 400, ('"[[', '\\"{{{{'))),
    "id of text": (with_option(id="a"), rerank(request_id="a")),
    "empty id": (with_option(id=""), rerank(request_id="")),
    "id of 128 bytes": (with_option(id="é" * 64), rerank(request_id="é" * 64)),
    "id zero": (with_option(id=0), rerank(request_id=0)),
    "negative id": (with_option(id=-LARGEST_ID), rerank(request_id=-LARGEST_ID)),
    "largest id": (with_option(id=LARGEST_ID), rerank(request_id=LARGEST_ID)),
    "null id": (with_option(id=None), rerank()),
    "documents as objects": (
        line(query="q", documents=["a", {"text": "b", "id": 7}, {"text": "c", "more": 1}]),
        Rerank(None, "rerank", (Group("q", ("a", "b", "c")),), (None, 7, None), Options()),
    ),
    "pairs, grouped by runs of one query": (
        line(type="score", id=1, pairs=[["q", "a"], ["q", "b"], ["r", "c"], ["q", "d"]]),
        Rerank(1, "score", (Group("q", ("a", "b")), Group("r", ("c",)), Group("q", ("d",))), None, Options()),
    ),
    "no pairs": (line(type="score", pairs=[]), Rerank(None, "score", (), None, Options())),
    "Cohere's request": (
        V1,
        Rerank(
            None,
            "v1/rerank",
            (Group("q", ("a", "b")),),
            (None, None),
            Options(top_k=1, return_documents=True, max_document_tokens=9, details=True),
            "m",
        ),
    ),
    "batch": (
        line(type="batch", id="b", timeout_ms=5, requests=[{"query": "q", "documents": ["a", "b"]}, {"id": 1}, 3]),
        Batch(
            "b",
            (
                rerank(timeout_ms=5),
                Refusal(1, Code.INVALID_REQUEST, "requests[1]: query is missing; it must be a string."),
                Refusal(None, Code.INVALID_REQUEST, "requests[2]: must be an object with query and documents."),
            ),
        ),
    ),
    "a part's own time-out": (
        line(type="batch", timeout_ms=5, requests=[{"query": "q", "documents": ["a", "b"], "timeout_ms": 6}]),
        Batch(None, (rerank(timeout_ms=6),)),
    ),
    "empty batch": (line(type="batch", requests=[]), Batch(None, ())),
    "cancel": (line(type="cancel", target="x", id=1), Cancel(1, "x")),
    "cancel zero": (line(type="cancel", target=0), Cancel(None, 0)),
    "configure": (line(type="configure", log_level="debug"), Configure(None, "DEBUG")),
    "configure nothing": (line(type="configure", id="c"), Configure("c", None)),
    **{name: (line(type=name, id=3), Control(3, name)) for name in CONTROLS},
    **{f"{name} as {json.dumps(value)}": (with_option(**{name: value}), rerank(**want)) for name, value, want in [
        ("top_k", 1, {"top_k": 1}),
        ("top_k", 10**6, {"top_k": 10**6}),
        ("top_k", None, {}),
        ("return_documents", True, {"return_documents": True}),
        ("return_documents", False, {}),
        ("raw_scores", True, {"scale": "logit"}),
        ("raw_scores", False, {}),
        ("normalize", True, {"scale": "probability"}),
        ("normalize", False, {"scale": "logit"}),
        ("max_length", 1, {"max_length": 1}),
        ("max_length", 1 << 20, {"max_length": 1 << 20}),
        ("timeout_ms", 1, {"timeout_ms": 1}),
        ("timeout_ms", 3_600_000, {"timeout_ms": 3_600_000}),
        ("priority", 0, {}),
        ("priority", 999, {"priority": 999}),
        ("partial", True, {"partial": True}),
        ("details", True, {"details": True}),
        ("instruction", "judge", {"instruction": "judge"}),
        ("instruction", "", {}),
    ]},
}  # fmt: skip

_BAD_IDS: list[Any] = [True, False, 1.0, 1e3, 2**53, -(2**53), 2**64, "x" * 129, "é" * 65, [], {}, [1]]
_NOT_STRINGS: list[Any] = [1, 1.5, True, [], {}, ["q"]]
_BAD_OPTIONS: dict[str, list[Any]] = {
    "top_k": [0, -1, 1.0, "1", True, [], {}, 2**60],
    "return_documents": [0, 1, "true", [], {}],
    "raw_scores": [0, "yes", []],
    "normalize": [1, "no", {}],
    "max_length": [0, -5, 1.5, "9", True, (1 << 20) + 1],
    "timeout_ms": [0, -1, 0.5, "5", False, 3_600_001],
    "priority": [-1, 1000, 1.0, "0", True],
    "partial": [0, "false", []],
    "details": [1, "x", {}],
    "instruction": [1, True, [], {}],
}
_INVALID = Code.INVALID_REQUEST
_JSON = Code.INVALID_JSON

# A small hostile corpus: texts that are not JSON, each wrong in its own way.
NOT_JSON: list[bytes] = [
    b"{", b"}", b"[", b"]", b'{"', b'{"a', b'{"a"', b'{"a":', b'{"a":1', b'{"a":1,', b'{"a":1,}', b"{,}", b'{"a" 1}', b'{"a":1 "b":2}', b"{1:2}",
    b"{a:1}", b"{'a':1}", b'{"a":\'b\'}', b'{"a":tru}', b'{"a":True}', b'{"a":None}', b'{"a":undefined}', b'{"a":nul}', b'{"a":truee}',
    b'{"a":NaN}', b'{"a":-NaN}', b'{"a":Infinity}', b'{"a":-Infinity}', b'{"a":1e400}', b'{"a":-1e400}', b'{"a":' + b"9" * 3000 + b"}",
    b'{"a":01}', b'{"a":+1}', b'{"a":.5}', b'{"a":5.}', b'{"a":1e}', b'{"a":1e+}', b'{"a":-}', b'{"a":--1}', b'{"a":0x1f}', b'{"a":1_000}',
    b'{"a":"\x00"}', b'{"a":"\x1f"}', b'{"a":"\t"}', b"\x00", b"{\x00}", b'{"a":1}\x00', b'{"a":"\\x41"}', b'{"a":"\\u12"}', b'{"a":"\\uZZZZ"}',
    b'{"a":"\\"}', b'{"a":"\\', b'"\\\\', b"//", b'{"a":1}//x', b'/*x*/{"a":1}', b'{"a":1}{"b":2}', b'{"a":1}]', b'{"a":1},', b"[1,]", b"[1,,2]",
    b'{"a":1;"b":2}', b"\xc2\xa0{}", b"\xe2\x80\xa8{}", b'{"a":"\x7f}', b'\\"' * 50, b'"' * 51, b"nonsense", b"<a/>", b"GET / HTTP/1.1",
    b"\x0b{}", b"\x0c{}",
]  # fmt: skip
NOT_OBJECTS: list[bytes] = [b"1", b"-0", b"null", b"true", b"false", b'"text"', b"[]", b"[{}]", b"1e3", b'""', b'["query"]']
# (line, offset of the first bad byte)
NOT_UTF8: list[tuple[bytes, int]] = [
    (b"\xff", 0),
    (b'{"query":"\xff"}', 10),
    (b'{"query":"a\xc3"}', 11),
    (b'{"query":"\xc0\xaf"}', 10),
    (b'{"query":"\xe0\x80\xaf"}', 10),
    (b'{"query":"\xed\xa0\x80"}', 10),
    (b'{"query":"\xf4\x90\x80\x80"}', 10),
    (b'{"query":"\xc3\xa4\x80"}', 12),
    (b"\xff\xfe{\x00}\x00", 0),
    (b"{\x80}", 1),
]

REFUSED: dict[str, tuple[bytes, Refused]] = {
    "byte order mark": (b"\xef\xbb\xbf" + with_option(), Refused(_JSON, "byte order mark")),
    "depth 17": (b'{"query":"q","documents":[],"x":' + b"[" * 16 + b"]" * 16 + b"}", Refused(_JSON, "deeper than 16")),
    "depth 17, mixed": (b'{"x":' + b'[{"x":' * 8 + b"1" + b"}]" * 8 + b"}", Refused(_JSON, "deeper than 16")),
    "unknown type": (line(type="rank", id=1), Refused(_INVALID, "Unknown type", 1)),
    "empty type": (line(type="", id=1), Refused(_INVALID, "Unknown type", 1)),
    "type of another kind": (line(type=5, id="a"), Refused(_INVALID, "type must be a string", "a")),
    "nothing at all": (b"{}", Refused(_INVALID, "query is missing")),
    "no query": (line(documents=["a"], id=5), Refused(_INVALID, "query is missing", 5)),
    "null query": (line(query=None, documents=["a"]), Refused(_INVALID, "query is missing")),
    "no list": (line(query="q", id=5), Refused(_INVALID, "documents is missing", 5)),
    "document null": (line(query="q", documents=["a", None]), Refused(_INVALID, "documents[1]")),
    "document number": (line(query="q", documents=[1]), Refused(_INVALID, "documents[0]")),
    "document without text": (line(query="q", documents=["a", "b", {"id": 1}]), Refused(_INVALID, "documents[2]")),
    "document with a wrong text": (line(query="q", documents=[{"text": ["a"]}]), Refused(_INVALID, "documents[0]")),
    "document with a wrong id": (line(query="q", documents=[{"text": "a", "id": 1.5}], id=2), Refused(_INVALID, "documents[0].id", 2)),
    "too many documents": (line(query="q", documents=["a"] * 21, id=1), Refused(Code.REQUEST_TOO_LARGE, "max_documents (20)", 1)),
    "too many pairs": (line(type="score", pairs=[["q", "a"]] * 21), Refused(Code.REQUEST_TOO_LARGE, "pairs has 21")),
    "too many parts": (line(type="batch", requests=[{}] * 21), Refused(Code.REQUEST_TOO_LARGE, "requests has 21")),
    "too many containers": (b'{"x":[' + b"[]," * 200 + b"[]]}", Refused(Code.REQUEST_TOO_LARGE, "too many arrays and objects")),
    "pair of one": (line(type="score", pairs=[["q", "a"], ["q"]]), Refused(_INVALID, "pairs[1]")),
    "pair of three": (line(type="score", pairs=[["q", "a", "b"]]), Refused(_INVALID, "pairs[0]")),
    "pair of text": (line(type="score", pairs=["qa"]), Refused(_INVALID, "pairs[0]")),
    "pair with null": (line(type="score", pairs=[["q", None]]), Refused(_INVALID, "pairs[0]")),
    "no pairs field": (line(type="score", query="q", documents=["a"]), Refused(_INVALID, "pairs is missing")),
    "no requests": (line(type="batch", id="b"), Refused(_INVALID, "requests is missing", "b")),
    "both scales": (with_option(raw_scores=True, normalize=True, id=4), Refused(_INVALID, "exclude each other", 4)),
    "cancel without target": (line(type="cancel", id=1), Refused(_INVALID, "target", 1)),
    "cancel with a wrong target": (line(type="cancel", target=[1], id=1), Refused(_INVALID, "target", 1)),
    "configure nonsense": (line(type="configure", log_level="LOUD"), Refused(_INVALID, "log_level must be one of")),
    "configure a number": (line(type="configure", log_level=10), Refused(_INVALID, "log_level must be one of")),
    **{f"top_n as {value!r}": (line(type="v1/rerank", query="q", documents=[], top_n=value), Refused(_INVALID, "top_n")) for value in (0, "1", 1.5)},
    **{f"id {json.dumps(value)[:20]}": (with_option(id=value), Refused(_INVALID, "id must be")) for value in _BAD_IDS},
    **{f"query {value!r}": (line(query=value, documents=[]), Refused(_INVALID, "query must be a string")) for value in _NOT_STRINGS},
    **{f"documents {value!r}": (line(query="q", documents=value), Refused(_INVALID, "documents must be an array")) for value in (1, "a", {}, True)},
    **{
        f"{name} as {value!r}": (with_option(id="o", **{name: value}), Refused(_INVALID, name, "o"))
        for name, values in _BAD_OPTIONS.items()
        for value in values
    },
    **{f"not JSON: {text[:40]!r} ({len(text)})": (text, Refused(_JSON, "not valid JSON")) for text in NOT_JSON},
    **{f"not an object: {text!r}": (text, Refused(_INVALID, "JSON object")) for text in NOT_OBJECTS},
    **{f"not UTF-8: {text!r}": (text, Refused(_JSON, f"not valid UTF-8 at byte {offset}.")) for text, offset in NOT_UTF8},
}
