"""What is checked before a model is loaded: whole files, no pickles, no code, nothing outside of the directory."""

from __future__ import annotations

import json
import os
import pickle
import random
from typing import TYPE_CHECKING

import pytest
from model_files import model_files, safetensors_bytes, write_model

from reranker_worker.models import ModelError, verify

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def refused(directory: Path, *, allow_pickle: bool = False, trust_remote_code: bool = False) -> ModelError:
    with pytest.raises(ModelError) as caught:
        verify(directory, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    return caught.value


def test_a_whole_model_passes(tmp_path: Path) -> None:
    verify(write_model(tmp_path))


def test_progress_of_hashing_ends_at_the_total(tmp_path: Path) -> None:
    reports: list[tuple[str, int, int]] = []
    verify(write_model(tmp_path, manifest=True), progress=lambda *report: reports.append(report))
    total = sum(len(data) for data in model_files().values())
    assert reports[-1] == ("verify", total, total)
    assert [done for _, done, _ in reports] == sorted(done for _, done, _ in reports)


CUTS: dict[str, Callable[[int], int]] = {
    "nothing left": lambda size: 0,
    "8 bytes left": lambda size: 8,
    "half left": lambda size: size // 2,
    "one byte short": lambda size: size - 1,
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("manifest", [True, False])
def test_a_cut_file_is_named_with_its_size(cut: str, name: str, manifest: bool, tmp_path: Path) -> None:
    write_model(tmp_path, manifest=manifest)
    data = (tmp_path / name).read_bytes()
    left = CUTS[cut](len(data))
    (tmp_path / name).write_bytes(data[:left])
    error = refused(tmp_path)
    assert error.exit_code == 65
    assert name in str(error)
    assert f"{left} bytes" in str(error)


def test_the_size_that_a_header_promises_is_named(tmp_path: Path) -> None:
    write_model(tmp_path)
    size = len(safetensors_bytes())
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes()[:-1])
    assert f"the file has {size - 1} bytes, but its header promises {size}" in str(refused(tmp_path))


def test_trailing_bytes_are_not_whole_weights(tmp_path: Path) -> None:
    write_model(tmp_path, {**model_files(), "model.safetensors": safetensors_bytes() + b"\0"})
    assert refused(tmp_path).exit_code == 65


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_byte_anywhere_is_caught_by_the_manifest(seed: int, tmp_path: Path) -> None:
    write_model(tmp_path, manifest=True)
    chance = random.Random(seed)
    path = tmp_path / chance.choice(sorted(model_files()))
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= chance.randrange(1, 256)
    path.write_bytes(data)
    error = refused(tmp_path)
    assert error.exit_code == 65
    assert path.name in str(error)
    assert "expected sha256" in str(error)
    assert "got" in str(error)


@pytest.mark.parametrize("position", [0, 3, 7])
def test_a_flipped_header_length_is_caught_without_a_manifest(position: int, tmp_path: Path) -> None:
    data = bytearray(safetensors_bytes())
    data[position] ^= 0x40
    write_model(tmp_path, {**model_files(), "model.safetensors": bytes(data)})
    assert refused(tmp_path).exit_code == 65


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"shape": [8]', b'"shape": [9]'),
        (b'"data_offsets": [0, 32]', b'"data_offsets": [1, 32]'),
        (b'"data_offsets": [32, 96]', b'"data_offsets": [33, 97]'),
        (b'"data_offsets": [0, 32]', b'"data_offsets": [1, 33]'),
        (b'"data_offsets": [0, 32]', b'"data_offsets": [-1,31]'),
        (b'"dtype": "F32"', b'"dtype": "F16"'),
        (b'{"__metadata__"', b'["__metadata__"'),
        (b'"shape": [8]', b'"shapE": [8]'),
        (b'"shape": [8]', b'"shape":  8 '),
    ],
)
def test_a_damaged_header_is_caught_without_a_manifest(old: bytes, new: bytes, tmp_path: Path) -> None:
    data = safetensors_bytes()
    assert old in data
    write_model(tmp_path, {**model_files(), "model.safetensors": data.replace(old, new, 1)})
    assert refused(tmp_path).exit_code == 65


class BoobyTrap:
    """Unpickling writes the marker file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl", "model.ckpt", "model.pth", "MODEL.BIN"])
def test_pickled_weights_are_refused_unopened(name: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    files = model_files()
    del files["model.safetensors"]
    write_model(tmp_path / "model", {**files, name: pickle.dumps(BoobyTrap(marker))})
    error = refused(tmp_path / "model")
    assert error.exit_code == 78
    assert name in str(error)
    assert "RERANKING_ALLOW_PICKLE" in str(error)
    assert not marker.exists()
    os.chmod(tmp_path / "model" / name, 0)  # not even opened: an unreadable file gives the same answer
    assert refused(tmp_path / "model").exit_code == 78


def test_the_booby_trap_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(BoobyTrap(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


def test_a_pickle_renamed_to_safetensors_is_corrupt_and_stays_unopened(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    write_model(tmp_path / "model", {**model_files(), "model.safetensors": pickle.dumps(BoobyTrap(marker))})
    error = refused(tmp_path / "model", allow_pickle=True)
    assert error.exit_code == 65
    assert "model.safetensors" in str(error)
    assert not marker.exists()


def test_pickled_weights_pass_when_they_are_allowed(tmp_path: Path) -> None:
    files = model_files()
    del files["model.safetensors"]
    verify(write_model(tmp_path, {**files, "pytorch_model.bin": b"x"}), allow_pickle=True)


def test_a_pickle_beside_safetensors_weights_is_left_alone(tmp_path: Path) -> None:
    verify(write_model(tmp_path, {**model_files(), "training_args.bin": b"x"}))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer", "config.json"])
def test_a_missing_part_is_named(name: str, tmp_path: Path) -> None:
    write_model(tmp_path, {file: data for file, data in model_files().items() if not file.startswith(name)})
    error = refused(tmp_path)
    assert error.exit_code == 66
    assert name.removeprefix("model.") in str(error)


@pytest.mark.parametrize("data", [b"", b"  \n", b"{", b"[]", b"{}", b"\xff\xfe{}", b"[" * 100_000, b"null"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_config_that_is_no_object_is_corrupt(name: str, data: bytes, tmp_path: Path) -> None:
    error = refused(write_model(tmp_path, {**model_files(), name: data}))
    assert error.exit_code == 65
    assert name in str(error)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_model_with_its_own_code_is_refused_unless_trusted(name: str, tmp_path: Path) -> None:
    content = {"auto_map": {"AutoConfig": "code.Config"}}
    write_model(tmp_path, {**model_files(), name: json.dumps(content).encode()})
    error = refused(tmp_path)
    assert error.exit_code == 78
    assert "auto_map" in str(error)
    assert "RERANKING_TRUST_REMOTE_CODE" in str(error)
    verify(tmp_path, trust_remote_code=True)


def test_an_adapter_that_names_another_model_is_refused(tmp_path: Path) -> None:
    error = refused(write_model(tmp_path, {**model_files(), "adapter_config.json": b'{"base_model_name_or_path": "org/other"}'}))
    assert error.exit_code == 78
    assert "adapter" in str(error)


def modules(*entries: object) -> dict[str, bytes]:
    return {**model_files(), "modules.json": json.dumps(entries).encode()}


def test_a_custom_module_is_refused_unless_trusted(tmp_path: Path) -> None:
    write_model(tmp_path, modules({"idx": 0, "name": "0", "path": "", "type": "custom_code.Transformer"}))
    error = refused(tmp_path)
    assert error.exit_code == 78
    assert "custom_code.Transformer" in str(error)
    verify(tmp_path, trust_remote_code=True)


def test_the_librarys_own_modules_pass(tmp_path: Path) -> None:
    kinds = ["sentence_transformers.models.Transformer", "sentence_transformers.cross_encoder.modules.logit_score.LogitScore"]
    entries = [{"idx": i, "name": str(i), "path": "" if i == 0 else "1_LogitScore", "type": kind} for i, kind in enumerate(kinds)]
    verify(write_model(tmp_path, {**modules(*entries), "1_LogitScore/config.json": b'{"true_token_id": 1}'}))


def test_a_pickle_in_a_modules_directory_is_refused(tmp_path: Path) -> None:
    entry = {"idx": 1, "name": "1", "path": "1_Dense", "type": "sentence_transformers.models.Dense"}
    write_model(tmp_path, {**modules(entry), "1_Dense/config.json": b'{"a": 1}', "1_Dense/pytorch_model.bin": b"x"})
    assert refused(tmp_path).exit_code == 78


@pytest.mark.parametrize("path", ["..", "../x", "/etc", "a/../../b", "..\\x", "C:x"])
def test_a_module_outside_of_the_directory_is_refused(path: str, tmp_path: Path) -> None:
    entry = {"idx": 1, "name": "1", "path": path, "type": "sentence_transformers.models.Dense"}
    assert refused(write_model(tmp_path / "model", modules(entry))).exit_code == 78


@pytest.mark.parametrize("text", [b"{}", b"[1]", b'[{"path": 3, "type": "sentence_transformers.x"}]', b'[{"path": "x"}]'])
def test_a_damaged_list_of_modules_is_corrupt(text: bytes, tmp_path: Path) -> None:
    assert refused(write_model(tmp_path, {**model_files(), "modules.json": text})).exit_code == 65


def sharded(**changes: str) -> dict[str, bytes]:
    files = model_files()
    del files["model.safetensors"]
    files["model-1.safetensors"] = safetensors_bytes({"a": 4})
    files["model-2.safetensors"] = safetensors_bytes({"b": 4})
    places = {"a": "model-1.safetensors", "b": "model-2.safetensors", **changes}
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": places}).encode()
    return files


def test_whole_shards_pass(tmp_path: Path) -> None:
    verify(write_model(tmp_path, sharded()))


@pytest.mark.parametrize(
    ("change", "named"),
    [({"c": "model-3.safetensors"}, "model-3.safetensors"), ({"c": "model-2.safetensors"}, "'c'"), ({"c": "../x.safetensors"}, "../x")],
)
def test_an_incomplete_index_is_corrupt(change: dict[str, str], named: str, tmp_path: Path) -> None:
    error = refused(write_model(tmp_path, sharded(**change)))
    assert error.exit_code == 65
    assert named in str(error)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside", "..\\outside", "C:outside", "link", "linked/outside"])
def test_a_manifest_may_not_leave_the_directory(name: str, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("x")
    model = write_model(tmp_path / "model")
    (model / "link").symlink_to(tmp_path / "outside")
    (model / "linked").symlink_to(tmp_path)
    (model / "MANIFEST.sha256").write_text(f"{'0' * 64}  {name}\n")
    error = refused(model)
    assert error.exit_code == 78
    assert "outside" in str(error)


def test_a_manifest_may_name_a_link_that_stays_inside(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", manifest=True)
    (model / "config.json").rename(model / "real.json")
    (model / "config.json").symlink_to("real.json")
    verify(model)


@pytest.mark.parametrize("text", ["", "\n", "nonsense\n", "abc  config.json\n", "0" * 64 + "config.json\n", "g" * 64 + "  config.json\n"])
def test_a_manifest_that_is_none_is_corrupt(text: str, tmp_path: Path) -> None:
    model = write_model(tmp_path)
    (model / "MANIFEST.sha256").write_text(text)
    assert refused(model).exit_code == 65


def test_a_file_that_the_manifest_names_must_be_there(tmp_path: Path) -> None:
    model = write_model(tmp_path, manifest=True)
    (model / "tokenizer_config.json").unlink()
    error = refused(model)
    assert error.exit_code == 65
    assert "tokenizer_config.json" in str(error)


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="the superuser reads everything")
def test_an_unreadable_file_is_said_so(tmp_path: Path) -> None:
    model = write_model(tmp_path)
    (model / "config.json").chmod(0)
    error = refused(model)
    assert error.exit_code == 66
    assert "cannot be read" in str(error)
