"""Plays transcripts against any worker: `python -m tests.transcripts.replay [--only PART] [-- COMMAND...]`.

COMMAND defaults to this worker with its fake backend; a transcript's own flags are appended to it. Real pipes, one child per transcript.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.transcripts.matcher import mismatch

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE = Path(__file__).resolve().parent
DEFAULT_COMMAND = (sys.executable, str(HERE.parents[1] / "reranking_server.py"), "--backend", "fake", "--log-level", "ERROR")
LINE_SECONDS = 20.0


class ReplayError(AssertionError):
    """The worker did not do what the transcript says."""


def load(path: Path) -> list[dict[str, Any]]:
    """The steps of a transcript, one for each line."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]


def transcripts() -> list[Path]:
    """All transcripts, in order."""
    return sorted(HERE.glob("*.jsonl"))


class Replay:
    """One transcript against one process."""

    def __init__(self, steps: Sequence[dict[str, Any]], command: Sequence[str]) -> None:
        self._steps = steps
        flags = next((step["flags"] for step in steps if "flags" in step), [])
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RERANKING_")}
        self._process = subprocess.Popen(
            [*command, *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, start_new_session=True
        )
        self._buffer = b""

    def run(self) -> None:
        """Play all steps; raises ReplayError with the number of the step."""
        try:
            for number, step in enumerate(self._steps, 1):
                fault = self._step(step)
                if fault:
                    raise ReplayError(f"step {number}: {fault}")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream:
                    with contextlib.suppress(OSError):
                        stream.close()

    def _step(self, step: dict[str, Any]) -> str | None:
        if "send" in step:
            return self._write(json.dumps(step["send"]).encode() + b"\n")
        if "send_raw" in step:
            return self._write(step["send_raw"].encode())
        if "send_base64" in step:
            return self._write(base64.b64decode(step["send_base64"]))
        if "expect" in step:
            line = self._line()
            return "stdout ended" if line is None else mismatch(step["expect"], line)
        if "expect_any_order" in step:
            return self._any_order(list(step["expect_any_order"]))
        if "signal" in step:
            os.kill(self._process.pid, signal.Signals[step["signal"]])
        elif "close_stdin" in step:
            assert self._process.stdin
            self._process.stdin.close()
        elif "exit" in step:
            return self._exit(step["exit"])
        elif not step.keys() <= {"note", "flags"}:
            raise ValueError(f"unknown step {sorted(step)}")
        return None

    def _write(self, data: bytes) -> str | None:
        assert self._process.stdin
        try:
            self._process.stdin.write(data)
            self._process.stdin.flush()
        except BrokenPipeError:
            return "the worker has closed its stdin"
        return None

    def _any_order(self, expected: list[Any]) -> str | None:
        while expected:
            line = self._line()
            faults = [mismatch(item, line) for item in expected]
            if line is None or None not in faults:
                return f"none of what is expected: {'; '.join(filter(None, faults))}"
            del expected[faults.index(None)]
        return None

    def _line(self) -> dict[str, Any] | None:
        """The next line; None at the end of stdout."""
        assert self._process.stdout
        deadline = time.monotonic() + LINE_SECONDS
        while b"\n" not in self._buffer:
            if not select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise ReplayError(f"no line within {LINE_SECONDS:g} s")
            data = os.read(self._process.stdout.fileno(), 65536)
            if not data:
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return dict(json.loads(line.decode("ascii")))

    def _exit(self, code: int) -> str | None:
        if self._line() is not None:
            return "a line that nobody asked for, before the exit"
        actual = self._process.wait(LINE_SECONDS)
        return None if actual == code else f"exit code {code} is expected, not {actual}"


def main() -> int:
    """Play them all; 1 when one fails."""
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(prog="python -m tests.transcripts.replay", description=__doc__)
    parser.add_argument("--only", default="", help="transcripts whose name holds this")
    options = parser.parse_args(arguments[:split])
    command = arguments[split + 1 :] or DEFAULT_COMMAND
    failed = 0
    for path in transcripts():
        if options.only in path.stem:
            try:
                Replay(load(path), command).run()
                print(f"ok      {path.stem}")
            except ReplayError as fault:
                failed += 1
                print(f"FAILED  {path.stem}: {fault}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
