"""Real downloads from a stand-in of the hub on the loopback: the right files, progress, one sentence for each failure."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hub_server import Hub, running_hub
from model_files import COMMIT, model_files, resolve_in_process, safetensors_bytes, write_cache

if TYPE_CHECKING:
    from collections.abc import Iterator

UNWANTED = {
    "pytorch_model.bin": b"never",
    "model.pt": b"never",
    "onnx/model.onnx": b"never",
    "onnx/model.safetensors": b"never",
    "onnx/config.json": b"{}",
    "openvino/openvino_model.bin": b"never",
    "modeling.py": b"never",
    "README.md": b"never",
    ".gitattributes": b"never",
}
WANTED = {
    **model_files(),
    "model.safetensors": safetensors_bytes({"weight": 100_000}),
    "vocab.txt": b"a\nb\n",
    "modules.json": b'[{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]',
    "1_LogitScore/config.json": b'{"true_token_id": 1}',
    "sentencepiece.bpe.model": b"x",
    "chat_template.jinja": b"{{ x }}",
}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running_hub({**WANTED, **UNWANTED}) as running:
        yield running


def environment(hub: Hub, home: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}


def test_a_model_is_downloaded_with_progress_and_then_starts_without_a_connection(hub: Hub, tmp_path: Path) -> None:
    answer = resolve_in_process({"model": "org/tiny"}, environment(hub, tmp_path), network=True)
    assert answer.get("source") == "hub", answer
    assert answer["revision"] == COMMIT
    path = Path(answer["path"])
    assert {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()} == WANTED
    downloads = [(done, total) for stage, done, total in answer["progress"] if stage == "download"]
    assert downloads
    assert [done for done, _ in downloads] == sorted(done for done, _ in downloads)
    assert all(0 < done <= total for done, total in downloads)
    assert downloads[-1][0] >= len(WANTED["model.safetensors"])
    again = resolve_in_process({"model": "org/tiny"}, environment(hub, tmp_path))
    assert (again["source"], again["path"], again["connections"]) == ("cache", answer["path"], [])


def test_a_tag_is_downloaded_when_the_cache_holds_another_revision_only(hub: Hub, tmp_path: Path) -> None:
    write_cache(tmp_path)
    answer = resolve_in_process({"model": "org/tiny", "model_revision": "v1"}, environment(hub, tmp_path), network=True)
    assert (answer["source"], answer["revision"]) == ("hub", COMMIT)


def test_a_cache_without_weights_is_completed(hub: Hub, tmp_path: Path) -> None:
    write_cache(tmp_path, files={"config.json": model_files()["config.json"]})
    answer = resolve_in_process({"model": "org/tiny"}, environment(hub, tmp_path), network=True)
    assert answer["source"] == "hub"
    assert (Path(answer["path"]) / "model.safetensors").read_bytes() == WANTED["model.safetensors"]


@pytest.mark.parametrize(
    ("settings", "exit_code", "words"),
    [
        ({"model": "org/unknown"}, 66, ["no model 'org/unknown'", "HF_TOKEN"]),
        ({"model": "nobody/nothing"}, 66, ["nobody/nothing"]),
        ({"model": "org/gated"}, 66, ["is gated", "HF_TOKEN"]),
        ({"model": "org/private"}, 66, ["HF_TOKEN"]),
        ({"model": "org/forbidden"}, 66, ["HF_TOKEN"]),
        ({"model": "org/broken"}, 69, ["HTTP 500"]),
        ({"model": "org/tiny", "model_revision": "v9"}, 66, ["v9", "RERANKING_MODEL_REVISION"]),
    ],
)
def test_each_refusal_of_the_hub_is_one_sentence(settings: dict[str, str], exit_code: int, words: list[str], hub: Hub, tmp_path: Path) -> None:
    answer = resolve_in_process(settings, {**environment(hub, tmp_path), "HF_TOKEN": "hf_secret_marker"}, network=True)
    assert answer["exit_code"] == exit_code, answer
    assert all(word in answer["error"] for word in words), answer["error"]
    assert "hf_secret_marker" not in answer["error"]
    assert "\n" not in answer["error"]


def test_a_cache_that_cannot_be_written_is_said_so(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file where the cache directory should be made")
    answer = resolve_in_process({"model": "org/tiny"}, environment(hub, tmp_path / "home"), network=True)
    assert answer["exit_code"] == 73, answer
    assert "HF_HOME" in answer["error"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser writes everywhere")
def test_a_read_only_cache_is_said_so(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir(mode=0o555)
    answer = resolve_in_process({"model": "org/tiny"}, environment(hub, tmp_path / "home"), network=True)
    assert answer["exit_code"] == 73, answer


def test_a_repository_without_safe_weights_is_said_so(tmp_path: Path) -> None:
    files = model_files()
    files["pytorch_model.bin"] = files.pop("model.safetensors")
    with running_hub(files) as hub:
        answer = resolve_in_process({"model": "org/tiny"}, environment(hub, tmp_path), network=True)
        assert answer["exit_code"] == 66, answer
        assert "safetensors" in answer["error"]
        assert not any("pytorch_model.bin" in path for _, path in hub.asked)
