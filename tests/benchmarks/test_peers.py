"""`python -m benchmarks peers`: everyone gets the same calls in turns, scores are compared first, and what cannot be had is told."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks import environments, peers
from benchmarks.contestants import PEERS, Call, Contestant, named_settings
from benchmarks.peerside import KINDS
from benchmarks.picture import bars
from benchmarks.texts import Texts

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 55.0
FAKE = ("--peers", "fake", "--reference", "fake", "--contestant", "ours:backend=fake")
Result = subprocess.CompletedProcess[str]


def run(*arguments: str, **environ: str) -> Result:
    command = [sys.executable, "-m", "benchmarks", "peers", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False, env=os.environ | environ)


def figures(tmp_path: Path, *arguments: str) -> tuple[Result, dict[str, Any]]:
    file = tmp_path / "figures.json"
    result = run(*arguments, "--cache", str(tmp_path / "cache"), "--json", str(file))
    assert result.returncode == 0, result.stderr
    body: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return result, body


def given(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"loads": ["a10", "c16x8"], "reference": "one", "rounds": 3} | changes)


class Stub(Contestant):
    """Scores by length, off by `shift`; keeps what it was asked."""

    def __init__(self, name: str, log: list[str], shift: float = 0.0, probabilities: bool = False) -> None:
        self.name = name
        self.probabilities = probabilities
        self.asked: list[Sequence[Call]] = []
        self._log = log
        self._shift = shift

    def score(self, calls: Sequence[Call], *, raw: bool = False) -> tuple[float, list[list[float]]]:
        self.asked.append(calls)
        self._log.append(self.name)
        return 0.5, [[self._shift if self.probabilities else len(text) / 1e3 + self._shift for text in documents] for _, documents in calls]

    def pids(self) -> list[int]:
        return []


def test_ours_and_a_peer_are_measured_on_every_load_with_a_table_and_ratios_turn_by_turn(tmp_path: Path) -> None:
    result, body = figures(tmp_path, *FAKE, "--rounds", "2")
    for side in body["contestants"].values():
        assert {load: len(rates) for load, rates in side["pairs_per_s"].items()} == dict.fromkeys(("a10", "a100", "c16x8", "long"), 2)
        assert side["difference"] == 0
        assert side["rss_mib"] > 10
    assert body["contestants"]["ours"]["ours"]
    assert {item["name"]: item["runs"] for item in body["cells"]}["a100, ours : fake"] == 2
    table = [line for line in result.stdout.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == ["**ours** (fake float32)", "fake"]
    assert len({line.count("|") for line in table}) == 1


@pytest.mark.parametrize("shift", ["0.001", "nan"])
def test_an_exact_worker_that_scores_otherwise_than_the_reference_is_a_failure(shift: str) -> None:
    result = run(*FAKE, "--rounds", "1", "--loads", "a10", "--peer-env", f"FAKE_PEER_SHIFT={shift}")
    assert result.returncode == 70
    assert "ours differs from fake" in result.stderr


def test_a_missed_goal_is_a_failure_only_when_asked_for() -> None:
    # A hash in the peer's own process is beyond any worker's reach.
    assert run(*FAKE, "--rounds", "1", "--loads", "a10").returncode == 0
    assert run(*FAKE, "--rounds", "1", "--loads", "a10", "--strict").returncode == 1


def test_a_peer_that_cannot_be_installed_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    alone = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull, "PIP_EXTRA_INDEX_URL": ""}
    file = tmp_path / "figures.json"
    arguments = ("--peers", "fake,infinity", *FAKE[2:], "--loads", "a10", "--rounds", "1", "--cache", str(tmp_path / "cache"), "--json", str(file))
    result = run(*arguments, **alone)
    assert result.returncode == 0, result.stderr
    assert "infinity could not be had: ERROR: No matching distribution found" in result.stdout
    body = json.loads(file.read_text(encoding="utf-8"))
    assert body["contestants"].keys() == {"ours", "fake"}
    assert body["missing"].keys() == {"infinity"}


def test_a_reference_that_cannot_be_had_ends_the_benchmark_with_a_sentence(tmp_path: Path) -> None:
    result = run(*FAKE, "--cache", str(tmp_path), "--peer-env", "FAKE_PEER_SHIFT=nonsense")
    assert result.returncode == 64
    assert "fake, the reference, cannot be had: ValueError" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_busy_neighbour_is_busy(tmp_path: Path) -> None:
    settings = ("--contestant", "ours:backend=fake,model=pair_us=3000")
    result = run(*FAKE[:4], *settings, "--rounds", "3", "--loads", "a10", "--neighbour", "--cache", str(tmp_path))
    assert result.returncode == 0, result.stderr
    share = float(result.stderr.partition("the busy neighbour had ")[2].partition("%")[0])
    assert share > 5


@pytest.mark.skipif(importlib.util.find_spec("sentence_transformers") is None, reason="sentence-transformers is not installed")
def test_the_worker_scores_as_predict_does(tmp_path: Path) -> None:
    """The short form for CI: parity, and no word on time."""
    _, body = figures(tmp_path, "--peers", "", "--rounds", "1", "--loads", "a10")
    assert not body["contestants"]["worker"]["reduced"]
    assert 0 < body["contestants"]["worker"]["difference"] <= 1e-4


def test_everyone_gets_the_same_calls_and_nobody_is_always_first() -> None:
    log: list[str] = []
    everyone: dict[str, Contestant] = {name: Stub(name, log) for name in ("one", "two", "three")}
    peers.measure(everyone, given(loads=["a100"]), {name: peers.Found(0.0) for name in everyone})
    assert log == ["one", "two", "three", "two", "three", "one", "three", "one", "two"]
    assert everyone["one"].asked == everyone["two"].asked == everyone["three"].asked  # type: ignore[attr-defined]
    queries = [query for calls in everyone["one"].asked for query, _ in calls]  # type: ignore[attr-defined]
    assert len(set(queries)) == 3


def test_a_short_load_is_repeated_within_a_turn_and_counts_once() -> None:
    found = {"one": peers.Found(0.0)}
    stub = Stub("one", [])
    peers.measure({"one": stub}, given(loads=["a10"], rounds=1), found)
    assert len(stub.asked) == 5
    assert found["one"].pairs_per_s == {"a10": [50 / (5 * 0.5)]}


def test_the_largest_difference_of_any_load_counts() -> None:
    log: list[str] = []

    class Lonely(Stub):
        def score(self, calls: Sequence[Call], *, raw: bool = False) -> tuple[float, list[list[float]]]:
            self._shift = 0.25 if len(calls) == 1 else 0.0
            return super().score(calls, raw=raw)

    everyone: dict[str, Contestant] = {"one": Stub("one", log), "off": Lonely("off", log)}
    found = peers.compare(everyone, given())
    assert found["one"].difference == 0
    assert found["off"].difference == pytest.approx(0.25)


def test_a_peer_that_gives_probabilities_is_compared_with_those() -> None:
    log: list[str] = []
    everyone: dict[str, Contestant] = {"one": Stub("one", log), "half": Stub("half", log, 0.5, probabilities=True)}
    expected = max(1 / (1 + 2.718281828459045 ** -(len(text) / 1e3)) - 0.5 for text in peers.LOADS["a10"].calls(Texts(7))[0][1])
    assert peers.compare(everyone, given(loads=["a10"]))["half"].difference == pytest.approx(4 * expected)


def test_every_peer_has_a_program_and_a_list_of_packages_with_every_version() -> None:
    assert PEERS.keys() == KINDS.keys()
    for name in {peer.environment for peer in PEERS.values()} - {""} | {"picture"}:
        lines = (ROOT / "benchmarks" / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        assert all("==" in line for line in lines[1:])
        assert lines[0].startswith("# ")


def test_an_environment_is_made_once_and_again_when_it_was_not_finished(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[list[str]] = []

    def make(command: list[str]) -> None:
        made.append(command)
        if command[1:3] == ["-m", "venv"]:
            Path(command[3]).mkdir(parents=True)

    (tmp_path / "some.txt").write_text("# Some.\n")
    monkeypatch.setattr(environments, "_REQUIREMENTS", tmp_path)
    monkeypatch.setattr(environments, "_run", make)
    first = environments.environment("some", tmp_path / "cache")
    assert environments.environment("some", tmp_path / "cache") == first
    assert len(made) == 2
    (first.parents[1] / "complete").unlink()
    (first.parents[1] / "half a package").touch()
    environments.environment("some", tmp_path / "cache")
    assert len(made) == 4
    assert not (first.parents[1] / "half a package").exists()
    (tmp_path / "some.txt").write_text("# Some.\nother==1.0\n")
    assert environments.environment("some", tmp_path / "cache") != first


def test_nothing_is_kept_in_the_repository() -> None:
    result = run(*FAKE, "--cache", "benchmarks/cache")
    assert result.returncode == 64
    assert "outside" in result.stderr
    assert not (ROOT / "benchmarks" / "cache").exists()


def test_settings_of_a_contestant() -> None:
    assert named_settings("a:backend=onnx,batch-size=8") == ("a", {"backend": "onnx", "batch_size": "8"})
    assert named_settings("a") == ("a", {})
    for text in ("", ":a=b", "predict:backend=onnx", "a:backend", "a:=b"):
        with pytest.raises(argparse.ArgumentTypeError):
            named_settings(text)


def test_the_picture_shows_medians_fastest_first_and_which_are_ours() -> None:
    sides = {
        "ours": {"ours": True, "reduced": False, "pairs_per_s": {"a10": [1.0, 5.0, 90.0]}},
        "peer-int8": {"ours": False, "reduced": True, "pairs_per_s": {"a10": [7.0, 8.0, 9.0]}},
    }
    assert bars({"contestants": sides}) == {"a10": [("peer-int8", 8.0, False), ("ours", 5.0, True)]}
