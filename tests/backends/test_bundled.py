"""The bundled model starts on every backend and in every precision that this machine has: its known pairs are scored before `ready`."""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.mark.parametrize(("backend", "dtype"), [("onnx", "float32"), ("torch", "float32"), ("torch", "bfloat16")])
def test_the_bundled_model_is_what_its_makers_measured(backend: str, dtype: str, spawn: Any) -> None:
    if dtype == "bfloat16" and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this CPU has no bfloat16 arithmetic")
    host = spawn("--backend", backend, "--dtype", dtype, backend=None)
    ready = host.read_line()
    assert (ready.get("backend"), ready.get("dtype")) == (backend, dtype), ready
    first, second = host.ask({"query": "capital of France", "documents": ["Berlin is in Germany.", "Paris is the capital of France."]})["scores"]
    assert second > 0.5 > first
