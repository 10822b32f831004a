"""`python -m tests.planted [--only TEXT] [--jobs N]`: plant each defect in a copy of the repository and see whether its test notices.

First every catcher runs on an unchanged copy: a test that fails anyway catches nothing. Exit code 1 when a defect is missed.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.planted.defects import DEFECTS, Defect

if TYPE_CHECKING:
    from collections.abc import Iterable

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 240
_LEAVE_OUT = shutil.ignore_patterns(*".git .venv __pycache__ .*_cache build dist *.egg-info *.safetensors *.onnx training benchmarks".split())
_PYTEST_FAILED = 1


@dataclass(frozen=True)
class Result:
    """What a catcher said of a copy."""

    noticed: bool
    seconds: float
    detail: str


def plant(copy: Path, defect: Defect) -> None:
    """Apply a defect to a copy; raises when its place is gone."""
    path = copy / defect.file
    text = path.read_text("utf-8")
    if text.count(defect.old) != 1:
        raise SystemExit(f"{defect.name}: {defect.file} holds the old text {text.count(defect.old)} times; repair the list")
    path.write_text(text.replace(defect.old, defect.new), "utf-8")


def run(copy: Path, catcher: str) -> Result:
    """Run a catcher in a copy."""
    words = shlex.split(catcher.replace(" -k ", " -k '", 1) + "'") if " -k " in catcher else catcher.split()
    if words[0] == "chaos":
        command = [sys.executable, "-m", "tests.chaos", "--runs", words[1], "--seed", words[2], "--failures", "1"]
    else:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *words]
    begin = time.monotonic()
    try:
        ended = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return Result(True, time.monotonic() - begin, "the catcher itself ran out of time")
    output = ended.stdout + ended.stderr
    if ended.returncode not in (0, _PYTEST_FAILED):
        return Result(False, time.monotonic() - begin, f"the catcher is broken (code {ended.returncode}): {output[-300:]}")
    marks = [line for line in output.splitlines() if line.startswith(("E  ", "FAILED", "DIFFERENT"))]
    return Result(ended.returncode == _PYTEST_FAILED, time.monotonic() - begin, marks[0][:110] if marks else "")


def _in_copy(snapshot: Path, catcher: str, defect: Defect | None) -> Result:
    with tempfile.TemporaryDirectory(prefix="planted-") as directory:
        copy = Path(directory) / "copy"
        shutil.copytree(snapshot, copy)
        if defect is not None:
            plant(copy, defect)
        return run(copy, catcher)


def _healthy(snapshot: Path, catchers: Iterable[str], jobs: int) -> bool:
    names = sorted(set(catchers))
    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(lambda catcher: _in_copy(snapshot, catcher, None), names))
    bad = [(catcher, result) for catcher, result in zip(names, results, strict=True) if result.noticed or result.detail]
    for catcher, result in bad:
        print(f"UNUSABLE {catcher}: fails without any defect: {result.detail}", flush=True)
    return not bad


def _plant_all(snapshot: Path, defects: list[Defect], jobs: int) -> int:
    caught = 0
    with ThreadPoolExecutor(jobs) as pool:
        for defect, result in zip(defects, pool.map(lambda defect: _in_copy(snapshot, defect.catcher, defect), defects), strict=True):
            caught += result.noticed
            verdict = "caught" if result.noticed else "MISSED"
            print(f"{verdict}  {result.seconds:6.1f} s  {defect.area:<12} {defect.name:<58} {result.detail}", flush=True)
    return caught


def main() -> int:
    """Plant them all, print a table."""
    parser = argparse.ArgumentParser(prog="python -m tests.planted", description=__doc__)
    parser.add_argument("--only", default="", help="defects whose name or area holds this")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--skip-healthy", action="store_true", help="do not run the catchers on an unchanged copy first")
    options = parser.parse_args()
    defects = [defect for defect in DEFECTS if options.only in defect.name or options.only == defect.area]
    # One snapshot for all: somebody may go on editing meanwhile.
    with tempfile.TemporaryDirectory(prefix="planted-") as directory:
        snapshot = Path(directory) / "snapshot"
        shutil.copytree(ROOT, snapshot, ignore=_LEAVE_OUT)
        healthy = options.skip_healthy or _healthy(snapshot, (defect.catcher for defect in defects), options.jobs)
        caught = _plant_all(snapshot, defects, options.jobs)
    print(f"{caught} of {len(defects)} planted defects caught{'' if healthy else '; some catchers are UNUSABLE'}")
    return 0 if healthy and caught == len(defects) else 1


if __name__ == "__main__":
    sys.exit(main())
