"""`python -m benchmarks throughput`: the worker against `CrossEncoder.predict(batch_size=32)` with its defaults.

Same model, same texts, same number of threads, in turns (A B A B ...): each idles while the other scores. The worker is measured from the
outside, with pipes and JSON; the peer measures itself. Ratios are taken turn by turn. Before anything is timed the scores are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.figures import Cell, add_common_flags, cell, report
from benchmarks.host import ROOT, HostError, end
from benchmarks.texts import Texts
from reranker_worker.byhand import processes
from reranker_worker.client import Client
from reranker_worker.machine import usable_threads
from reranker_worker.models import BUNDLED_DIRECTORY

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

_REST_SECONDS = 0.05  # threads of the other side that still spin come to rest
_TOLERANCE = 1e-4
_TIMEOUT_MS = 600_000
_MIB = 1024 * 1024
_DISAGREEMENT = 70

Call = tuple[str, list[str]]


@dataclass(frozen=True, slots=True)
class Load:
    """Concurrent requests of so many documents each, and the least ratio that is wanted."""

    name: str
    requests: int
    documents: int
    goal: float | None


LOADS = (Load("a10", 1, 10, None), Load("a100", 1, 100, 1.0), Load("c16x8", 16, 8, 1.5))


@dataclass(slots=True)
class Turns:
    """Pairs per second and CPU milliseconds per pair of each side, turn by turn."""

    ours: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)
    ours_cpu_ms: list[float] = field(default_factory=list)
    peer_cpu_ms: list[float] = field(default_factory=list)


class Peer:
    """The other process."""

    def __init__(self, model: str, threads: int, environ: dict[str, str]) -> None:
        command = [sys.executable, "-m", "benchmarks.peer", model, str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT, env=os.environ | environ
        )
        self._ask(None)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        end(self._process)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def score(self, calls: Sequence[Call], *, raw: bool = False) -> tuple[float, list[list[float]]]:
        """(seconds, scores): the calls one after the other."""
        body = self._ask({"calls": calls, "raw": raw})
        return body["seconds"], body["scores"]

    def _ask(self, body: dict[str, Any] | None) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if body is not None:
            self._process.stdin.write(json.dumps(body) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise HostError(f"the peer ended with code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def main(arguments: Sequence[str]) -> int:
    """The command; its exit code (70 when the scores disagree)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks throughput", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=str(BUNDLED_DIRECTORY), help="a local model directory (default: the bundled one)")
    parser.add_argument("--threads", type=int, default=usable_threads(), help="of each side (default: what this process may use)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side and load (default 7)")
    parser.add_argument("--peer-env", action="append", default=[], metavar="NAME=VALUE", help="a variable for the peer alone")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another setting of the worker")
    add_common_flags(parser)
    given = parser.parse_args(list(arguments))
    settings: dict[str, Any] = {"model": given.model, "threads": given.threads} | dict(item.split("=", 1) for item in given.set)
    begin = time.perf_counter()
    with Client(timeout_s=_TIMEOUT_MS / 1e3, stderr=subprocess.DEVNULL, **settings) as client:
        start_s = time.perf_counter() - begin
        begin = time.perf_counter()
        with Peer(given.model, given.threads, dict(item.split("=", 1) for item in given.peer_env)) as peer:
            peer_start_s = time.perf_counter() - begin
            texts = Texts(7)
            difference = _difference(client, peer, texts)
            turns = _measure(client, peer, texts, given.rounds)
            sides = ([client.pid, *processes.children(client.pid)], [peer.pid])
            memory = [sum(processes.rss_bytes(pid) or 0 for pid in side) / _MIB for side in sides]
            cells = [item for load in LOADS for item in _cells(load, turns[load.name])]
            cells += [
                cell("largest difference of a logit", "", [difference], at_most=_TOLERANCE),
                cell("start, worker", "s", [start_s]),
                cell("start, predict", "s", [peer_start_s]),
                cell("resident, worker (both processes)", "MiB", memory[:1]),
                cell("resident, predict", "MiB", memory[1:]),
            ]
    code = report("throughput", cells, given)
    return code if difference <= _TOLERANCE else _DISAGREEMENT


def _difference(client: Client, peer: Peer, texts: Texts) -> float:
    """The largest difference of a logit over one call of each load; also warms both sides up."""
    worst = 0.0
    for load in LOADS:
        calls = _calls(load, texts)
        _, expected = peer.score(calls, raw=True)
        ours = [client.rerank(query, documents, raw_scores=True, timeout_ms=_TIMEOUT_MS)["scores"] for query, documents in calls]
        worst = max(worst, *(abs(a - b) for mine, theirs in zip(ours, expected, strict=True) for a, b in zip(mine, theirs, strict=True)))
    return worst


def _measure(client: Client, peer: Peer, texts: Texts, rounds: int) -> dict[str, Turns]:
    turns: defaultdict[str, Turns] = defaultdict(Turns)
    ours = [client.pid, *processes.children(client.pid)]
    for _ in range(rounds):
        for load in LOADS:
            calls, turn = _calls(load, texts), turns[load.name]
            pairs = load.requests * load.documents
            time.sleep(_REST_SECONDS)
            before = _cpu_seconds(ours)
            turn.ours.append(pairs / _ours(client, calls))
            turn.ours_cpu_ms.append((_cpu_seconds(ours) - before) / pairs * 1e3)
            time.sleep(_REST_SECONDS)
            before = _cpu_seconds([peer.pid])
            turn.peer.append(pairs / peer.score(calls)[0])
            turn.peer_cpu_ms.append((_cpu_seconds([peer.pid]) - before) / pairs * 1e3)
    return turns


def _cpu_seconds(pids: Sequence[int]) -> float:
    return sum(processes.cpu_seconds(pid) or 0.0 for pid in pids)


def _ours(client: Client, calls: Sequence[Call]) -> float:
    """Seconds from the first request's write to the last answer; all are in flight at once."""
    begin = time.perf_counter()
    futures = [client.submit({"query": query, "documents": documents, "timeout_ms": _TIMEOUT_MS}) for query, documents in calls]
    for future in futures:
        future.result()
    return time.perf_counter() - begin


def _calls(load: Load, texts: Texts) -> list[Call]:
    return [(texts.query(), texts.passages(load.documents)) for _ in range(load.requests)]


def _cells(load: Load, turns: Turns) -> list[Cell]:
    ratios = [ours / peer for ours, peer in zip(turns.ours, turns.peer, strict=True)]
    shape = f"{load.requests} x {load.documents}"
    return [
        cell(f"{load.name} ({shape}), worker", "pairs/s", turns.ours),
        cell(f"{load.name} ({shape}), predict", "pairs/s", turns.peer),
        cell(f"{load.name} ({shape}), worker : predict", "x", ratios, at_least=load.goal),
        cell(f"{load.name} ({shape}), CPU, worker", "ms/pair", turns.ours_cpu_ms),
        cell(f"{load.name} ({shape}), CPU, predict", "ms/pair", turns.peer_cpu_ms),
    ]
