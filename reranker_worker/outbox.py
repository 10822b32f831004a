"""Lines on their way out: answers without ids in the order of their requests, and silence around `ready`. Pure."""

from __future__ import annotations

import math

from reranker_worker.ordering import Order, Place

# The known host reads through a stdio buffer: a line that arrives together with `ready` would be hidden behind it.
READY_SILENCE_SECONDS = 0.02


class Outbox:
    """Collects whole lines until `take`. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._order = Order()
        self._lines: list[bytes] = []
        self._hello: bytes | None = None
        self._last_line_at = -math.inf
        self._silent_until = -math.inf

    def reserve(self) -> Place:
        """A place in the order of answers without ids; ask for it when the request is read."""
        return self._order.reserve()

    def put(self, line: bytes, place: Place | None = None) -> None:
        """A finished line; with a place it leaves when all before it have left."""
        self._lines += [line] if place is None else self._order.fill(place, line)

    def put_hello(self, line: bytes) -> None:
        """The `ready` line: it goes out alone, some time after the line before it and before the line behind it."""
        self._hello = line
        self._silent_until = self._last_line_at + READY_SILENCE_SECONDS

    def take(self, now: float) -> list[bytes]:
        """The lines that may be written now."""
        if now < self._silent_until:
            return []
        if self._hello is not None:
            line, self._hello = self._hello, None
            self._silent_until = now + READY_SILENCE_SECONDS
            return [line]
        lines, self._lines = self._lines, []
        if lines:
            self._last_line_at = now
        return lines

    @property
    def held_bytes(self) -> int:
        """Bytes of lines that wait for the answer to an earlier request without an id."""
        return self._order.held_bytes

    @property
    def is_empty(self) -> bool:
        """True when nothing waits to be taken."""
        return not self._lines and self._hello is None

    @property
    def next_wakeup(self) -> float:
        """When `take` has something to give; inf when nothing waits."""
        return math.inf if self.is_empty else self._silent_until
