"""The benchmarks run and say something; their figures are not judged here."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 50.0
FAKE = ("--contestant", "one:backend=fake", "--contestant", "two:backend=fake,batch-target-ms=20")


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks", *arguments, "--json", str(file)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert result.returncode == 0, result.stderr
    assert "median" in result.stdout
    body: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    assert all(item["runs"] and math.isfinite(item["median"]) for item in body["cells"])
    return body


def medians(body: dict[str, Any]) -> dict[str, float]:
    return {item["name"]: item["median"] for item in body["cells"]}


def test_overhead_measures_every_shape_of_two_trees_in_turns_and_where_the_time_goes(tmp_path: Path) -> None:
    body = run(tmp_path, "overhead", "--seconds", "1", "--rounds", "2", "--against", str(ROOT))
    assert {f"{tree}{count} a request, pipelined" for tree in ("", "other: ") for count in (1, 10, 100)} <= medians(body).keys()
    ratios = [item for item in body["cells"] if item["name"].startswith("this : other")]
    assert [item["runs"] for item in ratios] == [2, 2, 2]
    assert all(stages["front in all"] > 0 for stages in body["microseconds_per_document"].values())


def test_frontdoor_follows_a_worker_from_hello_to_exit(tmp_path: Path) -> None:
    body = run(tmp_path, "frontdoor", "--backend", "fake", "--rounds", "2", "--seconds", "0.3")
    assert {"exec to first heartbeat", "shutdown to exit, idle", "end of input to exit, idle"} <= medians(body).keys()


def test_latency_tells_sizes_loads_and_what_a_large_request_does_to_small_ones(tmp_path: Path) -> None:
    body = run(tmp_path, "latency", *FAKE, "--model", "pair_us=500", "--rounds", "1", "--seconds", "0.2", "--large", "200")
    found = medians(body)
    assert found["requests that failed"] == 0
    for name, target_ms in (("one", 50), ("two", 20)):
        # A document takes half a millisecond, however much the machine has to do besides.
        for documents in (1, 50, 100):
            assert found[f"{name}, {documents} documents, lone, p50"] >= documents / 2
        assert {f"{name}, 10 documents at {share}% of the capacity, p99" for share in (25, 50, 75)} <= found.keys()
        # The large request takes 100 ms alone; small ones were sent all the while, and count in batches of this setting.
        beside = f"{name}, 10 documents beside 200, p95"
        assert found[f"{name}, 200 documents"] >= 100
        (batches,) = (item for item in body["cells"] if item["name"] == beside and item["unit"] != "ms")
        (in_ms,) = (item for item in body["cells"] if item["name"] == beside and item["unit"] == "ms")
        assert batches["median"] == pytest.approx(in_ms["median"] / target_ms)
        assert batches["goal"] == "<= 3"


def test_startup_times_the_worker_until_it_is_ready_and_has_answered(tmp_path: Path) -> None:
    slow = ("--contestant", "slow:backend=fake,model=load_ms=2000")
    found = medians(run(tmp_path, "startup", "--contestant", "quick:backend=fake", *slow, "--rounds", "1", "--no-original"))
    assert 0 < found["quick, exec to ready"] < found["quick, exec to the first answer"]
    assert 2 <= found["slow, exec to ready"] < found["slow, exec to the first answer"]


def test_memory_is_that_of_front_and_engine_and_grows_are_told(tmp_path: Path) -> None:
    found = medians(run(tmp_path, "memory", "--contestant", "one:backend=fake", "--requests", "20", "--shapes", "20"))
    assert found["one, resident at ready"] > 25  # two Python processes
    assert 0 < found["one, proportional at ready"] < found["one, resident at ready"] <= found["one, highest"] + 1
    assert "one, growth over 20 random shapes" in found


def test_owncost_compares_the_worker_with_the_bare_backend_at_equal_scores(tmp_path: Path) -> None:
    settings = ("--contestant", "one:backend=fake", "--model", "pair_us=300")
    found = medians(run(tmp_path, "owncost", *settings, "--documents", "40", "--rounds", "1"))
    worker, bare = found["one, 40 documents, worker"], found["one, 40 documents, bare backend"]
    assert min(worker, bare) >= 12  # 40 times 300 us
    assert found["one, worker : bare backend"] == pytest.approx(worker / bare)
    assert found["one, largest difference of a logit"] == 0


@pytest.mark.parametrize("name", ["latency", "startup", "memory", "owncost"])
def test_a_worker_that_cannot_start_is_a_sentence(name: str) -> None:
    command = [sys.executable, "-m", "benchmarks", name, "--contestant", "one:backend=fake,model=fail=66"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert result.returncode == 64
    assert "told to fail to load" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("arguments", [[], ["nonsense"]])
def test_a_benchmark_that_there_is_not_is_a_usage_error(arguments: list[str]) -> None:
    result = subprocess.run([sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, timeout=DEADLINE_S, check=False)
    assert result.returncode == 64
