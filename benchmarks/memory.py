"""`python -m benchmarks memory`: what the worker holds when it is ready, after 1,000 requests, and after 2,000 more of random shape.

Resident memory of front and engine together; of pages that both share each counts one, so that the proportional size (PSS) is given too.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections import defaultdict, deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.contestants import add_worker_flags, client, settings_of
from benchmarks.environments import UnavailableError
from benchmarks.figures import Cell, add_common_flags, cell, report
from benchmarks.latency import Maker
from benchmarks.texts import Texts
from reranker_worker.byhand import processes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from concurrent.futures import Future

    from reranker_worker.client import Client

_DOCUMENTS, _MOST_DOCUMENTS = 10, 32
_IN_FLIGHT = 4
_LONG_SHARE = 0.1
_GOAL_ONNX_MIB, _GOAL_GROWTH_MIB = 250, 32
_MIB = 1024 * 1024
_UNUSABLE = 64

Found = defaultdict[tuple[str, str], list[float]]


def main(arguments: Sequence[str]) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks memory", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a local model directory (default: the bundled one)")
    parser.add_argument("--threads", type=int, help="of the worker (default: what this process may use)")
    parser.add_argument("--rounds", type=int, default=1, help="fresh workers of each setting (default 1)")
    parser.add_argument("--requests", type=int, default=1000, help="ordinary requests of 10 documents (default 1,000)")
    parser.add_argument("--shapes", type=int, default=2000, help="requests of random shape after them (default 2,000)")
    add_worker_flags(parser)
    add_common_flags(parser)
    given = parser.parse_args(list(arguments))
    found: Found = defaultdict(list)
    backends: dict[str, str] = {}
    try:
        for turn in range(given.rounds):
            for name, settings in settings_of(given).items():
                with client(settings) as worker:
                    backends[name] = worker.wait_ready()["backend"]
                    _one(worker, given, turn, found, name)
    except UnavailableError as error:
        print(f"memory: {error}", file=sys.stderr)
        return _UNUSABLE
    return report("memory", [item for name, backend in backends.items() for item in _cells(name, backend, found, given)], given)


def _one(worker: Client, given: argparse.Namespace, turn: int, found: Found, name: str) -> None:
    pids = [worker.pid, *processes.children(worker.pid)]

    def note(when: str) -> None:
        found[name, f"RSS {when}"].append(sum(processes.rss_bytes(pid) or 0 for pid in pids) / _MIB)
        found[name, f"PSS {when}"].append(sum(_kib(pid, "smaps_rollup", "Pss") for pid in pids) / 1024)

    note("at ready")
    make = Maker(turn + 1)
    _drive(worker, (make(_DOCUMENTS) for _ in range(given.requests)))
    note("after the requests")
    _drive(worker, _shapes(given.shapes, turn))
    note("after the shapes")
    found[name, "growth"].append(found[name, "RSS after the shapes"][-1] - found[name, "RSS after the requests"][-1])
    found[name, "peak"].append(sum(_kib(pid, "status", "VmHWM") for pid in pids) / 1024)


def _shapes(count: int, seed: int) -> Iterable[dict[str, Any]]:
    """Requests of 1 to 32 documents, small ones more often, of a few words to 400 tokens."""
    texts, source = Texts(100 + seed), random.Random(seed)
    for number in range(count):
        documents = min(_MOST_DOCUMENTS, int(source.paretovariate(0.9)))
        make = texts.long_passages if source.random() < _LONG_SHARE else texts.passages
        yield {"query": f"{texts.query()} {number}", "documents": make(documents)}


def _drive(worker: Client, bodies: Iterable[dict[str, Any]]) -> None:
    """All of them, a few in flight; an error answer is raised."""
    flying: deque[Future[dict[str, Any]]] = deque()
    for body in bodies:
        flying.append(worker.submit(body))
        if len(flying) >= _IN_FLIGHT:
            flying.popleft().result()
    for future in flying:
        future.result()


def _kib(pid: int, file: str, name: str) -> int:
    """A figure in KiB from /proc; 0 where the system does not tell."""
    try:
        text = Path(f"/proc/{pid}/{file}").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) if found else 0


def _cells(name: str, backend: str, found: Found, given: argparse.Namespace) -> list[Cell]:
    limit = _GOAL_ONNX_MIB if backend == "onnx" else None
    requests = f"after {given.requests:,} requests"
    return [
        cell(f"{name}, resident at ready", "MiB", found[name, "RSS at ready"]),
        cell(f"{name}, resident {requests}", "MiB", found[name, "RSS after the requests"], at_most=limit),
        cell(f"{name}, growth over {given.shapes:,} random shapes", "MiB", found[name, "growth"], at_most=_GOAL_GROWTH_MIB),
        cell(f"{name}, highest", "MiB", found[name, "peak"]),
        cell(f"{name}, proportional at ready", "MiB", found[name, "PSS at ready"]),
        cell(f"{name}, proportional {requests}", "MiB", found[name, "PSS after the requests"]),
    ]
