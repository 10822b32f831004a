"""Answers without ids leave in the order of their requests; all others at once. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Place:
    """A place in the order, kept until its line is known."""

    line: bytes | None = None


class Order:
    """Holds finished lines back until all before them are finished."""

    def __init__(self) -> None:
        self._places: deque[Place] = deque()
        self.held_bytes = 0

    def reserve(self) -> Place:
        """The next place; call it when the request is read."""
        place = Place()
        self._places.append(place)
        return place

    def fill(self, place: Place, line: bytes) -> list[bytes]:
        """Give a place its line; the lines that may leave now."""
        place.line = line
        self.held_bytes += len(line)
        lines: list[bytes] = []
        while self._places and (head := self._places[0].line) is not None:
            lines.append(head)
            self.held_bytes -= len(head)
            self._places.popleft()
        return lines
