"""100,000 mutated lines: the decoder and a second parser agree on each. And the comparison itself sees what it is there to see."""

from __future__ import annotations

import time

import pytest

from reranker_worker.protocol import Decoder, Group, Limits, Options, Refusal, Rerank
from reranker_worker.protocol.messages import Code
from tests.fuzz.fuzz import MAX_DOCUMENTS, MAX_LINE_BYTES, difference, fuzz
from tests.fuzz.reference import verdict

LINES = 100_000
SEED = 20_000
MOST_SECONDS = 30.0  # a third of this on an idle core


def test_mutated_lines_are_served_and_refused_as_a_second_parser_says() -> None:
    begin = time.monotonic()
    tally = fuzz(LINES, SEED)
    assert not tally.differences, "\n".join(tally.differences) + f"\nreplay: python -m tests.fuzz --lines {LINES} --seed {SEED}"
    assert tally.lines == LINES
    assert time.monotonic() - begin < MOST_SECONDS
    # Each kind must come up often enough to mean something.
    assert {"served", "INVALID_JSON", "INVALID_REQUEST", "REQUEST_TOO_LARGE", "blank"} == tally.verdicts.keys()
    assert min(tally.verdicts[name] for name in ("served", "INVALID_JSON", "INVALID_REQUEST")) > 5_000


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        (b'{"query":"q","documents":[]}', "served"),
        (b'{"query":"q","documents":[]}\r', "served"),
        (b" \t\r", "blank"),
        (b'{"query":"q","documents":[],"a":1e400}', "INVALID_JSON"),
        (b'{"query":"q","documents":[],"a":NaN}', "INVALID_JSON"),
        (b'{"query":"\\ud800","documents":[]}', "INVALID_JSON"),
        (b'{"query":"\xff","documents":[]}', "INVALID_JSON"),
        (b'\xef\xbb\xbf{"query":"q","documents":[]}', "INVALID_JSON"),
        (b'{"a":' + b"[" * 16 + b"]" * 16 + b"}", "INVALID_JSON"),
        (b'{"query":"q","documents":[],"a":' + b"[" * 15 + b"]" * 15 + b"}", "served"),
        (b'{"query":"q","documents":[],"a":"' + b"[" * 99 + b'"}', "served"),
        (b'{"id":9007199254740992,"query":"q","documents":[]}', "INVALID_REQUEST"),
        (b'{"id":9007199254740991,"query":"q","documents":[]}', "served"),
        (b'{"id":1,"id":2,"query":"q","documents":[]}', "served"),
        (b"[]", "INVALID_REQUEST"),
        (b"x" * (MAX_LINE_BYTES + 1), "REQUEST_TOO_LARGE"),
        (b'{"query":"q","documents":[]}'.ljust(MAX_LINE_BYTES), "served"),
        (b'{"query":"q","documents":[]}'.ljust(MAX_LINE_BYTES + 1), "REQUEST_TOO_LARGE"),
    ],
)
def test_both_parsers_know_the_edges_of_the_contract(line: bytes, wanted: str) -> None:
    found, body = verdict(line, MAX_LINE_BYTES)
    assert found == wanted
    messages = Decoder(Limits(MAX_LINE_BYTES, MAX_DOCUMENTS)).feed(line + b"\n")
    assert difference(messages, wanted, body) is None


def test_the_comparison_sees_a_wrong_verdict_a_wrong_id_and_a_wrong_text() -> None:
    body = {"id": 1, "query": "q", "documents": ["a"]}

    def request(number: int | None, query: str = "q", documents: tuple[str, ...] = ("a",)) -> Rerank:
        return Rerank(number, "rerank", (Group(query, documents),), None, Options())

    assert difference([request(1)], "served", body) is None
    assert "served where" in str(difference([request(1)], "INVALID_REQUEST", body))
    assert "id None" in str(difference([request(None)], "served", body))
    assert "another content" in str(difference([request(1, "p")], "served", body))
    assert "another content" in str(difference([request(1, "q", ("b",))], "served", body))
    assert "refused as" in str(difference([Refusal(1, Code.INVALID_JSON, "")], "served", body))
    assert "0 messages" in str(difference([], "served", body))
