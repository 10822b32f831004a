"""`python -m reranker_worker check`: can this machine serve this model, and how fast? Asked of a real worker, told in plain words."""

from __future__ import annotations

import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from reranker_worker import __version__, machine
from reranker_worker.byhand import processes
from reranker_worker.byhand.failures import BAD_DATA, INTERNAL, Parser, advice, exit_code_of
from reranker_worker.byhand.progress import Progress
from reranker_worker.byhand.sample import IRRELEVANT, QUERY, RELEVANT, passages
from reranker_worker.byhand.serving import serving
from reranker_worker.client import WorkerError, WorkerGoneError
from reranker_worker.config import env_name
from reranker_worker.packages import installed_version

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reranker_worker.client import Answer, Client

_PACKAGES = ("onnxruntime", "torch", "transformers", "sentence-transformers", "tokenizers", "huggingface_hub", "numpy", "orjson")
_SAMPLE_SECONDS = 1.0
_SAMPLE_DOCUMENTS = 50
_REQUEST_TIMEOUT_MS = 600_000
_MIB = 1024 * 1024
_TIGHT_MEMORY = 0.8


@dataclass(frozen=True, slots=True)
class Verdict:
    """The last line and the exit code."""

    ok: bool
    text: str
    exit_code: int = 0


class Report:
    """Facts as they become known: printed at once for a person, kept for `--json`."""

    def __init__(self, *, as_json: bool) -> None:
        self.facts: dict[str, Any] = {}
        self._as_json = as_json

    def add(self, section: str, facts: dict[str, Any], *lines: tuple[str, str]) -> None:
        """Facts for machines, and lines (what, value) for people."""
        self.facts[section] = facts
        if not self._as_json:
            for what, value in lines:
                print(f"{what:<13} {value}", flush=True)

    def finish(self, verdict: Verdict) -> int:
        """Print the verdict; the exit code."""
        if self._as_json:
            body = {"ok": verdict.ok, "verdict": verdict.text, "exit_code": verdict.exit_code, **self.facts}
            sys.stdout.write(orjson.dumps(body, option=orjson.OPT_INDENT_2).decode() + "\n")
        else:
            print(verdict.text)
        return verdict.exit_code


def run(arguments: Sequence[str]) -> int:
    """The command; its exit code: 0, or why this machine cannot serve the model."""
    if "--deploy" in arguments:
        from reranker_worker.byhand import check_deploy

        return check_deploy.run(arguments)
    parser = Parser("check", "Say whether this machine can serve the model with these settings, and how fast.")
    parser.add_argument("--deploy", action="store_true", help="is this node ready to serve? files, versions, artefact, a scored pair (no speed)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    given, settings = parser.parse(list(arguments))
    report = Report(as_json=given.json)
    _machine(report)
    return report.finish(_ask(report, settings))


def _ask(report: Report, settings: dict[str, Any]) -> Verdict:
    name = settings.get("model") or os.environ.get(env_name("model")) or "bundled"
    try:
        with Progress() as progress, serving(settings, _REQUEST_TIMEOUT_MS / 1e3, progress) as (client, ready):
            progress.show("")
            return _questions(client, ready, report, progress)
    except WorkerGoneError as error:
        code = exit_code_of(error)
        return _cannot(name, str(error), advice(code), code)
    except WorkerError as error:
        return _cannot(name, str(error), advice(INTERNAL), INTERNAL)


def _questions(client: Client, ready: Answer, report: Report, progress: Progress) -> Verdict:
    """Ask the worker everything; what comes of it."""
    _model(report, client.request({"type": "info"}), ready)
    relevant, irrelevant = _pair(report, client)
    progress.show("measuring the speed ...")
    _speed(report, client, progress)
    used = _memory(report, client)
    limit = machine.memory_limit_bytes()
    name = str(ready["model"])
    if ready["backend"] == "fake":
        return Verdict(True, "This machine can serve the fake backend: no model, and scores that mean nothing.")
    if relevant <= irrelevant:
        return _cannot(name, "it scores an irrelevant text above a relevant one", "Name a model that was trained for reranking.", BAD_DATA)
    tight = f" Memory is tight: {used // _MIB:,} of {limit // _MIB:,} MiB." if limit and used > _TIGHT_MEMORY * limit else ""
    return Verdict(True, f"This machine can serve {name}.{tight}")


def _cannot(name: str, reason: str, advice: str, exit_code: int) -> Verdict:
    return Verdict(False, f"This machine cannot serve {name!a}: {reason.rstrip('.')}. Do: {advice}", exit_code)


# --- sections ----------------------------------------------------------------------------------------------------------------


def _machine(report: Report) -> None:
    versions = {name: installed_version(name) for name in _PACKAGES}
    threads, quota, memory = machine.usable_threads(), machine.cpu_quota(), machine.memory_limit_bytes()
    facts = {"python": platform.python_version(), "reranker_worker": __version__, **versions}
    present = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    absent = ", ".join(name for name, version in versions.items() if not version)
    report.add(
        "software",
        facts,
        ("software", f"Python {platform.python_version()}, reranker_worker {__version__}"),
        ("packages", present + (f"; absent: {absent}" if absent else "")),
    )
    allowed = "no quota" if quota is None else f"a quota of {quota:g}"
    report.add(
        "machine",
        {"system": platform.system(), "architecture": platform.machine(), "threads": threads, "cpu_quota": quota, "memory_bytes": memory},
        ("system", f"{platform.system()} on {platform.machine()}"),
        ("processors", f"{threads} usable of {os.cpu_count()} (affinity, and {allowed})"),
        ("memory", f"{memory // _MIB:,} MiB" if memory else "unknown"),
    )


def _model(report: Report, info: Answer, ready: Answer) -> None:
    path = Path(info["model_path"] or ".")
    fake = ready["backend"] == "fake"
    files = [] if fake else sorted((item.name, item.stat().st_size) for item in path.iterdir() if item.is_file())
    size = sum(size for _, size in files)
    source = "no files: the fake backend" if fake else _source(str(ready["model"]), path)
    facts = {name: ready.get(name) for name in ("model", "model_revision", "backend", "device", "dtype", "threads", "max_length", "load_time_ms")}
    report.add(
        "model",
        facts | {"source": source, "path": "" if fake else str(path), "bytes": size, "files": dict(files)},
        ("model", f"{ready['model']} ({source})"),
        *([] if fake else [("files", f"{len(files)} in {path}, {size / _MIB:,.1f} MiB")]),
        ("device", f"{ready['device']} ({ready['backend']}, {ready['dtype']}, {ready['threads']} threads)"),
        ("longest pair", f"{ready['max_length']} tokens"),
        ("start", f"{ready['load_time_ms'] / 1e3:.2f} s until it could score"),
    )


def _source(name: str, path: Path) -> str:
    if name == "bundled":
        return "ships with the package"
    return "from the hub's cache" if "snapshots" in path.parts else "from a directory"


def _pair(report: Report, client: Client) -> tuple[float, float]:
    answer = client.rerank(QUERY, [RELEVANT, IRRELEVANT], timeout_ms=_REQUEST_TIMEOUT_MS)
    relevant, irrelevant = answer["scores"]
    report.add(
        "scores",
        {"query": QUERY, "relevant": relevant, "irrelevant": irrelevant},
        ("scores", f'for "{QUERY}"'),
        ("", f"{relevant:.4f}  {RELEVANT}"),
        ("", f"{irrelevant:.4f}  {IRRELEVANT}"),
    )
    return relevant, irrelevant


def _speed(report: Report, client: Client, progress: Progress) -> None:
    """Pairs per second over at least two requests and a second, after one to warm up."""
    texts = passages(_SAMPLE_DOCUMENTS)
    pairs, tokens, spent = 0, 0, 0.0
    for number in range(1_000_000):
        begin = time.monotonic()
        answer = client.rerank(f"{QUERY} ({number})", texts, details=True, timeout_ms=_REQUEST_TIMEOUT_MS)
        if number:
            spent += time.monotonic() - begin
            pairs += len(texts)
            tokens += answer["usage"]["total_tokens"]
        if number > 1 and spent >= _SAMPLE_SECONDS:
            break
    rate, mean = pairs / spent, tokens / pairs
    progress.show("")
    report.add(
        "speed",
        {"pairs_per_second": round(rate, 1), "mean_tokens": round(mean, 1), "pairs": pairs, "seconds": round(spent, 3)},
        ("speed", f"{rate:,.0f} pairs/s of {mean:.0f} tokens; 100 such documents take {_duration(100 / rate)}"),
    )


def _memory(report: Report, client: Client) -> int:
    front = processes.rss_bytes(client.pid) or 0
    engines = sum(processes.rss_bytes(pid) or 0 for pid in processes.children(client.pid))
    known = front > 0
    report.add(
        "memory",
        {"front_rss_bytes": front if known else None, "engine_rss_bytes": engines if known else None},
        ("in use", f"{engines / _MIB:,.0f} MiB by the engine, {front / _MIB:,.0f} MiB by the front" if known else "unknown on this system"),
    )
    return front + engines


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
