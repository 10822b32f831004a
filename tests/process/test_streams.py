"""Noise on every stream and readers of every kind: only whole protocol lines reach stdout, one write each."""

from __future__ import annotations

import contextlib
import os
import signal
import stat

import pytest
from host import Host, is_running, request
from states import while_importing

from reranker_worker.backends.fake import fake_probability

MIB = 1024 * 1024


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
    host = spawn(env=while_importing(tmp_path, r"print('noise at import'); os.write(1, b'raw noise at import\n')"))
    host.wait_ready()
    host.logged("raw noise at import")


def test_one_answer_is_one_write(spawn):
    """In packet mode each write to a pipe is read on its own."""
    host = spawn(setup="fcntl.fcntl(1, fcntl.F_SETFL, fcntl.fcntl(1, fcntl.F_GETFL) | os.O_DIRECT)")
    host.wait_ready()
    host.reading = False
    host.send(*(request([f"{m}" for m in range(n % 100)], id=n) for n in range(200)), {"type": "heartbeat"})
    packets: list[bytes] = []

    def packet() -> bool:
        with contextlib.suppress(BlockingIOError):
            while len(packets) < 201:
                packets.append(os.read(host.stdout_fd, 4096))
        return len(packets) == 201

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


def test_a_host_that_closes_stdout_ends_the_worker_with_74(spawn):
    host = spawn()
    host.wait_ready()
    host.close_stdout()
    assert host.wait_exit(2) == 74
    assert not is_running(host.pid)
