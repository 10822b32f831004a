"""The light CPU path: ONNX Runtime and `tokenizers` alone, no torch. Imported in the engine process alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from reranker_worker.backends import BackendError, OutOfMemoryError
from reranker_worker.backends.graph_files import GRAPH_FILE
from reranker_worker.backends.onnx_runtime import runtime
from reranker_worker.backends.packed import MOST_PARALLEL_PASSES, PackedBackend
from reranker_worker.packages import package_versions

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from reranker_worker.backends.declared import Declared
    from reranker_worker.backends.packing import Packed
    from reranker_worker.config import Config

_FATAL_ONLY = 4
_UNFIT = 71
# Two threads, pairs per second with passes of 128, 256 and 512 tokens: float32 143, 149, 143; int8 440, 448, 402.
_PASS_TOKENS = 256
_MEMORY_WORDS = ("failed to allocate", "bad_alloc", "out of memory", "cannot allocate")


class OnnxBackend(PackedBackend):
    """Runs a graph of onnx_graph.py. One session serves all passes that run side by side, each on the one thread that calls it."""

    def __init__(self, config: Config, declared: Declared, graph: Path, *, positions: int, dtype: str, threads: int) -> None:
        """`graph` is the directory of GRAPH_FILE; `positions` is how many tokens its position table can number."""
        super().__init__(config, declared)
        self._session: Any = _open(graph, dtype)
        self._inputs = [item.name for item in self._session.get_inputs()]
        parallel = min(threads, MOST_PARALLEL_PASSES)
        self.info = self._info(config, backend="onnx", device="cpu", dtype=dtype, positions=positions, pass_tokens=_PASS_TOKENS, parallel=parallel)

    def _run(self, packed: Packed) -> NDArray[np.float32]:
        arrays = packed._asdict()
        try:
            scores: NDArray[np.float32] = self._session.run(["logits"], {name: arrays[name] for name in self._inputs})[0]
        except Exception as error:  # the runtime raises its own kinds for each of its status codes
            if not any(word in str(error).lower() for word in _MEMORY_WORDS):
                raise
        else:
            return scores
        raise OutOfMemoryError(f"{len(packed.first)} pairs of {len(packed.ids)} tokens did not fit into memory")


def _open(graph: Path, dtype: str) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL_ONLY
    # A plan of the memory for every shape ever seen: no faster (ratio 0.98 to 1.02 in turns), and 80 MiB after a hundred passes.
    options.enable_mem_pattern = False
    # The runtime's fused kernel for sum and normalization is a quarter of an int8 pass and half as fast as the two alone (measured, 1.31).
    unwanted = ["SkipLayerNormFusion"]
    try:
        return runtime.InferenceSession(str(graph / GRAPH_FILE), options, providers=["CPUExecutionProvider"], disabled_optimizers=unwanted)
    except Exception as error:  # as above
        reason = " ".join(str(error).split())[:300]
        raise BackendError(f"ONNX Runtime cannot open the {dtype} graph of the model: {reason!a}", _UNFIT) from error


def versions() -> dict[str, str]:
    """Versions of the libraries that decide the scores."""
    return package_versions("onnxruntime", "tokenizers", "numpy")
