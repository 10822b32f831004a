"""Where the worker's own time goes, without processes or pipes: the hall with an engine in memory, stage by stage, or under cProfile."""

from __future__ import annotations

import cProfile
import io
import json
import pstats
import time
from collections import defaultdict
from typing import Any

from benchmarks.texts import Texts
from reranker_worker.backends.fake import FakeBackend
from reranker_worker.config import Config
from reranker_worker.engine.frames import FrameReader, pack
from reranker_worker.engine.scoring import Scorer
from reranker_worker.protocol import Decoder, Limits
from reranker_worker.worker import Worker

_DOCUMENTS = 100
_WINDOW = 16
_PROFILED_ROUNDS = 40
_SHOWN_FUNCTIONS = 28


class _MemoryLink:
    """An engine that answers in the caller's thread; keeps the time of each stage."""

    def __init__(self, spent: defaultdict[str, float]) -> None:
        self.spent = spent
        self.sent: list[bytes] = []
        self._reader = FrameReader()
        self._scorer = Scorer(FakeBackend(""), Config(backend="fake"), lambda text: None)

    def start(self) -> None:
        self.sent.clear()

    def kill(self) -> None:
        self.sent.clear()

    def send(self, body: dict[str, Any]) -> None:
        begin = time.perf_counter()
        self.sent.append(pack(body))
        self.spent["front: pack frame"] += time.perf_counter() - begin

    def answer(self) -> list[bytes]:
        """What the engine makes of the frames sent so far."""
        answers: list[bytes] = []
        sent, self.sent = self.sent, []
        for data in sent:
            marks = [time.perf_counter()]
            (frame,) = self._reader.feed(data)
            marks.append(time.perf_counter())
            prepared = self._scorer.prepare(frame)
            marks.append(time.perf_counter())
            scored = self._scorer.score(prepared, lambda batch: None)
            marks.append(time.perf_counter())
            answers.append(pack(scored))
            marks.append(time.perf_counter())
            names = ("engine: unpack frame", "engine: pairs and tokenize (fake)", "engine: passes and hash (fake)", "engine: pack result")
            for name, start, stop in zip(names, marks, marks[1:], strict=False):
                self.spent[name] += stop - start
        return answers


class _Bench:
    """A worker that is ready, and rounds of requests for it."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)
        self._link = _MemoryLink(self.spent)
        self._worker = Worker(Config(backend="fake"), [self._link], now=0.0, wall_clock=time.time, pid=1)
        self._worker.tick(0.0)
        (engine,) = self._worker.fleet.engines
        info = {"model": "fake", "max_length": 512, "device": "cpu", "backend": "fake", "dtype": "float32", "tokens_per_ms": 5000.0}
        self._worker.on_frame(engine, {"event": "ready", "info": info}, 0.0)
        self._worker.take_lines(1.0)
        self._decoder = Decoder(Limits(Config().max_line_bytes, Config().max_documents))
        self._reader = FrameReader()
        self._now = 2.0
        texts = Texts(1)
        self._bodies = [json.dumps(texts.passages(_DOCUMENTS)).encode() for _ in range(_WINDOW)]
        self.documents = 0

    def round(self, *, parse_apart: bool) -> None:
        """One window of requests, all answered. `parse_apart` parses each line a second time, to know that part's cost."""
        self._now += 0.001
        first = self.documents
        for number, body in enumerate(self._bodies, first):
            line = b'{"id":%d,"query":"question %d about things","documents":%s}\n' % (number, number, body)
            if parse_apart:
                self._timed("front: parse", self._decoder.feed, line)
            self._timed("front: receive in all", self._worker.receive, line, self._now)
        lines = 0
        while lines < _WINDOW:
            for data in self._link.answer():
                (frame,) = self._timed("front: unpack result", self._reader.feed, data)
                self._timed("front: complete and answer in all", self._worker.on_frame, self._worker.fleet.engines[0], frame, self._now)
            lines += len(self._worker.take_lines(self._now))
        self.documents += _WINDOW * _DOCUMENTS

    def _timed(self, name: str, call: Any, *arguments: Any) -> Any:
        begin = time.perf_counter()
        result = call(*arguments)
        self.spent[name] += time.perf_counter() - begin
        return result


def stages(seconds: float) -> dict[str, float]:
    """Microseconds per document of each stage, in requests of 100 documents of about 75 tokens."""
    bench = _Bench()
    bench.round(parse_apart=True)
    bench.spent.clear()
    bench.documents, until = 0, time.perf_counter() + seconds
    while not bench.documents or time.perf_counter() < until:
        bench.round(parse_apart=True)
    spent = {name: value / bench.documents * 1e6 for name, value in bench.spent.items()}
    dispatched = spent["front: pack frame"]
    # Batches leave both when a request comes and when a result makes room; either way they are the front's.
    both = spent.pop("front: receive in all") + spent.pop("front: complete and answer in all")
    rest = both - spent["front: parse"] - dispatched
    ordered = {"front: parse": spent.pop("front: parse"), "front: admit, batch, complete, answer": rest, **spent}
    totals = {f"{side} in all": sum(value for name, value in ordered.items() if name.startswith(side)) for side in ("front", "engine")}
    return {name: round(value, 3) for name, value in {**ordered, **totals}.items()}


def profile() -> str:
    """The functions that take most, by their own time, under cProfile (which makes Python calls look dearer than they are)."""
    bench = _Bench()
    bench.round(parse_apart=False)
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(_PROFILED_ROUNDS):
        bench.round(parse_apart=False)
    profiler.disable()
    out = io.StringIO()
    pstats.Stats(profiler, stream=out).strip_dirs().sort_stats("tottime").print_stats(_SHOWN_FUNCTIONS)
    return f"{_PROFILED_ROUNDS * _WINDOW * _DOCUMENTS:,} documents\n{out.getvalue()}"
