"""Bytes to lines: a bounded reader that never scans a byte twice and forgets a line that grows too long."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Oversize:
    """Stands for one line longer than the limit; its bytes were discarded as they arrived."""


class LineReader:
    """Cuts a byte stream at `\\n` (0x0A) and at nothing else.

    Holds at most `max_line_bytes` of an unfinished line. A longer line yields one `Oversize` when it ends.
    """

    def __init__(self, max_line_bytes: int) -> None:
        self._max_line_bytes = max_line_bytes
        self._parts: list[bytes] = []
        self._held_bytes = 0
        self._oversize = False

    def feed(self, data: bytes) -> list[bytes | Oversize]:
        """The lines that `data` completes, in order, without their `\\n` and without one trailing `\\r`. Blank lines are left out."""
        *ends, rest = data.split(b"\n")
        lines: list[bytes | Oversize] = []
        for end in ends:
            self._hold(end)
            lines.extend(self._take())
        self._hold(rest)
        return lines

    def finish(self) -> list[bytes | Oversize]:
        """What is left when the input ends without a final `\\n`: none or one line."""
        return self._take()

    def _hold(self, part: bytes) -> None:
        if not part or self._oversize:
            return
        self._held_bytes += len(part)
        # One byte more is allowed, because the last may be the `\r` of a `\r\n`.
        if self._held_bytes > self._max_line_bytes + 1:
            self._oversize = True
            self._parts.clear()
        else:
            self._parts.append(part)

    def _take(self) -> list[bytes | Oversize]:
        oversize = self._oversize
        line = b"".join(self._parts)
        self._parts, self._held_bytes, self._oversize = [], 0, False
        line = line.removesuffix(b"\r")
        if oversize or len(line) > self._max_line_bytes:
            return [Oversize()]
        return [line] if line.strip(b" \t\r") else []
