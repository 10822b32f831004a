"""`prewarm` makes an artefact that serves at once, is never used for another model, and is whole or not there at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import pytest
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from host import Host

ModelMaker = Callable[..., Path]
ROOT = Path(__file__).parents[2]
DEADLINE_S = 120


def prewarm(*arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "reranker_worker", "prewarm", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def made(*arguments: Any) -> dict[str, Any]:
    done = prewarm("--json", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout))


def refused(exit_code: int, *arguments: Any) -> str:
    done = prewarm(*arguments)
    assert done.returncode == exit_code, done.stdout + done.stderr
    assert done.stderr.startswith("prewarm: ")
    assert done.stderr.count("\n") == 1, "one sentence"
    return done.stderr


@pytest.fixture(scope="module")
def model(tiny: ModelMaker) -> Path:
    return tiny("bert", layers=2)


@pytest.fixture(scope="module")
def artefact(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 artefact of the tiny model, made by the command."""
    place = tmp_path_factory.mktemp("made") / "artefact"
    facts = made("--model", model, "--output", place)
    assert facts["path"] == str(place)
    return place


@pytest.fixture
def copied(artefact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artefact, tmp_path / "copied"))


def scores(host: Host) -> list[float]:
    host.wait_ready(DEADLINE_S)
    return list(host.ask({"id": 1, "query": "where is the boat", "documents": ["the boat is on the lake", "bread and milk"]})["scores"])


# --- making ------------------------------------------------------------------------------------------------------------------


def test_an_artefact_tells_what_it_is_and_how_near_it_is_to_the_reference(artefact: Path, model: Path) -> None:
    told = json.loads((artefact / "artefact.json").read_text())
    assert (told["backend"], told["dtype"], told["source"]["model"]) == ("onnx", "float32", str(model))
    assert told["parity"]["max_difference"] < 1e-4
    assert told["parity"]["kendall_tau"] > 0.99
    assert told["parity"]["ndcg"] == pytest.approx(told["parity"]["reference_ndcg"], abs=0.01)
    assert set(told["versions"]) == {"onnxruntime", "tokenizers", "numpy"}
    assert not list(artefact.glob("*.safetensors")), "the weights are in it once"


def test_a_second_run_finds_it_there_and_changes_nothing(model: Path, copied: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in copied.iterdir()}
    assert made("--model", model, "--output", copied)["was_there"]
    assert {path.name: path.stat().st_mtime_ns for path in copied.iterdir()} == before


def test_runs_at_the_same_time_make_one_whole_artefact(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "reranker_worker", "prewarm", "--json", "--model", str(model), "--artefacts", str(tmp_path / "shared")]
    runs = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(3)]
    facts = [json.loads(run.communicate(timeout=DEADLINE_S)[0]) for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert sorted(fact["was_there"] for fact in facts) == [False, True, True]
    assert len([path for path in (tmp_path / "shared").iterdir() if path.is_dir()]) == 1
    assert made("--check", "--model", model, "--artefacts", tmp_path / "shared")["ok"]


def test_what_an_interrupted_run_left_is_cleared_away(model: Path, tmp_path: Path) -> None:
    left = tmp_path / ".artefact.abc.tmp"
    left.mkdir()
    (left / "model.weights").write_bytes(b"half")
    made("--model", model, "--output", tmp_path / "artefact")
    assert not left.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".artefact.lock", "artefact"]


def test_int8_moves_scores_a_little_and_halves_the_weights(model: Path, artefact: Path, tmp_path: Path) -> None:
    facts = made("--model", model, "--dtype", "int8", "--output", tmp_path / "small")
    assert facts["parity"]["max_difference"] > 1e-6
    assert facts["parity"]["kendall_tau"] > 0.8
    weights = [(place / "model.weights").stat().st_size for place in (tmp_path / "small", artefact)]
    assert weights[0] < weights[1]


def test_int8_weights_are_such_that_no_cpu_cuts_off_the_sum_of_two_products(model: Path, tmp_path: Path) -> None:
    made("--model", model, "--dtype", "int8", "--output", tmp_path / "small")
    graph = onnx.load(tmp_path / "small" / "model.onnx").graph
    arrays = [numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    assert arrays
    for weight in arrays:  # (inputs, outputs); two neighbouring inputs, each at most 255, are added up in 16 bits
        pairs = weight.astype(int).reshape(-1, 2, weight.shape[1])
        assert (255 * pairs.clip(min=0).sum(axis=1)).max() <= 32767
        assert (255 * pairs.clip(max=0).sum(axis=1)).min() >= -32768


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_one_channel_that_reaches_far_beyond_the_others_does_not_coarsen_their_steps(tiny: ModelMaker, tmp_path: Path, activation: str) -> None:
    far = Path(shutil.copytree(tiny("bert", layers=2, config={"hidden_act": activation}), tmp_path / "model"))
    weights = load_file(far / "model.safetensors")
    for number in range(2):
        part = f"bert.encoder.layer.{number}."
        weights[part + "intermediate.dense.bias"][0] = 20.0
        weights[part + "intermediate.dense.weight"][0] *= 5
        weights[part + "output.dense.weight"][:, 0] *= 0.1
    save_file(weights, far / "model.safetensors", metadata={"format": "pt"})
    parity = made("--model", far, "--dtype", "int8", "--output", tmp_path / "small")["parity"]
    assert parity["max_difference"] > 1e-3, "with steps for that channel the ranking falls apart, and everything stays float32"
    assert parity["kendall_tau"] > 0.85


def test_what_int8_would_spoil_stays_float32(tiny: ModelMaker, tmp_path: Path) -> None:
    spoiled = Path(shutil.copytree(tiny("bert", layers=4), tmp_path / "model"))
    weights = load_file(spoiled / "model.safetensors")
    for number in range(4):  # one unit of each feed-forward part is huge and leads nowhere; the others matter
        part = f"bert.encoder.layer.{number}."
        weights[part + "intermediate.dense.bias"][0] = 5000.0
        weights[part + "output.dense.weight"] *= 50
        weights[part + "output.dense.weight"][:, 0] = 0.0
    save_file(weights, spoiled / "model.safetensors", metadata={"format": "pt"})
    facts = made("--model", spoiled, "--dtype", "int8", "--output", tmp_path / "careful")
    assert facts["dtype"] == "int8"
    assert facts["parity"]["kendall_tau"] > 0.8
    assert facts["parity"]["max_difference"] > 1e-6
    made("--model", spoiled, "--output", tmp_path / "exact")
    sizes = [(tmp_path / name / "model.weights").stat().st_size for name in ("careful", "exact")]
    assert sizes[0] < sizes[1]


def test_a_model_that_graphs_cannot_hold_is_prewarmed_for_torch(tiny: ModelMaker, tmp_path: Path) -> None:
    facts = made("--model", tiny("modernbert"), "--output", tmp_path / "other")
    assert (facts["backend"], facts["dtype"]) == ("torch", "float32")
    assert "modernbert" in refused(78, "--model", tiny("modernbert"), "--backend", "onnx", "--output", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_scores_that_are_not_the_models_own_make_no_artefact(model: Path, tmp_path: Path) -> None:
    # A reference that differs, from the outside: the same directory with other weights behind sentence-transformers' back.
    program = """
import sys
from reranker_worker.prewarm import making
import reranker_worker.backends.torch as reference
honest = reference.TorchBackend.score
reference.TorchBackend.score = lambda self, batch: [logit + 0.01 for logit in honest(self, batch)]
from reranker_worker.cli import main
main(["prewarm", *sys.argv[1:]])
"""
    command = [sys.executable, "-c", program, "--model", str(model), "--output", str(tmp_path / "wrong")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 65
    assert "a logit differs by 0.01" in done.stderr
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (("--model", "/nowhere/at/all"), 66, "does not exist"),
        (("--backend", "fake"), 64, "no model"),
        (("--dtype", "int4"), 64, "int8"),
        (("--model", "bundled", "--revision", "abc"), 78, "revision"),
    ],
)
def test_what_goes_wrong_is_one_sentence_and_an_exit_code(arguments: tuple[str, ...], exit_code: int, words: str, tmp_path: Path) -> None:
    assert words in refused(exit_code, *arguments, "--artefacts", tmp_path)


def test_a_directory_with_something_else_in_it_is_left_alone(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    assert "no artefact" in refused(73, "--model", model, "--output", tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_a_place_that_cannot_be_written_is_one_sentence(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "--output" in refused(73, "--model", model, "--output", tmp_path / "file" / "below")


# --- checking ----------------------------------------------------------------------------------------------------------------


def test_check_finds_what_is_missing_damaged_stale_or_of_another_model(model: Path, tiny: ModelMaker, copied: Path, tmp_path: Path) -> None:
    assert made("--check", "--model", model, "--output", copied)["ok"]
    assert "not prewarmed" in refused(66, "--check", "--model", model, "--output", tmp_path / "nothing")
    assert "not what the settings name" in refused(78, "--check", "--model", tiny("bert", seed=9), "--output", copied)
    assert "not what the settings name" in refused(78, "--check", "--model", model, "--dtype", "int8", "--output", copied)
    weights = copied / "model.weights"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert "damaged" in refused(65, "--check", "--model", model, "--output", copied)


def test_a_damaged_artefact_is_made_again(model: Path, copied: Path) -> None:
    (copied / "model.onnx").write_bytes(b"")
    assert not made("--model", model, "--output", copied)["was_there"]
    assert made("--check", "--model", model, "--output", copied)["ok"]


# --- serving -----------------------------------------------------------------------------------------------------------------


def test_an_artefact_is_served_wherever_it_was_copied_with_the_models_own_scores(spawn: Any, copied: Path, model: Path) -> None:
    prewarmed, plain = spawn("--model", str(copied), backend=None), spawn("--model", str(model), "--backend", "torch", backend=None)
    assert scores(prewarmed) == pytest.approx(scores(plain), abs=1e-5)
    info = prewarmed.ask({"type": "info"})
    assert (info["backend"], info["model"], info["model_source"]) == ("onnx", str(model), "artefact")


def test_an_artefact_is_found_by_the_models_name_until_the_model_changes(spawn: Any, tiny: ModelMaker, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny("bert"), tmp_path / "model"))
    place = tmp_path / "artefacts"
    made("--model", path, "--dtype", "int8", "--artefacts", place)
    first = spawn("--model", str(path), "--artefacts", str(place), backend=None)
    assert first.wait_ready()["dtype"] == "int8"
    other = Path(shutil.copy(tiny("bert", seed=3) / "model.safetensors", path))
    os.utime(other, (1, 1))
    second = spawn("--model", str(path), "--artefacts", str(place), backend=None)
    assert second.wait_ready()["dtype"] == "float32"
    second.logged("made from other files")


def test_a_hub_models_artefact_serves_its_revision_without_the_hubs_cache(spawn: Any, model: Path, tmp_path: Path) -> None:
    home, place, commit = tmp_path / "hub-home", tmp_path / "artefacts", "c" * 40
    repository = home / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(model, repository / "snapshots" / commit)
    done = prewarm("--json", "--model", "org/tiny", "--artefacts", place, HF_HOME=str(home), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["revision"] == commit
    shutil.rmtree(home)
    settings = ["--model", "org/tiny", "--artefacts", str(place), "--local-files-only"]
    host = spawn(*settings, backend=None, env={"HF_HOME": str(home)})
    assert scores(host)
    assert host.ask({"type": "info"})["model_revision"] == commit
    other = spawn(*settings, "--model-revision", "d" * 40, backend=None, env={"HF_HOME": str(home)})
    assert other.wait_exit(DEADLINE_S) == 66
    other.read_line()


def test_settings_that_do_not_fit_an_artefact_are_refused(spawn: Any, copied: Path) -> None:
    host = spawn("--model", str(copied), "--dtype", "bfloat16", backend=None)
    assert "float32" in host.read_line()["error"]
    assert host.wait_exit() == 78


@pytest.mark.parametrize("change", ["format", "manifest", "json"])
def test_an_artefact_of_another_version_or_a_broken_one_is_refused(change: str, spawn: Any, copied: Path) -> None:
    told = json.loads((copied / "artefact.json").read_text())
    if change == "format":
        (copied / "artefact.json").write_text(json.dumps({**told, "format": 999}))
    elif change == "manifest":
        (copied / "MANIFEST.sha256").unlink()
    else:
        (copied / "artefact.json").write_text("{}")
    host = spawn("--model", str(copied), backend=None)
    assert "prewarm" in host.read_line()["error"]
    assert host.wait_exit() == (78 if change == "format" else 65)
