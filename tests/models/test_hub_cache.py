"""Models from a hub cache on disk: found without any network, pinned by revision, and never mixed up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from model_files import COMMIT, model_files, resolve_in_process, write_cache, write_model

from reranker_worker.models import ModelError, verify


@pytest.mark.parametrize("offline", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_a_cached_model_is_used_without_one_connection(offline: dict[str, str], tmp_path: Path) -> None:
    snapshot = write_cache(tmp_path)
    answer = resolve_in_process({"model": "org/tiny"}, {"HF_HOME": str(tmp_path), **offline})
    assert answer["connections"] == []
    assert answer["source"] == "cache"
    assert Path(answer["path"]) == snapshot
    assert answer["revision"] == COMMIT
    assert answer["name"] == "org/tiny"


def test_a_name_without_an_organisation_is_found_in_the_cache_named_by_hf_hub_cache(tmp_path: Path) -> None:
    snapshot = write_cache(tmp_path, "tiny")
    answer = resolve_in_process({"model": "tiny"}, {"HF_HUB_CACHE": str(tmp_path / "hub"), "HOME": "/nonexistent"})
    assert Path(answer["path"]) == snapshot
    assert answer["connections"] == []


@pytest.mark.parametrize("revision", ["v1", COMMIT])
def test_a_pinned_revision_is_found_in_the_cache(revision: str, tmp_path: Path) -> None:
    snapshot = write_cache(tmp_path, ref="v1")
    answer = resolve_in_process({"model": "org/tiny", "model_revision": revision}, {"HF_HOME": str(tmp_path)})
    assert Path(answer["path"]) == snapshot
    assert answer["connections"] == []


@pytest.mark.parametrize(
    ("settings", "environment"),
    [
        ({"model": "org/tiny"}, {"HF_HUB_OFFLINE": "1"}),
        ({"model": "org/tiny", "local_files_only": True}, {}),
        ({"model": "org/tiny", "local_files_only": True, "model_revision": "v9"}, {}),
    ],
)
def test_offline_and_not_cached_says_so_without_trying(settings: dict[str, object], environment: dict[str, str], tmp_path: Path) -> None:
    if settings.get("model_revision"):
        write_cache(tmp_path)  # another revision of the same model is no replacement
    answer = resolve_in_process(settings, {"HF_HOME": str(tmp_path), **environment})
    assert answer["exit_code"] == 66
    assert "network is switched off" in answer["error"]
    assert answer["connections"] == []


def test_not_cached_and_unreachable_needs_the_network(tmp_path: Path) -> None:
    answer = resolve_in_process({"model": "org/tiny"}, {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert answer["exit_code"] == 69
    assert "http://127.0.0.1:9" in answer["error"]
    assert answer["connections"]


def test_a_cached_model_is_verified_like_any_other(tmp_path: Path) -> None:
    files = {**model_files(), "config.json": json.dumps({"auto_map": {"AutoModel": "x.Y"}}).encode()}
    write_cache(tmp_path, files=files)
    answer = resolve_in_process({"model": "org/tiny"}, {"HF_HOME": str(tmp_path)})
    assert answer["exit_code"] == 78


def test_a_cache_with_pickled_weights_alone_is_refused_offline(tmp_path: Path) -> None:
    files = model_files()
    files["pytorch_model.bin"] = files.pop("model.safetensors")
    write_cache(tmp_path, files=files)
    answer = resolve_in_process({"model": "org/tiny"}, {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert answer["exit_code"] == 78
    assert "pytorch_model.bin" in answer["error"]


def test_a_manifest_in_a_snapshot_may_follow_the_caches_own_links_and_no_others(tmp_path: Path) -> None:
    files = model_files()
    write_model(tmp_path / "plain", files, manifest=True)
    files["MANIFEST.sha256"] = (tmp_path / "plain" / "MANIFEST.sha256").read_bytes()
    snapshot = write_cache(tmp_path, files=files)
    verify(snapshot)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(tmp_path / "plain" / "config.json")
    with pytest.raises(ModelError) as caught:
        verify(snapshot)
    assert caught.value.exit_code == 78
