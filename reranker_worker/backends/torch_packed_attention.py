"""Attention within pairs that are laid end to end: over a padded table anywhere, or without any padding where the device has a kernel.

Both give rows of (tokens, width); the second is used only when it is there and agrees with the first on this device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch.nn import functional

from reranker_worker.backends.packing import MASKED, Packed, pack
from reranker_worker.backends.texts import PairIds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

# Tables should be as wide as a multiple of this (see `pack`): torch's CPU kernel takes a slow way for what is left over. Measured, one AVX-512
# core, 12 heads of 32, 512 tokens: 5 pairs of 90 in float32 1.5 to 2.1 ms, of 96 1.1; in bfloat16 1.3 against 0.75. Multiples of 32 or 64 lose again.
TABLE_MULTIPLE = 16
# Averages of values from N(0, 1): bfloat16 rounds them to 2^-9 of up to 3 or 4, a kernel that attends wrongly is off by about 1.
_PROBE_TOLERANCE = 0.05
_PROBE_LENGTHS = (1, 40, 17)


class Places(Protocol):
    """The attention of one pass. `joined` holds a token's query, key and value side by side, or key and value alone."""

    def everyone(self, joined: torch.Tensor) -> torch.Tensor:
        """(tokens, 3 * width) to (tokens, width): each token looks at all of its pair."""

    def firsts(self, query: torch.Tensor, joined: torch.Tensor) -> torch.Tensor:
        """(pairs, width) and (tokens, 2 * width) to (pairs, width): the first token of each pair looks at all of its pair."""


class Attention(Protocol):
    """A way to attend. What it needs to know of a pass travels to the device as whole numbers, together with the token ids."""

    def numbers(self, packed: Packed) -> list[NDArray[np.int64]]:
        """Flat arrays."""

    def places(self, packed: Packed, numbers: Sequence[torch.Tensor]) -> Places:
        """`numbers` are those arrays on the device."""


class PaddedAttention:
    """Tokens are spread into a table of (pairs, longest pair), whose empty places are masked, and gathered again."""

    def __init__(self, heads: int) -> None:
        self._heads = heads

    def numbers(self, packed: Packed) -> list[NDArray[np.int64]]:
        """Each place's token, each token's place, each pair's length."""
        return [packed.spread.ravel(), packed.gather, packed.lengths]

    def places(self, packed: Packed, numbers: Sequence[torch.Tensor]) -> _Table:
        """See `Attention`."""
        count, width = packed.spread.shape
        is_full = packed.spread.size == packed.lengths.sum() == len(packed.ids)
        return _Table(self._heads, count, width, is_full, *numbers)


class _Table:
    def __init__(
        self, heads: int, count: int, width: int, is_full: bool, spread: torch.Tensor, gather: torch.Tensor, lengths: torch.Tensor
    ) -> None:
        self._shape = (count, width, heads)
        self._spread, self._gather = spread, gather
        self._full = is_full
        empty = torch.arange(width, device=lengths.device) >= lengths.unsqueeze(1)
        self._mask = torch.zeros(empty.shape, device=lengths.device).masked_fill_(empty, MASKED).view(count, 1, 1, width)

    def everyone(self, joined: torch.Tensor) -> torch.Tensor:
        query, key, value = self._heads_of(joined, 3)
        context = self._attend(query, key, value)
        return context if self._full else context.index_select(0, self._gather)

    def firsts(self, query: torch.Tensor, joined: torch.Tensor) -> torch.Tensor:
        count, _, heads = self._shape
        key, value = self._heads_of(joined, 2)
        return self._attend(query.view(count, 1, heads, -1).transpose(1, 2), key, value)

    def _heads_of(self, joined: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
        """(tokens, parts * width) to so many (pairs, heads, longest, width of a head)."""
        count, width, heads = self._shape
        table = joined if self._full else joined.index_select(0, self._spread)
        return table.view(count, width, parts, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Rows of (pairs * queries, width)."""
        mask = None if self._full else self._mask.to(query.dtype)
        context = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        count, heads, queries, size = context.shape
        return context.transpose(1, 2).reshape(count * queries, heads * size)


class VarlenAttention:
    """One kernel that is told where each pair begins: `torch.nn.attention.varlen.varlen_attn`, half precision on CUDA alone."""

    def __init__(self, heads: int, kernel: Any) -> None:
        self._heads = heads
        self._kernel = kernel

    def numbers(self, packed: Packed) -> list[NDArray[np.int64]]:
        """Where each pair begins, and where the last one ends."""
        return [np.append(packed.first, packed.lengths.sum())]

    def places(self, packed: Packed, numbers: Sequence[torch.Tensor]) -> _Rows:
        """See `Attention`."""
        return _Rows(self._heads, self._kernel, numbers[0].to(torch.int32), int(packed.lengths.max()))


class _Rows:
    def __init__(self, heads: int, kernel: Any, bounds: torch.Tensor, longest: int) -> None:
        self._heads, self._kernel, self._bounds, self._longest = heads, kernel, bounds, longest

    def everyone(self, joined: torch.Tensor) -> torch.Tensor:
        query, key, value = joined.view(len(joined), 3, self._heads, -1).unbind(1)
        context: torch.Tensor = self._kernel(query, key, value, self._bounds, self._bounds, self._longest, self._longest)
        return context.reshape(len(joined), -1)

    def firsts(self, query: torch.Tensor, joined: torch.Tensor) -> torch.Tensor:
        key, value = joined.view(len(joined), 2, self._heads, -1).unbind(1)
        each = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device)
        rows = query.view(len(query), self._heads, -1)
        context: torch.Tensor = self._kernel(rows, key, value, each, self._bounds, 1, self._longest)
        return context.reshape(len(query), -1)


def varlen_kernel(device: torch.device, dtype: torch.dtype) -> Any | None:
    """The kernel of `VarlenAttention`, if this build of torch has it and the device and the precision may suit it."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def choose_attention(heads: int, width: int, device: torch.device, dtype: torch.dtype, kernel: Any | None) -> Attention:
    """The one without padding, if there is a kernel and it gives what the padded one gives on this device; else the padded one."""
    padded = PaddedAttention(heads)
    if kernel is None:
        return padded
    unpadded = VarlenAttention(heads, kernel)
    try:
        return unpadded if attentions_agree(padded, unpadded, width, device, dtype) else padded
    except (RuntimeError, TypeError, ValueError):  # not for this GPU, this size of head, these arguments
        return padded


def attentions_agree(left: Attention, right: Attention, width: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether two ways give the same for random tokens in pairs of different lengths."""
    packed = pack([PairIds([0] * length, [0] * length) for length in _PROBE_LENGTHS])
    chance = torch.Generator().manual_seed(0)
    joined = torch.randn((len(packed.ids), 3 * width), generator=chance).to(device, dtype)
    results = []
    for way in (left, right):
        places = way.places(packed, [torch.from_numpy(array).to(device) for array in way.numbers(packed)])
        firsts = places.firsts(joined[torch.from_numpy(packed.first).to(device), :width], joined[:, width:].contiguous())
        results.append(torch.cat([places.everyone(joined), firsts]).float())
    return bool((results[0] - results[1]).abs().max() < _PROBE_TOLERANCE)
