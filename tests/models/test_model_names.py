"""From a name to a directory: what counts as a path, what as a hub id, and what is refused with a sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from model_files import resolve_in_process, write_model

from reranker_worker import models
from reranker_worker.config import Config
from reranker_worker.models import ModelError, ResolvedModel, resolve

if TYPE_CHECKING:
    from pathlib import Path


def quiet(stage: str, done_bytes: int, total_bytes: int) -> None:
    pass


def refused(name: str, **settings: object) -> ModelError:
    with pytest.raises(ModelError) as caught:
        resolve(Config(model=name, **settings), quiet)  # type: ignore[arg-type]
    return caught.value


def test_an_absolute_directory_is_used_as_it_stands(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model")
    assert resolve(Config(model=str(path)), quiet) == ResolvedModel(str(path), path, None, "directory")


@pytest.mark.parametrize("name", ["./model", "nested/../model", "model", "model/"])
def test_a_relative_directory_with_a_model_is_used(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    found = resolve(Config(model=name), quiet)
    assert (found.path, found.source) == (tmp_path / "model", "directory")


def test_org_slash_name_is_a_directory_when_a_model_lies_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert resolve(Config(model="org/name"), quiet).source == "directory"


def test_org_slash_name_is_a_hub_id_when_only_an_unrelated_directory_has_that_name(tmp_path: Path) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    answer = resolve_in_process({"model": "org/name", "local_files_only": True}, {"HF_HOME": str(tmp_path / "home")}, cwd=tmp_path)
    assert answer["exit_code"] == 66
    assert "not in the local cache" in answer["error"]


def test_directories_and_the_bundled_model_do_without_the_hub_library(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", manifest=True)
    answer = resolve_in_process({"model": str(path)}, {"HOME": "/nonexistent"})
    assert answer["source"] == "directory"
    assert not answer["hub_imported"]
    assert answer["connections"] == []


def test_the_bundled_model_comes_from_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "BUNDLED_DIRECTORY", write_model(tmp_path / "bundled", manifest=True))
    assert resolve(Config(), quiet) == ResolvedModel("bundled", tmp_path / "bundled", None, "bundled")


def test_a_missing_bundled_model_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "BUNDLED_DIRECTORY", tmp_path / "nothing")
    error = refused("bundled")
    assert error.exit_code == 66
    assert "bundled" in str(error)


def test_a_missing_directory_is_said_so(tmp_path: Path) -> None:
    error = refused(str(tmp_path / "nowhere"))
    assert error.exit_code == 66
    assert "does not exist" in str(error)


def test_a_file_instead_of_a_directory_is_said_so(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model") / "model.safetensors"
    error = refused(str(path))
    assert error.exit_code == 66
    assert "is a file" in str(error)


def test_a_directory_without_a_config_is_no_model(tmp_path: Path) -> None:
    error = refused(str(tmp_path))
    assert error.exit_code == 66
    assert "config.json" in str(error)


def test_a_revision_of_a_directory_is_refused_rather_than_ignored(tmp_path: Path) -> None:
    error = refused(str(write_model(tmp_path / "model")), model_revision="v2")
    assert error.exit_code == 78


HOSTILE = [
    *("../x", "..", ".", "./../../etc", "../../etc/passwd", "/etc/passwd", "/etc", "~root/x", "~/nowhere-at-all", "org/../../etc", "a/b/c"),
    *("..\\..\\windows", "C:\\models\\x", "org\\name", "org/..", "org/.hidden", ".hidden", "-x", "org/-x", "org//name", "/", "//"),
    *("models--org--name", "org/name.git", "a..b", "org/na me", "name;rm -rf", "$(id)", "`id`", "org/name?x=1", "org/name#x", "%2e%2e/x"),
    *("file:///etc/passwd", "https://example.com/x", "", " ", "\t", "a\0b", "org/\0", "a\nb", "\x1b[31mred", "\ud800", "é/ü", "x" * 5000),
    *("a" * 97, "\u202eoverride", "org/name\r\n{}", "con\u0000", "null\x00.json"),
]


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_end_in_one_printable_sentence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    error = refused(name, local_files_only=True)
    assert error.exit_code in (66, 78)
    text = str(error)
    assert name.isprintable() or "control characters" in text
    assert text.isascii()
    assert text.isprintable()
    assert len(text) < 500
    assert text.endswith((".", ")"))
