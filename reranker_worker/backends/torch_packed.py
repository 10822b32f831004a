"""The lean torch path: BERT-like cross-encoders on any device that torch knows, from their files alone, without transformers.

Imported in the engine process alone. Any other architecture is for the general path (torch.py). Not used here: CUDA graphs and
`torch.compile`; both want fixed shapes, that is padding to buckets, and whether that pays has to be measured on a GPU first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from reranker_worker.backends import BackendError, OutOfMemoryError
from reranker_worker.backends.declared import read_declared
from reranker_worker.backends.encoder import read_encoder
from reranker_worker.backends.packed import CPU_PASS_TOKENS, MOST_PARALLEL_PASSES, PackedBackend
from reranker_worker.backends.packing import Packed, pack
from reranker_worker.backends.texts import PairIds
from reranker_worker.backends.torch_device import ACCELERATOR_PASS_TOKENS, is_out_of_memory, release_memory, resolve_device, use_threads
from reranker_worker.backends.torch_packed_attention import TABLE_MULTIPLE
from reranker_worker.backends.torch_packed_network import ROWS, PackedNetwork
from reranker_worker.packages import package_versions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from reranker_worker.backends.declared import Declared
    from reranker_worker.backends.encoder import Encoder
    from reranker_worker.config import Config
    from reranker_worker.models import ResolvedModel

_UNFIT, _UNSAFE = 71, 78
# Half precision is chosen, never assumed: "auto" is exact.
_DTYPES = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class PackedTorchBackend(PackedBackend):
    """Runs a `PackedNetwork`. On a CPU passes run side by side, each in the thread that calls it and in the threads that fall to it."""

    def __init__(self, config: Config, declared: Declared, encoder: Encoder, *, device: torch.device, dtype: torch.dtype, threads: int) -> None:
        """Takes the layers out of `encoder`. Raises BackendError when the device or the settings do not suit the model."""
        super().__init__(config, declared)
        self._device = device
        positions = len(encoder.position)
        is_cpu = device.type == "cpu"
        parallel = min(threads, MOST_PARALLEL_PASSES) if is_cpu else 1
        self._rows, self._columns = ROWS if is_cpu else 1, TABLE_MULTIPLE
        use_threads(threads // parallel)
        self.info = self._info(
            config,
            backend="torch",
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            positions=positions,
            pass_tokens=CPU_PASS_TOKENS if is_cpu else ACCELERATOR_PASS_TOKENS,
            parallel=parallel,
        )
        self._network = _opened(encoder, device, dtype)

    def _run(self, packed: Packed) -> NDArray[np.float32]:
        try:
            with torch.inference_mode():
                scores: NDArray[np.float32] = self._network(packed).cpu().numpy()
                return scores
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside of the handler, so that the traceback no longer holds the failed pass's tensors when the cache is emptied.
        release_memory(self._device)
        raise OutOfMemoryError(f"{len(packed.first)} pairs of {len(packed.ids)} tokens did not fit into memory")


def open_packed(config: Config, model: ResolvedModel, threads: int) -> PackedTorchBackend:
    """Open a resolved model. Raises UnsupportedModelError when it is for the general path, BackendError when it cannot be used."""
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    declared = read_declared(model.path)
    encoder = read_encoder(model.path, declared.config, typed=declared.typed)
    return PackedTorchBackend(config, declared, encoder, device=device, dtype=dtype, threads=threads)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision that `name` means; raises BackendError where this path has none of the name or the CPU would have to imitate it."""
    if name not in _DTYPES:
        known = ", ".join(_DTYPES)
        raise BackendError(f"RERANKING_DTYPE={name!a} is not for the torch backend; use {known}.", _UNSAFE)
    dtype = _DTYPES[name]
    if device.type == "cpu" and not _is_native(dtype):
        text = f"This CPU has no {name} arithmetic, and to imitate it would be 5 to 6 times slower than float32; set RERANKING_DTYPE=float32."
        raise BackendError(text, _UNFIT)
    return dtype


def _is_native(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies in that precision. oneDNN's own answer counts imitation on AVX-512, so of bfloat16 the CPU is asked."""
    try:
        if dtype == torch.bfloat16:
            capability = torch.backends.cpu.get_cpu_capability()
            if capability.startswith(("AVX", "DEFAULT", "NO AVX")):
                return bool(torch.cpu._is_avx512_bf16_supported())
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    except (AttributeError, RuntimeError):
        return False


def _opened(encoder: Encoder, device: torch.device, dtype: torch.dtype) -> PackedNetwork:
    """The network, after one small pass that proves that the device can run it. Raises BackendError(71)."""
    try:
        with torch.inference_mode():
            network = PackedNetwork(encoder, device, dtype)
            network(pack([PairIds([0, 0], [0, 0]), PairIds([0], [0])])).cpu()
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise BackendError(f"The model does not fit into the memory of {device}; use a smaller model or another device.", _UNFIT) from error
        raise BackendError(f"The device {device} cannot run the model: {str(error)[:300]!a}", _UNFIT) from error
    return network


def versions() -> dict[str, str]:
    """Versions of the libraries that decide the scores."""
    return package_versions("torch", "tokenizers", "numpy")
