"""Attention without padding gives what padded attention gives, and a kernel that does not is never used. Runs without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import FAMILIES, PARITY, farthest, logits_of, some_pairs
from test_torch_packed import CPU, opened

from reranker_worker.backends import torch_packed_attention as attention

ModelMaker = Callable[..., Path]


def kernel(query: Any, key: Any, value: Any, query_bounds: Any, key_bounds: Any, longest_query: int, longest_key: int) -> Any:
    """What torch.nn.attention.varlen.varlen_attn computes, pair by pair."""
    assert (query_bounds.dtype, key_bounds.dtype) == (torch.int32, torch.int32)
    assert (longest_query, longest_key) == (int(query_bounds.diff().max()), int(key_bounds.diff().max()))
    rows = []
    for pair in range(len(key_bounds) - 1):
        own = [t[b[pair] : b[pair + 1]].transpose(0, 1) for t, b in ((query, query_bounds), (key, key_bounds), (value, key_bounds))]
        rows.append(torch.nn.functional.scaled_dot_product_attention(*own).transpose(0, 1))
    return torch.cat(rows)


def broken(*args: Any) -> Any:
    raise RuntimeError("no kernel image is available for execution on the device")


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_without_padding_gives_the_same_scores(family: str, tiny: ModelMaker) -> None:
    backend = opened(tiny(family))
    pairs = some_pairs(10, 20)
    expected = logits_of(backend, pairs)
    chosen = attention.choose_attention(2, 32, CPU, torch.float32, kernel)
    assert isinstance(chosen, attention.VarlenAttention)
    backend._network.attention = chosen
    backend._rows = 1  # as where this attention is chosen
    assert farthest(logits_of(backend, pairs), expected) < PARITY


@pytest.mark.parametrize("bad", [None, broken, lambda *a: kernel(*a) * 0.9, lambda *a: kernel(*a) * float("nan"), lambda query: query])
def test_a_kernel_that_does_not_agree_is_not_used(bad: Any) -> None:
    assert isinstance(attention.choose_attention(2, 32, CPU, torch.bfloat16, bad), attention.PaddedAttention)


def test_a_kernel_is_looked_for_on_cuda_in_half_precision_alone() -> None:
    cuda = torch.device("cuda:0")
    assert attention.varlen_kernel(CPU, torch.bfloat16) is None
    assert attention.varlen_kernel(cuda, torch.float32) is None
    assert callable(attention.varlen_kernel(cuda, torch.float16))
