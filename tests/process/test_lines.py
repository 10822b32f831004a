"""Lines of every length: at the cap and beyond it, bombs, cut by the end of input, and answers that would stall a host."""

from __future__ import annotations

import time

import pytest
from host import Host, memory_peak_mib, request

from reranker_worker.backends.fake import fake_probability

MIB = 1024 * 1024


def expect_scores(answer: dict, documents: list[str], query: str = "query") -> None:
    assert answer["scores"] == pytest.approx([fake_probability(query, document) for document in documents])


def line_of(size: int) -> bytes:
    """A request of exactly `size` bytes without its line end."""
    head, tail = b'{"query":"q","documents":["', b'"]}'
    return head + b"x" * (size - len(head) - len(tail)) + tail


def test_lines_up_to_the_cap_are_served_and_longer_ones_are_refused_once(spawn):
    host = spawn()
    cap = host.wait_ready()["limits"]["max_line_bytes"]
    for size, served in ((cap - 1, True), (cap, True), (cap + 1, False), (cap + 2, False)):
        for end in (b"\n", b"\r\n"):
            answer = host.ask(line_of(size) + end)
            assert ("scores" in answer) is served, (size, end, answer)
            assert served or answer["code"] == "REQUEST_TOO_LARGE"
    assert host.ask({"type": "heartbeat"})["status"] == "alive"


def test_a_line_of_256_mib_costs_constant_memory_and_one_answer(spawn):
    host = spawn()
    cap_mib = host.wait_ready()["limits"]["max_line_bytes"] / MIB
    block = b"x" * (4 * MIB)
    for _ in range(64):
        host.send(block)
    assert host.ask(b"\n", 20)["code"] == "REQUEST_TOO_LARGE"
    expect_scores(host.ask(request(["next"])), ["next"])
    assert memory_peak_mib(host.pid) <= 2 * cap_mib + 32
    host.send(block, block)
    host.close_stdin()
    assert host.read_line()["code"] == "REQUEST_TOO_LARGE"
    assert host.wait_exit() == 0


BOMBS = {
    "empty arrays": (b"[],", b"[]"),
    "small objects": (b'{"a":0},', b"0"),
    "short strings": (b'"ab",', b'""'),
    "integers": (b"1,", b"1"),
    "nested": (b"[", b"]"),
    "keys": (b"", b""),
}


@pytest.mark.parametrize("shape", BOMBS)
def test_a_line_at_the_cap_never_takes_thirty_times_its_size(spawn, shape):
    host = spawn()
    cap = host.wait_ready()["limits"]["max_line_bytes"]
    unit, last = BOMBS[shape]
    if shape == "keys":
        keys = b",".join(b'"%06x":0' % n for n in range(cap // 11 - 10))
        line = b'{"query":"q","documents":["a"],' + keys + b"}\n"
    else:
        line = b'{"query":"q","documents":[' + unit * ((cap - 64) // len(unit)) + last + b"]}\n"
    assert len(line) <= cap
    begin = time.monotonic()
    answer = host.ask(line)
    assert time.monotonic() - begin < 5
    assert "code" in answer or answer["scores"], answer
    assert memory_peak_mib(host.pid) <= 30 * cap / MIB
    assert host.ask({"type": "heartbeat"})["status"] == "alive"


def test_a_million_documents_are_refused_quickly(spawn):
    host = spawn()
    host.wait_ready()
    line = b'{"id":7,"query":"q","documents":[' + b",".join([b'""'] * 1_000_000) + b"]}\n"
    assert len(line) < 4 * MIB
    quickest = min(timed_refusal(host, line) for _ in range(3))
    assert quickest < 0.5


def timed_refusal(host: Host, line: bytes) -> float:
    begin = time.monotonic()
    answer = host.ask(line)
    assert (answer["id"], answer["code"]) == (7, "REQUEST_TOO_LARGE")
    return time.monotonic() - begin


@pytest.mark.parametrize("cut", [1, 20, 41, 42])
def test_a_request_cut_by_the_end_of_input_is_answered_without_a_guessed_id(spawn, cut):
    line = b'{"id":1234,"query":"q","documents":["abcd"]}'
    host = spawn()
    host.wait_ready()
    host.send(line[:cut])
    host.close_stdin()
    answer = host.read_line()
    assert answer["code"] == "INVALID_JSON"
    assert "id" not in answer
    assert host.wait_exit() == 0
    assert not host.has_line()


def test_a_whole_request_without_its_line_end_is_served_at_the_end_of_input(spawn):
    host = spawn()
    host.wait_ready()
    host.send(b'{"id":1234,"query":"query","documents":["abcd"]}')
    host.close_stdin()
    expect_scores(host.read_line(), ["abcd"])
    assert host.wait_exit() == 0


def test_no_answer_has_a_length_that_stalls_a_host_with_a_stdio_buffer(spawn):
    """A line of L bytes stalls it when k = (L - 1) // 4095 >= 1 and L <= 4096 k."""
    host = spawn()
    host.wait_ready()
    probe = host.ask(request(["x" * 100], return_documents=True))
    overhead = len(str(probe)) - 100
    lengths = [100, *range(4095 - overhead - 40, 4096 - overhead + 40, 2), *(4095 * k - overhead + d for k in (2, 3, 9) for d in range(-40, 60, 4))]
    seen = set()
    for length in lengths:
        host.send(request(["x" * length], return_documents=True))
        line = host.read_raw_line()
        Host.parse(line)
        whole = (len(line) - 1) // 4095
        assert whole == 0 or len(line) > 4096 * whole, len(line)
        seen.add(len(line))
    assert {4097, 8193} <= seen, "the hazard was met and padded away"
