"""Every stored number is read as torch reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from reranker_worker.models.safetensors import as_float32, map_tensors

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float16])
def test_every_code_of_a_small_type_is_the_same_number(dtype: torch.dtype, tmp_path: Path) -> None:
    whole = torch.arange(256, dtype=torch.uint8) if dtype.itemsize == 1 else torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    numbers = whole.view(dtype)
    save_file({"numbers": numbers}, tmp_path / "model.safetensors")
    read = as_float32(map_tensors(tmp_path / "model.safetensors")["numbers"])
    assert np.array_equal(read, numbers.float().numpy(), equal_nan=True)
    assert read.dtype == np.float32
