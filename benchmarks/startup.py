"""`python -m benchmarks startup`: from exec to `ready` and to the first answer, against `import sentence_transformers` and loading the model.

Fresh processes, in turns. The files are in the system's cache after the first turn, which is not counted.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from typing import TYPE_CHECKING

from benchmarks.contestants import add_worker_flags, settings_of
from benchmarks.figures import Cell, add_common_flags, cell, report
from benchmarks.host import Host, HostError, Pipes
from reranker_worker.config import flag_name
from reranker_worker.models import BUNDLED_DIRECTORY

if TYPE_CHECKING:
    from collections.abc import Sequence

_ORIGINAL = """
import sys
from sentence_transformers import CrossEncoder
model = CrossEncoder(sys.argv[1], device="cpu")
print("loaded", flush=True)
model.predict([("a question", "an answer")])
print("scored", flush=True)
"""
_REQUEST = b'{"id":1,"query":"a question","documents":["an answer"]}\n'
_GOAL_PART, _GOAL_SECONDS = 0.1, 0.6
_UNUSABLE = 64

Found = defaultdict[tuple[str, str], list[float]]


def main(arguments: Sequence[str]) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks startup", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="bundled", help="a local model directory (default: the bundled one)")
    parser.add_argument("--threads", type=int, help="of the worker (default: what this process may use)")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each that count (default 5)")
    parser.add_argument("--no-original", action="store_true", help="the worker alone")
    add_worker_flags(parser)
    add_common_flags(parser)
    given = parser.parse_args(list(arguments))
    workers = settings_of(given)
    found: Found = defaultdict(list)
    try:
        for turn in range(given.rounds + 1):
            for name, settings in workers.items():
                _worker(settings, found, name)
            if not given.no_original:
                _original(str(BUNDLED_DIRECTORY) if given.model == "bundled" else given.model, found)
            if turn == 0:
                found.clear()
    except HostError as error:
        print(f"startup: {error}", file=sys.stderr)
        return _UNUSABLE
    return report("startup", [item for name in workers for item in _cells(name, found)] + _reference(found), given)


def _worker(settings: dict[str, str], found: Found, name: str) -> None:
    with Host([f"{flag_name(key)}={value}" for key, value in settings.items()]) as host:
        host.wait_ready()
        found[name, "ready"].append(time.perf_counter() - host.started_at)
        if b'"scores"' not in (line := host.ask(_REQUEST)):
            raise HostError(line.decode())
        found[name, "scored"].append(time.perf_counter() - host.started_at)


def _original(model: str, found: Found) -> None:
    with Pipes([sys.executable, "-c", _ORIGINAL, model]) as pipes:
        for mark in ("loaded", "scored"):
            while pipes.read_line() != mark.encode():  # libraries print
                pass
            found["", mark].append(time.perf_counter() - pipes.started_at)


def _cells(name: str, found: Found) -> list[Cell]:
    ready, scored = found[name, "ready"], found[name, "scored"]
    cells = [
        cell(f"{name}, exec to ready", "s", ready, at_most=_GOAL_SECONDS),
        cell(f"{name}, exec to the first answer", "s", scored),
    ]
    for mine, mark in ((ready, "loaded"), (scored, "scored")):
        if theirs := found["", mark]:
            what = "ready : loaded" if mark == "loaded" else "first answer : first prediction"
            parts = [a / b for a, b in zip(mine, theirs, strict=True)]
            cells.append(cell(f"{name}, {what}", "x", parts, at_most=_GOAL_PART if mark == "loaded" else None))
    return cells


def _reference(found: Found) -> list[Cell]:
    names = {"loaded": "sentence_transformers, exec to loaded", "scored": "sentence_transformers, exec to the first prediction"}
    return [cell(text, "s", found["", mark]) for mark, text in names.items() if found["", mark]]
