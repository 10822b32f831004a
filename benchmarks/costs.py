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
        begin = time.process_time()
        self.sent.append(pack(body))
        self.spent["front: pack frame"] += time.process_time() - begin

    def answer(self) -> list[bytes]:
        """What the engine makes of the frames sent so far."""
        answers: list[bytes] = []
        sent, self.sent = self.sent, []
        for data in sent:
            marks = [time.process_time()]
            (frame,) = self._reader.feed(data)
            marks.append(time.process_time())
            prepared = self._scorer.prepare(frame)
            marks.append(time.process_time())
            scored = self._scorer.score(prepared, lambda batch: None)
            marks.append(time.process_time())
            answers.append(pack(scored))
            marks.append(time.process_time())
            names = ("engine: unpack frame", "engine: pairs and tokenize (fake)", "engine: passes and hash (fake)", "engine: pack result")
            for name, start, stop in zip(names, marks, marks[1:], strict=False):
                self.spent[name] += stop - start
        return answers


class _Bench:
    """A worker that is ready, and rounds of requests for it."""

    def __init__(self, documents: int) -> None:
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
        self._documents = documents
        self._bodies = [json.dumps(texts.passages(documents)).encode() for _ in range(max(_WINDOW, _WINDOW * 10 // documents))]
        self.documents = self._requests = 0

    def round(self, *, parse_apart: bool) -> None:
        """One window of requests, all answered. `parse_apart` parses each line a second time, to know that part's cost."""
        self._now += 0.001
        lines = [
            b'{"id":%d,"query":"question %d about things","documents":%s}\n' % (number, number, body)
            for number, body in enumerate(self._bodies, self._requests)
        ]
        if parse_apart:
            self._timed("front: parse", self._each, self._decoder.feed, lines)
        self._timed("front: receive in all", self._each, self._worker.receive, lines, self._now)
        answered = 0
        while answered < len(self._bodies):
            for data in self._link.answer():
                (frame,) = self._timed("front: unpack result", self._reader.feed, data)
                self._timed("front: complete and answer in all", self._worker.on_frame, self._worker.fleet.engines[0], frame, self._now)
            answered += len(self._worker.take_lines(self._now))
        self.documents += len(self._bodies) * self._documents
        self._requests += len(self._bodies)

    def _each(self, call: Any, lines: list[bytes], *arguments: Any) -> None:
        for line in lines:
            call(line, *arguments)

    def _timed(self, name: str, call: Any, *arguments: Any) -> Any:
        begin = time.process_time()
        result = call(*arguments)
        self.spent[name] += time.process_time() - begin
        return result


def stages(seconds: float, documents: int = 100) -> dict[str, float]:
    """Microseconds of CPU per document of each stage, in requests of so many documents of about 75 tokens."""
    bench = _Bench(documents)
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


def profile(documents: int = 100) -> str:
    """The functions that take most, by their own time, under cProfile (which makes Python calls look dearer than they are)."""
    bench = _Bench(documents)
    bench.round(parse_apart=False)
    bench.documents = 0
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(_PROFILED_ROUNDS):
        bench.round(parse_apart=False)
    profiler.disable()
    out = io.StringIO()
    pstats.Stats(profiler, stream=out).strip_dirs().sort_stats("tottime").print_stats(_SHOWN_FUNCTIONS)
    return f"{bench.documents:,} documents in requests of {documents}\n{out.getvalue()}"
