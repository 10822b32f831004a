"""The CPU path of OpenVINO: the graph of onnx_graph.py, no torch, and bfloat16 where the CPU has it. Imported in the engine process alone."""

from __future__ import annotations

import os
import queue
import sys
from typing import TYPE_CHECKING, Any

from reranker_worker.backends import BackendError, OutOfMemoryError
from reranker_worker.backends.graph_files import GRAPH_FILE
from reranker_worker.backends.packed import CPU_PASS_TOKENS, MOST_PARALLEL_PASSES, PackedBackend
from reranker_worker.packages import package_versions

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from reranker_worker.backends.declared import Declared
    from reranker_worker.backends.packing import Packed
    from reranker_worker.config import Config

_UNFIT, _UNSAFE = 71, 78
_PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
_MEMORY_WORDS = ("bad_alloc", "out of memory", "cannot allocate", "can't allocate", "not enough memory", "failed to allocate")
# The runtime and oneDNN inside of it keep compiled kernels for thousands of shapes, and packed passes hardly ever have the same one: rounded up
# to multiples of 32 tokens they do.
_ROWS = 32
_REMEMBERED_SHAPES = 256
# The package imports its converter, and that reports the import to a server of its maker unless the user once opted out.
_REPORTING = "openvino.tools.ovc"


class OpenVinoBackend(PackedBackend):
    """Runs a graph of onnx_graph.py. Passes run side by side, each in a request and on a thread of its own."""

    _rows = _ROWS

    def __init__(self, config: Config, declared: Declared, graph: Path, *, positions: int, dtype: str, threads: int) -> None:
        """`graph` is the directory of GRAPH_FILE; `positions` is how many tokens its position table can number."""
        super().__init__(config, declared)
        parallel = min(threads, MOST_PARALLEL_PASSES)
        compiled = _compiled(graph, dtype, parallel)
        self._inputs = [item.any_name for item in compiled.inputs]
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(parallel):
            self._requests.put(compiled.create_infer_request())
        self.info = self._info(
            config, backend="openvino", device="cpu", dtype=dtype, positions=positions, pass_tokens=CPU_PASS_TOKENS, parallel=parallel
        )

    def _run(self, packed: Packed) -> NDArray[np.float32]:
        arrays = packed._asdict()
        request = self._requests.get()
        try:
            # The inputs are read where they are; the output is copied, because the next pass of the request writes over it.
            request.infer({name: arrays[name] for name in self._inputs}, share_inputs=True)
            scores: NDArray[np.float32] = request.get_output_tensor().data.copy()
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
        else:
            return scores
        finally:
            self._requests.put(request)
        raise OutOfMemoryError(f"{len(packed.first)} pairs of {len(packed.ids)} tokens did not fit into memory")


def _compiled(graph: Path, dtype: str, parallel: int) -> Any:
    """The graph, compiled for `parallel` passes at a time; raises BackendError with a sentence."""
    if dtype not in _PRECISIONS:
        raise BackendError(f"RERANKING_DTYPE={dtype!a} is not for the openvino backend; use {', '.join(_PRECISIONS)}.", _UNSAFE)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_REMEMBERED_SHAPES))
    core = _library().Core()
    if dtype == "bfloat16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        text = "This CPU has no bfloat16 arithmetic, and to imitate it would be 5 to 6 times slower than float32; set RERANKING_DTYPE=float32."
        raise BackendError(text, _UNFIT)
    options = {
        "INFERENCE_PRECISION_HINT": _PRECISIONS[dtype],
        "NUM_STREAMS": parallel,
        "INFERENCE_NUM_THREADS": parallel,
        # A thread that is bound to a core waits for whoever else is on it.
        "ENABLE_CPU_PINNING": False,
        "CACHE_DIR": "",
        "CPU_RUNTIME_CACHE_CAPACITY": _REMEMBERED_SHAPES,
    }
    try:
        return core.compile_model(core.read_model(str(graph / GRAPH_FILE)), "CPU", options)
    except (RuntimeError, MemoryError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BackendError(f"OpenVINO cannot open the {dtype} graph of the model: {reason!a}", _UNFIT) from error


def _library() -> Any:
    """The runtime without its converter, which is not needed here and is most of what the package imports (0.27 s instead of 0.45)."""
    is_blocked = _REPORTING not in sys.modules
    if is_blocked:
        sys.modules[_REPORTING] = None  # type: ignore[assignment]  # what Python documents for "not to be found"
    try:
        import openvino
    finally:
        if is_blocked:
            del sys.modules[_REPORTING]
    return openvino


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in _MEMORY_WORDS)


def versions() -> dict[str, str]:
    """Versions of the libraries that decide the scores."""
    return package_versions("openvino", "tokenizers", "numpy")
