"""`python -m reranker_worker prewarm`: download, verify, export, reduce and check a model ahead of time, so that serving only opens files.

The heavy libraries are imported here, in a process that ends, and never in the one that serves.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import orjson

from reranker_worker.byhand.failures import Failure, Parser
from reranker_worker.byhand.progress import Progress
from reranker_worker.byhand.table import bar
from reranker_worker.config import from_flags

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reranker_worker.models.artefacts import Artefact

_STAGES = {"download": "downloading the model", "verify": "verifying the files"}
_MIB = 1024 * 1024


def run(arguments: Sequence[str]) -> int:
    """The command; its exit code: 0, or why there is no artefact (65 damaged or other scores, 66 missing, 69 network, 73 no place, 78 stale)."""
    parser = Parser("prewarm", "Make a model ready for a fast start, or say whether it is (--check).")
    parser.add_argument("--output", metavar="DIR", default="", help="a directory for this artefact alone (default: one in --artefacts)")
    parser.add_argument("--revision", dest="model_revision", metavar="VALUE", help="the same as --model-revision")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 0 if the artefact is there, whole and up to date")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    given, _ = parser.parse(list(arguments))
    config = from_flags(given, os.environ)
    if config.backend == "fake":
        raise Failure("The fake backend has no model, so there is nothing to prewarm.", 64)
    from reranker_worker.backends import BackendError
    from reranker_worker.models import ModelError
    from reranker_worker.prewarm import making

    try:
        with Progress() as progress:
            shower = _Shower(progress)
            if given.check:
                artefact, was_there = making.check(config, given.output, shower), True
            else:
                made = making.make(config, given.output, shower)
                artefact, was_there = made.artefact, made.was_there
    except ModuleNotFoundError as error:
        text = f"The Python package {error.name} is not installed, and prewarming compares with what it gives; run pip install -r requirements.txt."
        raise Failure(text, 78) from None
    except (ModelError, BackendError) as error:
        if not given.json:
            raise Failure(str(error), error.exit_code) from None
        sys.stdout.write(orjson.dumps({"ok": False, "error": str(error), "exit_code": error.exit_code}).decode() + "\n")
        return error.exit_code
    _tell(artefact, was_there, as_json=given.json)
    return 0


class _Shower:
    """Progress of every stage, from whatever thread, on one line."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __call__(self, stage: str, done: int, total: int) -> None:
        what = _STAGES.get(stage, stage)
        if total <= 0:
            self._progress.show(f"{what} ...")
            return
        counted = f"{done / _MIB:,.0f} of {total / _MIB:,.0f} MiB" if stage in _STAGES else f"{done} of {total}"
        self._progress.show(f"{what} {bar(done / total)} {done / total:4.0%} ({counted})")


def _tell(artefact: Artefact, was_there: bool, *, as_json: bool) -> None:
    facts: dict[str, Any] = {"ok": True, "path": str(artefact.path), "was_there": was_there, "model": artefact.source.model}
    facts |= {"revision": artefact.source.revision, "backend": artefact.backend, "dtype": artefact.dtype}
    facts |= {"parity": artefact.parity, "pairs_per_second": artefact.pairs_per_second, "versions": artefact.versions}
    facts["bytes"] = sum(path.stat().st_size for path in artefact.path.rglob("*") if path.is_file())
    if as_json:
        sys.stdout.write(orjson.dumps(facts, option=orjson.OPT_INDENT_2).decode() + "\n")
        return
    parity = artefact.parity
    revision = f" at {artefact.source.revision}" if artefact.source.revision else ""
    print(f"model         {artefact.source.model}{revision}")
    print(f"artefact      {artefact.path} ({facts['bytes'] / _MIB:,.0f} MiB, {'was there' if was_there else 'made now'})")
    print(f"backend       {artefact.backend}, {artefact.dtype}; {artefact.pairs_per_second:,.0f} pairs per second when it was made")
    print(f"parity        largest difference {parity['max_difference']:.2g} in the logit, Kendall's tau {parity['kendall_tau']:.4f}")
    print(f"              NDCG@10 on the sample {parity['ndcg']:.4f}, reference {parity['reference_ndcg']:.4f}")
    print("This model is prewarmed.")
