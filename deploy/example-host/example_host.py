#!/usr/bin/env python3
"""A small host for trying the deployment without the database: starts the worker as a child, answers over HTTP, and needs nothing but Python.

    python example_host.py [--listen 127.0.0.1:8080]

RERANKING_PYTHON and RERANKING_SCRIPT_PATH name the worker's interpreter and script; the worker inherits the environment, so its settings are
RERANKING_* variables. GET /livez (this process), /readyz (the worker can score), /health and /metrics (the worker's own); POST /rerank with a
request of the worker's wire, for example {"query": "...", "documents": ["...", "..."]}. A worker that ends is started again; what it owed is
answered with 503. SIGTERM: no new requests, those under way are finished; the exit code is 0, or the worker's own if it cannot be started at all.
Under systemd with Type=notify it says READY=1 when the worker is ready, and WATCHDOG=1 while the worker answers heartbeats.
It shows how a host does it; it is no database and no production server.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import IO, Any

HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPT = os.environ.get("RERANKING_SCRIPT_PATH") or os.path.normpath(os.path.join(HERE, "..", "..", "reranking_server.py"))
PYTHON = os.environ.get("RERANKING_PYTHON") or sys.executable
# Above the worker's own limit (RERANKING_REQUEST_TIMEOUT_MS, 30 s by default), so that its error arrives before we stop waiting.
ANSWER_SECONDS = 35.0
LONGEST_PAUSE_SECONDS = 30.0
# Above the worker's RERANKING_DRAIN_TIMEOUT_MS (5 s by default); whoever stops us should wait longer still.
DRAIN_SECONDS = 15.0
# sysexits.h: what another start would not mend (a wrong setting, a model that is missing or corrupt, no network, no permission).
HOPELESS = {64, 65, 66, 69, 73, 78}
MAX_BODY_BYTES = 4 * 1024 * 1024

Body = dict[str, Any]


class Worker:
    """The child process: one writer at a time, one reader, answers matched by id."""

    def __init__(self) -> None:
        self.ready = False
        self.stopping = threading.Event()
        self.exit_code: int | None = None
        self._numbers = itertools.count(1)
        self._waiting: dict[int, queue.Queue[Body]] = {}
        self._lock = threading.Lock()
        # Apart from the lock: a write may block while the worker is busy, and its answers must be read all the same.
        self._writing = threading.Lock()
        self._input: IO[bytes] | None = None
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Close the worker's input: it finishes what it has and leaves."""
        self.stopping.set()
        self._close(self._input)
        self._thread.join(DRAIN_SECONDS)

    def _close(self, pipe: IO[bytes] | None) -> None:
        if pipe is not None and self._writing.acquire(timeout=DRAIN_SECONDS):
            with contextlib.suppress(OSError):
                pipe.close()
            self._writing.release()

    def ask(self, body: Body, seconds: float = ANSWER_SECONDS) -> Body:
        """One request, one answer; an answer with the code NOT_READY when the worker is gone or silent."""
        number = next(self._numbers)
        answer: queue.Queue[Body] = queue.Queue(1)
        line = json.dumps({**body, "id": number}, ensure_ascii=False).encode(errors="replace") + b"\n"
        with self._lock:
            pipe = self._input
            if pipe is None:
                return _not_ready("The worker is not running.")
            self._waiting[number] = answer
        try:
            with self._writing:
                pipe.write(line)
                pipe.flush()
        except (OSError, ValueError):
            with self._lock:
                self._waiting.pop(number, None)
            return _not_ready("The worker has just ended; it is started again.")
        try:
            return answer.get(timeout=seconds)
        except queue.Empty:
            with self._lock:
                self._waiting.pop(number, None)
            return _not_ready("The worker did not answer in time.")

    def _run(self) -> None:
        pause = 0.5
        while not self.stopping.is_set():
            began = time.monotonic()
            # stderr is inherited: the worker's log lines go where ours go (the journal, `docker logs`).
            process = subprocess.Popen([PYTHON, SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S603  # our own worker
            assert process.stdin is not None  # both are pipes
            assert process.stdout is not None
            with self._lock:
                self._input = process.stdin
            if self.stopping.is_set():  # told to stop while it was being started
                self._close(process.stdin)
            for line in process.stdout:
                self._take(line)
            with self._lock:
                self._input, self.ready = None, False
                owed, self._waiting = self._waiting, {}
            self.exit_code = process.wait()
            for answer in owed.values():
                answer.put(_not_ready("The worker ended before it answered."))
            if self.stopping.is_set():
                return
            if self.exit_code in HOPELESS:
                say(f"The worker cannot start (exit code {self.exit_code}; its sentence is above). Starting it again would not help.")
                os.kill(os.getpid(), signal.SIGTERM)
                return
            pause = 0.5 if time.monotonic() - began > 60 else min(2 * pause, LONGEST_PAUSE_SECONDS)
            say(f"The worker ended with {self.exit_code}; starting it again in {pause:g} s.")
            self.stopping.wait(pause)

    def _take(self, line: bytes) -> None:
        answer = json.loads(line)
        number = answer.pop("id", None)
        if number is None:
            if answer.get("type") == "ready":
                self.ready = True
                say("The worker is ready: " + line.decode().strip())
                notify("READY=1")
            else:
                say("The worker says: " + line.decode().strip())
            return
        with self._lock:
            waiting = self._waiting.pop(number, None)
        if waiting is not None:
            waiting.put(answer)


def say(text: str) -> None:
    """One line of log, beside the worker's own."""
    sys.stderr.write(text + "\n")  # in one write: `print` may put the worker's line before the end of ours
    sys.stderr.flush()


def _not_ready(text: str) -> Body:
    return {"error": text, "code": "NOT_READY", "retryable": True}


def notify(state: str) -> None:
    """sd_notify(3) without a library: one datagram to the socket that systemd names, if it does."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


def watch(worker: Worker) -> None:
    """Feed systemd's watchdog while the worker answers."""
    interval = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6 / 3
    while interval and not worker.stopping.is_set():
        if worker.ask({"type": "heartbeat"}, seconds=interval).get("status") == "alive":
            notify("WATCHDOG=1")
        worker.stopping.wait(interval)


class Handler(BaseHTTPRequestHandler):
    """HTTP to wire and back."""

    worker: Worker
    protocol_version = "HTTP/1.1"
    # Requests being answered; the process must not leave between the worker's answer and ours.
    _open = 0
    _change = threading.Condition()

    @classmethod
    def wait_until_answered(cls) -> None:
        with cls._change:
            cls._change.wait_for(lambda: cls._open == 0, timeout=3)  # the worker is gone by now: only a client that does not read is waited for

    def do_GET(self) -> None:
        if self.path == "/livez":
            self._send(200, {"status": "alive"})
        elif self.path == "/readyz":
            answer = self.worker.ask({"type": "ready"}, seconds=5)
            self._send(200 if answer.get("ready") else 503, answer)
        elif self.path == "/health":
            answer = self.worker.ask({"type": "health"}, seconds=5)
            self._send(503 if "error" in answer else 200, answer)
        elif self.path == "/metrics":
            answer = self.worker.ask({"type": "metrics"}, seconds=5)
            self._send_bytes(503 if "error" in answer else 200, str(answer.get("body", answer)).encode(), "text/plain; version=0.0.4")
        else:
            self._send(404, {"error": "Known are GET /livez, /readyz, /health, /metrics and POST /rerank."})

    def do_POST(self) -> None:
        with self._change:
            Handler._open += 1
        try:
            self._rerank()
        finally:
            with self._change:
                Handler._open -= 1
                self._change.notify_all()

    def _rerank(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self.path != "/rerank" or not length.isdigit() or int(length) > MAX_BODY_BYTES:
            self.close_connection = True
            status = 404 if self.path != "/rerank" else 411 if not length.isdigit() else 413
            self._send(status, {"error": "POST /rerank takes a body of at most 4 MiB with a Content-Length."})
            return
        try:
            body = json.loads(self.rfile.read(int(length)))
        except ValueError:
            body = None
        if not isinstance(body, dict):
            self._send(400, {"error": 'The body must be a JSON object such as {"query": "...", "documents": ["..."]}.'})
            return
        answer = self.worker.ask(body)
        self._send((503 if answer.get("retryable") else 400) if "error" in answer else 200, answer)

    def _send(self, status: int, body: Body) -> None:
        self._send_bytes(status, json.dumps(body).encode() + b"\n", "application/json")

    def _send_bytes(self, status: int, data: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the name is the library's
        """Probes come every few seconds: only errors are worth a line."""
        if len(args) > 1 and str(args[1]) >= "500":
            say(format % args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--listen", default=os.environ.get("EXAMPLE_HOST_LISTEN", "127.0.0.1:8080"), metavar="ADDRESS:PORT")
    address, _, port = parser.parse_args().listen.rpartition(":")
    worker = Worker()
    Handler.worker = worker
    server = ThreadingHTTPServer((address, int(port)), Handler)
    say("Listening on {}:{}".format(*server.server_address))

    def leave(*_: object) -> None:
        worker.stopping.set()  # whoever stops the whole group ends the worker too: it must not be started again
        threading.Thread(target=server.shutdown).start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    worker.start()
    threading.Thread(target=watch, args=(worker,), name="watchdog", daemon=True).start()
    server.serve_forever()
    notify("STOPPING=1")
    worker.stop()
    Handler.wait_until_answered()
    sys.exit(worker.exit_code if worker.exit_code in HOPELESS else 0)


if __name__ == "__main__":
    main()
