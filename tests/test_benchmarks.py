"""The benchmarks run and say something; their figures are not judged here."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.figures import cell, quantile, table
from benchmarks.texts import Texts

ROOT = Path(__file__).resolve().parents[1]
DEADLINE_S = 50.0


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks", *arguments, "--json", str(file)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert result.returncode == 0, result.stderr
    assert "median" in result.stdout
    body: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    assert all(item["runs"] and math.isfinite(item["median"]) for item in body["cells"])
    return body


def test_overhead_measures_every_shape_of_two_trees_in_turns_and_where_the_time_goes(tmp_path: Path) -> None:
    body = run(tmp_path, "overhead", "--seconds", "1", "--rounds", "2", "--against", str(ROOT))
    names = {item["name"] for item in body["cells"]}
    assert {f"{tree}{count} a request, pipelined" for tree in ("", "other: ") for count in (1, 10, 100)} <= names
    ratios = [item for item in body["cells"] if item["name"].startswith("this : other")]
    assert [item["runs"] for item in ratios] == [2, 2, 2]
    assert all(stages["front in all"] > 0 for stages in body["microseconds_per_document"].values())


def test_frontdoor_follows_a_worker_from_hello_to_exit(tmp_path: Path) -> None:
    body = run(tmp_path, "frontdoor", "--backend", "fake", "--rounds", "2", "--seconds", "0.3")
    assert {"exec to first heartbeat", "shutdown to exit, idle", "end of input to exit, idle"} <= {item["name"] for item in body["cells"]}


@pytest.mark.parametrize("arguments", [[], ["nonsense"]])
def test_a_benchmark_that_there_is_not_is_a_usage_error(arguments: list[str]) -> None:
    result = subprocess.run([sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, timeout=DEADLINE_S, check=False)
    assert result.returncode == 64


def test_the_texts_are_the_same_for_the_same_seed_and_all_different() -> None:
    passages = Texts(3).passages(500)
    assert passages == Texts(3).passages(500)
    assert passages != Texts(4).passages(500)
    assert len(set(passages)) == 500


def test_the_passages_have_realistic_lengths() -> None:
    words = [len(passage.split()) for passage in Texts(1).passages(3000)]
    assert 52 <= statistics.mean(words) <= 62  # times about 1.31 tokens a word: 75
    assert 100 <= quantile(words, 0.95) <= 125


def test_quantiles_are_nearest_ranks() -> None:
    values = [float(value) for value in range(1, 101)]
    assert (quantile(values, 0.5), quantile(values, 0.99), quantile(values, 1.0), quantile([5.0], 0.01)) == (50.0, 99.0, 100.0, 5.0)


def test_a_goal_is_judged_by_the_median() -> None:
    assert cell("a", "x", [1.0, 2.0, 9.0], at_least=2).ok
    assert not cell("a", "x", [1.0, 2.0, 9.0], at_most=1.5).ok
    assert "missed" in table([cell("a", "x", [1.0], at_least=2)])
