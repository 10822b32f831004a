"""`python -m benchmarks frontdoor`: how the worker treats its host while it loads, while it is busy, and when it leaves.

Every quantity is measured on several fresh workers; with `--against` those of the other tree take turns with this one's.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.figures import Cell, add_common_flags, cell, quantile, report
from benchmarks.host import ROOT, Host
from benchmarks.overhead import Shape, requests_of
from reranker_worker.byhand import processes

if TYPE_CHECKING:
    from collections.abc import Sequence

_HEARTBEAT = b'{"type":"heartbeat","id":"beat"}\n'
_SHUTDOWN = b'{"type":"shutdown","id":"end"}\n'
_BEAT = b'"id":"beat"'  # the word heartbeat stands in `ready` too
_LOAD_MS = 700  # of the fake backend: a real model takes seconds
_BUSY = Shape(documents=50, window=4)
_EVERY_SECONDS = 0.005
_MIB = 1024 * 1024


def main(arguments: Sequence[str]) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks frontdoor", description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", default="auto", help="fake, or what serves (default auto)")
    parser.add_argument("--model", default="", help="default: the bundled model; with the fake backend a slow one")
    parser.add_argument("--rounds", type=int, default=5, help="fresh workers of each tree (default 5)")
    parser.add_argument("--seconds", type=float, default=3.0, help="busy time of each worker (default 3)")
    parser.add_argument("--against", metavar="DIR", help="another tree with reranking_server.py, measured in turns with this one")
    add_common_flags(parser)
    given = parser.parse_args(list(arguments))
    model = given.model or (f"load_ms={_LOAD_MS}&pair_us=200" if given.backend == "fake" else "bundled")
    trees = {"": ROOT} | ({"other: ": Path(given.against).resolve()} if given.against else {})
    found: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for turn in range(given.rounds):
        for tree, root in trees.items():
            _one(["--backend", given.backend, "--model", model], root, given.seconds, found, tree, by_shutdown=turn % 2 == 0)
    return report("frontdoor", [item for tree in trees for item in _cells(tree, found)], given)


def _one(
    flags: list[str], root: Path, seconds: float, found: defaultdict[tuple[str, str], list[float]], tree: str, *, by_shutdown: bool
) -> None:
    """The life of one worker: hello, loading, idle, busy, the end."""

    def note(name: str, *values: float) -> None:
        found[tree, name].extend(values)

    with Host(flags, root) as host:
        host.ask(_HEARTBEAT)
        note("first", (time.perf_counter() - host.started_at) * 1e3)
        note("loading", *_beats_until_ready(host))
        note("ready", time.perf_counter() - host.started_at)
        front = processes.rss_bytes(host.pid)
        note("idle rss", (front or 0) / _MIB)
        note("busy", *_beats_while_busy(host, seconds))
        note("busy rss", (processes.rss_bytes(host.pid) or 0) / _MIB)
        note("engine rss", sum(processes.rss_bytes(pid) or 0 for pid in host.engine_pids) / _MIB)
        note("shutdown" if by_shutdown else "eof", host.time_to_exit(_SHUTDOWN if by_shutdown else b"") * 1e3)


def _beats_until_ready(host: Host) -> list[float]:
    """Milliseconds of every heartbeat until the worker is ready."""
    waits: list[float] = []
    ready = False
    while not ready:
        begin = time.perf_counter()
        host.write(_HEARTBEAT)
        while _BEAT not in (line := host.read_line()):
            ready = ready or b'"ready"' in line
        waits.append((time.perf_counter() - begin) * 1e3)
        time.sleep(_EVERY_SECONDS)
    return waits


def _beats_while_busy(host: Host, seconds: float) -> list[float]:
    """Milliseconds of heartbeats while a few requests of 50 documents are always in flight."""
    request = requests_of(_BUSY)
    waits: list[float] = []
    sent = in_flight = 0
    until = time.perf_counter() + seconds
    while in_flight or time.perf_counter() < until:
        while in_flight < _BUSY.window and time.perf_counter() < until:
            host.write(request(sent))
            sent += 1
            in_flight += 1
        begin = time.perf_counter()
        host.write(_HEARTBEAT)
        while _BEAT not in host.read_line():
            in_flight -= 1
        waits.append((time.perf_counter() - begin) * 1e3)
        time.sleep(_EVERY_SECONDS)
    return waits


def _cells(tree: str, found: dict[tuple[str, str], list[float]]) -> list[Cell]:
    loading, busy = found[tree, "loading"], found[tree, "busy"]
    return [
        cell(f"{tree}exec to first heartbeat", "ms", found[tree, "first"], at_most=250),
        cell(f"{tree}exec to ready", "s", found[tree, "ready"]),
        cell(f"{tree}heartbeat while loading, p50", "ms", loading),
        cell(f"{tree}heartbeat while loading, p99", "ms", [quantile(loading, 0.99)]),
        cell(f"{tree}heartbeat while scoring, p50", "ms", busy),
        cell(f"{tree}heartbeat while scoring, p99", "ms", [quantile(busy, 0.99)]),
        cell(f"{tree}front, resident, idle", "MiB", found[tree, "idle rss"], at_most=24),
        cell(f"{tree}front, resident, after work", "MiB", found[tree, "busy rss"]),
        cell(f"{tree}engine, resident, after work", "MiB", found[tree, "engine rss"]),
        cell(f"{tree}shutdown to exit, idle", "ms", found[tree, "shutdown"], at_most=100),
        cell(f"{tree}end of input to exit, idle", "ms", found[tree, "eof"], at_most=100),
    ]
