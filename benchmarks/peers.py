"""`python -m benchmarks peers`: the worker end to end against what users would pick instead, and all of them against `CrossEncoder.predict`.

Same model, same texts, same number of threads, in turns (A B C A B C ...): each idles while another scores. The worker is measured from the
outside, with pipes and JSON; peers measure themselves. Ratios are taken turn by turn. Before anything is timed the logits are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import contestants, picture
from benchmarks.contestants import DEFAULT_PEERS, PEERS, REFERENCE, Call, Contestant, add_worker_flags, settings_of
from benchmarks.environments import UnavailableError, cache_directory
from benchmarks.figures import Cell, add_common_flags, cell, report
from benchmarks.host import HostError
from benchmarks.texts import Texts
from reranker_worker.byhand import processes
from reranker_worker.machine import usable_threads
from reranker_worker.models import BUNDLED_DIRECTORY

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_REST_SECONDS = 0.05  # threads of the other side that still spin come to rest
_EXACT, _TOLERANCE = 1e-4, 1e-3  # of a logit: ours, and beyond which a peer is told of
_DISAGREEMENT = 70
_USAGE_ERROR = 64
_BUSY = "import os\nwhile os.getppid() == {parent}:\n for _ in range(100000): pass"


@dataclass(frozen=True, slots=True)
class Load:
    """Concurrent requests of so many documents each, `repeats` times in a turn; the least ratios that are wanted of ours, exact and reduced."""

    requests: int
    documents: int
    repeats: int = 1
    long: bool = False
    exact: float | None = None
    reduced: float | None = None

    def calls(self, texts: Texts) -> list[Call]:
        """Fresh ones at every call."""
        make = texts.long_passages if self.long else texts.passages
        return [(texts.query(), make(self.documents)) for _ in range(self.requests)]


LOADS = {
    "a10": Load(1, 10, repeats=5, exact=2.3, reduced=4.0),
    "a100": Load(1, 100, exact=2.0, reduced=4.0),
    "c16x8": Load(16, 8, exact=2.2, reduced=4.0),
    "long": Load(1, 32, long=True),
}


@dataclass(slots=True)
class Found:
    """What was measured of one contestant, by load: pairs per second and CPU milliseconds per pair, turn by turn."""

    difference: float
    pairs_per_s: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    cpu_ms: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    rss_mib: float = math.nan


def main(arguments: Sequence[str]) -> int:
    """The command; its exit code (70 when a float32 worker's scores differ from the reference's)."""
    given = _parse(list(arguments))
    try:
        cache = cache_directory(given.cache)
        with contextlib.ExitStack() as stack:
            everyone, missing = _start(given, cache, stack)
            if given.neighbour:
                stack.enter_context(_neighbour())
            found = compare(everyone, given)
            measure(everyone, given, found)
            for name, side in everyone.items():
                found[name].rss_mib = side.rss_mib()
    except (UnavailableError, HostError) as error:
        print(f"peers: {error}", file=sys.stderr)
        return _USAGE_ERROR
    return _report(given, everyone, found, missing, cache)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks peers", description=__doc__.partition("\n")[0])
    parser.add_argument("--peers", default=",".join(DEFAULT_PEERS), help=f"of {', '.join(PEERS)}; empty: {REFERENCE} alone (default: all)")
    parser.add_argument("--reference", default=REFERENCE, choices=PEERS, help=f"what ratios are taken against (default {REFERENCE})")
    parser.add_argument("--loads", default=",".join(LOADS), help="of %(default)s (default: all)")
    parser.add_argument("--model", default="bundled", help="a local model directory (default: the bundled one)")
    parser.add_argument("--threads", type=int, default=usable_threads(), help="of each side (default: what this process may use)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side and load (default 5)")
    parser.add_argument("--peer-env", action="append", default=[], metavar="NAME=VALUE", help="a variable for the peers alone")
    parser.add_argument("--neighbour", action="store_true", help="with one busy process on the side")
    parser.add_argument("--cache", metavar="DIR", help="where environments are kept (default: reranker-worker-benchmarks in the user's cache)")
    parser.add_argument("--png", metavar="FILE", help="also draw the picture")
    add_worker_flags(parser)
    add_common_flags(parser)
    given = parser.parse_args(arguments)
    for name, known in (("peers", PEERS), ("loads", LOADS)):
        chosen = [item for item in getattr(given, name).split(",") if item]
        if unknown := set(chosen) - set(known):
            parser.error(f"--{name}: {', '.join(sorted(unknown))} not known; known are {', '.join(known)}")
        setattr(given, name, chosen)
    return given


def _start(given: argparse.Namespace, cache: Path, stack: contextlib.ExitStack) -> tuple[dict[str, Contestant], dict[str, str]]:
    """All contestants, ours first, and why others could not be had. The reference and ours must be there."""
    everyone: dict[str, Contestant] = {}
    missing: dict[str, str] = {}
    for name, settings in settings_of(given).items():
        everyone[name] = stack.enter_context(contestants.contestant(name, settings))
    environ = dict(item.split("=", 1) for item in given.peer_env)
    model = BUNDLED_DIRECTORY if given.model == "bundled" else Path(given.model).resolve()
    for name in dict.fromkeys([given.reference, *given.peers]):
        try:
            everyone[name] = stack.enter_context(contestants.peer(name, model, given.threads, cache, environ))
        except UnavailableError as error:
            missing[name] = str(error)
    if given.reference in missing:
        raise UnavailableError(f"{given.reference}, the reference, cannot be had: {missing[given.reference]}")
    return everyone, missing


@contextlib.contextmanager
def _neighbour() -> Iterator[None]:
    """A process that is always busy, on the last of our CPUs; it ends with us."""
    process = subprocess.Popen([sys.executable, "-c", _BUSY.format(parent=os.getpid())])
    os.sched_setaffinity(process.pid, {max(os.sched_getaffinity(0))})
    begin = time.perf_counter()
    try:
        yield
        share = (processes.cpu_seconds(process.pid) or 0.0) / (time.perf_counter() - begin)
        print(f"the busy neighbour had {share:.0%} of a CPU", file=sys.stderr)
    finally:
        process.kill()
        process.wait()


def compare(everyone: dict[str, Contestant], given: argparse.Namespace) -> dict[str, Found]:
    """The largest difference of a logit from the reference's over one call of each load; also warms everyone up, and shows which peers are exact."""
    texts = Texts(7)
    worst = dict.fromkeys(everyone, 0.0)
    for name in given.loads:
        calls = LOADS[name].calls(texts)
        expected = everyone[given.reference].score(calls, raw=True)[1]
        for side in everyone.values():
            pairs = [pair for rows in zip(side.score(calls, raw=True)[1], expected, strict=True) for pair in zip(*rows, strict=True)]
            worst[side.name] = max(worst[side.name], *(_difference(mine, logit, side.probabilities) for mine, logit in pairs))
    for name, side in everyone.items():
        if not side.ours and worst[name] <= _EXACT:
            side.reduced = False  # a runtime that chooses its precision by the CPU chose float32 on this one
    return {name: Found(difference) for name, difference in worst.items()}


def _difference(mine: float, logit: float, probability: bool) -> float:
    """Of two logits; where one side gives a probability, four times the difference of those, which is the same around 0.5."""
    difference = 4 * abs(mine - 1.0 / (1.0 + math.exp(-logit))) if probability else abs(mine - logit)
    return difference if math.isfinite(difference) else math.inf


def measure(everyone: dict[str, Contestant], given: argparse.Namespace, found: dict[str, Found]) -> None:
    texts = Texts(8)
    names = list(everyone)
    for turn in range(given.rounds):
        # Who comes first changes, so that nobody always follows the same one.
        order = names[turn % len(names) :] + names[: turn % len(names)]
        for load_name in given.loads:
            print(f"turn {turn + 1} of {given.rounds}: {load_name}", file=sys.stderr)
            load = LOADS[load_name]
            rounds = [load.calls(texts) for _ in range(load.repeats)]
            pairs = load.requests * load.documents * load.repeats
            for name in order:
                time.sleep(_REST_SECONDS)
                before = everyone[name].cpu_s()
                seconds = sum(everyone[name].score(calls)[0] for calls in rounds)
                found[name].pairs_per_s[load_name].append(pairs / seconds)
                found[name].cpu_ms[load_name].append((everyone[name].cpu_s() - before) / pairs * 1e3)


# --- the report --------------------------------------------------------------------------------------------------------------


def _report(
    given: argparse.Namespace, everyone: dict[str, Contestant], found: dict[str, Found], missing: dict[str, str], cache: Path
) -> int:
    cells = [item for side in everyone.values() if side.ours for item in _cells(side, given, found)] + _against_the_best(everyone, given, found)
    rows = {
        name: {
            "ours": side.ours, "about": side.about, "reduced": side.reduced, "start_s": side.start_s, "rss_mib": found[name].rss_mib,
            "difference": found[name].difference, "pairs_per_s": found[name].pairs_per_s, "cpu_ms": found[name].cpu_ms,
        }
        for name, side in everyone.items()
    }  # fmt: skip
    print(markdown(everyone, given, found) + "\n")
    for name, reason in missing.items():
        print(f"{name} could not be had: {reason}\n")
    for name in (name for name, side in everyone.items() if not side.ours and not side.reduced and found[name].difference > _TOLERANCE):
        print(f"{name} does not score as {given.reference} does: a logit differs by {found[name].difference:.2g}\n")
    code = report("peers", cells, given, {"contestants": rows, "missing": missing, "reference": given.reference})
    if given.png:
        picture.draw({"contestants": rows, "reference": given.reference}, Path(given.png), cache)
    wrong = [side.name for side in everyone.values() if side.ours and not side.reduced and not found[side.name].difference <= _EXACT]
    for name in wrong:
        print(f"peers: {name} differs from {given.reference} by {found[name].difference:.2g}, more than {_EXACT:g}", file=sys.stderr)
    return _DISAGREEMENT if wrong else code


def _ratios(name: str, load: str, given: argparse.Namespace, found: dict[str, Found]) -> list[float]:
    return [mine / theirs for mine, theirs in zip(found[name].pairs_per_s[load], found[given.reference].pairs_per_s[load], strict=True)]


def _cells(side: Contestant, given: argparse.Namespace, found: dict[str, Found]) -> list[Cell]:
    """One of ours against its goals."""
    cells: list[Cell] = []
    for load in given.loads:
        goal = LOADS[load].reduced if side.reduced else LOADS[load].exact
        cells.append(cell(f"{load}, {side.name} : {given.reference}", "x", _ratios(side.name, load, given, found), at_least=goal))
    limit = None if side.reduced else _EXACT
    return [*cells, cell(f"largest difference of a logit, {side.name}", "", [found[side.name].difference], at_most=limit)]


def _against_the_best(everyone: dict[str, Contestant], given: argparse.Namespace, found: dict[str, Found]) -> list[Cell]:
    """Our fastest against the fastest peer of the same kind of precision, load by load."""
    cells: list[Cell] = []
    for load in given.loads:
        for reduced in (False, True):
            sides = [side for side in everyone.values() if side.reduced == reduced]
            rate = {side.name: cell("", "", found[side.name].pairs_per_s[load]).median for side in sides}
            mine = max((side.name for side in sides if side.ours), key=lambda name: rate[name], default=None)
            other = max((side.name for side in sides if not side.ours), key=lambda name: rate[name], default=None)
            if mine and other:
                turns = zip(found[mine].pairs_per_s[load], found[other].pairs_per_s[load], strict=True)
                name = f"{load}, {mine} : best {'reduced' if reduced else 'exact'} peer ({other})"
                cells.append(cell(name, "x", [a / b for a, b in turns], at_least=1))
    return cells


def markdown(everyone: dict[str, Contestant], given: argparse.Namespace, found: dict[str, Found]) -> str:
    """The table for the README: pairs per second and, against the reference, the median ratio with its lowest and highest."""
    heads = [f"{name} ({LOADS[name].requests} x {LOADS[name].documents})" for name in given.loads]
    lines = [f"| pairs/s (times {given.reference}) | {' | '.join(heads)} | logits differ by | MiB | start, s |", "|---" * (len(heads) + 4) + "|"]
    for name, side in everyone.items():
        cells = [_shown(cell("", "", found[name].pairs_per_s[load]), cell("", "", _ratios(name, load, given, found))) for load in given.loads]
        label = f"**{name}** ({side.about})" if side.ours else name
        lines.append(f"| {label} | {' | '.join(cells)} | {found[name].difference:.1g} | {found[name].rss_mib:,.0f} | {side.start_s:.1f} |")
    return "\n".join(lines)


def _shown(rate: Cell, ratio: Cell) -> str:
    return f"{rate.median:,.0f} ({ratio.median:.2f}; {ratio.low:.2f} to {ratio.high:.2f})"
