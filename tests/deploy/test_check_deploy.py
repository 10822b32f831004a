"""`check --deploy` as a deployment calls it: a ready node passes, and each thing that is wrong with one fails by its name and exit code."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from reranker_worker.byhand.check_deploy import scores_point
from reranker_worker.byhand.node import pins
from reranker_worker.machine import available_bytes
from reranker_worker.models.known_pairs import KnownPair, write_known_pairs

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 120.0
pytestmark = pytest.mark.timeout(300)  # the first test that needs a tiny model imports the libraries that write and prewarm it
WITHOUT_CAPABILITIES = ("setpriv", "--inh-caps=-all", "--bounding-set=-all")  # root who must obey the modes of files, as others do

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make the file system read-only or to give up its rights")


class Seen:
    """The points by name, and how it ended."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        body = json.loads(done.stdout)
        self.exit_code, self.verdict = done.returncode, str(body["verdict"])
        self.points: dict[str, dict[str, Any]] = {point["name"]: point for point in body["points"]}
        assert body["exit_code"] == done.returncode
        assert body["ok"] == (done.returncode == 0)

    def statuses(self) -> dict[str, str]:
        return {name: point["status"] for name, point in self.points.items() if point["status"] != "ok"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "reranker_worker", *map(str, arguments)]


def ask(*arguments: object, code: Path = ROOT, before: tuple[str, ...] = (), limit: Callable[[], None] | None = None, **environ: str) -> Seen:
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | environ
    done = subprocess.run(
        [*before, *command("check", "--deploy", "--json", *arguments)],
        cwd=code,
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        preexec_fn=limit,
    )
    assert done.stdout, done.stderr
    return Seen(done)


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A copy of the worker's files, to be spoilt."""
    place = tmp_path / "code"
    shutil.copytree(ROOT / "reranker_worker", place / "reranker_worker", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("reranking_server.py", "requirements-lock.txt"):
        shutil.copy(ROOT / name, place / name)
    return place


@pytest.fixture(scope="module")
def prewarmed(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a tiny model's directory, the directory of artefacts in which it was prewarmed)."""
    place = tmp_path_factory.mktemp("prewarmed")
    model = Path(shutil.copytree(tiny("bert", layers=1), place / "model"))
    done = subprocess.run(
        command("prewarm", "--model", model, "--artefacts", place / "artefacts"), cwd=ROOT, capture_output=True, timeout=2 * DEADLINE_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return model, place / "artefacts"


@pytest.fixture
def node(prewarmed: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """The same artefacts, to be spoilt. The model stays where it is: an artefact names the directory that it was made from."""
    model, artefacts = prewarmed
    return model, Path(shutil.copytree(artefacts, tmp_path / "artefacts"))


def only_artefact(artefacts: Path) -> Path:
    (path,) = (path for path in artefacts.iterdir() if path.is_dir())
    return path


# --- a node that is ready ----------------------------------------------------------------------------------------------------


def test_a_node_with_the_bundled_model_is_ready_and_says_so_in_one_line_for_each_point() -> None:
    done = subprocess.run(command("check", "--deploy"), cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    *lines, verdict = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    names = "settings code packages network descriptors threads caches model artefact memory worker scores exit"
    assert [line.split()[1] for line in lines] == names.split()
    assert verdict.startswith("This node is ready to serve 'bundled'")
    assert "known pairs" in done.stdout
    assert done.stderr == ""


def test_a_prewarmed_model_is_ready_and_its_artefact_is_the_one_that_serves(prewarmed: tuple[Path, Path]) -> None:
    model, artefacts = prewarmed
    seen = ask("--model", model, "--artefacts", artefacts)
    assert seen.exit_code == 0, seen.points
    assert seen.points["artefact"]["facts"]["paths"] == [str(only_artefact(artefacts))]
    assert seen.points["worker"]["facts"]["backend"] == "onnx"
    assert seen.points["scores"]["facts"]["largest_difference"] < 1e-3


@needs_root
def test_it_needs_no_place_to_write_and_no_home(prewarmed: tuple[Path, Path]) -> None:
    model, artefacts = prewarmed
    read_only = ("unshare", "-m", "sh", "-c", 'mount -o remount,ro,bind / && ! touch /tmp/x 2>/dev/null && exec "$@"', "sh")
    if subprocess.run([*read_only, "true"], capture_output=True, timeout=DEADLINE_S, check=False).returncode:
        pytest.skip("this machine does not let a test mount a read-only root")
    seen = ask("--model", model, "--artefacts", artefacts, before=read_only, HOME="/nonexistent", TMPDIR="/nonexistent")
    assert seen.exit_code == 0, seen.points


def test_it_needs_neither_torch_nor_the_libraries_that_import_it(tmp_path: Path) -> None:
    for name in ("torch", "transformers", "sentence_transformers"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('not here', name={name!r})\n")
    seen = ask(PYTHONPATH=str(tmp_path), RERANKING_BACKEND="onnx")
    assert seen.exit_code == 0, seen.points


# --- settings ----------------------------------------------------------------------------------------------------------------


def test_a_wrong_setting_is_a_failed_point_with_exit_code_64() -> None:
    seen = ask(RERANKING_BATCH_SIZE="many")
    assert (seen.exit_code, seen.statuses()) == (64, {"settings": "failed"})
    assert "RERANKING_BATCH_SIZE must be" in seen.points["settings"]["text"]


def test_a_misspelt_variable_is_a_warning_that_names_the_one_meant() -> None:
    seen = ask(RERANKING_BATCHSIZE="8", RERANKING_SCRIPT_PATH="/the/hosts/own", RERANKING_BACKEND="fake")
    assert seen.exit_code == 0
    assert seen.points["settings"]["facts"]["unknown"] == ["RERANKING_BATCHSIZE"]
    assert "RERANKING_BATCH_SIZE" in seen.points["settings"]["do"]


def test_the_fake_backend_passes_with_a_warning_because_its_scores_mean_nothing() -> None:
    seen = ask(RERANKING_BACKEND="fake")
    assert (seen.exit_code, seen.statuses()["model"]) == (0, "warning")


def test_more_threads_than_the_machine_grants_are_a_warning() -> None:
    seen = ask(RERANKING_BACKEND="fake", RERANKING_THREADS="1000")
    assert (seen.exit_code, seen.statuses()["threads"]) == (0, "warning")


def test_too_few_file_descriptors_fail() -> None:
    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (80, 80))

    seen = ask(RERANKING_BACKEND="fake", limit=few)
    assert (seen.exit_code, seen.statuses()["descriptors"]) == (71, "failed")


def test_more_engines_than_memory_has_room_for_fail_before_one_is_started() -> None:
    seen = ask(RERANKING_ENGINES="64", RERANKING_BACKEND="torch")
    if (available_bytes() or 0) > 48 << 30:
        pytest.skip("this machine has room for 64 engines")
    assert (seen.exit_code, seen.statuses()["memory"], seen.statuses()["worker"]) == (71, "failed", "skipped")


# --- code and versions -------------------------------------------------------------------------------------------------------


def test_versions_other_than_the_lock_files_fail_with_the_command_that_mends_them(code: Path) -> None:
    lock = code / "requirements-lock.txt"
    lock.write_text("".join("orjson==1.2.3\n" if line.startswith("orjson==") else line for line in lock.read_text().splitlines(keepends=True)))
    seen = ask(code=code)
    assert (seen.exit_code, seen.statuses().get("packages")) == (78, "failed")
    assert "orjson" in seen.points["packages"]["text"]
    assert f"-m pip install -c {lock} orjson" in seen.points["packages"]["do"]
    assert seen.points["scores"]["status"] == "ok", "the other points are told all the same"


def test_the_first_failure_gives_the_exit_code(code: Path) -> None:
    (code / "requirements-lock.txt").write_text("orjson==1.2.3\n")
    seen = ask("--model", "/nowhere/model", code=code)
    assert seen.statuses() == {"packages": "failed", "model": "failed", "worker": "skipped"}
    assert (seen.points["packages"]["exit_code"], seen.points["model"]["exit_code"], seen.exit_code) == (78, 66, 78)


def test_a_missing_lock_file_is_a_warning(code: Path) -> None:
    (code / "requirements-lock.txt").unlink()
    seen = ask(code=code)
    assert (seen.exit_code, seen.statuses()["packages"]) == (0, "warning")


def test_a_lock_file_may_name_several_versions_and_builds_of_one_package() -> None:
    text = "# about\nnumpy==2.4.6 ; python_version < '3.12'\nnumpy==2.5.5 ; python_version >= '3.12'\ntorch==2.13.0+cpu\nHuggingface_Hub==2.4.0\n"
    assert pins(text) == {"numpy": ["2.4.6", "2.5.5"], "torch": ["2.13.0"], "huggingface-hub": ["2.4.0"]}


def test_code_that_anyone_may_change_fails(code: Path) -> None:
    (code / "reranker_worker" / "worker.py").chmod(0o666)
    seen = ask(code=code)
    assert (seen.exit_code, seen.statuses().get("code")) == (73, "failed")
    assert "worker.py" in seen.points["code"]["text"]


@needs_root
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is not installed")
def test_files_that_the_serving_user_cannot_read_fail_by_their_name(code: Path, node: tuple[Path, Path]) -> None:
    model, artefacts = node
    (code / "reranker_worker" / "backends" / "torch.py").chmod(0)
    (only_artefact(artefacts) / "config.json").chmod(0)
    seen = ask("--model", model, "--artefacts", artefacts, code=code, before=WITHOUT_CAPABILITIES)
    assert (seen.exit_code, seen.statuses()) == (73, {"code": "failed", "caches": "failed", "worker": "skipped"})
    assert "torch.py" in seen.points["code"]["text"]
    assert "config.json" in seen.points["caches"]["text"]


# --- the model and its artefact ----------------------------------------------------------------------------------------------


def test_a_model_that_is_not_there_fails_and_no_worker_is_started() -> None:
    seen = ask("--model", "/nowhere/model")
    assert (seen.exit_code, seen.statuses()) == (66, {"model": "failed", "worker": "skipped"})


def test_a_hub_model_that_is_missing_fails_without_a_word_to_the_network(tmp_path: Path) -> None:
    with socket.socket() as hub:
        hub.bind(("127.0.0.1", 0))
        hub.listen()
        hub.setblocking(False)
        address = f"http://127.0.0.1:{hub.getsockname()[1]}"
        seen = ask("--model", "org/name", HF_HOME=str(tmp_path), HF_ENDPOINT=address, RERANKING_LOCAL_FILES_ONLY="0")
        with pytest.raises(BlockingIOError):
            hub.accept()
    assert seen.exit_code == 66
    assert seen.statuses() == {"network": "warning", "model": "failed", "worker": "skipped"}


def test_switching_the_network_off_for_serving_ends_the_warning(tmp_path: Path) -> None:
    seen = ask("--model", "org/name", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert seen.statuses() == {"model": "failed", "worker": "skipped"}


def test_a_model_that_should_be_prewarmed_and_is_not_fails(node: tuple[Path, Path], tmp_path: Path) -> None:
    seen = ask("--model", node[0], "--artefacts", tmp_path / "none")
    assert (seen.exit_code, seen.statuses().get("artefact")) == (66, "failed")
    assert "prewarm" in seen.points["artefact"]["do"]


def test_a_changed_byte_in_an_artefact_fails(node: tuple[Path, Path]) -> None:
    model, artefacts = node
    largest = max((path for path in only_artefact(artefacts).iterdir() if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    seen = ask("--model", model, "--artefacts", artefacts)
    assert (seen.exit_code, seen.statuses()["artefact"]) == (65, "failed")
    assert largest.name in seen.points["artefact"]["text"]


def test_an_artefact_of_other_files_than_the_model_has_now_fails(node: tuple[Path, Path]) -> None:
    model, artefacts = node
    config = model / "config.json"
    before = config.read_bytes(), config.stat().st_mtime_ns
    try:
        config.write_bytes(before[0] + b"\n")
        seen = ask("--model", model, "--artefacts", artefacts)
    finally:
        config.write_bytes(before[0])
        os.utime(config, ns=(before[1], before[1]))
    assert (seen.exit_code, seen.statuses()["artefact"]) == (78, "failed")
    assert "prewarm" in seen.points["artefact"]["do"]


def test_an_artefact_that_is_named_by_its_directory_is_ready(node: tuple[Path, Path]) -> None:
    seen = ask("--model", only_artefact(node[1]))
    assert seen.exit_code == 0, seen.points
    assert "whole" in seen.points["artefact"]["text"]


# --- scores ------------------------------------------------------------------------------------------------------------------


class Answering:
    """A worker that gives these logits."""

    def __init__(self, *logits: float) -> None:
        self.logits = list(logits)

    def request(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["raw_scores"]
        assert len(body["pairs"]) == len(self.logits)
        return {"scores": self.logits}


READY = {"backend": "onnx", "dtype": "float32"}


def test_scores_other_than_the_known_ones_fail(tmp_path: Path) -> None:
    write_known_pairs(tmp_path, [KnownPair("q", "a", 1.5), KnownPair("q", "b", -2.0)])
    assert scores_point(Answering(1.5001, -2.0), READY, str(tmp_path)).status == "ok"
    wrong = scores_point(Answering(1.5, -1.9), READY, str(tmp_path))
    assert (wrong.status, wrong.exit_code) == ("failed", 65)
    assert scores_point(Answering(1.5, -1.9), READY | {"dtype": "int8"}, str(tmp_path)).status == "ok"


def test_a_model_without_known_pairs_must_tell_a_relevant_text_from_an_irrelevant_one(tmp_path: Path) -> None:
    assert scores_point(Answering(2.0, -2.0), READY, str(tmp_path)).status == "ok"
    assert scores_point(Answering(-2.0, -1.0), READY, str(tmp_path)).exit_code == 65


def test_a_worker_that_cannot_start_fails_with_its_own_exit_code_and_sentence() -> None:
    seen = ask(RERANKING_DEVICE="cuda:99", RERANKING_BACKEND="torch")
    assert seen.points["worker"]["status"] == "failed"
    assert (seen.exit_code, seen.points["worker"]["exit_code"]) == (71, 71)


def test_the_worker_is_started_with_the_settings_of_the_node() -> None:
    seen = ask("--max-length", "77", RERANKING_THREADS="1")
    facts = seen.points["worker"]["facts"]
    assert (facts["max_length"], facts["threads"]) == (77, 1)
