"""A BERT-like encoder in torch, over pairs that are laid end to end: no padding outside of attention, nothing computed in vain.

In the last layer queries, feed-forward and normalization run for the first token of each pair alone, because nothing else reaches the score.
What goes from layer to layer is float32 in every precision, as are embeddings, normalization and the head: of bfloat16 that costs 2 %
and makes the largest difference of a logit a third (measured, MiniLM-L6: 0.012 against 0.040); only the linear layers and attention are reduced.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from reranker_worker.backends.torch_device import bound_shape_caches
from reranker_worker.backends.torch_packed_attention import choose_attention, varlen_kernel

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from reranker_worker.backends.encoder import Encoder, Layer, Linear, Norm
    from reranker_worker.backends.packing import Packed
    from reranker_worker.backends.torch_packed_attention import Places

# For how many rows oneDNN arranges a weight; other numbers of rows work too and were as fast (measured with 1 to 512).
_PREPACKED_ROWS = 512
# bfloat16 rounds a sum to 2^-9 of itself; a wrong operator is off by all of it.
_PREPACKED_TOLERANCE = 0.02
# A pass's tokens are rounded up to multiples of 32 (packing.pack): some twenty numbers of rows, each met by half a dozen kinds of linear layers.
ROWS = 32
_REMEMBERED_SHAPES = 256
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": torch.relu,
    "tanh": torch.tanh,
}


class PackedNetwork:
    """The network on a device. Layers are taken out of `encoder`, which is of no use afterwards, so that no two copies of them exist."""

    def __init__(self, encoder: Encoder, device: torch.device, dtype: torch.dtype) -> None:
        """Raises RuntimeError when the device has not enough memory."""
        bound_shape_caches(_REMEMBERED_SHAPES)
        self._device, self._dtype = device, dtype
        self._width = len(encoder.layers[0].query.bias)
        self.attention = choose_attention(encoder.heads, self._width, device, dtype, varlen_kernel(device, dtype))
        # Not converted: of a large vocabulary only the rows that occur are ever read, from the mapped file.
        self._word = _tensor(encoder.word, device)
        self._position = _tensor(encoder.position, device)
        self._token_type = None if encoder.token_type is None else _tensor(encoder.token_type, device)
        norm = partial(_Norm, epsilon=encoder.epsilon, device=device)
        linear = partial(_Linear, device=device, dtype=dtype)
        self._embedding_norm = norm(encoder.embedding_norm)
        self._projection = None if encoder.projection is None else linear([encoder.projection])
        self._layers: list[_Layer] = []
        while encoder.layers:
            layer = encoder.layers.pop(0)
            self._layers.append(_Layer(layer, _ACTIVATIONS[encoder.activation], linear, norm, is_last=not encoder.layers))
        self._pooler = _Linear([encoder.pooler], device, torch.float32)
        self._pooler_activation = _ACTIVATIONS[encoder.pooler_activation]
        self._classifier = _Linear([encoder.classifier], device, torch.float32)

    def __call__(self, packed: Packed) -> torch.Tensor:
        """(pairs, labels), float32, on the device; raises RuntimeError or MemoryError when memory does not suffice."""
        ids, types, positions, first, *numbers = self._moved(packed)
        places = self.attention.places(packed, numbers)
        state = self._embedded(ids, types, positions)
        for layer in self._layers[:-1]:
            state = layer.everyone(state, state.to(self._dtype), places)
        state = self._layers[-1].firsts(state, state.to(self._dtype), first, places)
        return self._classifier(self._pooler_activation(self._pooler(state)))

    def _moved(self, packed: Packed) -> Sequence[torch.Tensor]:
        """The whole numbers of a pass on the device, in one transfer that nobody waits for."""
        arrays = [packed.ids, packed.types, packed.positions, packed.first, *self.attention.numbers(packed)]
        sizes = [array.size for array in arrays]
        buffer = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=self._device.type == "cuda")
        np.concatenate(arrays, out=buffer.numpy())
        moved: Sequence[torch.Tensor] = torch.split(buffer.to(self._device, non_blocking=True), sizes)
        return moved

    def _embedded(self, ids: torch.Tensor, types: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """(tokens, width), float32."""
        state = self._word.index_select(0, ids).float()
        state += self._position.index_select(0, positions)
        if self._token_type is not None:
            state += self._token_type.index_select(0, types)
        state = self._embedding_norm(state)
        return state if self._projection is None else self._projection(state.to(self._dtype)).float()


class _Layer:
    """One transformer layer. `state` is float32, `reduced` the same in the precision of the linear layers."""

    def __init__(self, layer: Layer, activation: Any, linear: Callable[..., _Linear], norm: Callable[..., _Norm], *, is_last: bool) -> None:
        self._query = linear([layer.query]) if is_last else None
        self._joined = linear([layer.key, layer.value] if is_last else [layer.query, layer.key, layer.value])
        self._attention_output, self._attention_norm = linear([layer.attention_output]), norm(layer.attention_norm)
        self._up, self._activation, self._down = linear([layer.up]), activation, linear([layer.down])
        self._output_norm = norm(layer.output_norm)

    def everyone(self, state: torch.Tensor, reduced: torch.Tensor, places: Places) -> torch.Tensor:
        """(tokens, width) to the same."""
        return self._feed_forward(places.everyone(self._joined(reduced)), state)

    def firsts(self, state: torch.Tensor, reduced: torch.Tensor, first: torch.Tensor, places: Places) -> torch.Tensor:
        """(tokens, width) to (pairs, width); for the last layer alone."""
        assert self._query is not None
        query = self._query(reduced.index_select(0, first))
        return self._feed_forward(places.firsts(query, self._joined(reduced)), state.index_select(0, first))

    def _feed_forward(self, context: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """The rest of a layer behind its attention; `state` is what went in."""
        state = self._attention_norm(self._attention_output(context).float().add_(state))
        inner = self._activation(self._up(state.to(context.dtype)))
        return self._output_norm(self._down(inner).float().add_(state))


class _Norm:
    """Layer normalization in float32."""

    def __init__(self, norm: Norm, epsilon: float, device: torch.device) -> None:
        self._weight, self._bias, self._epsilon = _tensor(norm.weight, device), _tensor(norm.bias, device), epsilon

    def __call__(self, state: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(state, self._weight.shape, self._weight, self._bias, self._epsilon)


class _Linear:
    """One or more linear layers of the same input as one; on a CPU with its weight arranged for oneDNN once and for all."""

    def __init__(self, parts: Sequence[Linear], device: torch.device, dtype: torch.dtype) -> None:
        self._weight = torch.from_numpy(np.concatenate([part.weight for part in parts])).to(device, dtype)
        self._bias = torch.from_numpy(np.concatenate([part.bias for part in parts])).to(device, dtype)
        prepacked = _prepacked(self._weight, self._bias) if device.type == "cpu" else None
        self._is_prepacked = prepacked is not None
        if prepacked is not None:
            self._weight = prepacked

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """(rows, inputs) to (rows, outputs)."""
        if self._is_prepacked:
            result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
            return result
        return functional.linear(rows, self._weight, self._bias)


def _prepacked(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor | None:
    """The weight as oneDNN wants it, or None where this build of torch cannot.

    torch compiles models to these operators but does not promise them to anybody: they are tried, not trusted.
    """
    rows = torch.ones((2, weight.shape[1]), dtype=weight.dtype)
    try:
        arranged: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _PREPACKED_ROWS)
        result = torch.ops.mkldnn._linear_pointwise(rows, arranged, bias, "none", [], "")
        expected = functional.linear(rows.float(), weight.float(), bias.float())
        agrees = bool(((result.float() - expected).abs() <= _PREPACKED_TOLERANCE * (1 + expected.abs().max())).all())
    except (AttributeError, RuntimeError, TypeError):
        return None
    return arranged if agrees else None


def _tensor(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """An array's numbers in their own precision: on a CPU the same memory, which may be a mapped file, read only."""
    with warnings.catch_warnings():
        # torch warns that writing to such a tensor would be undefined; nobody writes.
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(np.require(array, requirements=["A", "C"])).to(device)
