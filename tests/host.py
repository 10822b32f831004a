"""A host for tests: spawns the real worker over real pipes, in a process group of its own. Raw bytes in and out, everything with a deadline.

No threads: each wait pumps stdin, stdout and stderr together, so that no test deadlocks on a full pipe. `finish` (called by the
`spawn` fixture) demands that the process group is empty soon after and that stdout held whole JSON lines and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "reranking_server.py"
GROUP_EMPTY_WITHIN = 1.5
_CHUNK = 1 << 16

# Runs `setup` in the process that becomes the worker: a preexec_fn without its dangers.
_TRAMPOLINE = "import fcntl, os, resource, signal, socket, sys\n{setup}\nos.execv(sys.argv[1], sys.argv[1:])"
# A parent that can be killed: spawns the worker on its own standard streams, tells the worker's pid, then only waits.
_KEEPER = """
import os, subprocess, sys, threading
child = subprocess.Popen(sys.argv[2:])
for fd in (0, 1, 2):
    os.close(fd)
with open(int(sys.argv[1]), "w") as stream:
    stream.write(f"{child.pid}\\n")
threading.Event().wait()
"""


class HostError(AssertionError):
    """The worker did not do in time what the test waits for."""


class Host:
    """One worker and its three streams.

    `stdin`: "pipe", "socketpair", "null" or a path; `stdout`: "pipe", "socketpair", "null" or a path; `stderr`: "read" (drained, kept in
    `errors`), "never" (a pipe that nobody reads) or "devnull". `setup` is Python that runs in the worker's process before its
    exec. `keeper`: a process between us and the worker, to be killed as its host; then this process holds the pipes like a sibling.
    """

    def __init__(
        self,
        *args: str | bytes,
        env: Mapping[str, str] | None = None,
        backend: str | None = "fake",
        stdin: str | Path = "pipe",
        stdout: str | Path = "pipe",
        stderr: str = "read",
        setup: str = "",
        cwd: Path | None = None,
        keeper: bool = False,
        pass_fds: Sequence[int] = (),
        python: str = sys.executable,
        wrapper: Sequence[str] = (),
    ) -> None:
        self.raw = bytearray()  # every byte of stdout so far
        self.errors = bytearray()  # every byte of stderr so far
        self.reading = True  # False: a host that does not read its answers
        self.torn_ok = False  # a worker that was killed, or left a deaf host, may end in the middle of a line
        self.code: int | None = None
        self._parsed = 0
        self._unsent = bytearray()
        self._close_after_send = False
        self._stderr_kind = stderr
        self._finished = False
        command: list[str | bytes] = [*wrapper, python, str(SCRIPT), *(["--backend", backend] if backend else []), *args]
        if setup:
            command = [python, "-I", "-S", "-c", _TRAMPOLINE.format(setup=setup), *command]
        self._spawn(command, stdin, stdout, cwd, environment(env or {}), keeper, pass_fds)

    def _spawn(
        self,
        command: list[str | bytes],
        stdin: str | Path,
        stdout: str | Path,
        cwd: Path | None,
        env: dict[str, str],
        keeper: bool,
        pass_fds: Sequence[int],
    ) -> None:
        child_in, self.stdin_fd = _stream(stdin, writes=False)
        child_out, self.stdout_fd = _stream(stdout, writes=True)
        child_err, self.stderr_fd = _stream("null" if self._stderr_kind == "devnull" else "pipe", writes=True)
        pid_r = pid_w = -1
        if keeper:
            pid_r, pid_w = os.pipe()
            command = [sys.executable, "-I", "-c", _KEEPER, str(pid_w), *command]
            pass_fds = (*pass_fds, pid_w)
        try:
            self._process = subprocess.Popen(
                command, stdin=child_in, stdout=child_out, stderr=child_err, cwd=cwd, env=env, start_new_session=True, pass_fds=pass_fds
            )
        finally:
            for descriptor in (child_in, child_out, child_err, pid_w):
                if descriptor >= 0:
                    os.close(descriptor)
        self.group = self.keeper_pid = self.pid = self._process.pid
        for descriptor in (self.stdin_fd, self.stdout_fd, self.stderr_fd):
            if descriptor >= 0:
                os.set_blocking(descriptor, False)
        if keeper:
            with os.fdopen(pid_r) as stream:
                self.pid = int(stream.readline())

    # --- talking ---------------------------------------------------------------------------------------------------------------

    def send(self, *messages: Any, within: float = 20.0) -> None:
        """Write objects as lines (bytes go as they are); returns when the pipe has taken all."""
        self.queue(*messages)
        self.until(lambda: not self._unsent or self.stdin_fd < 0, within, "the worker to take its input")

    def queue(self, *messages: Any) -> None:
        """Like `send`, but only queued: the pipe takes it during later waits."""
        for message in messages:
            self._unsent += message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n"

    def read_line(self, within: float = 10.0) -> dict[str, Any]:
        """The next answer."""
        return self.parse(self.read_raw_line(within))

    def read_raw_line(self, within: float = 10.0) -> bytes:
        """The next line of stdout with its `\\n`."""
        self.until(lambda: self.has_line() or self.stdout_fd < 0, within, "a line")
        if not self.has_line():
            raise HostError(f"stdout ended where a line was expected; {self._state()}")
        end = self.raw.index(b"\n", self._parsed) + 1
        line, self._parsed = bytes(self.raw[self._parsed : end]), end
        return line

    def read_lines(self, count: int, within: float = 20.0) -> list[dict[str, Any]]:
        """The next `count` answers; `within` holds for all together."""
        deadline = time.monotonic() + within
        return [self.read_line(max(0.0, deadline - time.monotonic())) for _ in range(count)]

    def has_line(self) -> bool:
        """True when a whole line waits to be read."""
        return self.raw.find(b"\n", self._parsed) >= 0

    def ask(self, message: Any, within: float = 10.0) -> dict[str, Any]:
        """Send one request and take the next line."""
        self.send(message)
        return self.read_line(within)

    def wait_ready(self, within: float = 20.0) -> dict[str, Any]:
        """The `ready` line, which must be the next one."""
        line = self.read_line(within)
        assert line.get("type") == "ready", line
        return line

    def silent_for(self, seconds: float) -> bool:
        """True when no line arrives for so long (the one wait that cannot end early)."""
        deadline = time.monotonic() + seconds
        while not self.has_line() and time.monotonic() < deadline:
            self.pump(deadline - time.monotonic())
        return not self.has_line()

    @staticmethod
    def parse(line: bytes) -> dict[str, Any]:
        """One whole line as strict JSON: an object, ASCII, no NaN."""

        def refuse(name: str) -> None:
            raise AssertionError(f"{name} on the wire")

        assert line.endswith(b"\n"), f"torn line: {line[-200:]!r}"
        body = json.loads(line.decode("ascii"), parse_constant=refuse)
        assert isinstance(body, dict), body
        return body

    # --- ending ----------------------------------------------------------------------------------------------------------------

    def close_stdin(self) -> None:
        """End of input, after all that was sent."""
        self._close_after_send = True
        self.pump(0.0)

    def close_stdout(self) -> None:
        """Stop listening for good."""
        self.stdout_fd = _close(self.stdout_fd)

    def signal(self, number: int) -> None:
        """Send the front a signal."""
        os.kill(self.pid, number)

    def wait_exit(self, within: float = 10.0) -> int:
        """The exit code (negative for a signal), with all of stdout read."""
        self.until(self.exited, within, "the worker's exit")
        while self.pump(0.0):
            pass
        assert self.code is not None
        return self.code

    def exited(self) -> bool:
        """True when the worker has ended (with a keeper: when its process is gone or a zombie)."""
        if self.keeper_pid != self.pid:
            if is_running(self.pid):
                return False
            self.code = 0
            return True
        self.code = self._process.poll()
        return self.code is not None

    def kill_keeper(self) -> None:
        """The host's sudden death."""
        self._process.kill()
        self._process.wait()

    def finish(self) -> None:
        """End the worker if it lives, then check that nothing of it is left and that stdout was clean."""
        if self._finished:
            return
        self._finished = True
        try:
            if not self.exited():
                self.reading = True
                self.close_stdin()
                self.wait_exit(8.0)
            if self.keeper_pid != self.pid:
                self.kill_keeper()
            self.until(lambda: not self.group_pids(), GROUP_EMPTY_WITHIN, "an empty process group")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.group, signal.SIGKILL)
            self._process.wait()
            while self.pump(0.0):
                pass
            self.stdin_fd, self.stdout_fd, self.stderr_fd = map(_close, (self.stdin_fd, self.stdout_fd, self.stderr_fd))
        self.check_stdout()

    def check_stdout(self) -> None:
        """Every byte of stdout belongs to a whole line of JSON."""
        *lines, rest = bytes(self.raw).split(b"\n")
        assert self.torn_ok or not rest, f"stdout ends in the middle of a line: {rest[-200:]!r}"
        for line in lines:
            self.parse(line + b"\n")

    # --- looking ---------------------------------------------------------------------------------------------------------------

    def engine_pids(self) -> list[int]:
        """The front's living children."""
        return [pid for pid, (parent, _, state) in _processes().items() if parent == self.pid and state not in "ZX"]

    def wait_engines(self, count: int = 1, within: float = 10.0) -> list[int]:
        """The engines' process ids, when there are so many."""
        self.until(lambda: len(self.engine_pids()) == count, within, f"{count} engines")
        return self.engine_pids()

    def group_pids(self) -> list[int]:
        """Living members of the worker's process group (zombies wait for their parent, not for us)."""
        return [pid for pid, (_, group, state) in _processes().items() if group == self.group and state not in "ZX"]

    def log(self) -> list[dict[str, Any]]:
        """The records on stderr so far."""
        return [json.loads(line) for line in bytes(self.errors).split(b"\n")[:-1]]

    def logged(self, text: str, within: float = 10.0) -> None:
        """Wait until stderr holds a text."""
        self.until(lambda: text.encode() in self.errors, within, f"{text!r} on stderr")

    def until(self, done: Callable[[], Any], within: float, what: str) -> None:
        """Pump until a condition holds; fails after so many seconds."""
        deadline = time.monotonic() + within
        while not done():
            left = deadline - time.monotonic()
            if left <= 0:
                raise HostError(f"waited {within:g} s for {what}; {self._state()}")
            # A short grain: exits and children are not seen by poll.
            self.pump(min(left, 0.01))

    def pump(self, seconds: float) -> bool:
        """Move what can be moved on the three streams, waiting at most so long; True when something moved."""
        poll = select.poll()
        if self._unsent and self.stdin_fd >= 0:
            poll.register(self.stdin_fd, select.POLLOUT)
        elif self._close_after_send:
            self.stdin_fd = _close(self.stdin_fd)
        if self.reading and self.stdout_fd >= 0:
            poll.register(self.stdout_fd, select.POLLIN)
        if self._stderr_kind == "read" and self.stderr_fd >= 0:
            poll.register(self.stderr_fd, select.POLLIN)
        moved = False
        for fd, _ in poll.poll(max(0.0, seconds) * 1e3):
            moved = self._move(fd) or moved
        return moved

    def _move(self, fd: int) -> bool:
        try:
            if fd == self.stdin_fd:
                del self._unsent[: os.write(fd, bytes(self._unsent[: 1 << 20]))]
                return True
            data = os.read(fd, _CHUNK)
        except BlockingIOError:
            return False
        except (BrokenPipeError, ConnectionResetError):
            data = b""
            self._unsent.clear()
        if fd == self.stdin_fd or not data:
            os.close(fd)
            ours = (self.stdin_fd, self.stdout_fd, self.stderr_fd)
            self.stdin_fd, self.stdout_fd, self.stderr_fd = (-1 if fd == mine else mine for mine in ours)
            return True
        (self.raw if fd == self.stdout_fd else self.errors).extend(data)
        return True

    def _state(self) -> str:
        return f"exit code {self._process.poll()}, stdout ends {bytes(self.raw[-300:])!r}, stderr {bytes(self.errors[-1500:])!r}"


def environment(changes: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without settings of the worker (but where the tests' artefacts are), plus `changes`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RERANKING_") or name == "RERANKING_ARTEFACTS"}
    return kept | dict(changes)


def request(documents: Sequence[Any], query: str = "query", **fields: Any) -> dict[str, Any]:
    """A rerank request."""
    return {"query": query, "documents": list(documents), **fields}


def is_running(pid: int) -> bool:
    """True when the process exists and is no zombie."""
    return pid in (living := _processes()) and living[pid][2] not in "ZX"


def memory_peak_mib(pid: int) -> float:
    """VmHWM of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def _processes() -> dict[int, tuple[int, int, str]]:
    """pid -> (parent, process group, state) of every process."""
    found: dict[int, tuple[int, int, str]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile
                state, parent, group = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()[:3]
                found[int(name)] = (int(parent), int(group), state)
    return found


def _stream(kind: str | Path, *, writes: bool) -> tuple[int, int]:
    """(the worker's descriptor, ours or -1) of one stream; `writes` is the worker's direction."""
    if kind == "pipe":
        reader, writer = os.pipe()
        return (writer, reader) if writes else (reader, writer)
    if kind == "socketpair":
        mine, theirs = socket.socketpair()
        return theirs.detach(), mine.detach()
    path = os.devnull if kind == "null" else kind
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND if writes else os.O_RDONLY | os.O_NOCTTY, 0o644), -1


def _close(fd: int) -> int:
    if fd >= 0:
        os.close(fd)
    return -1
