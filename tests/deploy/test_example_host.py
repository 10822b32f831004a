"""The example host as a deployment runs it: a real process with a real worker (the fake backend) behind real HTTP."""

from __future__ import annotations

import http.client
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 40.0
COMMAND = (sys.executable, str(ROOT / "deploy" / "example-host" / "example_host.py"))
ENVIRON = {**os.environ, "RERANKING_BACKEND": "fake"}
pytestmark = pytest.mark.timeout(120)

QUESTION = {"query": "capital of France", "documents": ["Berlin is in Germany.", "Paris is the capital of France."]}


class ExampleHost:
    """One running example host; its log lines arrive in a queue."""

    def __init__(self, **settings: str) -> None:
        command = [*COMMAND, "--listen", "127.0.0.1:0"]
        environ = {**ENVIRON, **settings}
        self.process = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.port = int(self.says(r"Listening on .*:(\d+)")[1])

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.put(line.rstrip())

    def says(self, pattern: str) -> re.Match[str]:
        """Wait for a line of its log."""
        seen, deadline = [], time.monotonic() + DEADLINE_S
        while (left := deadline - time.monotonic()) > 0:
            try:
                seen.append(self._lines.get(timeout=left))
            except queue.Empty:
                break
            if match := re.search(pattern, seen[-1]):
                return match
        raise AssertionError(f"no line like {pattern!r} in time; there were:\n" + "\n".join(seen))

    def ready(self) -> int:
        """Wait until a worker is ready; its process number."""
        return int(json.loads(self.says(r"The worker is ready: (.*)")[1])["pid"])

    def get(self, path: str) -> tuple[int, str]:
        """GET: status and body."""
        return self._ask("GET", path, None, {})

    def post(self, body: Any, path: str = "/rerank") -> tuple[int, dict[str, Any]]:
        """POST of JSON (or of bytes as they are): status and answer."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, text = self._ask("POST", path, data, {"Content-Length": str(len(data))})
        return status, json.loads(text)

    def _ask(self, method: str, path: str, data: bytes | None, headers: dict[str, str]) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
        try:
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def end(self) -> int:
        """Wait for its end; the exit code."""
        return self.process.wait(DEADLINE_S)


@pytest.fixture
def start() -> Iterator[Callable[..., ExampleHost]]:
    """`start(RERANKING_...="...")`: a running example host, killed at the end of the test if it still runs."""
    hosts: list[ExampleHost] = []

    def begin(**settings: str) -> ExampleHost:
        hosts.append(ExampleHost(**settings))
        return hosts[-1]

    yield begin
    for host in hosts:
        host.process.kill()
        host.process.wait(DEADLINE_S)


def in_background(act: Callable[[], Any]) -> queue.Queue[Any]:
    """The result of `act`, which runs in a thread, will be in this queue."""
    result: queue.Queue[Any] = queue.Queue()
    threading.Thread(target=lambda: result.put(act()), daemon=True).start()
    return result


def until(holds: Callable[[], bool], what: str) -> None:
    """Ask again and again, until it holds or the deadline has passed."""
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    """Whether the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def test_a_ready_host_reranks_and_shows_what_the_worker_says(start: Callable[..., ExampleHost]) -> None:
    host = start()
    host.ready()
    status, answer = host.post({**QUESTION, "top_k": 1})
    assert (status, len(answer["scores"]), len(answer["results"])) == (200, 2, 1)
    assert host.get("/livez")[0] == 200
    assert host.get("/readyz")[0] == 200
    assert json.loads(host.get("/health")[1])["status"] == "serving"
    status, metrics = host.get("/metrics")
    assert status == 200
    assert "reranking_scored_requests_total 1" in metrics.splitlines()


def test_a_host_whose_worker_still_loads_is_alive_and_not_ready(start: Callable[..., ExampleHost]) -> None:
    host = start(RERANKING_MODEL_PATH="load_ms=600000")
    until(lambda: "reason" in json.loads(host.get("/readyz")[1]), "the worker answers")
    assert host.get("/readyz")[0] == 503
    assert host.get("/livez")[0] == 200


def test_a_log_line_leaves_in_one_write_so_that_the_worker_cannot_cut_into_it() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)  # keeps one write apart from the next
    with ours, theirs, subprocess.Popen([*COMMAND, "--listen", "127.0.0.1:0"], env=ENVIRON, stdin=subprocess.DEVNULL, stderr=theirs) as process:
        ours.settimeout(DEADLINE_S)
        try:
            assert any(message.endswith("\n") and "Listening on" in message for message in (ours.recv(65536).decode() for _ in range(20)))
        finally:
            process.kill()


def test_wrong_requests_are_told_apart(start: Callable[..., ExampleHost]) -> None:
    host = start()
    host.ready()
    assert host.get("/elsewhere")[0] == 404
    assert host.post(QUESTION, "/elsewhere")[0] == 404
    assert host.post(b"no json")[0] == 400
    assert host.post(["a list"])[0] == 400
    status, answer = host.post({"query": "without documents"})
    assert (status, answer["code"]) == (400, "INVALID_REQUEST")
    assert host._ask("POST", "/rerank", None, {"Content-Length": "many"})[0] == 411
    assert host._ask("POST", "/rerank", None, {"Content-Length": "9999999999"})[0] == 413


def test_a_killed_worker_comes_back_and_what_it_owed_is_answered(start: Callable[..., ExampleHost]) -> None:
    host = start()
    worker = host.ready()
    owed = in_background(lambda: host.post({"query": "q", "documents": ["fake:sleep 600000"]}))
    until(lambda: host.post({"type": "stats"})[1]["waiting_requests"] == 1, "the worker has the request")
    os.kill(worker, signal.SIGKILL)
    status, answer = owed.get(timeout=DEADLINE_S)
    assert (status, answer["code"], answer["retryable"]) == (503, "NOT_READY", True)
    assert "ended before it answered" in answer["error"]  # at once, not when its time is over
    assert host.ready() != worker
    assert host.post(QUESTION)[0] == 200


@pytest.mark.parametrize(("settings", "code"), [({"RERANKING_BATCH_SIZE": "0"}, 64), ({"RERANKING_MODEL_PATH": "fail=66"}, 66)])
def test_a_worker_that_cannot_start_ends_the_host_with_its_code(start: Callable[..., ExampleHost], settings: dict[str, str], code: int) -> None:
    assert start(**settings).end() == code


def test_a_worker_that_ends_for_a_passing_reason_is_tried_again(start: Callable[..., ExampleHost]) -> None:
    host = start(RERANKING_MODEL_PATH="fail=71")
    host.says("The worker ended with 71; starting it again in 1 s")
    host.says("The worker ended with 71; starting it again in 2 s")
    assert host.get("/livez")[0] == 200
    assert host.get("/readyz")[0] == 503


def test_sigterm_finishes_what_is_under_way_and_leaves_nothing_behind(start: Callable[..., ExampleHost]) -> None:
    host = start()
    worker = host.ready()
    answer = in_background(lambda: host.post({"query": "q", "documents": ["fake:sleep 1000"]}))
    until(lambda: host.post({"type": "stats"})[1]["waiting_requests"] == 1, "the worker has the request")
    began = time.monotonic()
    host.process.send_signal(signal.SIGTERM)
    assert answer.get(timeout=DEADLINE_S)[0] == 200
    assert host.end() == 0
    assert time.monotonic() - began < 10  # less than the host waits at most: it told the worker to leave
    assert is_gone(worker)


def test_sigterm_does_not_cut_an_answer_that_is_being_sent(start: Callable[..., ExampleHost]) -> None:
    host = start()
    worker = host.ready()
    text = "ä" * 1_200_000  # six bytes each in the answer: more than any socket buffer here
    body = json.dumps({"query": "q", "documents": [text], "return_documents": True}, ensure_ascii=False).encode()
    with socket.socket() as client:
        client.settimeout(DEADLINE_S)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.connect(("127.0.0.1", host.port))
        client.sendall(b"POST /rerank HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        received = client.recv(1)
        host.process.send_signal(signal.SIGTERM)
        until(lambda: is_gone(worker), "the worker has left")
        while chunk := client.recv(1 << 20):
            received += chunk
    head, _, answer = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert json.loads(answer)["results"][0]["document"] == text
    assert host.end() == 0


def test_sigterm_while_a_worker_is_to_be_started_again_does_not_wait_for_it(start: Callable[..., ExampleHost]) -> None:
    host = start(RERANKING_MODEL_PATH="fail=71")
    host.says("starting it again in 8 s")
    began = time.monotonic()
    host.process.send_signal(signal.SIGTERM)
    assert host.end() == 0
    assert time.monotonic() - began < 6
