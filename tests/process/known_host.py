"""The known host, replayed: how JadeVectorDB's SubprocessManager starts a worker, talks to it, times out and stops it.

It polls the descriptor but reads through a 4,096-byte stdio buffer by `fgets`: what is already buffered is invisible to its poll.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from host import SCRIPT, environment

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

BUFFER = 4096


class StdioReader:
    """A `FILE*` on a pipe: `fgets` reads the descriptor in blocks of 4,096 bytes, and only when its buffer is empty."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._buffered = b""

    def fgets(self, size: int) -> bytes:
        """At most size - 1 bytes, up to and with a newline; blocks like C's."""
        taken = b""
        while len(taken) < size - 1 and not taken.endswith(b"\n"):
            if not self._buffered:
                # Blocks for ever in C; a test must not.
                if not _readable(self._fd, 10.0):
                    raise AssertionError("fgets hangs in the middle of a line")
                self._buffered = os.read(self._fd, BUFFER)
                if not self._buffered:
                    break
            room = size - 1 - len(taken)
            end = self._buffered.find(b"\n", 0, room) + 1 or min(room, len(self._buffered))
            taken, self._buffered = taken + self._buffered[:end], self._buffered[end:]
        return taken

    def read_line(self, seconds: float) -> bytes | None:
        """One line, or None after so many seconds without anything to poll; what was read of an unfinished line is lost."""
        deadline = time.monotonic() + seconds
        line = b""
        while _readable(self._fd, deadline - time.monotonic()):
            piece = self.fgets(BUFFER)
            if not piece:
                return None
            line += piece
            if line.endswith(b"\n"):
                return line
        return None


class KnownHostError(Exception):
    """What the known host throws; its text is what its user sees."""


class KnownHost:
    """One subprocess, one request at a time, no ids, stderr never read."""

    def __init__(self, model: str = "bundled", batch_size: int = 32, env: Mapping[str, str] | None = None, *, limit_s: float = 5.0) -> None:
        self._limit_s = limit_s
        stdin_r, self._stdin = os.pipe()
        stdout_r, stdout_w = os.pipe()
        self._stderr, stderr_w = os.pipe()
        self._stdout = stdout_r
        argv = [sys.executable, str(SCRIPT), "--model", model, "--batch-size", str(batch_size)]
        self.process = subprocess.Popen(
            argv,
            stdin=stdin_r,
            stdout=stdout_w,
            stderr=stderr_w,
            env=environment({"RERANKING_BACKEND": "fake", **(env or {})}),
            start_new_session=True,
        )
        for descriptor in (stdin_r, stdout_w, stderr_w):
            os.close(descriptor)
        self._reader = StdioReader(self._stdout)
        self.model: str | None = None

    def wait_ready(self) -> None:
        """10 s for a line with type ready; others are skipped, 100 ms each; an error fails the start."""
        deadline = time.monotonic() + 10.0
        while time.monotonic() < deadline:
            line = self._reader.read_line(0.1)
            if line is None:
                continue
            body = json.loads(line)
            if body.get("type") == "ready":
                self.model = _string(body["model"])
                return
            if "error" in body:
                raise KnownHostError(_string(body["error"]))
        raise KnownHostError("Timeout waiting for subprocess to be ready")

    def rerank(self, query: str, documents: Sequence[str]) -> list[float]:
        """The scores of the next line, whatever request it belongs to."""
        body = self.call({"documents": list(documents), "query": query})
        return [_double(score) for score in body["scores"]]

    def heartbeat(self) -> bool:
        """True when the worker is alive in its eyes."""
        with contextlib.suppress(KnownHostError):
            body = self.call({"type": "heartbeat"})
            return body.get("type") == "heartbeat" and body.get("status") == "alive"
        return False

    def call(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send a line, take the next one; gives up after its limit without telling anybody."""
        self.send(message)
        line = self._reader.read_line(self._limit_s)
        if line is None:
            raise KnownHostError("Timeout waiting for response")
        body = json.loads(line)
        if "error" in body:
            raise KnownHostError(_string(body["error"]))
        return dict(body)

    def send(self, message: dict[str, Any]) -> None:
        """nlohmann's dump: keys sorted, no spaces, UTF-8 as it is."""
        os.write(self._stdin, json.dumps(message, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() + b"\n")

    def stop(self) -> str:
        """shutdown, 500 ms, SIGTERM, 500 ms, SIGKILL; which of them ended the worker."""
        with contextlib.suppress(OSError):
            self.send({"type": "shutdown"})
        for name, act in (("shutdown", self.process.terminate), ("SIGTERM", self.process.kill)):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.5)
                return name
            act()
        self.process.wait()
        return "SIGKILL"

    def close(self) -> None:
        """Leave nothing behind."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for descriptor in (self._stdin, self._stdout, self._stderr):
            os.close(descriptor)


def _readable(fd: int, seconds: float) -> bool:
    return bool(select.select([fd], [], [], max(0.0, seconds))[0])


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise AssertionError(f"std::terminate: type must be string, but is {type(value).__name__}")
    return value


def _double(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise AssertionError(f"std::terminate: type must be number, but is {type(value).__name__}")
    return float(value)
