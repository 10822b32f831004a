"""`python -m benchmarks owncost`: what the worker adds to its backend: end to end over the pipes against the bare backend call.

The bare call runs in a child that opens the backend as the engine does, with the engine's environment, and tokenizes and scores the same
passages. Both take turns; each idles while the other scores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from benchmarks.contestants import Call, Contestant, add_worker_flags, contestant, settings_of
from benchmarks.environments import UnavailableError
from benchmarks.figures import Cell, add_common_flags, cell, report
from benchmarks.host import Pipes
from benchmarks.texts import Texts
from reranker_worker.config import Config, parse_value
from reranker_worker.engine.handle import engine_environment

if TYPE_CHECKING:
    from collections.abc import Sequence

_REST_SECONDS = 0.05
_GOAL = 1.05
_UNUSABLE = 64

Found = defaultdict[tuple[str, str], list[float]]


class Bare(Contestant):
    """The backend alone, in a child that times itself."""

    def __init__(self, name: str, pipes: Pipes) -> None:
        self.name = name
        self._pipes = pipes
        self._pipes.read_line()

    def score(self, calls: Sequence[Call], *, raw: bool = False) -> tuple[float, list[list[float]]]:
        body = json.loads(self._pipes.ask(json.dumps(calls).encode() + b"\n"))
        return body["seconds"], body["scores"]

    def pids(self) -> list[int]:
        return [self._pipes.pid]


def main(arguments: Sequence[str]) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks owncost", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a local model directory (default: the bundled one)")
    parser.add_argument("--threads", type=int, help="of each side (default: what this process may use)")
    parser.add_argument("--documents", type=int, default=100, help="of a request (default 100)")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each side (default 15)")
    add_worker_flags(parser)
    add_common_flags(parser)
    given = parser.parse_args(list(arguments))
    found: Found = defaultdict(list)
    try:
        for name, settings in settings_of(given).items():
            _measure(name, settings, given, found)
    except UnavailableError as error:
        print(f"owncost: {error}", file=sys.stderr)
        return _UNUSABLE
    return report("owncost", [item for name in settings_of(given) for item in _cells(name, found, given.documents)], given)


def _measure(name: str, settings: dict[str, str], given: argparse.Namespace, found: Found) -> None:
    config = Config(**{key: parse_value(key, value, key) for key, value in settings.items()})
    command = [sys.executable, "-m", "benchmarks.owncost", json.dumps(settings)]
    texts = Texts(11)
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(contestant(name, settings))
        bare = Bare(name, stack.enter_context(Pipes(command, environ=engine_environment(config, os.environ))))
        for turn in range(given.rounds + 1):
            calls = [(f"{texts.query()} {turn}", texts.passages(given.documents))]
            scores: list[list[list[float]]] = []
            # Who comes first changes.
            for kind, side in ((("worker", ours), ("bare", bare)), (("bare", bare), ("worker", ours)))[turn % 2]:
                time.sleep(_REST_SECONDS)
                seconds, answered = side.score(calls, raw=True)
                scores.append(answered)
                if turn:
                    found[name, kind].append(seconds * 1e3)
            worst = max(abs(a - b) for a, b in zip(scores[0][0], scores[1][0], strict=True))
            found[name, "difference"].append(worst)


def _cells(name: str, found: Found, documents: int) -> list[Cell]:
    ratios = [ours / bare for ours, bare in zip(found[name, "worker"], found[name, "bare"], strict=True)]
    return [
        cell(f"{name}, {documents} documents, worker", "ms", found[name, "worker"]),
        cell(f"{name}, {documents} documents, bare backend", "ms", found[name, "bare"]),
        cell(f"{name}, worker : bare backend", "x", ratios, at_most=_GOAL),
        cell(f"{name}, largest difference of a logit", "", [max(found[name, "difference"])]),
    ]


def _serve(settings: dict[str, str]) -> None:
    """The child: JSON lines of calls in, seconds and logits out."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    from reranker_worker.backends import open_backend
    from reranker_worker.engine.child import _resolve
    from reranker_worker.engine.scoring import Scorer
    from reranker_worker.machine import usable_threads

    config = Config(**{key: parse_value(key, value, key) for key, value in settings.items()})
    model = _resolve(config, lambda *stage: None)
    scorer = Scorer(open_backend(config, model, config.threads or usable_threads()), config, lambda text: None)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        calls: list[Call] = json.loads(line)
        begin = time.perf_counter()
        frames: list[dict[str, Any]] = [
            scorer.score(scorer.prepare({"batch": 0, "groups": [[query, 0, 0, "", documents]]}), lambda batch: None)
            for query, documents in calls
        ]
        seconds = time.perf_counter() - begin
        print(json.dumps({"seconds": seconds, "scores": [frame["logits"] for frame in frames]}), file=answers, flush=True)


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
