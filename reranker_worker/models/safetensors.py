"""A .safetensors file: its header, checked against the file's size without reading the weights, and its tensors, mapped into memory.

Layout: 8 bytes little-endian header length, the header as JSON ({name: {dtype, shape, data_offsets}}), then the tensors, without gaps.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from reranker_worker.models.errors import CORRUPT, ModelError, shown

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

# The format's own bound; a header beyond it is a damaged length.
_MAX_HEADER_BYTES = 100_000_000
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16}
_BITS |= {"I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64}


# What numpy has no type for is mapped as whole numbers of the same size; `as_float32` knows what they mean.
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "I64": "<i8", "I32": "<i4", "U8": "u1", "I8": "i1"}


class Tensor(NamedTuple):
    """One tensor, mapped into memory and not yet read. `dtype` is the file's name of the type ("F16", "BF16", ...)."""

    data: NDArray[Any]
    dtype: str


def tensor_names(path: Path) -> frozenset[str]:
    """Names of the tensors in a .safetensors file; raises ModelError(65) when the file is not one or not whole."""
    return frozenset(_read_header(path)[0])


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file that numpy can hold; raises ModelError(65) when the file is not one or not whole."""
    import numpy as np

    entries, begin = _read_header(path)
    data = np.memmap(path, dtype=np.uint8, mode="r") if entries else np.empty(0, dtype=np.uint8)
    tensors = {}
    for name, entry in entries.items():
        if entry["dtype"] in _NUMPY:
            start, stop = entry["data_offsets"]
            raw = data[begin + start : begin + stop]
            tensors[name] = Tensor(raw.view(_NUMPY[entry["dtype"]]).reshape(entry["shape"]), entry["dtype"])
    return tensors


def as_float32(tensor: Tensor) -> NDArray[np.float32]:
    """The tensor's numbers as float32; raises ValueError for a type that holds no real numbers."""
    import numpy as np

    if tensor.dtype == "BF16":
        return (tensor.data.astype(np.uint32) << 16).view(np.float32)
    if tensor.dtype == "F8_E4M3":
        numbers: NDArray[np.float32] = _float8(np)[tensor.data]
        return numbers
    if tensor.dtype not in ("F16", "F32", "F64"):
        raise ValueError(f"weights of type {tensor.dtype}")
    return np.asarray(tensor.data, dtype=np.float32)


def _float8(np: Any) -> NDArray[np.float32]:
    """The number that each byte means in E4M3: a sign, 4 bits of exponent (bias 7), 3 of fraction; no infinities, the last code is no number.

    Layout after Micikevicius et al., "FP8 formats for deep learning" (2022).
    """
    code = np.arange(128)
    exponent, fraction = code >> 3, (code & 7) / 8
    values = np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7.0)).astype(np.float32)
    values[127] = np.nan
    both: NDArray[np.float32] = np.concatenate([values, -values])
    return both


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """({name: {dtype, shape, data_offsets}}, the byte at which the tensors begin); raises ModelError(65)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise _damaged(path, size, f"its header should end at byte {8 + length}" if size >= 8 else "it should have at least 10")
        header = file.read(length)
    try:
        entries = json.loads(header)
        spans = sorted(_span(entry) for name, entry in entries.items() if name != "__metadata__")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path, size, "its header is not one of a .safetensors file") from error
    end = 0
    for start, stop in spans:
        if start != end:
            raise _damaged(path, size, f"its header leaves a gap or an overlap at byte {8 + length + end}")
        end = stop
    if 8 + length + end != size:
        raise _damaged(path, size, f"its header promises {8 + length + end}")
    return {name: entry for name, entry in entries.items() if name != "__metadata__"}, 8 + length


def _span(entry: Any) -> tuple[int, int]:
    """(start, stop) of one tensor's bytes; raises ValueError when they do not fit its type and shape."""
    start, stop = entry["data_offsets"]
    shape = entry["shape"]
    if not all(isinstance(number, int) and number >= 0 for number in (start, stop, *shape)):
        raise ValueError("offsets and shape must be whole numbers")
    bits = _BITS.get(entry["dtype"])
    if start > stop or (bits is not None and math.prod(shape) * bits != (stop - start) * 8):
        raise ValueError("the shape does not fit the offsets")
    return start, stop


def _damaged(path: Path, size: int, what: str) -> ModelError:
    text = f"The weights {shown(path.name)} are damaged or cut short: the file has {size} bytes, but {what}. Fetch the model again."
    return ModelError(text, CORRUPT)
