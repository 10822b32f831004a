"""A host in Python: spawns the worker as any host would (a child, two pipes) and asks it. `rerank`, `check` and the benchmarks use it.

    with Client(model="bundled") as client:
        answer = client.rerank("what is the capital of France", ["Paris is the capital of France.", "Bread is baked from flour."])
        print(answer["scores"])

Threads may share one client: requests are pipelined and told apart by ids. Every wait has a deadline.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as WaitTimeoutError
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from reranker_worker.config import Config, flag_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType
    from typing import IO

Answer = dict[str, Any]

_ROOT = str(Path(__file__).resolve().parents[1])
# The package that is asked is the one that is served, wherever it lies and whatever the current directory holds.
_START = "import sys; sys.path[:] = [sys.argv[1], *filter(None, sys.path)]; from reranker_worker.cli import main; main(['serve', *sys.argv[2:]])"
_READ_BYTES = 1 << 18
_TICK_SECONDS = 0.5  # grain of the deadline of a future that nobody waits for
_KILL_SECONDS = 1.0


class WorkerError(Exception):
    """The worker refused or failed a request, or could not start. `code` is a wire code (README, "The wire")."""

    def __init__(self, message: str, code: str, *, retryable: bool = False, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.retryable = retryable
        self.retry_after_ms = retry_after_ms


class WorkerGoneError(WorkerError):
    """The worker process has ended, or never got ready. `exit_code` is its own, negative for a signal, None while it is not known."""

    def __init__(self, message: str, code: str, exit_code: int | None) -> None:
        super().__init__(message, code, retryable=False)
        self.exit_code = exit_code


class WorkerTimeoutError(WorkerError):
    """The client's own deadline passed; the request has been cancelled at the worker."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "DEADLINE_EXCEEDED", retryable=True)


@dataclass(slots=True)
class _Pending:
    future: Future[Answer]
    deadline: float
    id: object  # what the caller named it, restored in the answer
    named: bool


class Client:
    """One worker process. `with` waits until it can score and stops it at the end.

    `settings` are the worker's own (see `config.Config`: model, backend, threads, ...). `stderr` is where the worker's log goes:
    None passes it through, `subprocess.DEVNULL` drops it, a file keeps it. `command` replaces the command line that serves.
    """

    def __init__(
        self,
        *,
        timeout_s: float = 60.0,
        start_timeout_s: float = 600.0,
        stop_timeout_s: float = 10.0,
        stderr: int | IO[bytes] | None = None,
        environ: Mapping[str, str] | None = None,
        command: Sequence[str] | None = None,
        **settings: str | int | bool,
    ) -> None:
        self.timeout_s = timeout_s
        self.start_timeout_s = start_timeout_s
        self.stop_timeout_s = stop_timeout_s
        self._lock = threading.Lock()  # the pending table
        self._write_lock = threading.Lock()
        self._pending: dict[int, _Pending] = {}
        self._numbers = itertools.count(1)
        self._hello: Future[Answer] = Future()
        self._gone: WorkerGoneError | None = None
        self._max_line_bytes = int(settings.get("max_line_bytes", Config().max_line_bytes))
        base = list(command) if command is not None else [sys.executable, "-c", _START, _ROOT]
        self._process = subprocess.Popen(  # noqa: S603  # our own interpreter, or what the caller asks for
            [*base, *_flags(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=environ, bufsize=0
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests_fd = self._process.stdin.fileno()
        self._answers_fd = self._process.stdout.fileno()
        os.set_blocking(self._requests_fd, False)
        self._reader = threading.Thread(target=self._read, name="answers", daemon=True)
        self._reader.start()

    # --- life ----------------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Client:
        try:
            self.wait_ready()
        except BaseException:
            self.stop(0.0)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop(self.stop_timeout_s if kind is None else 0.0)

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while the worker runs."""
        return self._process.poll()

    @property
    def is_ready(self) -> bool:
        """True once the worker has said `ready`."""
        return self._hello.done() and self._hello.exception() is None

    def wait_ready(self, timeout_s: float | None = None) -> Answer:
        """The worker's `ready` line. Raises WorkerGoneError when it cannot start, WorkerTimeoutError when it takes longer."""
        limit = self.start_timeout_s if timeout_s is None else timeout_s
        try:
            return self._hello.result(limit)
        except WaitTimeoutError:
            raise WorkerTimeoutError(f"The worker was not ready within {limit:g} s.") from None

    def stop(self, timeout_s: float | None = None) -> int:
        """Close the worker's input, let it finish what it accepted, and end it by force when the time is up. Its exit code."""
        limit = self.stop_timeout_s if timeout_s is None else timeout_s
        if self._write_lock.acquire(timeout=limit + _KILL_SECONDS):
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._write_lock.release()
        for seconds, escalate in ((limit, self._process.terminate), (_KILL_SECONDS, self._process.kill)):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
                break
            escalate()
        code = self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()
        return code

    # --- requests ------------------------------------------------------------------------------------------------------------

    def rerank(
        self, query: str, documents: Sequence[str | Mapping[str, object]], *, timeout_s: float | None = None, **options: object
    ) -> Answer:
        """Score documents for a query. `options` are the wire's: top_k, return_documents, raw_scores, timeout_ms, priority, ..."""
        return self.request({"query": query, "documents": list(documents), **options}, timeout_s=timeout_s)

    def request(self, body: Mapping[str, object], *, timeout_s: float | None = None) -> Answer:
        """Send one request and wait for its answer. Raises WorkerError for an error answer."""
        limit = self.timeout_s if timeout_s is None else timeout_s
        number, future = self._send(body, limit)
        try:
            return future.result(limit)
        except WaitTimeoutError:
            self._abandon(number)
            # The answer may have come between the two lines above.
            return future.result(0)

    def submit(self, body: Mapping[str, object], *, timeout_s: float | None = None) -> Future[Answer]:
        """Send one request and go on; the future gives its answer or raises as `request` does, at the latest after the time-out."""
        return self._send(body, self.timeout_s if timeout_s is None else timeout_s)[1]

    def _send(self, body: Mapping[str, object], timeout_s: float) -> tuple[int, Future[Answer]]:
        number = next(self._numbers)
        line = _line({**body, "id": number})
        if len(line) > self._max_line_bytes:
            text = f"The request is {len(line):,} bytes long and max_line_bytes is {self._max_line_bytes:,}; send fewer documents at a time."
            raise WorkerError(text, "REQUEST_TOO_LARGE")
        deadline = time.monotonic() + timeout_s
        pending = _Pending(Future(), deadline, body.get("id"), "id" in body)
        pending.future.set_running_or_notify_cancel()  # what is on its way cannot be taken back
        with self._lock:
            if self._gone is not None:
                raise self._gone
            self._pending[number] = pending
        self._write(line, deadline)
        return number, pending.future

    def _write(self, line: bytes, deadline: float) -> None:
        """Write a whole line. A worker that does not take it in time is beyond use: half a line would spoil all that follow."""
        view = memoryview(line)
        poll = select.poll()
        with self._write_lock:
            assert self._process.stdin is not None
            if self._process.stdin.closed:
                raise WorkerError("The client has been stopped.", "SHUTTING_DOWN")
            poll.register(self._requests_fd, select.POLLOUT)
            while view:
                try:
                    view = view[os.write(self._requests_fd, view) :]
                except BlockingIOError:
                    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1e3):
                        self._process.kill()
                        raise WorkerTimeoutError("The worker does not read its input; it has been ended.") from None
                except BrokenPipeError:
                    return  # the reader sees the end too, and knows why

    # --- answers -------------------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Give every answer to its future until the worker closes its side. Runs in a thread of its own."""
        poll = select.poll()
        poll.register(self._answers_fd, select.POLLIN)
        parts: list[bytes] = []
        while True:
            self._expire()
            if not poll.poll(_TICK_SECONDS * 1e3):
                continue
            data = os.read(self._answers_fd, _READ_BYTES)
            if not data:
                break
            *ends, rest = data.split(b"\n")
            for end in ends:
                self._answer(b"".join([*parts, end]))
                parts.clear()
            parts.append(rest)
        self._end()

    def _answer(self, line: bytes) -> None:
        try:
            body = orjson.loads(line)
        except orjson.JSONDecodeError:
            body = None
        if not isinstance(body, dict):
            self._fail_all(WorkerError("The worker wrote a line that is not a JSON object.", "PROCESSING_ERROR"))
            return
        number = body.pop("id", None)
        if number is None:
            self._unasked(body)
            return
        with self._lock:
            pending = self._pending.pop(number, None)
        if pending is None:
            return  # the caller has given up
        if pending.named:
            body = {"id": pending.id} | body
        _settle(pending.future, body)

    def _unasked(self, body: Answer) -> None:
        """A line without an id: `ready`, why there will be none, or the refusal of a line that the worker could not read."""
        if body.get("type") == "ready":
            self._max_line_bytes = int(body.get("limits", {}).get("max_line_bytes", self._max_line_bytes))
            self._hello.set_result(body)
        elif "error" in body and not self._hello.done() and body.get("code") == "MODEL_LOAD_ERROR":
            # Its exit code follows in a moment, and belongs into the exception.
            self._gone = WorkerGoneError(str(body["error"]), str(body["code"]), None)
        elif "error" in body:
            self._fail_all(_error(body))

    def _end(self) -> None:
        """The worker's side is closed: reap it, then tell everyone who still waits."""
        try:
            code = self._process.wait(self.stop_timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        with self._lock:
            told = self._gone
            text = str(told) if told else f"The worker ended {_ending(code)}."
            self._gone = WorkerGoneError(text, told.code if told else "SERVER_ERROR", code)
        if not self._hello.done():
            self._hello.set_exception(self._gone)
        self._fail_all(self._gone)

    def _fail_all(self, error: WorkerError) -> None:
        with self._lock:
            pending = list(self._pending.values())
            self._pending.clear()
        for item in pending:
            item.future.set_exception(error)

    def _expire(self) -> None:
        now = time.monotonic()
        with self._lock:
            late = [number for number, item in self._pending.items() if item.deadline <= now]
        for number in late:
            self._abandon(number)

    def _abandon(self, number: int) -> None:
        """Give up a request: its future fails, and the worker is told not to bother."""
        with self._lock:
            pending = self._pending.pop(number, None)
        if pending is None:
            return
        pending.future.set_exception(WorkerTimeoutError("The worker did not answer in time."))
        with contextlib.suppress(WorkerError):
            # Nobody waits for the acknowledgement: its id is in no table.
            self._write(_line({"type": "cancel", "target": number, "id": next(self._numbers)}), time.monotonic() + _KILL_SECONDS)


def _settle(future: Future[Answer], body: Answer) -> None:
    if "error" in body and "code" in body:
        future.set_exception(_error(body))
    else:
        future.set_result(body)


def _error(body: Answer) -> WorkerError:
    return WorkerError(
        str(body["error"]), str(body.get("code")), retryable=bool(body.get("retryable")), retry_after_ms=body.get("retry_after_ms")
    )


def _line(body: Mapping[str, object]) -> bytes:
    try:
        return orjson.dumps(body, option=orjson.OPT_APPEND_NEWLINE)
    except orjson.JSONEncodeError as error:
        raise WorkerError(f"The request cannot be written as JSON: {error}.", "INVALID_REQUEST") from None


def _flags(settings: Mapping[str, str | int | bool]) -> list[str]:
    """Settings as command-line flags; raises ValueError for a name that is none."""
    unknown = settings.keys() - {item.name for item in fields(Config)}
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: not a setting of the worker.")
    return [f"{flag_name(name)}={str(value).lower() if isinstance(value, bool) else value}" for name, value in settings.items()]


def _ending(code: int) -> str:
    return f"with exit code {code}" if code >= 0 else f"by signal {-code}"
