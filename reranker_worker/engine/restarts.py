"""When a dead engine is started again. Pure: time is an argument."""

from __future__ import annotations

from collections import deque

DELAYS_SECONDS = (0.0, 0.1, 0.5, 2.0, 5.0)
WINDOW_SECONDS = 60.0
SLOW_SECONDS = 30.0
# A restart cannot help: usage, corrupt or missing model, protocol, configuration (exit codes of sysexits.h).
PERMANENT_EXIT_CODES = frozenset({64, 65, 66, 76, 77, 78})


class Restarts:
    """Back-off of one engine: 0, 0.1, 0.5, 2, 5 s for deaths within a minute, then every 30 s."""

    def __init__(self) -> None:
        self._deaths: deque[float] = deque(maxlen=len(DELAYS_SECONDS) + 1)

    def delay(self, now: float) -> float:
        """Record a death at `now` (seconds, monotonic); how long to wait before the next start, in seconds."""
        self._forget(now)
        self._deaths.append(now)
        return DELAYS_SECONDS[len(self._deaths) - 1] if len(self._deaths) <= len(DELAYS_SECONDS) else SLOW_SECONDS

    def storming(self, now: float) -> bool:
        """True when so many deaths are recent that requests should not wait for the next start."""
        self._forget(now)
        return len(self._deaths) >= len(DELAYS_SECONDS)

    def _forget(self, now: float) -> None:
        if len(self._deaths) >= len(DELAYS_SECONDS):
            # In a storm the starts are so far apart that no window would be full: it ends when an engine has lived for a window.
            if now - self._deaths[-1] > SLOW_SECONDS + WINDOW_SECONDS:
                self._deaths.clear()
            return
        while self._deaths and now - self._deaths[0] > WINDOW_SECONDS:
            self._deaths.popleft()
