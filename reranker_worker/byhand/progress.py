"""One line of progress on standard error, rewritten in place, and only where a person looks: on a terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

_ERASE = "\r\x1b[K"


class Progress:
    """`with Progress() as progress: progress.show("...")`; the line is gone at the end."""

    def __init__(self) -> None:
        self._on = sys.stderr.isatty()
        self._shown = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.show("")

    def show(self, text: str) -> None:
        """Replace the line; "" erases it."""
        if self._on and text != self._shown:
            sys.stderr.write(_ERASE + text)
            sys.stderr.flush()
            self._shown = text
