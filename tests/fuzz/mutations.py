"""Valid lines and what a careless or hostile host may make of them. Everything follows from one `random.Random`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random

_VALID = [
    {"query": "capital", "documents": ["Paris", "Lyon", ""]},
    {"id": "a", "query": "q", "documents": ["x"], "top_k": 1, "return_documents": True},
    {"id": 7, "query": "schlüssel \U0001f600", "documents": [{"text": "t", "id": 1}, "字"], "timeout_ms": 100, "priority": 3, "partial": True},
    {"id": "o", "query": "q", "documents": ["a"], "raw_scores": True, "max_length": 64, "instruction": "find", "details": False, "normalize": None},
    {"type": "score", "id": -5, "pairs": [["a", "b"], ["a", "c"], ["d", "e"]]},
    {"type": "batch", "id": "b", "requests": [{"query": "q", "documents": ["a"]}, {"type": "score", "pairs": [["a", "b"]]}], "timeout_ms": 5},
    {"type": "v1/rerank", "model": "m", "query": "q", "documents": [{"text": "a"}, "b"], "top_n": 2, "max_tokens_per_doc": 9},
    {"type": "heartbeat"},
    {"type": "stats", "id": 9007199254740991},
    {"type": "cancel", "id": "c", "target": "a"},
    {"type": "configure", "log_level": "info"},
    {"type": "shutdown", "id": None},
]
LINES = [json.dumps(body, ensure_ascii=ascii_only).encode() for body in _VALID for ascii_only in (True, False)]
_TOKENS = [
    token.encode("utf-8", "surrogatepass")
    for token in (
        "{ } [ ] , : \" \\ \\\" \\n \\u0000 \\ud800 \\udc00 \\ud83d\\ude00 \\x \\u12 null true false nul NaN Infinity -Infinity -0 -0.0 01 1. "
        ".5 1e5 1e400 -1e400 1e-400 9007199254740992 -9007199254740992 18446744073709551616 123456789012345678901234567890 0x10 +1 '' // [] {} [[ ]] "
        "\ufeff \u2028 \u0085 \x00 \x07 \t \r \x0b \x7f \x80 \ud800 \U0010ffff "
        '"id":1, "id":null, "query":"z", "type":"rerank", "type":null, "documents":[], "top_k":0,'
    ).split(" ")
] + [b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82", b"[" * 20, b"]" * 20, b'{"a":' * 17, b"9" * 5000, b" " * 30, b"x" * 300]


def mutate(rng: random.Random) -> bytes:
    """One line without its line end: a valid one with one to six changes, seldom none."""
    line = bytearray(rng.choice(LINES))
    for _ in range(0 if rng.random() < 0.03 else min(6, 1 + int(rng.expovariate(0.9)))):
        _change(line, rng)
    return bytes(line).replace(b"\n", b" ")


def _change(line: bytearray, rng: random.Random) -> None:
    size = len(line)
    place = rng.randrange(size + 1)
    kind = rng.randrange(9)
    if kind == 0 and size:
        line[place % size] ^= 1 << rng.randrange(8)
    elif kind == 1 and size:
        line[place % size] = rng.randrange(256)
    elif kind == 2:
        line[place:place] = rng.choice(_TOKENS)
    elif kind == 3:
        del line[place : place + rng.randint(1, 8)]
    elif kind == 4:
        del line[place:]
    elif kind == 5:
        line[place:place] = line[place : place + rng.randint(1, 30)]
    elif kind == 6:
        _replace_value(line, rng)
    elif kind == 7:
        line[place:] = rng.choice(LINES)[place:]
    else:
        line[:0] = rng.choice((b" ", b"[", b"\t", b"{", b"\xef\xbb\xbf"))


def _replace_value(line: bytearray, rng: random.Random) -> None:
    """What follows a colon becomes something else."""
    colons = [index for index, byte in enumerate(line) if byte == ord(":")]
    if colons:
        start = rng.choice(colons) + 1
        stops = [index for index in range(start, len(line)) if line[index] in b",}]"]
        line[start : stops[0] if stops else len(line)] = rng.choice(_TOKENS)
