"""Who takes part: settings of our worker, scored over its pipes, and the peers, each in a process of its own that times itself."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from benchmarks.environments import UnavailableError, environment, exported
from benchmarks.host import HostError, Pipes
from reranker_worker.byhand import processes
from reranker_worker.client import Client, WorkerError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

Call = tuple[str, list[str]]

_TIMEOUT_MS = 600_000
_MIB = 1024 * 1024
_MOST_LOG_BYTES = 2000
# Nothing is downloaded but packages, and nobody is told of our runs.
_PEER_ENVIRON = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}


@dataclass(frozen=True, slots=True)
class Peer:
    """`environment` is a name in requirements/, or "" for the one that runs the benchmark. `reduced`: not float32."""

    environment: str
    reduced: bool = False
    onnx: bool = False
    probabilities: bool = False  # it gives no logits


PEERS = {
    "predict": Peer(""),
    "predict-bf16": Peer("", reduced=True),
    "predict-onnx": Peer("onnx", onnx=True),
    "predict-onnx-int8": Peer("onnx", reduced=True, onnx=True),
    "predict-openvino": Peer("openvino", reduced=True),
    "predict-openvino-fp32": Peer("openvino"),
    "flashrank": Peer("flashrank", onnx=True, probabilities=True),
    "flashrank-int8": Peer("flashrank", reduced=True, onnx=True, probabilities=True),
    "fastembed": Peer("fastembed", onnx=True),
    "fastembed-int8": Peer("fastembed", reduced=True, onnx=True),
    "infinity": Peer("infinity"),
    "fake": Peer(""),
}
REFERENCE = "predict"
DEFAULT_PEERS = tuple(name for name in PEERS if name not in (REFERENCE, "fake"))


class Contestant:
    """One side of the comparison: `score` gives (seconds, scores) of calls that are all there at once."""

    name = ""
    about = ""
    ours = False
    reduced = False
    probabilities = False
    start_s = math.nan

    def score(self, calls: Sequence[Call], *, raw: bool = False) -> tuple[float, list[list[float]]]:
        """`raw` asks for logits."""
        raise NotImplementedError

    def pids(self) -> list[int]:
        """Its processes."""
        raise NotImplementedError

    def rss_mib(self) -> float:
        """Resident memory of all of them."""
        return sum(processes.rss_bytes(pid) or 0 for pid in self.pids()) / _MIB

    def cpu_s(self) -> float:
        """CPU time that they have used."""
        return sum(processes.cpu_seconds(pid) or 0.0 for pid in self.pids())


class Worker(Contestant):
    """Ours, measured from the first byte written to the last answer parsed; all calls are in flight at once."""

    ours = True

    def __init__(self, name: str, client: Client, start_s: float) -> None:
        self.name = name
        self.start_s = start_s
        self._client = client
        ready = client.wait_ready()
        self.reduced = ready["dtype"] not in ("float32", "fp32")
        self.about = f"{ready['backend']} {ready['dtype']}"

    def score(self, calls: Sequence[Call], *, raw: bool = False) -> tuple[float, list[list[float]]]:
        options = {"timeout_ms": _TIMEOUT_MS, "raw_scores": raw}
        begin = time.perf_counter()
        futures = [self._client.submit({"query": query, "documents": documents, **options}) for query, documents in calls]
        scores = [future.result()["scores"] for future in futures]
        return time.perf_counter() - begin, scores

    def pids(self) -> list[int]:
        return [self._client.pid, *processes.children(self._client.pid)]


class PeerProcess(Contestant):
    """A peer, asked through a pipe; it measures itself."""

    def __init__(self, name: str, pipes: Pipes) -> None:
        self.name = self.about = name
        self.reduced = PEERS[name].reduced
        self.probabilities = PEERS[name].probabilities
        self._pipes = pipes
        self.start_s = time.perf_counter() - pipes.started_at

    def score(self, calls: Sequence[Call], *, raw: bool = False) -> tuple[float, list[list[float]]]:
        body = json.loads(self._pipes.ask(json.dumps({"calls": calls, "raw": raw}).encode() + b"\n"))
        return body["seconds"], body["scores"]

    def pids(self) -> list[int]:
        return [self._pipes.pid]


def add_worker_flags(parser: argparse.ArgumentParser) -> None:
    """`--contestant` and what is common to all contestants."""
    text = "a setting of our worker, as often as wanted: onnx-int8:backend=onnx,dtype=int8 (default: worker, with its defaults)"
    parser.add_argument("--contestant", action="append", metavar="NAME:SETTING=VALUE,...", type=named_settings, help=text)


def named_settings(text: str) -> tuple[str, dict[str, str]]:
    """NAME:SETTING=VALUE,... as (name, settings)."""
    name, _, rest = text.partition(":")
    pairs = [item.partition("=") for item in rest.split(",") if item]
    if not name or name in PEERS or not all(key and sign for key, sign, _ in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME or NAME:SETTING=VALUE,... (and not a peer's name)")
    return name, {key.replace("-", "_"): value for key, _, value in pairs}


def settings_of(given: argparse.Namespace) -> dict[str, dict[str, str]]:
    """The worker's settings by contestant; `--model` and `--threads` are for all."""
    common = {name: str(value) for name in ("model", "threads") if (value := getattr(given, name, None))}
    return {name: common | settings for name, settings in given.contestant or [("worker", {})]}


@contextlib.contextmanager
def client(settings: dict[str, str]) -> Iterator[Client]:
    """A worker, ready. Raises UnavailableError when it cannot be had, or fails later."""
    try:
        worker = Client(timeout_s=_TIMEOUT_MS / 1e3, stderr=subprocess.DEVNULL, **settings)
    except ValueError as error:  # no such setting
        raise UnavailableError(str(error)) from None
    try:
        with worker:
            yield worker
    except WorkerError as error:
        raise UnavailableError(str(error)) from None


@contextlib.contextmanager
def contestant(name: str, settings: dict[str, str]) -> Iterator[Worker]:
    """Our worker, ready, as a side of the comparison."""
    begin = time.perf_counter()
    with client(settings) as ours:
        yield Worker(name, ours, time.perf_counter() - begin)


@contextlib.contextmanager
def peer(name: str, model: Path, threads: int, cache: Path, environ: dict[str, str]) -> Iterator[PeerProcess]:
    """A peer, ready. Raises UnavailableError with the reason when it cannot be had."""
    kind = PEERS[name]
    python = str(environment(kind.environment, cache)) if kind.environment else sys.executable
    files = str(exported(model, cache)) if kind.onnx else ""
    command = [python, "-m", "benchmarks.peerside", name, str(model), files, str(threads)]
    with tempfile.TemporaryFile() as log:
        pipes = Pipes(command, environ=os.environ | _PEER_ENVIRON | {"OMP_NUM_THREADS": str(threads)} | environ, stderr=log)
        with pipes:
            try:
                pipes.read_line()
            except HostError:
                raise UnavailableError(_last_line(log)) from None
            yield PeerProcess(name, pipes)


def _last_line(log: IO[bytes]) -> str:
    log.seek(max(0, log.seek(0, os.SEEK_END) - _MOST_LOG_BYTES))
    lines = [line for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it ended without a word"
