"""Which backend runs a model: what the settings name, or the fastest that is installed and certain to give the model's own scores.

Measured on 2 cores with MiniLM-L6 and mixed passages in exact float32, in turns: OpenVINO 169 pairs per second, packed torch 163, ONNX Runtime 157,
the general torch path 120. ONNX Runtime comes first all the same: it is ready in half of OpenVINO's time and a quarter of torch's, and
holds half and a third of their memory; a worker beside a database is judged by all three.
"""

from __future__ import annotations

import importlib.util
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from reranker_worker.backends import Backend, BackendError
from reranker_worker.backends.declared import UnsupportedModelError, read_declared
from reranker_worker.machine import may_have_accelerator

if TYPE_CHECKING:
    from collections.abc import Callable

    from reranker_worker.backends.declared import Declared
    from reranker_worker.config import Config
    from reranker_worker.models import ResolvedModel

_UNFIT, _UNSAFE = 71, 78
_PRECISIONS = {
    "onnx": ("float32", "int8"),
    "openvino": ("float32", "bfloat16"),
    "torch": ("float32", "bfloat16", "float16"),
}
_RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino"}


def choose_backend(config: Config, model: ResolvedModel, threads: int, log: Callable[[str], None]) -> Backend:
    """Open the model with the first backend that can run it; raises BackendError with a sentence. `log` is told what was passed over."""
    if model.artefact is not None:
        settled = replace(config, backend=model.artefact.backend, dtype=model.artefact.dtype)
        return _open(settled.backend, settled.dtype, settled, model, threads)
    if model.stale:
        log(model.stale)
    dtype = "float32" if config.dtype == "auto" else config.dtype
    if dtype == "int8":
        text = "int8 rounds the weights, which must be checked against the model's own ranking first: "
        raise BackendError(text + "run `python -m reranker_worker prewarm --dtype int8` with the same model, once.", _UNSAFE)
    names = _candidates(config, dtype)
    refusals: list[BackendError] = []
    for name in names[:-1]:
        try:
            return _open(name, dtype, config, model, threads)
        except (UnsupportedModelError, BackendError) as error:
            log(f"the backend {name} cannot run the model ({error}); trying the next")
            if isinstance(error, BackendError):
                refusals.append(error)
    try:
        return _open(names[-1], dtype, config, model, threads)
    except ModuleNotFoundError:
        # A node without torch is meant to serve with the light backends: what kept them from it is what has to be mended.
        if refusals:
            raise refusals[0] from None
        raise
    except UnsupportedModelError as error:
        text = f"The backend {names[-1]} cannot run the model {model.name!a}: {error}; set RERANKING_BACKEND=auto or torch."
        raise BackendError(text, _UNSAFE) from error


def _candidates(config: Config, dtype: str) -> list[str]:
    """Backends in the order of preference; the last one's refusal is final."""
    if config.backend != "auto":
        if dtype not in _PRECISIONS[config.backend]:
            text = f"The backend {config.backend} has no {dtype}; it has {', '.join(_PRECISIONS[config.backend])}."
            raise BackendError(text, _UNSAFE)
        return [config.backend]
    elsewhere = config.device not in ("auto", "cpu") or (config.device == "auto" and may_have_accelerator())
    light = [] if elsewhere else [name for name in ("onnx", "openvino") if _is_installed(_RUNTIMES[name])]
    return [*(name for name in light if dtype in _PRECISIONS[name]), "torch"]


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _open(name: str, dtype: str, config: Config, model: ResolvedModel, threads: int) -> Backend:
    if name == "torch":
        return _open_torch(config, model, threads)
    if config.device not in ("auto", "cpu"):
        raise BackendError(f"The backend {name} runs on the CPU; set RERANKING_DEVICE=cpu, or RERANKING_BACKEND=torch.", _UNSAFE)
    if not _is_installed(_RUNTIMES[name]):
        text = f"The Python package {_RUNTIMES[name]} is not installed; run pip install {_RUNTIMES[name]}, or set RERANKING_BACKEND=auto."
        raise BackendError(text, _UNSAFE)
    declared = read_declared(model.path)
    if model.artefact is not None:
        return _open_graph(name, dtype, config, declared, model.path, model.artefact.positions, threads)
    try:
        with tempfile.TemporaryDirectory(prefix="reranker-") as scratch:
            positions = _write_graph(model.path, declared, Path(scratch))
            # Mapped files live on when their names are gone.
            return _open_graph(name, dtype, config, declared, Path(scratch), positions, threads)
    except OSError as error:
        text = f"The model's graph cannot be written ({error.strerror}); prewarm the model, or set TMPDIR to a place that has room."
        raise BackendError(text, _UNFIT) from error


def _write_graph(model: Path, declared: Declared, directory: Path) -> int:
    """Write the float32 graph of a model directory; returns how many tokens it can number. Raises UnsupportedModelError, OSError."""
    from reranker_worker.backends.encoder import read_encoder

    encoder = read_encoder(model, declared.config, typed=declared.typed)
    try:
        from reranker_worker.backends.onnx_graph import save_graph
    except ModuleNotFoundError as error:
        raise BackendError(f"The Python package {error.name} is not installed; install it, or prewarm the model elsewhere.", _UNSAFE) from error
    save_graph(encoder, directory)
    return len(encoder.position)


def _open_graph(name: str, dtype: str, config: Config, declared: Declared, graph: Path, positions: int, threads: int) -> Backend:
    if name == "onnx":
        from reranker_worker.backends.onnx import OnnxBackend

        return OnnxBackend(config, declared, graph, positions=positions, dtype=dtype, threads=threads)
    from reranker_worker.backends.openvino import OpenVinoBackend

    return OpenVinoBackend(config, declared, graph, positions=positions, dtype=dtype, threads=threads)


def _open_torch(config: Config, model: ResolvedModel, threads: int) -> Backend:
    """The lean path for BERT-like models; any other through sentence-transformers, which takes some seconds more to import."""
    from reranker_worker.backends.torch_packed import open_packed

    try:
        return open_packed(config, model, threads)
    except UnsupportedModelError:
        from reranker_worker.backends.torch import TorchBackend

        return TorchBackend(config, model, threads)
