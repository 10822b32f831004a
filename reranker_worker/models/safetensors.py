"""The header of a .safetensors file, checked against the file's size without reading the weights.

Layout: 8 bytes little-endian header length, the header as JSON ({name: {dtype, shape, data_offsets}}), then the tensors, without gaps.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from reranker_worker.models.errors import CORRUPT, ModelError, shown

if TYPE_CHECKING:
    from pathlib import Path

# The format's own bound; a header beyond it is a damaged length.
_MAX_HEADER_BYTES = 100_000_000
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16}
_BITS |= {"I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64}


def tensor_names(path: Path) -> frozenset[str]:
    """Names of the tensors in a .safetensors file; raises ModelError(65) when the file is not one or not whole."""
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
    return frozenset(name for name in entries if name != "__metadata__")


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
