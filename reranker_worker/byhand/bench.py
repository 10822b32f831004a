"""`python -m reranker_worker bench`: what will this worker do on this machine with this model? Asked of a real worker, told in a small table."""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import orjson

from reranker_worker.byhand import bench_loads as loads
from reranker_worker.byhand import processes
from reranker_worker.byhand.bench_report import Table, check_drawable, draw, quantiles, spread
from reranker_worker.byhand.bench_texts import Questions, read_queries
from reranker_worker.byhand.failures import INTERNAL, Parser
from reranker_worker.byhand.progress import Progress
from reranker_worker.byhand.serving import serving
from reranker_worker.config import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from reranker_worker.client import Answer, Client

_SHAPES = ((1, 10), (1, 100), (16, 8))  # requests at once, documents of each
_SIZES = (1, 10, 50, 100)
_LOAD_DOCUMENTS, _STRESS_DOCUMENTS = 10, 40
_STRESS_CLIENTS = 16
_WINDOW = 8  # requests in flight that keep a worker busy
_SHARES = (0.25, 0.5, 0.75, 0.9, 1.1, 1.5, 2.0, 4.0, 8.0)  # of the capacity
_CAPACITY_SHARE = 0.2  # of the time
_BEHIND = 2.0  # a worker that takes so many times as long as the requests took to arrive will not recover
_LONGEST_WAIT_MS = 3_600_000
_PATIENCE_SECONDS = 10.0
_BAR_CELLS = 20
_MIB = 1024 * 1024
Item = TypeVar("Item")
_EXPECTED = {loads.SCORED, loads.GIVEN_UP, "DEADLINE_EXCEEDED", "OVERLOADED"}


@dataclass(slots=True)
class Bench:
    """A worker that is ready, and what to ask of it."""

    client: Client
    ready: Answer
    make: Questions
    seconds: float
    documents: int | None
    progress: Progress

    def show(self, what: str, part: float) -> None:
        """Tell how far we are."""
        filled = round(min(1.0, part) * _BAR_CELLS)
        self.progress.show(f"{what} [{'#' * filled}{'.' * (_BAR_CELLS - filled)}] {min(1.0, part):4.0%}")


def run(arguments: Sequence[str]) -> int:
    """The command; its exit code."""
    parser = Parser("bench", "Measure what a worker with these settings does on this machine: how fast, how soon, how much it bears.")
    parser.add_argument("--mode", choices=sorted(_MODES), default="throughput", help="what to measure (default throughput)")
    parser.add_argument("--seconds", metavar="N", default="10", help="measuring time, about (default 10)")
    parser.add_argument("--documents", metavar="N", help="documents of a request (default: by mode)")
    parser.add_argument("--queries-file", metavar="FILE", help='your own texts: JSON lines {"query": "...", "documents": ["...", ...]}')
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--plot", metavar="FILE", help="also draw the table (.png, .svg; needs matplotlib)")
    given, settings = parser.parse(list(arguments))
    seconds = _number("--seconds", given.seconds, 3600)
    documents = None if given.documents is None else int(_number("--documents", given.documents, 100_000, whole=True))
    if given.plot:
        check_drawable(given.plot)
    known = read_queries(given.queries_file) if given.queries_file else None
    limit = {"timeout_ms": _LONGEST_WAIT_MS} if given.mode in ("throughput", "latency") and given.request_timeout_ms is None else {}
    with Progress() as progress, serving(settings, _LONGEST_WAIT_MS / 1e3, progress) as (client, ready):
        _check_size(documents, ready)
        bench = Bench(client, ready, Questions(known, limit), seconds, documents, progress)
        bench.show("warming up", 0.0)
        loads.at_once(client, bench.make, 1, min(_LOAD_DOCUMENTS, _most(ready)))
        table = _MODES[given.mode](bench)
        memory = sum(processes.rss_bytes(pid) or 0 for pid in (client.pid, *processes.children(client.pid)))
    return _tell(given, ready, table, memory)


def _number(flag: str, raw: str, most: int, *, whole: bool = False) -> float:
    try:
        value = float(int(raw) if whole else float(raw))
    except ValueError:
        value = -1.0
    if not 0 < value <= most:
        raise ConfigError(f"{flag} must be {'a whole number from 1' if whole else 'a number above 0, up'} to {most:,}, not {raw[:64]!r}.")
    return value


def _most(ready: Answer) -> int:
    return int(min(ready["limits"]["max_documents"], ready["limits"]["max_waiting_pairs"]))


def _check_size(documents: int | None, ready: Answer) -> None:
    if documents and documents > _most(ready):
        raise ConfigError(f"--documents {documents:,} is more than the worker takes in one request: {_most(ready):,} (--max-documents).")


# --- modes -------------------------------------------------------------------------------------------------------------------


def _throughput(bench: Bench) -> Table:
    """Pairs per second by shape, in turns."""
    shapes = [(1, bench.documents), (16, bench.documents)] if bench.documents else _SHAPES
    shapes = [(requests, documents) for requests, documents in shapes if documents <= _most(bench.ready)]
    found: dict[tuple[int, int], list[float]] = {shape: [] for shape in shapes}
    for shape in _turns(bench, "throughput", shapes):
        found[shape].append(loads.at_once(bench.client, bench.make, *shape))
    rows = [{"load": f"{requests} x {documents}", **spread(rates)} for (requests, documents), rates in found.items()]
    return Table(rows, "load", ["pairs_per_s"], ["requests at once x documents of each"])


def _latency(bench: Bench) -> Table:
    """Quantiles of lone requests by size, in turns."""
    sizes = [bench.documents] if bench.documents else [size for size in _SIZES if size <= _most(bench.ready)]
    found: dict[int, list[float]] = {size: [] for size in sizes}
    for size in _turns(bench, "latency", sizes):
        found[size] += loads.lone(bench.client, bench.make, size, 1, 0.0)
    rows = [{"documents": size, "runs": len(taken), **quantiles(taken)} for size, taken in found.items()]
    return Table(rows, "documents", ["p50_ms", "p95_ms", "p99_ms"], ["one request at a time"])


def _load(bench: Bench) -> Table:
    """Arrivals by chance at rates that rise until the worker does not bear them."""
    documents = bench.documents or min(_LOAD_DOCUMENTS, _most(bench.ready))
    limit_ms = bench.ready["limits"]["request_timeout_ms"]
    bench.show("load: capacity", 0.0)
    busy = loads.closed(bench.client, _patient(bench.make), documents, _window(bench.ready, documents), bench.seconds * _CAPACITY_SHARE)
    capacity = max(1, busy.counts[loads.SCORED]) / busy.seconds
    table = Table([], "requests_per_s", ["p50_ms", "p95_ms", "p99_ms"])
    step_seconds = bench.seconds * (1 - _CAPACITY_SHARE) / len(_SHARES)
    for number, share in enumerate(_SHARES):
        bench.show(f"load: {share * capacity:,.1f} requests/s", number / len(_SHARES))
        times = loads.arrivals(share * capacity, step_seconds, random.Random(number))
        outcome = loads.open_loop(bench.client, bench.make, documents, times)
        row = {"requests_per_s": round(share * capacity, 2), "requests": outcome.sent, "scored": outcome.counts[loads.SCORED]}
        table.rows.append(row | quantiles(outcome.latencies_ms) | {"errors": outcome.failed})
        over = (table.rows[-1]["p95_ms"] or limit_ms) >= limit_ms
        if outcome.failed or over or (share > 1 and outcome.seconds > _BEHIND * max(outcome.due, step_seconds)):
            why = _codes(outcome.counts) if outcome.failed else (f"p95 beyond {limit_ms:,} ms" if over else "it falls behind")
            table.notes.append(f"ended at {share * capacity:,.1f} requests/s: {why}")
            break
    table.notes.insert(0, f"{documents} documents a request; capacity {capacity:,.1f} requests/s, {capacity * documents:,.0f} pairs/s")
    return table


def _patient(make: Questions) -> Callable[[int], dict[str, Any]]:
    """The capacity is what the worker can do, not what it can do in time."""
    return lambda documents: make(documents) | {"timeout_ms": _LONGEST_WAIT_MS}


def _window(ready: Answer, documents: int) -> int:
    """Requests in flight that keep the worker busy, and that it does not refuse."""
    limits = ready["limits"]
    return int(max(1, min(_WINDOW, limits["max_waiting_requests"], limits["max_waiting_pairs"] // documents)))


def _stress(bench: Bench) -> Table:
    """Everything at once; nothing may be lost."""
    documents = bench.documents or min(_STRESS_DOCUMENTS, _most(bench.ready))
    pids = [bench.client.pid, *processes.children(bench.client.pid)]
    counts: Counter[str] = Counter()
    taken: list[float] = []
    memory: list[float] = []
    begin = time.perf_counter()
    while (spent := time.perf_counter() - begin) < bench.seconds:
        bench.show(f"stress: {sum(counts.values()):,} requests", spent / bench.seconds)
        slice_seconds = max(0.05, min(1.0, bench.seconds / 10, bench.seconds - spent))
        outcome = loads.stress(bench.client, bench.make, documents, _STRESS_CLIENTS, time.perf_counter() + slice_seconds, len(memory))
        counts += outcome.counts
        taken += outcome.latencies_ms
        memory.append(sum(processes.rss_bytes(pid) or 0 for pid in pids) / _MIB)
    if left := _left(bench.client):
        counts[loads.LOST] += left
    notes = [f"{_STRESS_CLIENTS} clients, 1 to {documents} documents, options, time-outs and cancels by chance"]
    notes.append("p50 {p50_ms} ms, p95 {p95_ms} ms, p99 {p99_ms} ms".format(**quantiles(taken)))
    notes.append(f"memory grew by {memory[-1] - memory[0]:.1f} MiB, from {memory[0]:,.0f} MiB" if memory[0] else "memory: unknown on this system")
    return Table([{"what": name, "requests": count} for name, count in counts.most_common()], "what", ["requests"], notes)


def _left(client: Client) -> int:
    """Requests that the worker still holds when everybody has gone home: none, a moment later."""
    until = time.perf_counter() + _PATIENCE_SECONDS
    while left := int(client.request({"type": "stats"})["waiting_requests"]):
        if time.perf_counter() > until:
            break
        time.sleep(0.01)
    return left


_MODES: dict[str, Callable[[Bench], Table]] = {"throughput": _throughput, "latency": _latency, "load": _load, "stress": _stress}


def _turns(bench: Bench, what: str, items: Sequence[Item]) -> Iterator[Item]:
    """Each item in turn, as often as the time allows, once at least."""
    begin = time.perf_counter()
    while True:
        for item in items:
            bench.show(what, (time.perf_counter() - begin) / bench.seconds)
            yield item
        if time.perf_counter() - begin >= bench.seconds:
            return


def _codes(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.most_common() if name != loads.SCORED)


# --- telling -----------------------------------------------------------------------------------------------------------------


def _tell(given: Any, ready: Answer, table: Table, memory: int) -> int:
    """Print; the exit code: not 0 when an answer was lost or a request failed that should not have."""
    about = {name: ready[name] for name in ("model", "backend", "dtype", "device", "threads", "version")}
    title = f"{ready['model']} ({ready['backend']} {ready['dtype']}, {ready['device']}, {ready['threads']} threads)"
    if given.json:
        body = {"mode": given.mode, **about, "rows": table.rows, "notes": table.notes, "rss_bytes": memory or None}
        sys.stdout.write(orjson.dumps(body, option=orjson.OPT_INDENT_2).decode() + "\n")
    else:
        print("\n".join([title, *table.lines(), *([f"{memory / _MIB:,.0f} MiB resident"] if memory else [])]))
    if given.plot:
        draw(table, title, given.plot)
    wrong = sorted({str(row["what"]) for row in table.rows if "what" in row} - _EXPECTED)
    if wrong:
        print(f"bench: under stress the worker gave {', '.join(wrong)}, which it should not.", file=sys.stderr)
    return INTERNAL if wrong else 0
