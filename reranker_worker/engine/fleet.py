"""The engines as the worker sees them: which are ready, what each has in flight, which hang, when a dead one starts again.

Pure: it drives `Link`s (a process, or anything a test puts there) and is told the time.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from reranker_worker.engine.restarts import PERMANENT_EXIT_CODES, Restarts
from reranker_worker.reports import EngineStatus
from reranker_worker.scheduler import Batch, Result, Room

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reranker_worker.config import Config

# One is scored while the next is on its way; a long one may be the third, and nobody waits for it, as short ones overtake it. Parts of a longer one
# are single passes on a machine with two threads: the third waits for the thread that is free first.
_MOST_SHORT, _MOST_LONG = 2, 3
# An engine without progress is given this long after a deadline has passed, or four times its slowest pass.
_GRACE_SECONDS = 1.0
_GRACE_PASSES = 4.0
_SOONEST_SECONDS = 1.0  # a start in a storm takes at least so long; "now" would make hosts hammer
_INTERNAL_ERROR = 70
_MACHINE_UNFIT = 71


class Link(Protocol):
    """What the fleet needs of an engine."""

    def start(self) -> None: ...
    def send(self, body: dict[str, Any]) -> None: ...
    def kill(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Loading:
    """An engine's start goes on; of a download `done` and `total` bytes are known (total 0: not known)."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Ready:
    """An engine can score."""

    info: dict[str, Any]


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """No engine could be started, and trying again would not help."""

    error: str
    exit_code: int


@dataclass(frozen=True, slots=True)
class Scored:
    batch: Batch
    result: Result


@dataclass(frozen=True, slots=True)
class Lost:
    """An engine died; `batches` were in flight. `reason` is a phrase for the log."""

    batches: list[Batch]
    reason: str


Event = Loading | Ready | LoadFailed | Scored | Lost | None


@dataclass(slots=True)
class Engine:
    """One engine's state. `state` is "waiting" (for its next start), "loading", "ready" or "gone" (never started again)."""

    link: Link
    state: str = "waiting"
    in_flight: dict[int, Batch] = field(default_factory=dict)
    start_at: float = 0.0
    progress_at: float = 0.0
    slowest_seconds: float = 0.0
    restarts: Restarts = field(default_factory=Restarts)
    starts: int = 0
    info: dict[str, Any] = field(default_factory=dict)
    stage: str = ""
    failure: tuple[str, int] | None = None  # what it said before it went
    kill_reason: str = ""

    @property
    def room(self) -> Room:
        """What it may be sent: nothing beside a batch that is tried alone; a short batch need not wait for long ones, nor a long request of a better
        priority for parts of a longer one, because it overtakes them."""
        batches = self.in_flight.values()
        if self.state != "ready" or any(batch.alone for batch in batches) or sum(not batch.long for batch in batches) >= _MOST_SHORT:
            return Room.NONE
        if len(batches) < _MOST_LONG:
            return Room.PART
        return Room.LONG if sum(not batch.part for batch in batches) < _MOST_LONG else Room.SHORT

    def makes_progress(self, frame: dict[str, Any]) -> bool:
        """False for news of a batch behind one that must have been begun before: if that one hangs, its thread alone stands still."""
        number = frame.get("batch")
        batch = self.in_flight.get(number) if isinstance(number, int) else None
        return batch is None or not any(other.number < batch.number and other.order < batch.order for other in self.in_flight.values())

    def status(self, now: float) -> EngineStatus:
        """A snapshot for reports."""
        progress_ms = round((now - self.progress_at) * 1e3, 3) if self.in_flight or self.state == "loading" else None
        return EngineStatus(self.state, self.stage if self.state == "loading" else "", len(self.in_flight), progress_ms, self.starts)


class Fleet:
    """All engines. Calls take `now` in monotonic seconds."""

    def __init__(self, config: Config, links: Sequence[Link]) -> None:
        self._stall_seconds = config.engine_stall_ms / 1e3
        self._start_seconds = config.start_timeout_ms / 1e3
        self.engines = [Engine(link) for link in links]
        self.ever_ready = False

    @property
    def ready(self) -> list[Engine]:
        """The engines that can score, the least busy first."""
        return sorted((engine for engine in self.engines if engine.state == "ready"), key=lambda engine: len(engine.in_flight))

    def unavailable(self, now: float) -> float | None:
        """None while requests are worth queueing; else the seconds until an engine may be back (inf: never)."""
        if any(engine.state in ("ready", "loading") and not engine.restarts.storming(now) for engine in self.engines):
            return None
        if any(engine.state == "ready" for engine in self.engines):
            return None
        waits = [max(_SOONEST_SECONDS, engine.start_at - now) for engine in self.engines if engine.state != "gone"]
        if not waits:
            return float("inf")
        storming = all(engine.restarts.storming(now) for engine in self.engines if engine.state != "gone")
        return min(waits) if storming else None

    def send(self, engine: Engine, batch: Batch, now: float) -> None:
        """Put a batch in flight."""
        if not engine.in_flight:
            engine.progress_at = now
        engine.in_flight[batch.number] = batch
        engine.link.send({"op": "score", "batch": batch.number, "order": batch.order, "groups": batch.groups})

    def on_frame(self, engine: Engine, frame: dict[str, Any], now: float) -> Event:
        """What an engine said. A frame that makes no sense kills the engine (its death is reported by `on_death`)."""
        if engine.makes_progress(frame):
            if engine.in_flight:
                engine.slowest_seconds = max(engine.slowest_seconds, now - engine.progress_at)
            engine.progress_at = now
        try:
            return self._understand(engine, frame)
        except (KeyError, TypeError, ValueError):
            self.on_garbage(engine)
            return None

    def _understand(self, engine: Engine, frame: dict[str, Any]) -> Event:
        event = frame.get("event")
        if event == "loading":
            engine.stage = str(frame["stage"])
            return Loading(engine.stage, int(frame["done"]), int(frame["total"]))
        if event == "ready":
            engine.state, engine.info = "ready", frame["info"]
            self.ever_ready = True
            return Ready(engine.info)
        if event == "load_failed":
            engine.failure = (str(frame["error"]), int(frame["exit_code"]))
        elif event == "scored":
            return self._scored(engine, frame)
        elif event != "progress":
            self._kill(engine, "it broke the inner wire")
        return None

    def on_garbage(self, engine: Engine) -> None:
        """The engine's bytes were not frames."""
        self._kill(engine, "it broke the inner wire")

    def on_death(self, engine: Engine, return_code: int, now: float) -> list[Event]:
        """An engine process ended; what that means for what it owed and for the worker."""
        was_loading = engine.state == "loading"
        batches = list(engine.in_flight.values())
        engine.in_flight.clear()
        reason = engine.kill_reason or (engine.failure[0] if engine.failure else _ending(return_code))
        events: list[Event] = [Lost(batches, reason)]
        permanent = engine.failure is not None and engine.failure[1] in PERMANENT_EXIT_CODES
        engine.start_at = now + engine.restarts.delay(now)
        engine.state = "gone" if permanent else "waiting"
        if not self.ever_ready and was_loading:
            failed = self._first_start_failed(engine, return_code, now)
            if failed:
                events.insert(0, failed)  # the cause before its consequences: a host shows its user the first error
        engine.failure, engine.kill_reason = None, ""
        return events

    def tick(self, now: float) -> list[Event]:
        """Start what is due, kill what hangs."""
        events: list[Event] = []
        for engine in self.engines:
            if engine.state == "waiting" and engine.start_at <= now:
                events += self._start(engine, now)
            elif engine.state == "loading" and now - engine.progress_at >= self._start_seconds:
                self._kill(engine, f"its start made no progress for {self._start_seconds:g} s")
                engine.progress_at = now
            elif self._stalled_at(engine) <= now and not engine.kill_reason:
                self._kill(engine, "it hung while scoring")
        return events

    def next_wakeup(self) -> float:
        """The moment at which `tick` has something to do (monotonic seconds; inf: never)."""
        moments = [float("inf")]
        for engine in self.engines:
            if engine.state == "waiting":
                moments.append(engine.start_at)
            elif engine.state == "loading":
                moments.append(engine.progress_at + self._start_seconds)
            elif not engine.kill_reason:
                moments.append(self._stalled_at(engine))
        return min(moments)

    def forgive(self, seconds: float) -> None:
        """The whole machine, or this process group, stood still for so long: no engine made progress, and none hangs for that."""
        for engine in self.engines:
            engine.progress_at += seconds

    def kill_all(self) -> None:
        """At exit."""
        for engine in self.engines:
            if engine.state in ("loading", "ready"):
                engine.link.kill()

    def _start(self, engine: Engine, now: float) -> list[Event]:
        engine.state, engine.progress_at, engine.stage = "loading", now, "starting"
        engine.starts += 1
        try:
            engine.link.start()
        except OSError as error:
            engine.failure = (f"The engine process cannot be started: {error.strerror}.", _MACHINE_UNFIT)
            return self.on_death(engine, _MACHINE_UNFIT, now)
        return []

    def _first_start_failed(self, engine: Engine, return_code: int, now: float) -> LoadFailed | None:
        if engine.failure:
            return LoadFailed(*engine.failure)
        if engine.kill_reason:
            return LoadFailed(f"The model could not be loaded: {engine.kill_reason}.", _INTERNAL_ERROR)
        if return_code == -signal.SIGILL:
            return LoadFailed("The engine used an instruction that this CPU does not have; install builds made for it.", _MACHINE_UNFIT)
        if engine.restarts.storming(now):
            return LoadFailed(f"The model could not be loaded: the engine died {engine.starts} times ({_ending(return_code)}).", _INTERNAL_ERROR)
        return None

    def _scored(self, engine: Engine, frame: dict[str, Any]) -> Event:
        batch = engine.in_flight.get(frame["batch"])
        sizes = {len(frame[name]) for name in ("logits", "probabilities", "tokens")}
        if batch is None or sizes != {batch.num_pairs}:
            self._kill(engine, "it broke the inner wire")
            return None
        result = Result(
            logits=frame["logits"],
            probabilities=frame["probabilities"],
            model_scores=frame.get("model_scores"),
            tokens=frame["tokens"],
            truncated=frame["truncated"],
            failures=[(pair, code, text) for pair, code, text in frame["failures"]],
            tokenize_ms=frame["tokenize_ms"],
            inference_ms=frame["inference_ms"],
        )
        failed = {pair for pair, _, _ in result.failures}
        # A pair has a score or a failure; a null would reach the host as a score.
        if any(logit is None and pair not in failed for pair, logit in enumerate(result.logits)):
            self._kill(engine, "it broke the inner wire")
            return None
        del engine.in_flight[batch.number]
        return Scored(batch, result)

    def _stalled_at(self, engine: Engine) -> float:
        if engine.state != "ready" or not engine.in_flight:
            return float("inf")
        # Which of those that are being scored hangs is not known.
        batches = sorted(engine.in_flight.values(), key=lambda batch: batch.order)[: engine.info.get("parallel_passes", 1)]
        expected_seconds = max(batch.expected_ms for batch in batches) / 1e3
        grace = max(_GRACE_SECONDS, _GRACE_PASSES * max(engine.slowest_seconds, expected_seconds))
        deadline = min(batch.first_deadline for batch in batches)
        return min(engine.progress_at + self._stall_seconds, max(deadline, engine.progress_at) + grace)

    def _kill(self, engine: Engine, reason: str) -> None:
        engine.kill_reason = reason
        engine.link.kill()


def _ending(return_code: int) -> str:
    if return_code >= 0:
        return f"it exited with code {return_code}"
    try:
        return f"it was killed by {signal.Signals(-return_code).name}"
    except ValueError:
        return f"it was killed by signal {-return_code}"
