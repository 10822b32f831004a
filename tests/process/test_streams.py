"""The three streams under hostile conditions: only whole protocol lines on stdout, whatever the host did to the descriptors."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import stat
import time
from pathlib import Path

import pytest
from host import Host, is_running, memory_peak_mib, request

from reranker_worker.backends.fake import fake_probability

CLOSED_SUBSETS = [subset for size in (1, 2, 3) for subset in itertools.combinations((0, 1, 2), size)]
MIB = 1024 * 1024


def expect_scores(answer: dict, documents: list[str], query: str = "query") -> None:
    assert answer["scores"] == pytest.approx([fake_probability(query, document) for document in documents])


# --- noise ---------------------------------------------------------------------------------------------------------------------


def test_noise_of_libraries_and_children_lands_on_stderr_and_never_on_stdout(spawn):
    host = spawn()
    host.wait_ready()
    answer = host.ask(request(["a", "fake:print", "b"], id=1))
    assert [answer["id"], answer["num_documents"]] == [1, 3]
    for source in ("print", "write(1)", "a child", "a warning"):
        host.logged(f"noise from {source}")
    host.logged("noise on stderr")
    assert all(record["source"] == "engine" for record in host.log() if "noise" in record["message"])


def test_noise_during_a_thousand_requests_tears_no_answer(spawn):
    host = spawn("--max-waiting-requests", "2000")
    host.wait_ready()
    host.queue(*(request([f"a{n}", "fake:print" if n % 20 == 0 else "b"], id=n) for n in range(1000)))
    answers = host.read_lines(1000, 30)
    assert sorted(answer["id"] for answer in answers) == list(range(1000))
    for answer in answers:
        assert answer["scores"][0] == pytest.approx(fake_probability("query", f"a{answer['id']}"))


def test_noise_while_python_starts_does_not_reach_stdout(spawn, tmp_path):
    """A module that prints when it is imported, in both processes."""
    (tmp_path / "orjson.py").write_text(
        "import os, sys, importlib.util\n"
        "print('noise at import'); os.write(1, b'raw noise at import\\n')\n"
        "sys.path.remove(os.path.dirname(__file__)); del sys.modules['orjson']\n"
        "import orjson\n"
    )
    host = spawn(env={"PYTHONPATH": str(tmp_path)})
    host.wait_ready()
    host.logged("raw noise at import")


# --- descriptors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", CLOSED_SUBSETS, ids=str)
def test_closed_standard_descriptors_end_in_service_or_a_clean_exit(spawn, tmp_path, closed):
    """The next opened file would take the number and receive log lines or answers."""
    canary = tmp_path / "canary"
    canary.write_text("untouched")
    setup = "\n".join(f"os.close({descriptor})" for descriptor in closed)
    host = spawn(setup=setup, cwd=tmp_path)
    if 1 not in closed and 0 not in closed:
        host.wait_ready()
        expect_scores(host.ask(request(["a", "b"])), ["a", "b"])
    host.close_stdin()
    assert host.wait_exit() in (0, 74)
    assert os.listdir(tmp_path) == ["canary"]
    assert canary.read_text() == "untouched"


def test_the_front_and_the_engine_hold_exactly_their_own_descriptors(spawn, tmp_path):
    leak = tmp_path / "leak"
    leak.touch()
    # The known host leaks descriptors without CLOEXEC, of other workers' pipes among them.
    setup = f"for _ in range(20):\n    os.set_inheritable(os.open({str(leak)!r}, os.O_RDWR), True)\na, b = os.pipe()\nos.set_inheritable(b, True)"
    host = spawn(setup=setup)
    host.wait_ready()
    front, engine = descriptors(host.pid), descriptors(host.wait_engines()[0])
    for listing in (front, engine):
        assert not any("leak" in target for target, _ in listing.values())
        assert listing[0][0] == os.devnull
    assert all(cloexec for fd, (_, cloexec) in front.items() if fd > 2), front
    assert front[1][0] == front[2][0], "everything but answers goes to stderr"
    # stdin and stdout of the conversation, the signals' pipe (2), the host's pidfd, three pipes of the engine
    assert len(front) == 3 + 2 + 2 + 1 + 3, front
    assert len(engine) == 3 + 2, engine
    assert engine[1][0] == engine[2][0]
    assert all(cloexec for fd, (_, cloexec) in engine.items() if fd > 2), "a child of the engine would keep its pipes open"
    theirs = {target for fd, (target, _) in front.items() if fd > 2 and target.startswith("pipe")}
    shared = {target for target, _ in engine.values() if target.startswith("pipe")}
    assert len(shared) == 3
    assert shared <= theirs


def test_descriptors_do_not_accumulate_over_engine_restarts(spawn):
    host = spawn()
    host.wait_ready()
    before = len(descriptors(host.pid))
    for starts in (2, 3):
        os.kill(host.wait_engines()[0], signal.SIGKILL)
        host.until(lambda starts=starts: ready_engine_starts(host) == starts, 10, "the next engine")
    assert len(descriptors(host.pid)) == before


def descriptors(pid: int) -> dict[int, tuple[str, bool]]:
    """fd -> (what it refers to, close-on-exec)."""
    found = {}
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except PermissionError:
        pytest.skip("only root can list the descriptors of an undumpable process")
    for name in names:
        flags = Path(f"/proc/{pid}/fdinfo/{name}").read_text().split("flags:")[1].split()[0]
        found[int(name)] = (os.readlink(f"/proc/{pid}/fd/{name}"), bool(int(flags, 8) & os.O_CLOEXEC))
    return found


def ready_engine_starts(host: Host) -> int:
    engine = host.ask({"type": "health"})["engines"][0]
    return engine["starts"] if engine["state"] == "ready" else 0


# --- writing -------------------------------------------------------------------------------------------------------------------


def test_one_answer_is_one_write(spawn):
    """In packet mode each write to a pipe is read on its own."""
    host = spawn(setup="fcntl.fcntl(1, fcntl.F_SETFL, fcntl.fcntl(1, fcntl.F_GETFL) | os.O_DIRECT)")
    host.wait_ready()
    host.reading = False
    host.send(*(request([f"{m}" for m in range(n % 100)], id=n) for n in range(200)), {"type": "heartbeat"})
    packets: list[bytes] = []

    def packet() -> bool:
        with contextlib.suppress(BlockingIOError):
            packets.append(os.read(host.stdout_fd, 4096))
        return len(packets) >= 201

    host.until(packet, 20, "all packets")
    for packet_bytes in packets:
        Host.parse(packet_bytes)
        assert packet_bytes.count(b"\n") == 1


def test_whole_lines_reach_a_host_that_made_the_shared_stdout_non_blocking(spawn):
    setup = "fcntl.fcntl(1, fcntl.F_SETFL, fcntl.fcntl(1, fcntl.F_GETFL) | os.O_NONBLOCK)\nos.set_blocking(0, False)\nos.set_blocking(2, False)"
    host = spawn(setup=setup)
    host.wait_ready()
    long_answers(host, count=5)


def test_whole_lines_pass_through_a_socket_with_a_tiny_buffer(spawn):
    setup = "s = socket.socket(fileno=os.dup(1))\ns.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)\ns.close()"
    host = spawn(stdin="socketpair", stdout="socketpair", setup=setup)
    host.wait_ready()
    long_answers(host, count=3)


def test_whole_lines_pass_through_a_pipe_of_one_page_under_a_storm_of_signals(spawn):
    host = spawn(setup="fcntl.fcntl(1, 1031, 4096)")
    host.wait_ready()
    storm = iter(range(1_000_000))
    host.queue(*(request([text], id=n, return_documents=True) for n, text in enumerate(long_texts(8))))

    def stormed() -> bool:
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE, signal.SIGCHLD, signal.SIGINT, signal.SIGWINCH):
            host.signal(number)
        return next(storm) > 300 and host.raw.count(b"\n") >= 9

    host.until(stormed, 20, "eight answers under signals")
    answers = host.read_lines(8, 5)
    assert {answer["id"]: answer["results"][0]["document"] for answer in answers} == dict(enumerate(long_texts(8)))


def test_answers_of_many_sizes_stay_whole_for_a_reader_of_odd_pieces(spawn):
    host = spawn()
    host.wait_ready()
    host.reading = False
    sizes = [1 + (n * n * 37) % 60_000 for n in range(60)] + [MIB]
    host.queue(*(request(["x" * size], id=n, return_documents=True) for n, size in enumerate(sizes)))

    def piece() -> bool:
        with contextlib.suppress(BlockingIOError):
            for _ in range(100):
                host.raw += os.read(host.stdout_fd, 2999)
        return host.raw.count(b"\n") > len(sizes)

    host.until(piece, 40, "all answers in pieces of 2,999 bytes")
    answers = host.read_lines(len(sizes), 1)
    assert {answer["id"]: len(answer["results"][0]["document"]) for answer in answers} == dict(enumerate(sizes))


def test_an_answer_larger_than_max_unsent_bytes_does_not_end_a_worker_whose_host_reads(spawn):
    """Escapes make up to three bytes of one: 4 MiB of request text is up to 12 MiB of answer."""
    host = spawn()
    host.wait_ready()
    text = "\U0001f600" * 1_000_000
    line = b'{"query":"q","return_documents":true,"documents":["' + text.encode() + b'"]}\n'
    answer = host.ask(line, 20)
    assert answer["results"][0]["document"] == text
    assert host.ask({"type": "heartbeat"})["status"] == "alive"


def test_a_burst_of_answers_beyond_max_unsent_bytes_does_not_end_a_worker_whose_host_reads(spawn):
    host = spawn()
    host.wait_ready()
    for n in range(12):
        host.queue(request(["fake:sleep 300" if n == 0 else "x", "y" * MIB], id=n, return_documents=True))
    answers = host.read_lines(12, 30)
    assert all(len(answer["results"]) == 2 for answer in answers)


def test_stdin_and_stdout_may_be_files(spawn, tmp_path):
    requests, answers = tmp_path / "requests", tmp_path / "answers"
    requests.write_bytes(b'{"id":1,"query":"q","documents":["a","b"]}\n\n{"id":2,"query":"q","documents":["c"]}\n{"type":"heartbeat"}')
    host = spawn(stdin=requests, stdout=answers)
    assert host.wait_exit() == 0
    lines = [Host.parse(line + b"\n") for line in answers.read_bytes().splitlines()]
    assert sorted(line.get("type") or line["id"] for line in lines if line.get("type") != "ready" and "id" in line) == [1, 2]
    assert [line["type"] for line in lines if "type" in line and line["type"] != "ready"] == ["heartbeat"]
    assert stat.S_ISREG(answers.stat().st_mode)


def long_texts(count: int) -> list[str]:
    return [chr(ord("a") + n) * 200_000 for n in range(count)]


def long_answers(host: Host, count: int) -> None:
    texts = long_texts(count)
    host.queue(*(request([text], id=n, return_documents=True) for n, text in enumerate(texts)))
    answers = host.read_lines(count, 20)
    assert {answer["id"]: answer["results"][0]["document"] for answer in answers} == dict(enumerate(texts))


# --- long lines ----------------------------------------------------------------------------------------------------------------


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


# --- the end of input ----------------------------------------------------------------------------------------------------------


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


def test_a_host_that_closes_stdout_ends_the_worker_with_74(spawn):
    host = spawn()
    host.wait_ready()
    host.close_stdout()
    assert host.wait_exit(2) == 74
    assert not is_running(host.pid)


# --- line lengths --------------------------------------------------------------------------------------------------------------


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
