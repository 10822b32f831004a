"""`python -m benchmarks latency`: how long a request takes, by its size, by the load beside it, and beside a request of 1,000 documents.

Several settings of the worker take turns. Loads are arrivals by chance (Poisson) at shares of the capacity that was measured just before, and
a request's time runs from the moment at which it was due: a worker that falls behind cannot hide it.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import time
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

from benchmarks.contestants import add_worker_flags, client, settings_of
from benchmarks.environments import UnavailableError
from benchmarks.figures import Cell, add_common_flags, cell, quantile, report
from benchmarks.texts import Texts
from reranker_worker.byhand import bench_loads as loads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reranker_worker.client import Client

_SIZES = (1, 10, 50, 100)
_SHARES = (0.25, 0.5, 0.75)
_LOAD_DOCUMENTS, _WINDOW = 10, 8
_LARGE, _SMALL = 1000, 10
_GOAL_BATCHES = 3.0
_TIMEOUT_MS = 600_000
_UNUSABLE = 64

Found = defaultdict[tuple[str, str], list[list[float]]]  # by setting and quantity: the values of each turn


class Maker:
    """Requests of fresh texts. Most are made beforehand: to make one takes longer than many a worker needs to answer it."""

    def __init__(self, seed: int) -> None:
        self._texts = Texts(seed)
        self._passages = self._texts.passages(2 * _LARGE)
        self._number = 0

    def __call__(self, documents: int) -> dict[str, Any]:
        """So many documents that follow one another; the query is new."""
        self._number += 1
        start = self._number * documents % (len(self._passages) - documents + 1)
        query = f"{self._texts.query()} {self._number}"
        return {"query": query, "documents": self._passages[start : start + documents], "timeout_ms": _TIMEOUT_MS}


def main(arguments: Sequence[str]) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks latency", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a local model directory (default: the bundled one)")
    parser.add_argument("--threads", type=int, help="of the worker (default: what this process may use)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default 3)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each size and load in each turn (default 5)")
    parser.add_argument("--large", type=int, default=_LARGE, help=f"documents of the large request (default {_LARGE:,})")
    parser.add_argument("--large-priority", type=int, default=0, help="priority of the large request (default 0, as the small ones; higher is worse)")
    add_worker_flags(parser)
    add_common_flags(parser)
    given = parser.parse_args(list(arguments))
    found: Found = defaultdict(list)
    failed: Counter[str] = Counter()
    try:
        with contextlib.ExitStack() as stack:
            workers = {name: stack.enter_context(client(settings)) for name, settings in settings_of(given).items()}
            target_ms = {name: worker.request({"type": "info"})["settings"]["batch_target_ms"] for name, worker in workers.items()}
            for turn in range(given.rounds):
                for name, worker in workers.items():
                    _one(worker, Maker(turn + 1), given, found, name, failed)
    except UnavailableError as error:
        print(f"latency: {error}", file=sys.stderr)
        return _UNUSABLE
    cells = [item for name in workers for item in _cells(name, found, target_ms[name], given.large)]
    cells.append(cell("requests that failed", "", [sum(failed.values())], at_most=0))
    return report("latency", cells, given, {"failed": failed})


def _one(worker: Client, make: Maker, given: argparse.Namespace, found: Found, name: str, failed: Counter[str]) -> None:
    """One turn of one worker."""
    worker.request(make(_LOAD_DOCUMENTS))
    for size in _SIZES:
        until = time.perf_counter() + given.seconds
        found[name, f"{size} documents"].append(loads.lone(worker, make, size, sys.maxsize, until))
    busy = loads.closed(worker, make, _LOAD_DOCUMENTS, _WINDOW, given.seconds)
    capacity = busy.counts[loads.SCORED] / busy.seconds
    found[name, "capacity"].append([capacity * _LOAD_DOCUMENTS])
    for share in _SHARES:
        times = loads.arrivals(capacity * share, given.seconds, random.Random(share))
        outcome = loads.open_loop(worker, make, _LOAD_DOCUMENTS, times)
        found[name, f"load {share:.0%}"].append(outcome.latencies_ms)
        failed.update({code: count for code, count in outcome.counts.items() if code != loads.SCORED})
    large_ms, beside_ms = loads.beside(worker, make, given.large, _SMALL, given.large_priority)
    found[name, "large"].append([large_ms])
    found[name, "beside"].append(beside_ms)


def _cells(name: str, found: Found, target_ms: float, large: int) -> list[Cell]:
    cells: list[Cell] = []
    for size in _SIZES:
        cells += _quantiles(f"{name}, {size} documents, lone", found[name, f"{size} documents"])
    cells.append(cell(f"{name}, capacity in requests of {_LOAD_DOCUMENTS}", "pairs/s", [rate for (rate,) in found[name, "capacity"]]))
    for share in _SHARES:
        cells += _quantiles(f"{name}, {_LOAD_DOCUMENTS} documents at {share:.0%} of the capacity", found[name, f"load {share:.0%}"])
    beside = found[name, "beside"]
    cells += _quantiles(f"{name}, {_SMALL} documents beside {large:,}", beside)
    batches = [quantile(taken, 0.95) / target_ms for taken in beside]
    cells.append(cell(f"{name}, {_SMALL} documents beside {large:,}, p95", f"batches of {target_ms} ms", batches, at_most=_GOAL_BATCHES))
    cells.append(cell(f"{name}, {large:,} documents", "ms", [taken for (taken,) in found[name, "large"]]))
    return cells


def _quantiles(name: str, turns: list[list[float]]) -> list[Cell]:
    return [cell(f"{name}, p{part}", "ms", [quantile(taken, part / 100) for taken in turns]) for part in (50, 95, 99)]
