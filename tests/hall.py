"""A worker with in-memory engines and virtual time: what a host sends goes in, whole answers come out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from scheduling import score_of

from reranker_worker.config import Config
from reranker_worker.worker import Worker

if TYPE_CHECKING:
    from reranker_worker.engine.fleet import Engine

INFO: dict[str, Any] = {
    "model": "tiny",
    "model_path": "/models/tiny",
    "model_revision": None,
    "backend": "fake",
    "device": "cpu",
    "dtype": "float32",
    "max_length": 512,
    "activation": "sigmoid",
    "threads": 1,
    "tokens_per_ms": 10.0,
    "versions": {"runtime": "1"},
}
WALL_CLOCK = 1234.5


class MemoryLink:
    """Records what an engine is told."""

    def __init__(self) -> None:
        self.starts = 0
        self.alive = False
        self.frames: list[dict[str, Any]] = []
        self.cannot_start: OSError | None = None

    def start(self) -> None:
        if self.cannot_start:
            raise self.cannot_start
        self.starts += 1
        self.alive = True
        self.frames = []

    def send(self, body: dict[str, Any]) -> None:
        self.frames.append(body)

    def kill(self) -> None:
        self.alive = False


def scored(frame: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The good answer of an engine to a `score` frame."""
    values = [score_of(query, document, *options) for query, *options, documents in frame["groups"] for document in documents]
    answer = {
        "event": "scored",
        "batch": frame["batch"],
        "logits": [value + 1 for value in values],
        "probabilities": values,
        "tokens": [10] * len(values),
        "truncated": [],
        "failures": [],
        "tokenize_ms": 1.0,
        "inference_ms": len(values),
    }
    return answer | changes


class Hall:
    """One worker; `now` moves by `later` alone."""

    def __init__(self, *, start: bool = True, engines: int = 1, **settings: Any) -> None:
        self.now = 100.0
        self.kept: list[dict[str, Any]] = []  # lines that were taken while time passed
        self.links = [MemoryLink() for _ in range(engines)]
        config = Config(engines=engines, backend="fake", **settings)
        self.worker = Worker(config, self.links, now=self.now, wall_clock=lambda: WALL_CLOCK, pid=42)
        self.worker.tick(self.now)
        if start:
            for number in range(engines):
                self.ready(number)
            hello = self.lines()
            assert [line["type"] for line in hello] == ["ready"]

    def engine(self, number: int = 0) -> Engine:
        return self.worker.fleet.engines[number]

    def send(self, data: bytes) -> None:
        self.worker.receive(data, self.now)

    def ask(self, **fields: Any) -> None:
        self.send(json.dumps(fields).encode() + b"\n")

    def rerank(self, *documents: str, query: str = "q", **fields: Any) -> None:
        self.ask(query=query, documents=documents, **fields)

    def frame(self, number: int = 0, **body: Any) -> None:
        """An engine says something."""
        self.worker.on_frame(self.engine(number), body, self.now)

    def ready(self, number: int = 0, **changes: Any) -> None:
        self.frame(number, event="ready", info=INFO | changes)

    def score(self, number: int = 0, **changes: Any) -> None:
        """The engine answers the oldest batch that it was sent."""
        self.frame(number, **scored(self.links[number].frames.pop(0), **changes))

    def score_all(self) -> None:
        while any(link.frames for link in self.links):
            for number, link in enumerate(self.links):
                if link.frames:
                    self.score(number)

    def die(self, code: int = -11, number: int = 0) -> None:
        self.links[number].alive = False
        self.links[number].frames = []
        self.worker.on_death(self.engine(number), code, self.now)

    def revive(self, number: int = 0) -> None:
        """Wait for the next start, and let it succeed."""
        starts = self.links[number].starts
        while self.links[number].starts == starts:
            self.kept += self.take()
            self.now = max(self.now, self.worker.next_wakeup())
            self.worker.tick(self.now)
        self.ready(number)

    def later(self, seconds: float) -> None:
        self.now += seconds
        self.worker.tick(self.now)

    def wait(self, seconds: float) -> None:
        """Time passes, and the worker is woken whenever it asks for it."""
        end = self.now + seconds
        while (moment := self.worker.next_wakeup()) <= end:
            self.now = max(self.now, moment)
            self.worker.tick(self.now)
            self.kept += self.take()
            if self.worker.next_wakeup() <= self.now:
                break
        self.now = end
        self.worker.tick(end)

    def take(self) -> list[dict[str, Any]]:
        """The lines that may be written at this moment."""
        lines = self.worker.take_lines(self.now)
        assert all(line.endswith(b"\n") and line.count(b"\n") == 1 and line.isascii() for line in lines)
        return [json.loads(line) for line in lines]

    def lines(self) -> list[dict[str, Any]]:
        """All lines, waiting out the silence around `ready`."""
        found = self.kept + self.take()
        self.kept = []
        while self.worker.has_lines:
            self.now += 0.001
            found += self.take()
        return found

    def line(self) -> dict[str, Any]:
        """The one line there is."""
        (only,) = self.lines()
        return only

    def in_flight(self, number: int = 0) -> list[str]:
        """All documents that an engine has been sent and has not answered."""
        return [document for frame in self.links[number].frames for group in frame["groups"] for document in group[4]]


def expected(*documents: str, query: str = "q") -> list[float]:
    """The default scores."""
    return [score_of(query, document) for document in documents]
