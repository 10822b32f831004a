"""The loop of the front: signals, the host's death, and the one loop that moves bytes and tells the time.

One thread polls everything and owns all state; only the writers of stdout and stderr may block, each in a thread of its own.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import time
from typing import TYPE_CHECKING

from reranker_worker.engine.frames import FrameError
from reranker_worker.logs import Log
from reranker_worker.machine import no_core_dump
from reranker_worker.streams import AnswerWriter, Streams
from reranker_worker.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from reranker_worker.config import Config
    from reranker_worker.engine.fleet import Engine
    from reranker_worker.engine.handle import EngineProcess

_READ_BYTES = 1 << 18
_PARENT_POLL_SECONDS = 0.5
# So late a wake-up means that the machine slept or we were stopped, and the engines with us.
_PAUSED_SECONDS = 0.5
# Beyond max_unsent_bytes a host that reads is still served: one answer may be larger, and many may be whole at the same moment.
_DEAF_SECONDS = 1.0
_MOST_UNSENT = 8  # times max_unsent_bytes, even while the host reads
_FLUSH_STEP_SECONDS = 0.02
_LOG_FLUSH_SECONDS = 0.1
_REAP_SECONDS = 0.05  # the kernel needs longer to take back a large engine; an idle exit promises 100 ms
IO_ERROR = 74
SECOND_SIGNAL = 143


class Signals:
    """Signals as bytes on a pipe that the loop polls. SIGINT counts only on a terminal: a host's Ctrl-C reaches us too."""

    def __init__(self, *, on_terminal: bool) -> None:
        self.fd, write_fd = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(write_fd, False)
        self._write_fd = write_fd
        signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        for number in (signal.SIGPIPE, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGINT, (lambda *_: None) if on_terminal else signal.SIG_IGN)
        # A spawner's blocked mask is inherited and would make SIGTERM ineffective for ever.
        signal.pthread_sigmask(signal.SIG_SETMASK, [])

    def take(self) -> int:
        """How many stop signals have arrived since the last call."""
        try:
            return len(os.read(self.fd, 4096))
        except BlockingIOError:
            return 0


class ParentWatch:
    """Sees the host's death at once by a pidfd, or by a changed parent id where there is none."""

    def __init__(self, host_pid: int) -> None:
        self._parent = host_pid
        self.fd = -1
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):
                self.fd = os.pidfd_open(self._parent)

    def gone(self) -> bool:
        """True when the parent is not the one we started under."""
        return os.getppid() != self._parent


class Loop:
    """Polls until the worker says with which code to exit."""

    def __init__(self, config: Config, streams: Streams, worker: Worker, processes: list[EngineProcess], log: Log) -> None:
        self._config = config
        self._streams = streams
        self._worker = worker
        self._processes = processes
        self._log = log
        self._writer = AnswerWriter(streams.answers_fd)
        self._signals = Signals(on_terminal=os.isatty(streams.requests_fd))
        self._parent = ParentWatch(streams.host_pid)
        self._stop_signals = 0
        self._input_open = True
        self._code: int | None = None
        self._progress_at = time.monotonic()
        self._flush_until = math.inf

    def run(self) -> int:
        """Serve; the exit code."""
        self._worker.tick(time.monotonic())
        while self._code is None:
            for handler in self._wait():
                handler()
            now = time.monotonic()
            self._worker.tick(now)
            self._answer(now)
            self._note()
            self._check_host(now)
            if self._code is None and self._worker.exit_code is not None and not self._worker.has_lines:
                self._finish(self._worker.exit_code, now)
        return self._code

    def _finish(self, code: int, now: float) -> None:
        """Leave when the last answers are written. In short steps: a second signal and the host's death end the wait."""
        self._flush_until = min(self._flush_until, now + self._config.drain_timeout_ms / 1e3 + 1.0)
        if self._writer.flush(_FLUSH_STEP_SECONDS):
            self._code = code
        elif self._writer.broken or now >= self._flush_until:
            self._code = IO_ERROR

    def _wait(self) -> list[Callable[[], None]]:
        """Wait for input, an engine, a signal or the time; what to call for each."""
        handlers: dict[int, Callable[[], None]] = {}
        poll = select.poll()

        def watch(fd: int, events: int, handler: Callable[[], None]) -> None:
            if fd >= 0:
                poll.register(fd, events)
                handlers[fd] = handler

        if self._input_open:
            watch(self._streams.requests_fd, select.POLLIN, self._read_requests)
        watch(self._streams.answers_fd, 0, self._host_stopped_reading)
        watch(self._signals.fd, select.POLLIN, self._on_signal)
        watch(self._parent.fd, select.POLLIN, self._on_parent)
        for engine, process in zip(self._worker.fleet.engines, self._processes, strict=True):
            watch(process.results_fd, select.POLLIN, lambda e=engine, p=process: self._read_engine(e, p))  # type: ignore[misc]
            watch(process.log_fd, select.POLLIN, lambda p=process: self._read_log(p))  # type: ignore[misc]
            if process.wants_write:
                watch(process.requests_fd, select.POLLOUT, process.flush)
        wakeup = self._wakeup()
        # Rounded up: waking a fraction too early would spin.
        ready = poll.poll(None if wakeup == math.inf else math.ceil(max(0.0, wakeup - time.monotonic()) * 1e3))
        late = time.monotonic() - wakeup
        if late > _PAUSED_SECONDS:
            self._worker.fleet.forgive(late)
        return [handlers[fd] for fd, _ in ready]

    def _wakeup(self) -> float:
        """When to look again although nothing happened (monotonic seconds; inf: never)."""
        if self._flush_until < math.inf:
            return time.monotonic()
        wakeup = self._worker.next_wakeup()
        if self._parent.fd < 0 or self._writer.unsent_bytes:
            wakeup = min(wakeup, time.monotonic() + _PARENT_POLL_SECONDS)
        return wakeup

    def _read_requests(self) -> None:
        try:
            data = os.read(self._streams.requests_fd, _READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        now = time.monotonic()
        if data:
            self._worker.receive(data, now)
        else:
            self._input_open = False
            self._worker.end_of_input(now)

    def _read_engine(self, engine: Engine, process: EngineProcess) -> None:
        now = time.monotonic()
        try:
            frames = process.read()
        except FrameError:
            self._worker.fleet.on_garbage(engine)
            return
        if frames is None:
            self._read_log(process)
            self._worker.on_death(engine, process.reap(), now)
            return
        for frame in frames:
            self._worker.on_frame(engine, frame, now)

    def _read_log(self, process: EngineProcess) -> None:
        if process.log_fd >= 0:
            for line in process.read_log():
                self._log.write("INFO", "engine", line)

    def _on_signal(self) -> None:
        for _ in range(self._signals.take()):
            self._stop_signals += 1
            if self._stop_signals > 1:
                self._code = SECOND_SIGNAL
            self._worker.drain(time.monotonic())

    def _on_parent(self) -> None:
        self._log.write("WARNING", "worker", "the host process is gone")
        self._code = IO_ERROR

    def _host_stopped_reading(self) -> None:
        self._log.write("WARNING", "worker", "the host has closed its side of stdout")
        self._code = IO_ERROR

    def _answer(self, now: float) -> None:
        lines = self._worker.take_lines(now)
        if lines:
            if not self._writer.unsent_bytes:
                self._progress_at = now
            self._writer.put(lines)

    def _note(self) -> None:
        self._log.level = self._worker.log_level
        self._worker.lost_log_lines = self._log.lost_lines
        for level, text in self._worker.notes:
            self._log.write(level, "worker", text)
        self._worker.notes.clear()

    def _check_host(self, now: float) -> None:
        """Leave when the host is gone, or has read nothing for too long while too much waits for it."""
        writer = self._writer
        if self._code is not None:
            return
        if self._parent.gone():
            self._on_parent()
        elif writer.broken:
            self._host_stopped_reading()
        elif self._worker.held_bytes > _MOST_UNSENT * self._config.max_unsent_bytes:
            self._log.write("ERROR", "worker", "too many answers wait for that of an earlier request without an id")
            self._code = IO_ERROR
        elif writer.unsent_bytes:
            if writer.made_progress():
                self._progress_at = now
            held, most = writer.unsent_bytes, self._config.max_unsent_bytes
            patience = self._config.write_timeout_ms / 1e3
            if held > most:
                patience = min(patience, _DEAF_SECONDS)
            if now - self._progress_at >= patience or held > _MOST_UNSENT * most:
                self._log.write("ERROR", "worker", "the host does not read its answers")
                self._code = IO_ERROR


def serve(config: Config, streams: Streams, processes: list[EngineProcess], warnings: Sequence[str] = ()) -> int:
    """Run the worker on the claimed streams with engines that may have started already; the exit code. The caller ends the process with it."""
    no_core_dump()
    log = Log(2, config.log_level)
    for text in warnings:
        log.write("WARNING", "worker", text)
    if os.isatty(streams.requests_fd):
        log.write("INFO", "worker", 'waiting for one JSON request a line, such as {"query": "...", "documents": ["...", "..."]}; end with Ctrl-D')
    worker = Worker(config, processes, now=time.monotonic(), wall_clock=time.time, pid=os.getpid())
    loop = Loop(config, streams, worker, processes, log)
    try:
        return loop.run()
    finally:
        for process in processes:
            process.kill()
        log.flush(_LOG_FLUSH_SECONDS)
        # Reaped here: a host that is PID 1 of a container may never reap orphans.
        for process in processes:
            process.wait(_REAP_SECONDS)
