"""A lean host on raw pipes: one thread, no JSON, so that on two cores it takes little from what it measures."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self

from reranker_worker.byhand import processes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

ROOT = Path(__file__).resolve().parents[1]
_READ_BYTES = 1 << 18
_WRITE_BYTES = 1 << 16  # joined small requests: about what a pipe takes at once
_PATIENCE_SECONDS = 120.0

Request = Callable[[int], bytes]


class HostError(Exception):
    """The worker did not behave: an error answer, silence, or its death."""


@dataclass(frozen=True, slots=True)
class Drive:
    """What one pipelined run did."""

    requests: int
    seconds: float


def end(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """Close a process's stdin and wait for its end; kill it after ten seconds."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(10.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Pipes:
    """A process, and lines to and from it. `with` ends it."""

    def __init__(self, command: Sequence[str], *, environ: Mapping[str, str] | None = None, stderr: int | IO[bytes] = subprocess.DEVNULL) -> None:
        self.started_at = time.perf_counter()
        self._process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, bufsize=0, cwd=ROOT, env=environ
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in_fd, self._out_fd = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in_fd, False)
        self._readable = select.poll()
        self._readable.register(self._out_fd, select.POLLIN)
        self._both = select.poll()
        self._both.register(self._out_fd, select.POLLIN)
        self._both.register(self._in_fd, select.POLLOUT)
        self._rest = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process.stdout is not None
        end(self._process)
        self._process.stdout.close()

    @property
    def pid(self) -> int:
        """Its process id; of a worker the front's."""
        return self._process.pid

    def ask(self, line: bytes) -> bytes:
        """Write one line and read one; nothing else may be in flight."""
        self.write(line)
        return self.read_line()

    def write(self, line: bytes) -> None:
        """Write a whole line."""
        view = memoryview(line)
        while view:
            try:
                view = view[os.write(self._in_fd, view) :]
            except BlockingIOError:
                self._both.poll(_PATIENCE_SECONDS * 1e3)

    def read_line(self) -> bytes:
        """The next line."""
        while b"\n" not in self._rest:
            self._rest += self._read()
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _read(self) -> bytes:
        if not self._readable.poll(_PATIENCE_SECONDS * 1e3):
            self._silent()
        data = os.read(self._out_fd, _READ_BYTES)
        if not data:
            raise HostError(f"the process ended with code {self._process.wait()}")
        return data

    def _silent(self) -> list[tuple[int, int]]:
        raise HostError(f"no answer for {_PATIENCE_SECONDS:g} s")


class Host(Pipes):
    """A worker of the tree at `root`."""

    def __init__(self, flags: Sequence[str], root: Path = ROOT) -> None:
        super().__init__([sys.executable, str(root / "reranking_server.py"), *flags])

    @property
    def engine_pids(self) -> list[int]:
        """The engines."""
        return processes.children(self._process.pid)

    def wait_ready(self) -> bytes:
        """The `ready` line."""
        while b'"ready"' not in (line := self.read_line()):
            if b'"error"' in line:
                raise HostError(line.decode())
        return line

    def drive(self, request: Request, first: int, window: int, seconds: float) -> Drive:
        """Keep up to `window` requests in flight for so long, then wait for the rest. Request n is `request(n)`."""
        begin = time.perf_counter()
        until = begin + seconds
        sent = answered = 0
        view = memoryview(b"")
        while True:
            if not view and sent - answered < window and time.perf_counter() < until:
                block = [request(first + sent)]
                sent += 1
                size = len(block[0])
                while sent - answered < window and size < _WRITE_BYTES:
                    block.append(request(first + sent))
                    sent += 1
                    size += len(block[-1])
                view = memoryview(b"".join(block))
            if not view and sent == answered:
                return Drive(answered, time.perf_counter() - begin)
            for descriptor, _ in (self._both if view else self._readable).poll(_PATIENCE_SECONDS * 1e3) or self._silent():
                if descriptor == self._in_fd:
                    view = view[os.write(self._in_fd, view) :]
                else:
                    answered += self._count()

    def time_to_exit(self, last_words: bytes) -> float:
        """Write a line (or close the input, with b""), then the seconds until the process has ended."""
        assert self._process.stdin is not None
        begin = time.perf_counter()
        if last_words:
            self.write(last_words)
        else:
            self._process.stdin.close()
        self._process.wait(_PATIENCE_SECONDS)
        return time.perf_counter() - begin

    def _count(self) -> int:
        data = self._read()
        if b'"error"' in data:
            raise HostError(data[:500].decode("utf-8", "replace"))
        return data.count(b"\n")
