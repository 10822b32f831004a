"""Sustained mixed load with 1 % faults, watching what must not grow: memory, descriptors, threads, children.

The figures that are compared are taken at rest: everything answered, all engines back.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.chaos.driver import ROOT, WorkerProcess
from tests.chaos.expected import Expected, Ledger, ViolationError, parse_answer

if TYPE_CHECKING:
    from collections.abc import Sequence

MIB = 1 << 20
FRONT_GROWTH_BYTES = 8 * MIB
ENGINE_GROWTH_BYTES = 32 * MIB
IN_FLIGHT = 48
BLOCK = 16  # lines in one write
FAULT_SHARE = 0.01
KILL_EVERY_SECONDS = 20.0  # five deaths of an engine within a minute would be a storm
SETTLE_SECONDS = 30.0
COMMAND = (sys.executable, str(ROOT / "reranking_server.py"), *"--backend fake --engines 2 --log-level ERROR --engine-stall-ms 2000".split())
_FAULTS = ("fake:nan", "fake:raise", "fake:oom", "fake:oom1", "fake:print", "garbage", "timeout", "cancel")


@dataclass(frozen=True)
class Sample:
    """One look at the process tree. `fds` is None where the system does not show another process's descriptors."""

    seconds: float
    answers: int
    front_bytes: int
    engine_bytes: int
    threads: int
    fds: int | None
    children: int


@dataclass
class Outcome:
    samples: list[Sample] = field(default_factory=list)
    codes: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    first: Sample | None = None
    last: Sample | None = None
    faults: list[str] = field(default_factory=list)


def look(worker: WorkerProcess, seconds: float, answers: int) -> Sample:
    """The tree now."""
    engines = worker.engines()
    front = _status(worker.pid)
    fds: int | None = None
    with contextlib.suppress(PermissionError):  # a process without core dumps hides them from all but root
        fds = len(os.listdir(f"/proc/{worker.pid}/fd"))
    engine_bytes = max((_status(pid).get("VmRSS", 0) for pid in engines), default=0)
    return Sample(seconds, answers, front["VmRSS"], engine_bytes, front["Threads"], fds, len(engines))


def _status(pid: int) -> dict[str, int]:
    found: dict[str, int] = {}
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "Threads":
                found[name] = int(value)
            elif name == "VmRSS":
                found[name] = int(value.split()[0]) * 1024
    return found


def judge(first: Sample, last: Sample) -> list[str]:
    """What grew between two looks at rest."""
    faults = []
    if last.front_bytes - first.front_bytes > FRONT_GROWTH_BYTES:
        faults.append(f"the front grew by {(last.front_bytes - first.front_bytes) / MIB:.1f} MiB")
    if last.engine_bytes - first.engine_bytes > ENGINE_GROWTH_BYTES:
        faults.append(f"an engine grew by {(last.engine_bytes - first.engine_bytes) / MIB:.1f} MiB")
    if first.fds is not None and last.fds is not None and last.fds > first.fds:
        faults.append(f"descriptors grew from {first.fds} to {last.fds}")
    if last.threads > first.threads:
        faults.append(f"threads grew from {first.threads} to {last.threads}")
    if last.children > first.children:
        faults.append(f"children grew from {first.children} to {last.children}")
    return faults


class Load:
    """Keeps a number of random requests in flight and checks each answer."""

    def __init__(self, worker: WorkerProcess, seed: int) -> None:
        self._worker = worker
        self._random = random.Random(seed)
        self._number = 0
        self.ledger = Ledger()
        self.codes: Counter[str] = Counter()
        self.sent = 0
        worker.on_line = self._answered

    def _answered(self, line: bytes) -> None:
        self.codes[str(parse_answer(line).get("code", "ok"))] += 1
        self.ledger.answered(line)

    def keep_up(self, seconds: float) -> None:
        """Write more lines as answers come, for so long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.sent - self.ledger.answers < IN_FLIGHT:
                self._worker.write(b"".join(self._line() for _ in range(BLOCK)), deadline + SETTLE_SECONDS)
            else:
                known = self.ledger.answers
                self._worker.pump(0.05, lambda known=known: self.ledger.answers >= known + BLOCK)

    def settle(self) -> None:
        """Wait until all is answered and both engines are there."""
        if not self._worker.pump(SETTLE_SECONDS, lambda: not self.ledger.open):
            raise ViolationError(f"lost: {self.ledger.open[:5]}")
        state: list[Any] = []

        def note(line: bytes) -> None:
            state.append(parse_answer(line))

        self._worker.on_line = note
        deadline = time.monotonic() + SETTLE_SECONDS
        while not (state and all(engine["state"] == "ready" for engine in state[-1]["engines"])):
            if time.monotonic() > deadline:
                raise ViolationError("the engines do not come back")
            asked = len(state)
            self._worker.write(b'{"type":"health"}\n', deadline)
            self._worker.pump(5.0, lambda asked=asked: len(state) > asked)
            self._worker.pump(0.02)
        self._worker.on_line = self._answered

    def _line(self) -> bytes:
        self._number += 1
        rng, number = self._random, self._number
        fault = rng.choice(_FAULTS) if rng.random() < FAULT_SHARE else ""
        self.sent += 1
        if fault == "garbage":
            self.ledger.sent(Expected("error", None, codes={"INVALID_JSON"}))
            return b"garbage\n"
        if fault == "cancel":
            self.ledger.sent(Expected("cancel", number, target="nobody"))
            return b'{"type":"cancel","id":%d,"target":"nobody"}\n' % number
        expected = Expected("rerank", number if rng.random() < 0.8 else None)
        documents = [f"document {rng.randrange(10**6)} {'x' * rng.randrange(200)}" for _ in range(rng.randint(1, 12))]
        body: dict[str, Any] = {"query": f"q{number % 1000}", "documents": documents}
        if fault.startswith("fake:"):
            documents.append(f"{fault} x{number}")
            if fault in ("fake:nan", "fake:raise", "fake:oom1"):
                expected.codes, expected.must_fail = {"INFERENCE_ERROR"}, True
        elif fault == "timeout":
            body["timeout_ms"] = 1
            expected.codes.add("DEADLINE_EXCEEDED")
        if expected.id is not None:
            body["id"] = expected.id
        expected.pairs = [(body["query"], document) for document in documents]
        self.ledger.sent(expected)
        return json.dumps(body).encode() + b"\n"


def soak(seconds: float, seed: int = 1, command: Sequence[str] = COMMAND, *, kills: bool = True) -> Outcome:
    """Run the load: a third to warm up, then two thirds that must not grow anything. Raises ViolationError for a wrong answer."""
    outcome = Outcome()
    worker = WorkerProcess("soak", command)
    try:
        if not worker.pump(SETTLE_SECONDS, lambda: worker.ready):
            raise ViolationError("no `ready`")
        load = Load(worker, seed)
        begin = time.monotonic()
        warm_until, end = begin + seconds / 3, begin + seconds
        kill_at = begin + min(2.0, seconds / 6)
        while (now := time.monotonic()) < end:
            if outcome.first is None and now >= warm_until:
                load.settle()
                outcome.first = look(worker, now - begin, load.ledger.answers)
            if kills and now >= kill_at:
                kill_at = now + KILL_EVERY_SECONDS
                outcome.kills += 1
                worker.signal(signal.SIGKILL, next(iter(worker.engines()), None))
            load.keep_up(min(seconds / 12, 1.0))
            outcome.samples.append(look(worker, time.monotonic() - begin, load.ledger.answers))
        load.settle()
        outcome.last = look(worker, time.monotonic() - begin, load.ledger.answers)
        outcome.codes = load.codes
        assert outcome.first
        outcome.faults = judge(outcome.first, outcome.last)
    finally:
        worker.destroy()
    return outcome


def table(outcome: Outcome) -> str:
    """Up to twenty samples and the two that were compared, as text."""
    rows = [f"{'s':>7} {'answers':>9} {'front MiB':>10} {'engine MiB':>11} {'threads':>8} {'fds':>5} {'children':>9}"]
    step = max(1, len(outcome.samples) // 20)
    marked = [("", sample) for sample in outcome.samples[::step]]
    marked += [(mark, sample) for mark, sample in (("  at rest, warm", outcome.first), ("  at rest, end", outcome.last)) if sample]
    for mark, sample in marked:
        fds = "-" if sample.fds is None else str(sample.fds)
        memory = f"{sample.front_bytes / MIB:10.1f} {sample.engine_bytes / MIB:11.1f}"
        rows.append(f"{sample.seconds:7.1f} {sample.answers:9d} {memory} {sample.threads:8d} {fds:>5} {sample.children:9d}{mark}")
    return "\n".join(rows)
