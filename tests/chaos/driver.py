"""A worker process on real pipes, driven by one thread that writes torn, reads slowly, stalls, and sends signals."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.chaos.expected import ViolationError, parse_answer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROOT = Path(__file__).resolve().parents[2]
# Small limits make oversize lines, several batches in flight and stalls cheap to provoke.
COMMON_FLAGS = (
    "--backend fake --max-line-bytes 16384 --max-documents 64 --max-batch-pairs 16 --batch-size 4 --engine-stall-ms 1200 --log-level ERROR"
).split()
PROFILES: dict[str, list[str]] = {
    "one": ["--model", "pair_us=50"],
    "slow": ["--model", "pair_us=400"],
    "two": ["--engines", "2", "--model", "pair_us=200"],
    "three": ["--engines", "3", "--model", "pair_us=200"],
    "tight": ["--max-waiting-requests", "6", "--max-waiting-pairs", "80", "--model", "pair_us=300"],
}
_F_SETPIPE_SZ = 1031
_PIPE_BYTES = 4096  # the host's side is narrow, so that a pause in reading is felt at once


class WorkerProcess:
    """One spawned worker. `on_line` gets each whole stdout line without its `\\n`."""

    def __init__(self, profile: str, command: Sequence[str] = ()) -> None:
        self.profile = profile
        self.served = 0
        self.ready = False
        self._rest = b""
        self._out_open = True
        self.read_bytes = 65536  # most bytes taken by one read
        self.paused = False
        self.on_line: Callable[[bytes], None] | None = None
        command = command or [sys.executable, str(ROOT / "reranking_server.py"), *COMMON_FLAGS, *PROFILES[profile]]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RERANKING_")}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, start_new_session=True
        )
        assert self._process.stdin
        assert self._process.stdout
        self._in_fd, self._out_fd = self._process.stdin.fileno(), self._process.stdout.fileno()
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._out_fd, _F_SETPIPE_SZ, _PIPE_BYTES)
        os.set_blocking(self._in_fd, False)
        os.set_blocking(self._out_fd, False)

    @property
    def pid(self) -> int:
        """The front's process id, which is also its session's."""
        return self._process.pid

    def engines(self) -> list[int]:
        """Process ids of the engines that run now."""
        return sorted(pid for pid, group, parent, state in _processes() if parent == self.pid and state not in "ZX")

    def write(self, data: bytes, deadline: float) -> None:
        """Write all of it, reading answers meanwhile as a host does (unless reading is paused)."""
        view = memoryview(data)
        while view:
            if time.monotonic() > deadline:
                raise ViolationError("the worker does not read its stdin")
            try:
                view = view[os.write(self._in_fd, view) :]
            except BlockingIOError:
                self._poll(0.05, want_write=True)
            except BrokenPipeError:
                raise ViolationError("the worker left while the host was writing") from None

    def pump(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Read answers for so long, or until the condition holds; whether it held."""
        deadline = time.monotonic() + seconds
        while not until():
            left = deadline - time.monotonic()
            if left <= 0 or (not self._out_open and self.exit_code(0) is not None):
                return until()
            self._poll(min(left, 0.05), want_write=False)
        return True

    def _poll(self, seconds: float, *, want_write: bool) -> None:
        readers = [self._out_fd] if self._out_open and not self.paused else []
        readable, _, _ = select.select(readers, [self._in_fd] if want_write else [], [], seconds)
        if readable:
            self._read()

    def _read(self) -> None:
        try:
            data = os.read(self._out_fd, self.read_bytes)
        except BlockingIOError:
            return
        if not data:
            self._out_open = False
            if self._rest:
                raise ViolationError(f"stdout ends in the middle of a line: {self._rest[:200]!r}")
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if not self.ready and b'"type":"ready"' in line:
                self.ready = parse_answer(line)["protocol"] == 1
            elif self.on_line:
                self.on_line(line)
            else:
                raise ViolationError(f"a line that nobody asked for: {line[:200]!r}")

    def signal(self, number: int, pid: int | None = None) -> None:
        """A signal to the front, or to one of its engines."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid if pid is None else pid, number)

    def close_stdin(self) -> None:
        """The host has nothing more to say."""
        assert self._process.stdin
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def close_stdout(self) -> None:
        """The host will not read any more."""
        assert self._process.stdout
        self._process.stdout.close()
        self._out_open = False

    @property
    def finished(self) -> bool:
        """True when stdout has ended and the process is gone."""
        return not self._out_open and self._process.poll() is not None

    def exit_code(self, seconds: float) -> int | None:
        """The exit code, waiting up to so long; None while it runs."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def left_over(self, seconds: float) -> list[int]:
        """Processes of the worker's session that still run; waits up to so long for none."""
        deadline = time.monotonic() + seconds
        while True:
            pids = [pid for pid, session, _, state in _processes() if session == self.pid and state not in "ZX"]
            if not pids or time.monotonic() > deadline:
                return pids
            select.select([], [], [], 0.005)

    def destroy(self) -> None:
        """End everything that was started, whatever its state."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                with contextlib.suppress(OSError):
                    stream.close()


def _processes() -> list[tuple[int, int, int, str]]:
    """(process id, session, parent, state) of every process of the machine."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
                found.append((int(name), int(fields[3]), int(fields[1]), fields[0]))
    return found
