"""`python -m reranker_worker check --deploy`: is this node ready to serve with its settings? Asked before a deployment reports success.

One line for each point, with what to do where it fails; the exit code is the first failure's. The network is never used and nothing is written, so it
runs as the user who serves, below a read-only root, and without torch.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import orjson

from reranker_worker.byhand import node, processes
from reranker_worker.byhand.failures import BAD_DATA, INTERNAL, USAGE, Parser, advice, exit_code_of
from reranker_worker.byhand.node import FAILED, OK, SKIPPED, WARNING, Point, failed
from reranker_worker.byhand.progress import Progress
from reranker_worker.byhand.sample import IRRELEVANT, QUERY, RELEVANT
from reranker_worker.client import Client, WorkerError, WorkerGoneError
from reranker_worker.config import ConfigError, from_flags
from reranker_worker.models.known_pairs import read_known_pairs, tolerance

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator, Sequence

    from reranker_worker.client import Answer
    from reranker_worker.config import Config

_MIB = 1024 * 1024
_STOP_SECONDS = 10.0
_MOST_LOG_BYTES = 4096
_KNOWN_PAIRS = 4


class Report:
    """Points as they become known: printed at once for a person, kept for `--json`."""

    def __init__(self, *, as_json: bool) -> None:
        self.points: list[Point] = []
        self._as_json = as_json

    def add(self, point: Point) -> Point:
        """Keep a point, and show it."""
        self.points.append(point)
        if not self._as_json:
            status = point.status.upper() if point.status == FAILED else point.status
            do = f". Do: {point.do}" if point.do else ""
            print(f"{status:<8} {point.name:<12} {point.text}{do}", flush=True)
        return point

    def finish(self, model: str) -> int:
        """Print the verdict; the exit code: 0, or the first failure's."""
        bad = [point for point in self.points if point.status == FAILED]
        warnings = sum(point.status == WARNING for point in self.points)
        code = bad[0].exit_code if bad else 0
        if bad:
            text = f"This node is NOT ready to serve {model!a}: {', '.join(point.name for point in bad)} failed (exit code {code})."
        else:
            text = f"This node is ready to serve {model!a}" + (f"; {warnings} warning{'s' if warnings > 1 else ''}." if warnings else ".")
        if self._as_json:
            body = {"ok": not bad, "exit_code": code, "verdict": text, "points": [asdict(point) for point in self.points]}
            sys.stdout.write(orjson.dumps(body, option=orjson.OPT_INDENT_2).decode() + "\n")
        else:
            print(text)
        return code


def run(arguments: Sequence[str]) -> int:
    """The command; its exit code: 0, or the first failing point's."""
    parser = Parser("check --deploy", "Say whether this node is ready to serve with its settings, before a deployment reports success.")
    parser.add_argument("--deploy", action="store_true", help="this check (without it: the model alone, with its speed)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    report = Report(as_json="--json" in arguments)
    try:
        given, settings = parser.parse(list(arguments))
    except ConfigError as error:
        report.add(failed("settings", str(error).rstrip("."), "Correct that setting.", USAGE))
        return report.finish(os.environ.get("RERANKING_MODEL_PATH") or "bundled")
    return _ask(report, given, settings)


def _ask(report: Report, given: Namespace, settings: dict[str, Any]) -> int:
    config = from_flags(given, os.environ)
    report.add(node.settings_point(os.environ, len(settings)))
    report.add(node.code_point())
    report.add(node.packages_point())
    report.add(node.network_point(config, os.environ))
    report.add(node.descriptors_point(config))
    report.add(node.threads_point(config))
    with Progress() as progress:
        startable = _files(report, config, progress)
        if startable:
            _serve(report, config, settings, progress)
        else:
            report.add(Point("worker", SKIPPED, "not started, because of what failed above"))
    return report.finish(config.model)


def _files(report: Report, config: Config, progress: Progress) -> bool:
    """The points about the model; whether a worker can be started at all."""
    if config.backend == "fake":
        report.add(Point("model", WARNING, "the fake backend has none, and its scores mean nothing", "Set RERANKING_BACKEND=auto."))
        return True

    def show(stage: str, done: int, total: int) -> None:
        progress.show(f"verifying the model's files {done // _MIB:,} of {total // _MIB:,} MiB ...")

    caches = report.add(node.caches_point(config))
    if caches.status == FAILED:
        return False
    point, model = node.model_point(config, show)
    progress.show("")
    report.add(point)
    point = node.artefact_point(config, model, show)
    progress.show("")
    if model is not None or point.exit_code == BAD_DATA:  # without a model only a damaged artefact is news
        report.add(point)
    memory = report.add(node.memory_point(config, model))
    return model is not None and memory.status != FAILED


# --- a real worker -----------------------------------------------------------------------------------------------------------


def _serve(report: Report, config: Config, settings: dict[str, Any], progress: Progress) -> None:
    """Start a worker as a host does, let it score, stop it."""
    with _log() as log:
        progress.show("starting a worker ...")
        client = _start(config, settings, log)
        try:
            began = time.monotonic()
            ready = client.wait_ready()
            seconds = time.monotonic() - began
            info = client.request({"type": "info"})
            scores = scores_point(client, ready, str(info["model_path"] or ""))
            progress.show("")
            report.add(_worker_point(client, ready, seconds))
            report.add(scores)
        except WorkerError as error:
            progress.show("")
            client.stop(0.0)
            code = exit_code_of(error) if isinstance(error, WorkerGoneError) else INTERNAL
            report.add(failed("worker", str(error).rstrip("."), advice(code), code))
            _show_log(log)
            return
        except BaseException:
            client.stop(0.0)
            raise
        code = client.stop()
        if code:
            report.add(failed("exit", f"the worker ended with exit code {code}", advice(INTERNAL), INTERNAL))
            _show_log(log)
        else:
            report.add(Point("exit", OK, "drained, exit code 0"))


def _start(config: Config, settings: dict[str, Any], log: IO[bytes] | None) -> Client:
    script = node.PACKAGE.parent / "reranking_server.py"
    command = [sys.executable, str(script)] if script.is_file() else [sys.executable, "-m", "reranker_worker", "serve"]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "RERANKING_LOCAL_FILES_ONLY": "1"}
    settings = {name: value for name, value in settings.items() if name != "local_files_only"}
    limit = config.start_timeout_ms / 1e3
    # A start that makes progress may take longer than that; one that makes none is ended by the worker itself.
    return Client(
        timeout_s=limit, start_timeout_s=10 * limit, stop_timeout_s=_STOP_SECONDS, stderr=log, environ=environ, command=command, **settings
    )


def _worker_point(client: Client, ready: Answer, seconds: float) -> Point:
    # A unit's ProtectProc= may hide them.
    used = sum(processes.rss_bytes(pid) or 0 for pid in (client.pid, *processes.children(client.pid)))
    facts = {name: ready.get(name) for name in ("version", "model", "backend", "device", "dtype", "threads", "max_length")}
    facts |= {"ready_seconds": round(seconds, 3), "rss_bytes": used}
    threads = f"{ready['threads']} thread{'s' if ready['threads'] > 1 else ''}"
    memory = f"{used // _MIB:,} MiB" if used else "its memory is hidden from us"
    text = f"ready after {seconds:.1f} s: {ready['backend']} {ready['dtype']} on {ready['device']}, {threads}, {memory}"
    return Point("worker", OK, text, facts=facts)


def scores_point(client: Client, ready: Answer, path: str) -> Point:
    """Known pairs get their known scores; a model that brings none must put a relevant text above an irrelevant one."""
    known = read_known_pairs(Path(path))[:_KNOWN_PAIRS] if path and ready["backend"] != "fake" else []
    pairs = [[pair.query, pair.document] for pair in known] or [[QUERY, RELEVANT], [QUERY, IRRELEVANT]]
    began = time.monotonic()
    logits = client.request({"type": "score", "pairs": pairs, "raw_scores": True})["scores"]
    took = f"in {(time.monotonic() - began) * 1e3:.0f} ms"
    if ready["backend"] == "fake":
        return Point("scores", OK, f"{len(pairs)} pairs {took}, by the fake backend", facts={"logits": logits})
    if not known:
        if logits[0] > logits[1]:
            return Point("scores", OK, f"a relevant text {logits[0]:.3f}, an irrelevant one {logits[1]:.3f}, {took}", facts={"logits": logits})
        text = f"an irrelevant text gets {logits[1]:.3f} and a relevant one only {logits[0]:.3f}"
        return failed("scores", text, "Name a model that was trained for reranking.", BAD_DATA)
    worst = max(abs(logit - pair.logit) for logit, pair in zip(logits, known, strict=True))
    text = f"{len(known)} known pairs {took}, at most {worst:.2g} from their known logits"
    if worst > tolerance(ready["dtype"]):
        return failed("scores", text, advice(BAD_DATA), BAD_DATA)
    return Point("scores", OK, text, facts={"logits": logits, "largest_difference": worst})


@contextlib.contextmanager
def _log() -> Iterator[IO[bytes] | None]:
    """Where the worker's log goes: into memory, because a read-only node may have no place for a file."""
    if not hasattr(os, "memfd_create"):
        yield None
        return
    with os.fdopen(os.memfd_create("worker-log"), "w+b") as log:
        yield log


def _show_log(log: IO[bytes] | None) -> None:
    """The end of the worker's log, on standard error."""
    if log is not None:
        log.seek(max(0, log.seek(0, os.SEEK_END) - _MOST_LOG_BYTES))
        sys.stderr.write(log.read().decode("ascii", "backslashreplace"))
