"""`bench` as a person runs it: real processes and the fake backend; what it counts, what it says, how it fails."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import pty
import random
import statistics
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from reranker_worker.byhand import bench_loads as loads
from reranker_worker.byhand.bench_report import Table, draw, quantiles
from reranker_worker.byhand.bench_texts import Questions, read_queries
from reranker_worker.byhand.failures import Failure
from reranker_worker.client import WorkerError, WorkerTimeoutError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ROOT = Path(__file__).resolve().parents[1]
DEADLINE_S = 40.0
Result = subprocess.CompletedProcess[str]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "reranker_worker", "bench", "--backend=fake", *arguments]


def run(*arguments: str, env: Mapping[str, str] | None = None) -> Result:
    return subprocess.run(
        command(*arguments), cwd=ROOT, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )


def rows(*arguments: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    result = run("--json", *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    body: dict[str, Any] = json.loads(result.stdout)
    return body["rows"], body


def sentence(result: Result) -> str:
    (line,) = result.stderr.splitlines()
    assert line.endswith(".")
    return line


# --- what the modes tell -----------------------------------------------------------------------------------------------------


def test_throughput_is_told_for_small_large_and_concurrent_requests() -> None:
    found, body = rows("--seconds", "0.3", "--model=pair_us=1000")
    assert [row["load"] for row in found] == ["1 x 10", "1 x 100", "16 x 8"]
    # A pair takes a millisecond, whatever the machine does besides.
    assert all(0 < row["lowest"] <= row["pairs_per_s"] <= row["highest"] <= 1000 for row in found)
    assert (body["mode"], body["backend"], body["dtype"]) == ("throughput", "fake", "float32")
    assert body["rss_bytes"] > 1 << 20


def test_latency_is_told_by_the_number_of_documents() -> None:
    found, _ = rows("--mode=latency", "--seconds", "0.3", "--model=pair_us=1000")
    assert [row["documents"] for row in found] == [1, 10, 50, 100]
    assert all(row["documents"] <= row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] for row in found)


def test_documents_sets_the_size_of_a_request() -> None:
    assert [row["documents"] for row in rows("--mode=latency", "--seconds", "0.1", "--documents", "7")[0]] == [7]
    assert [row["load"] for row in rows("--seconds", "0.1", "--documents", "7")[0]] == ["1 x 7", "16 x 7"]


def test_load_rises_until_the_worker_refuses() -> None:
    found, body = rows("--mode=load", "--seconds", "2", "--model=pair_us=2000", "--max-waiting-requests=8")
    rates = [row["requests_per_s"] for row in found]
    assert rates == sorted(rates)
    assert [row["errors"] > 0 for row in found] == [False] * (len(found) - 1) + [True]
    assert all(row["requests"] == row["scored"] + row["errors"] for row in found)
    assert "OVERLOADED" in body["notes"][-1]


def test_the_capacity_is_measured_within_what_the_worker_takes_at_once() -> None:
    _, body = rows("--mode=load", "--seconds", "1", "--model=pair_us=2000", "--max-waiting-requests=1")
    capacity = float(body["notes"][0].partition("capacity ")[2].partition(" ")[0])
    assert 0 < capacity <= 50  # ten pairs take 20 ms


def test_load_ends_when_answers_take_longer_than_the_time_out() -> None:
    found, body = rows("--mode=load", "--seconds", "2", "--model=pair_us=5000", "--request-timeout-ms=100")
    assert found[-1]["errors"] > 0
    assert "DEADLINE_EXCEEDED" in body["notes"][-1]


def test_under_stress_every_request_is_accounted_for() -> None:
    found, body = rows("--mode=stress", "--seconds", "1.5", "--model=pair_us=300")
    counts = {row["what"]: row["requests"] for row in found}
    assert counts["scored"] > 0
    assert counts["given up"] > 0
    assert counts.keys() <= {"scored", "given up", "DEADLINE_EXCEEDED", "OVERLOADED"}
    assert any(note.startswith("memory grew by") for note in body["notes"])


def test_an_answer_that_should_not_be_fails_the_stress(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    # The first request, which warms up, is the second of these.
    file.write_text('{"query": "q", "documents": ["fake:raise"]}\n{"query": "q", "documents": ["fine"]}\n')
    result = run("--mode=stress", "--seconds", "0.5", "--queries-file", str(file))
    assert result.returncode == 70
    assert "INFERENCE_ERROR" in result.stderr.splitlines()[-1]


def test_a_table_for_people_and_nothing_on_standard_error_in_a_pipe() -> None:
    result = run("--seconds", "0.1")
    assert result.stderr == ""
    title, heading, *lines = result.stdout.splitlines()
    assert title.startswith("bundled (fake float32, cpu, ")
    assert heading.split() == ["load", "pairs/s", "lowest", "highest", "runs"]
    assert lines[1].startswith("1 x 100 ")
    assert lines[-1].endswith("MiB resident")


def test_progress_is_shown_on_a_terminal(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    with (tmp_path / "out").open("wb") as output:
        process = subprocess.Popen(command("--seconds", "0.3", "--json"), cwd=ROOT, stdout=output, stderr=theirs)
    os.close(theirs)
    shown = ""
    while True:
        try:
            shown += os.read(ours, 1 << 16).decode()
        except OSError:  # Linux reports the end of a terminal as an error
            break
    os.close(ours)
    assert process.wait(DEADLINE_S) == 0
    assert "throughput [" in shown
    assert "%" in shown
    assert shown.endswith("\r\x1b[K")
    assert json.loads((tmp_path / "out").read_bytes())["rows"]


# --- the user's own texts ----------------------------------------------------------------------------------------------------


def test_queries_and_documents_of_a_file_are_what_is_scored(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text('{"query": "q", "documents": ["fine", {"text": "fake:raise"}]}\n')
    result = run("--seconds", "0.1", "--queries-file", str(file))
    assert result.returncode == 70
    assert "failed on one of the documents" in sentence(result)


def test_no_two_requests_have_a_pair_in_common() -> None:
    for known in (None, [("q", ["a", "b"]), ("r", ["c"])]):
        make = Questions(known, {"timeout_ms": 5})
        bodies = [make(5) for _ in range(50)]
        pairs = {(body["query"], text) for body in bodies for text in body["documents"]}
        assert len(pairs) == 250
        assert all(body["timeout_ms"] == 5 for body in bodies)


def test_a_request_of_more_documents_than_the_file_has_repeats_them_told_apart() -> None:
    assert Questions([("q", ["a", "b"])], {})(5)["documents"] == ["a", "b", "a 2", "b 3", "a 4"]


@pytest.mark.parametrize(
    "line", ["nonsense", "[]", "{}", '{"query": "q"}', '{"query": "q", "documents": []}', '{"query": " ", "documents": ["a"]}',
             '{"query": "q", "documents": ["a", 7]}', '{"query": 7, "documents": ["a"]}']
)  # fmt: skip
def test_a_line_that_is_no_query_is_named(line: str, tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text('{"query": "q", "documents": ["a"]}\n' + line)
    with pytest.raises(Failure, match=r"q\.jsonl:2: ") as caught:
        read_queries(str(file))
    assert caught.value.exit_code == 65


def test_a_file_of_queries_that_is_not_there_or_empty_is_a_sentence(tmp_path: Path) -> None:
    assert run("--queries-file", str(tmp_path / "none")).returncode == 66
    (tmp_path / "empty").write_text("\n")
    result = run("--queries-file", str(tmp_path / "empty"))
    assert result.returncode == 66
    assert "holds no queries" in sentence(result)


# --- bad usage ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("--seconds", "0"), ("--seconds", "nan"), ("--seconds", "x"), ("--seconds", "99999"), ("--documents", "0"), ("--documents", "2.5"),
        ("--documents", "1001"), ("--mode", "nonsense"), ("--nonsense",), ("--batch-size", "x"),
    ],
)  # fmt: skip
def test_bad_usage_is_a_sentence_and_exit_code_64(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.returncode == 64
    assert sentence(result).startswith("bench: ")


def test_a_worker_that_cannot_start_hands_its_exit_code_on() -> None:
    result = run("--model=fail=66")
    assert result.returncode == 66
    assert "told to fail to load" in sentence(result)


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['matplotlib'] = None\n", encoding="ascii")
    result = run("--seconds", "3600", "--plot", str(tmp_path / "a.png"), env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 78
    assert "needs the Python package matplotlib" in sentence(result)


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
@pytest.mark.parametrize("x", [[1, 10], ["a", "b"]])
def test_a_plot_is_drawn(x: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    draw(Table([{"x": value, "p50_ms": 2.0} for value in x], "x", ["p50_ms"]), "title", str(file))
    assert file.read_bytes().startswith(b"\x89PNG")


# --- the loads themselves ----------------------------------------------------------------------------------------------------


class Stub:
    """A client whose worker does as told: `answer` makes the outcome of a request."""

    timeout_s = 0.0

    def __init__(self, answer: Callable[[Mapping[str, Any]], Any]) -> None:
        self._answer = answer

    def submit(self, body: Mapping[str, Any]) -> Future[Any]:
        future: Future[Any] = Future()
        outcome = self._answer(body)
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        elif outcome is not None:
            future.set_result(outcome)
        return future


def scores(body: Mapping[str, Any]) -> Any:
    return {"scores": [0.5] * len(body["documents"])}


def make(documents: int) -> dict[str, Any]:
    return {"query": "q", "documents": ["d"] * documents}


def outcome_of(answer: Callable[[Mapping[str, Any]], Any]) -> loads.Outcome:
    return loads.open_loop(Stub(answer), make, 3, [0.0, 0.0])  # type: ignore[arg-type]


def test_what_becomes_of_a_request_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loads, "_LAST_SECONDS", 0.0)
    good = outcome_of(scores)
    assert (good.counts, good.pairs, len(good.latencies_ms), good.failed) == ({"scored": 2}, 6, 2, 0)
    assert outcome_of(lambda body: WorkerError("no", "OVERLOADED")).counts == {"OVERLOADED": 2}
    assert outcome_of(lambda body: WorkerTimeoutError("late")).counts == {"DEADLINE_EXCEEDED": 2}
    assert outcome_of(lambda body: {"scores": [0.5]}).counts == {"lost": 2}
    never = outcome_of(lambda body: None)
    assert (never.counts, never.failed, never.latencies_ms) == ({"lost": 2}, 2, [])


def test_latency_runs_from_the_moment_at_which_a_request_was_due() -> None:
    def slowly(body: Mapping[str, Any]) -> Any:
        begin = time.perf_counter()
        while time.perf_counter() < begin + 0.01:
            pass
        return scores(body)

    taken = loads.open_loop(Stub(slowly), make, 1, [0.0, 0.0, 0.0]).latencies_ms  # type: ignore[arg-type]
    assert all(milliseconds >= 10 * position for position, milliseconds in enumerate(taken, 1))


def test_arrivals_come_by_chance_at_the_rate_that_was_asked_for() -> None:
    times = loads.arrivals(50.0, 100.0, random.Random(1))
    assert times == sorted(times) == loads.arrivals(50.0, 100.0, random.Random(1))
    assert 4700 < len(times) < 5300
    assert times[-1] < 100.0
    gaps = [later - sooner for sooner, later in itertools.pairwise(times)]
    assert 0.9 < statistics.stdev(gaps) / statistics.mean(gaps) < 1.1  # exponential: neither regular nor in bursts
    assert loads.arrivals(0.001, 1.0, random.Random(1)) == [0.0]


def test_quantiles_are_nearest_ranks() -> None:
    assert quantiles([float(value) for value in range(100, 0, -1)]) == {"p50_ms": 50.0, "p95_ms": 95.0, "p99_ms": 99.0}
    assert quantiles([7.0]) == dict.fromkeys(("p50_ms", "p95_ms", "p99_ms"), 7.0)
    assert quantiles([]) == dict.fromkeys(("p50_ms", "p95_ms", "p99_ms"))
