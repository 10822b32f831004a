"""Which backend `auto` takes: the light ones on a CPU, torch where there may be an accelerator or a precision that only it has."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reranker_worker.backends import Backend, BackendError, open_backend
from reranker_worker.config import Config
from reranker_worker.machine import may_have_accelerator
from reranker_worker.models import ResolvedModel

ModelMaker = Callable[..., Path]


def opened(path: Path, **settings: Any) -> Backend:
    return open_backend(Config(model=str(path), **settings), ResolvedModel(str(path), path, None, "directory"), 1)


def installed(monkeypatch: pytest.MonkeyPatch, *runtimes: str) -> None:
    monkeypatch.setattr("reranker_worker.backends.choosing._is_installed", lambda package: package in runtimes)


def accelerated(monkeypatch: pytest.MonkeyPatch, answer: bool) -> None:
    monkeypatch.setattr("reranker_worker.backends.choosing.may_have_accelerator", lambda: answer)


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_on_a_cpu_auto_takes_onnx_where_it_is_installed(device: str, tiny: ModelMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerated(monkeypatch, False)
    installed(monkeypatch, "onnxruntime")
    assert opened(tiny("bert"), device=device).info.backend == "onnx"
    installed(monkeypatch)
    assert opened(tiny("bert"), device=device).info.backend == "torch"


def test_where_there_may_be_an_accelerator_torch_is_asked(tiny: ModelMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "onnxruntime")
    accelerated(monkeypatch, True)
    assert opened(tiny("bert")).info.backend == "torch"
    assert opened(tiny("bert"), device="cpu").info.backend == "onnx"


def test_a_named_device_is_never_replaced_by_the_cpu(tiny: ModelMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerated(monkeypatch, False)
    with pytest.raises(BackendError, match="cuda") as caught:
        opened(tiny("bert"), device="cuda:7")
    assert caught.value.exit_code == 71


def test_a_precision_that_only_torch_has_is_torchs(tiny: ModelMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerated(monkeypatch, False)
    installed(monkeypatch, "onnxruntime")
    import torch

    if torch.cpu._is_avx512_bf16_supported():
        info = opened(tiny("bert"), dtype="bfloat16").info
        assert (info.backend, info.dtype) == ("torch", "bfloat16")
    else:
        with pytest.raises(BackendError, match="bfloat16"):
            opened(tiny("bert"), dtype="bfloat16")


def test_a_backend_that_is_named_and_not_installed_is_one_sentence(tiny: ModelMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    with pytest.raises(BackendError, match="pip install openvino"):
        opened(tiny("bert"), backend="openvino", device="cpu")


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac always may have one")
@pytest.mark.parametrize("name", ["nvidiactl", "kfd", "dxg", "dri/renderD128"])
def test_a_drivers_device_means_that_it_is_worth_looking(name: str, tmp_path: Path) -> None:
    assert not may_have_accelerator(tmp_path)
    (tmp_path / "dev" / name).parent.mkdir(parents=True)
    (tmp_path / "dev" / name).touch()
    assert may_have_accelerator(tmp_path)


def test_without_torch_the_reason_is_what_kept_the_light_backend_from_the_model(tiny: ModelMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerated(monkeypatch, False)
    installed(monkeypatch, "onnxruntime")
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "reranker_worker.backends.torch_packed", raising=False)
    monkeypatch.setattr("tempfile.tempdir", "/nonexistent")
    with pytest.raises(BackendError, match=r"graph cannot be written.*prewarm"):
        opened(tiny("bert"))
