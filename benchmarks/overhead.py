"""`python -m benchmarks overhead`: what the worker itself costs, with the fake backend (a hash), so that the model costs nothing.

Requests of 100, 10 and 1 documents are pipelined and, in other turns, sent one at a time. The turns of all shapes (and of the other tree with
`--against`) are interleaved in rounds, so that a change in the machine's load meets all alike.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import costs
from benchmarks.figures import Cell, add_common_flags, cell, quantile, report
from benchmarks.host import ROOT, Host
from benchmarks.texts import Texts
from reranker_worker.byhand import processes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_DISTINCT = 200  # bodies of each shape; the query makes every request's pairs distinct
_GOAL_DOCUMENTS_PER_S = 100_000
_GOAL_LONE_MS = 3.0
_COSTS_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Shape:
    """Requests of so many documents; `window` of them in flight when pipelined."""

    documents: int
    window: int


SHAPES = (Shape(100, 64), Shape(10, 256), Shape(1, 512))


@dataclass(slots=True)
class Turns:
    """What was measured of one tree and shape."""

    documents_per_s: list[float] = field(default_factory=list)
    front_us: list[float] = field(default_factory=list)
    engine_us: list[float] = field(default_factory=list)
    lone_ms: list[float] = field(default_factory=list)


def main(arguments: Sequence[str]) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks overhead", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=40.0, help="measuring time in all (default 40)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each shape (default 5)")
    parser.add_argument("--against", metavar="DIR", help="another tree with reranking_server.py, measured in turns with this one")
    parser.add_argument("--profile", action="store_true", help="also the functions that cost most, by cProfile")
    add_common_flags(parser)
    given = parser.parse_args(list(arguments))
    trees = {"": ROOT} | ({"other: ": Path(given.against).resolve()} if given.against else {})
    turns = _measure(trees, given.rounds, given.seconds)
    cells = [item for tree in trees for item in _cells(tree, turns)]
    if given.against:
        cells += _ratios(turns)
    stages = {shape.documents: costs.stages(min(_COSTS_SECONDS, given.seconds / 4), shape.documents) for shape in SHAPES}
    code = report("overhead", cells, given, {"microseconds_per_document": stages})
    print(f"\nmicroseconds of CPU per document in requests of {', '.join(str(shape.documents) for shape in SHAPES)}, without pipes:")
    for name in next(iter(stages.values())):
        print(f"  {name:<38}" + "".join(f"{stages[shape.documents][name]:9.2f}" for shape in SHAPES))
    if given.profile:
        print("".join("\n" + costs.profile(shape.documents) for shape in SHAPES))
    return code


def requests_of(shape: Shape) -> Callable[[int], bytes]:
    """Request n as prebuilt bytes: only its id and query are made on the way, so that no two have a pair in common."""
    texts = Texts(shape.documents)
    tails = [json.dumps(texts.passages(shape.documents), ensure_ascii=False).encode() + b"}\n" for _ in range(_DISTINCT)]
    return lambda number: b'{"id":%d,"query":"question number %d about things","documents":' % (number, number) + tails[number % _DISTINCT]


def _measure(trees: dict[str, Path], rounds: int, seconds: float) -> dict[tuple[str, int], Turns]:
    turns: dict[tuple[str, int], Turns] = defaultdict(Turns)
    requests = {shape: requests_of(shape) for shape in SHAPES}
    number = 0
    with ExitStack() as stack:
        hosts = {tree: stack.enter_context(Host(["--backend", "fake"], root)) for tree, root in trees.items()}
        for host in hosts.values():
            host.wait_ready()
            number += host.drive(requests[SHAPES[0]], number, SHAPES[0].window, 0.2).requests
        turn_seconds = seconds / (rounds * len(SHAPES) * len(trees) * 2)
        for _ in range(rounds):
            for shape in SHAPES:
                for tree, host in hosts.items():
                    number += _pipelined(host, shape, requests[shape], number, turn_seconds, turns[tree, shape.documents])
                    number += _lone(host, requests[shape], number, turn_seconds, turns[tree, shape.documents])
    return turns


def _pipelined(host: Host, shape: Shape, request: Callable[[int], bytes], first: int, seconds: float, turns: Turns) -> int:
    pids = [[host.pid], host.engine_pids]
    before = [sum(processes.cpu_seconds(pid) or 0.0 for pid in group) for group in pids]
    drive = host.drive(request, first, shape.window, seconds)
    used = [sum(processes.cpu_seconds(pid) or 0.0 for pid in group) - start for group, start in zip(pids, before, strict=True)]
    documents = drive.requests * shape.documents
    turns.documents_per_s.append(documents / drive.seconds)
    turns.front_us.append(used[0] / documents * 1e6)
    turns.engine_us.append(used[1] / documents * 1e6)
    return drive.requests


def _lone(host: Host, request: Callable[[int], bytes], first: int, seconds: float, turns: Turns) -> int:
    until, sent = time.perf_counter() + seconds, 0
    while sent < 3 or time.perf_counter() < until:
        line = request(first + sent)
        begin = time.perf_counter()
        host.ask(line)
        turns.lone_ms.append((time.perf_counter() - begin) * 1e3)
        sent += 1
    return sent


def _cells(tree: str, turns: dict[tuple[str, int], Turns]) -> list[Cell]:
    cells: list[Cell] = []
    for shape in SHAPES:
        found, name = turns[tree, shape.documents], f"{tree}{shape.documents} a request"
        goal = _GOAL_DOCUMENTS_PER_S if shape.documents == 100 else None
        cells += [
            cell(f"{name}, pipelined", "documents/s", found.documents_per_s, at_least=goal),
            cell(f"{name}, CPU of the front", "us/document", found.front_us),
            cell(f"{name}, CPU of the engine", "us/document", found.engine_us),
            cell(f"{name}, lone, p50", "ms", found.lone_ms, at_most=_GOAL_LONE_MS if shape.documents == 10 else None),
            cell(f"{name}, lone, p95", "ms", [quantile(found.lone_ms, 0.95)]),
        ]
    return cells


def _ratios(turns: dict[tuple[str, int], Turns]) -> list[Cell]:
    cells: list[Cell] = []
    for shape in SHAPES:
        mine, other = turns["", shape.documents], turns["other: ", shape.documents]
        pairs = zip(mine.documents_per_s, other.documents_per_s, strict=True)
        cells.append(cell(f"this : other, {shape.documents} a request", "x documents/s", [a / b for a, b in pairs]))
    return cells
