"""The log on stderr: one JSON object a line (plain text on a terminal), lossy, never blocking, without request text.

The known host creates the stderr pipe and never reads it: after 64 KiB a blocking write would stop the worker for ever.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque

LEVELS = {"DEBUG": 10, "INFO": 20, "WARNING": 30, "ERROR": 40}
_LAST_WORDS_SECONDS = 0.1
_MOST_LINES = 256
_MOST_LINE_BYTES = 4096
_MOST_MESSAGE_CHARS = 3000


class Log:
    """Lines wait in a bounded queue for a thread that alone may block; when it is full, lines are dropped and counted."""

    def __init__(self, fd: int, level: str) -> None:
        self._fd = fd
        self._plain = os.isatty(fd)
        self._lines: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._busy = False
        self.level = level
        self.lost_lines = 0
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def write(self, level: str, source: str, message: str) -> None:
        """Queue one record if `level` is severe enough."""
        if LEVELS[level] < LEVELS[self.level]:
            return
        line = self._format(level, source, message[:_MOST_MESSAGE_CHARS])
        with self._changed:
            if len(self._lines) >= _MOST_LINES:
                self.lost_lines += 1
                return
            self._lines.append(line)
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> None:
        """Wait until all is written, or until the time is up because nobody reads."""
        with self._changed:
            self._changed.wait_for(lambda: not self._lines and not self._busy, timeout_s)

    def _format(self, level: str, source: str, message: str) -> bytes:
        if self._plain:
            printable = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in message)
            return f"{level.lower()}: {source}: {printable}\n".encode("ascii", "backslashreplace")
        record = {"time": round(time.time(), 3), "level": level, "source": source, "message": message}
        line = json.dumps(record).encode("ascii")
        if len(line) >= _MOST_LINE_BYTES:  # escapes can make twelve bytes of one character
            record["message"] = message[: len(message) // 12]
            line = json.dumps(record).encode("ascii")
        return line + b"\n"

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._lines))
                line = self._lines.popleft()
                self._busy = True
            try:
                os.write(self._fd, line)
            except OSError:  # a reader that left, or a full non-blocking pipe
                self.lost_lines += 1
            with self._changed:
                self._busy = False
                self._changed.notify_all()


def last_words(message: str) -> None:
    """One log line before the end, without waiting for a host that never reads its stderr."""
    log = Log(2, "ERROR")
    log.write("ERROR", "worker", message)
    log.flush(_LAST_WORDS_SECONDS)
