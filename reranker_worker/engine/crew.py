"""The scoring threads: what has the lowest number runs first, whenever it came."""

from __future__ import annotations

import itertools
import queue
import threading
import weakref
from concurrent.futures import Future
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    _Call = tuple[Callable[[], None], Future[None]]
    _Work = queue.PriorityQueue[tuple[float, int, _Call | None]]


class Crew:
    """Threads made at once: one that cannot be made later, for want of memory, would leave a batch without an end."""

    def __init__(self, size: int) -> None:
        """Raises RuntimeError when a thread cannot be made."""
        self._work: _Work = queue.PriorityQueue()
        self._count = itertools.count()  # of two with one number the first runs first
        for _ in range(size):
            # A thread holds the queue and not the crew, so that a crew that nobody uses any more ends.
            threading.Thread(target=_run, args=(self._work,), name="score", daemon=True).start()
        weakref.finalize(self, _dismiss, self._work, size)

    def submit(self, order: float, call: Callable[[], None]) -> Future[None]:
        """Have `call` run by the first free thread, before everything that waits with a higher `order`."""
        future: Future[None] = Future()
        self._work.put((order, next(self._count), (call, future)))
        return future


def _run(work: _Work) -> None:
    while True:
        _, _, item = work.get()
        if item is None:
            return
        call, future = item
        try:
            call()
        except BaseException as error:  # for whoever waits for it
            future.set_exception(error)
        else:
            future.set_result(None)
        del item, call, future  # else an idle thread would hold the last batch


def _dismiss(work: _Work, size: int) -> None:
    for number in range(size):
        work.put((float("inf"), number, None))
