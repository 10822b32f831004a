"""Writes an encoder as an ONNX graph of standard operators that takes packed pairs (see packing.py) and does nothing in vain.

No padding outside of attention; the last layer multiplies its weights with the first token of each pair alone, because nothing else reaches the
score. The same graph serves onnxruntime and OpenVINO.
Reduced to int8, a linear layer's inputs are rounded by one fixed scale found by calibration, so that a pair's score does not depend on
the pairs beside it; weights have a scale for each output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from reranker_worker.backends.encoder import Linear, Norm
from reranker_worker.backends.graph_files import GRAPH_FILE, WEIGHTS_FILE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from reranker_worker.backends.encoder import Encoder, Layer

_OPSET, _IR_VERSION = 20, 10
_CONTRIB = "com.microsoft"
# Smaller tensors stay in the graph's own file.
_EXTERNAL_BYTES = 1024
_ALIGNED_BYTES = 4096  # the mapping of a weight begins at a page
_KEYS = (0, 2, 3, 1)  # (pairs, heads, width of a head, longest)
_GROUPS = (4, 3, 2, 1)  # of heads, the first number that divides theirs
_INT8_MAX, _UINT8_MAX = 127.0, 255.0


class Range(NamedTuple):
    """The least and the greatest number that one linear layer's input may hold in int8; what is beyond is cut off."""

    low: float
    high: float


def save_graph(encoder: Encoder, directory: Path, ranges: Mapping[str, Range] | None = None, *, watch: bool = False) -> None:
    """Write GRAPH_FILE and WEIGHTS_FILE; with `ranges` (by linear layer's name) the linear layers that it names are int8.

    `watch` makes each linear layer's input an output of the layer's name, for calibration.
    """
    graph = _Graph(encoder, ranges or {})
    with (directory / WEIGHTS_FILE).open("wb") as file:
        weights = [_stored(name, array, file) for name, array in graph.weights.items()]
    (directory / GRAPH_FILE).write_bytes(_model(graph, encoder, weights, watch).SerializeToString())


def _stored(name: str, array: NDArray[Any], file: BinaryIO) -> Any:
    """A weight, written to the file beside the graph (the runtime maps it into memory, and a graph may hold 2 GB at most)."""
    if array.nbytes < _EXTERNAL_BYTES:
        return numpy_helper.from_array(array, name)
    file.write(bytes(-file.tell() % _ALIGNED_BYTES))
    place = {"location": WEIGHTS_FILE, "offset": str(file.tell()), "length": str(array.nbytes)}
    array.tofile(file)
    tensor = TensorProto(name=name, dims=array.shape, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), data_location=TensorProto.EXTERNAL)
    for key, value in place.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def _model(graph: _Graph, encoder: Encoder, weights: list[Any], watch: bool) -> onnx.ModelProto:
    inputs = [_value(name, TensorProto.INT64, ["tokens"]) for name in ("ids", "positions", "gather")]
    if encoder.token_type is not None:
        inputs.append(_value("types", TensorProto.INT64, ["tokens"]))
    inputs.append(_value("spread", TensorProto.INT64, ["pairs", "longest"]))
    inputs.append(_value("first", TensorProto.INT64, ["pairs"]))
    inputs.append(_value("mask", TensorProto.FLOAT, ["pairs", 1, 1, "longest"]))
    outputs = [_value("logits", TensorProto.FLOAT, ["pairs", len(encoder.classifier.bias)])]
    if watch:
        graph.nodes += [helper.make_node("Identity", [source], [name]) for name, source in graph.linears.items()]
        outputs += [_value(name, TensorProto.FLOAT, None) for name in graph.linears]
    made = helper.make_graph(graph.nodes, "cross-encoder", inputs, outputs, initializer=weights)
    opsets = [helper.make_opsetid("", _OPSET), *([helper.make_opsetid(_CONTRIB, 1)] if graph.is_reduced else [])]
    return helper.make_model(made, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="reranker_worker")


def _value(name: str, kind: int, shape: list[str | int] | None) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def _greatest_pair(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """(outputs,): of a weight (inputs, outputs), the greatest sum of two neighbouring inputs' weights of one sign.

    CPUs without VNNI multiply two neighbours with uint8 and add both in 16 bits, where more than 255 * 128 is cut off (vpmaddubsw). With steps of
    the greatest weight alone that happens: logits of a trained MiniLM-L6 differed by up to 0.9 from float32, as it is by 0.5.
    """
    inputs, outputs = weight.shape
    pairs = np.concatenate([weight, np.zeros((inputs % 2, outputs), np.float32)]).reshape(-1, 2, outputs)
    greatest: NDArray[np.float32] = np.maximum(np.maximum(pairs, 0).sum(axis=1), np.maximum(-pairs, 0).sum(axis=1)).max(axis=0)
    return greatest


class _Graph:
    """The nodes and weights while they are being written. Methods take and give names of values."""

    def __init__(self, encoder: Encoder, ranges: Mapping[str, Range]) -> None:
        self.nodes: list[Any] = []
        self.weights: dict[str, NDArray[Any]] = {}
        self.linears: dict[str, str] = {}  # linear layer's name -> the value it reads
        self._encoder = encoder
        self._rounded: dict[str, tuple[str, str, str]] = {}
        self._ranges = ranges
        self._width = len(encoder.layers[0].query.bias)
        self.is_reduced = bool(ranges)
        self._write()

    def _write(self) -> None:
        encoder = self._encoder
        self._constant("heads_shape", np.array([-1, encoder.heads, self._width // encoder.heads]))
        self._constant("row_shape", np.array([-1, self._width]))
        groups = len(self._groups())
        self._constant("group_shape", np.array([0, 0, encoder.heads // groups, self._width // encoder.heads]))
        self._constant("group_row_shape", np.array([-1, self._width // groups]))
        self._constant("axis_1", np.array([1]))
        state = self._embeddings()
        for number, layer in enumerate(encoder.layers[:-1]):
            state = self._layer(f"layer{number}", layer, state)
        state = self._last_layer(f"layer{len(encoder.layers) - 1}", encoder.layers[-1], state)
        # The head is small and decides the score: it stays float32.
        state = self._activation(encoder.pooler_activation, self._linear("pooler", encoder.pooler, state, exact=True))
        self._node("Identity", [self._linear("classifier", encoder.classifier, state, exact=True)], name="logits")

    def _embeddings(self) -> str:
        encoder = self._encoder
        state = self._node("Gather", [self._constant("word", encoder.word), "ids"])
        if encoder.word.dtype != np.float32:
            state = self._node("Cast", [state], to=TensorProto.FLOAT)
        state = self._node("Add", [state, self._node("Gather", [self._constant("position", encoder.position), "positions"])])
        if encoder.token_type is not None:
            state = self._node("Add", [state, self._node("Gather", [self._constant("token_type", encoder.token_type), "types"])])
        state = self._norm("embedding_norm", encoder.embedding_norm, state)
        return state if encoder.projection is None else self._linear("projection", encoder.projection, state)

    def _layer(self, name: str, layer: Layer, state: str) -> str:
        groups = [self._context(f"{name}.group{number}", layer, part, state) for number, part in enumerate(self._groups())]
        context = self._node("Concat", groups, axis=1) if len(groups) > 1 else groups[0]
        return self._feed_forward(name, layer, self._node("Gather", [context, "gather"]), state)

    def _groups(self) -> list[slice]:
        """The rows of query, key and value that belong to each group of heads.

        The weights of attention over long texts are what a pass needs most memory for, and more than the caches hold: a quarter of the heads at
        a time is 15 % faster with 512 tokens and 2 % with passages (float32; int8 16 % faster and 2 % slower), and takes 40 MiB less in two threads.
        """
        count = next(number for number in _GROUPS if self._encoder.heads % number == 0)
        return [slice(number * self._width // count, (number + 1) * self._width // count) for number in range(count)]

    def _context(self, name: str, layer: Layer, part: slice, state: str) -> str:
        """(pairs * longest, width of the part): what attention gives to each token, of some heads."""
        # One multiplication for all three and a split behind it cost 5 % of a pass more than three (measured).
        query, key, value = (
            self._table(f"{name}.{kind}", Linear(linear.weight[part], linear.bias[part]), state)
            for kind, linear in (("query", self._scaled(layer.query)), ("key", layer.key), ("value", layer.value))
        )
        query, key, value = self._heads(query), self._heads(key, _KEYS), self._heads(value)
        return self._attention(query, key, value)

    def _last_layer(self, name: str, layer: Layer, state: str) -> str:
        """One query per pair asks every token, so the key's weights are multiplied with the query and the value's with the sum, once per pair
        instead of once per token: query . (K x) = (K' query) . x, and sum of w (V x + b) = V (sum of w x) + b where the weights w sum to 1.
        The key's bias adds the same to every token's score, which softmax takes away again.
        """
        heads, width = self._encoder.heads, self._width // self._encoder.heads
        first = self._node("Gather", [state, "first"])
        table = self._node("Gather", [state, "spread"])
        query = self._linear(name + ".query", self._scaled(layer.query), first)
        key = layer.key.weight.reshape(heads, width, self._width)
        value = layer.value.weight.reshape(heads, width, self._width).transpose(0, 2, 1)
        asked = self._by_head(self._node("Reshape", [query, "heads_shape"]), name + ".key", key)
        scores = self._node("MatMul", [asked, self._node("Transpose", [table], perm=[0, 2, 1])])
        weights = self._node("Softmax", [self._node("Add", [scores, self._node("Squeeze", ["mask", "axis_1"])])], axis=-1)
        context = self._by_head(self._node("MatMul", [weights, table]), name + ".value", value)
        context = self._node("Add", [self._node("Reshape", [context, "row_shape"]), self._constant(name + ".value.bias", layer.value.bias)])
        return self._feed_forward(name, layer, context, first)

    def _by_head(self, rows: str, name: str, weight: NDArray[np.float32]) -> str:
        """(pairs, heads, inputs) to (pairs, heads, outputs) by a `weight` (heads, inputs, outputs)."""
        turned = self._node("Transpose", [rows], perm=[1, 0, 2])
        return self._node("Transpose", [self._node("MatMul", [turned, self._constant(name + ".weight", weight)])], perm=[1, 0, 2])

    def _table(self, name: str, linear: Linear, state: str) -> str:
        """(pairs, longest, width): a linear layer's rows, spread for attention."""
        return self._node("Gather", [self._linear(name, linear, state), "spread"])

    def _scaled(self, query: Linear) -> Linear:
        """The query with the attention's 1 / sqrt(width of a head) in its weights."""
        scale = np.float32(1.0 / np.sqrt(self._width // self._encoder.heads))
        return Linear(query.weight * scale, query.bias * scale)

    def _heads(self, table: str, order: Sequence[int] = (0, 2, 1, 3)) -> str:
        """(pairs, longest, width of a group) to (pairs, heads, longest, width of a head), or another order of these."""
        return self._node("Transpose", [self._node("Reshape", [table, "group_shape"])], perm=list(order))

    def _attention(self, query: str, key: str, value: str) -> str:
        """Rows of (pairs * queries, width)."""
        scores = self._node("MatMul", [query, key])
        weights = self._node("Softmax", [self._node("Add", [scores, "mask"])], axis=-1)
        context = self._node("Transpose", [self._node("MatMul", [weights, value])], perm=[0, 2, 1, 3])
        return self._node("Reshape", [context, "group_row_shape"])

    def _feed_forward(self, name: str, layer: Layer, context: str, state: str) -> str:
        """The rest of a layer behind its attention; `state` is what went in."""
        added = self._node("Add", [self._linear(name + ".attention_output", layer.attention_output, context), state])
        state = self._norm(name + ".attention_norm", layer.attention_norm, added)
        inner = self._activation(self._encoder.activation, self._linear(name + ".up", layer.up, state), reduced=name + ".down" in self._ranges)
        added = self._node("Add", [self._linear(name + ".down", layer.down, inner), state])
        return self._norm(name + ".output_norm", layer.output_norm, added)

    def _linear(self, name: str, linear: Linear, state: str, *, exact: bool = False) -> str:
        if not exact:
            self.linears[name] = state
        if name in self._ranges and not exact:
            return self._int8_linear(name, linear, state)
        return self._node("Gemm", [state, self._constant(name + ".weight", linear.weight), self._constant(name + ".bias", linear.bias)], transB=1)

    def _int8_linear(self, name: str, linear: Linear, state: str) -> str:
        if state not in self._rounded:
            self._rounded[state] = self._round(name, self._ranges[name], state)
        rounded, scale, zero = self._rounded[state]
        weight = linear.weight.T
        steps = np.maximum(_greatest_pair(weight) / np.float32(_INT8_MAX), np.float32(1e-12))
        whole = np.clip(np.rint(weight / steps), -_INT8_MAX, _INT8_MAX).astype(np.int8)
        inputs = [rounded, self._constant(name + ".weight", whole), scale, self._constant(name + ".scale", steps), zero, ""]
        return self._node("MatMulIntegerToFloat", [*inputs, self._constant(name + ".bias", linear.bias)], domain=_CONTRIB)

    def _round(self, name: str, seen: Range, state: str) -> tuple[str, str, str]:
        """(the state in int8, its scale, its zero), once for all linear layers that read it."""
        low, high = min(0.0, seen.low), max(0.0, seen.high)
        step = np.float32(max(high - low, 1e-6) / _UINT8_MAX)
        point = np.uint8(np.clip(np.rint(-low / step), 0, _UINT8_MAX))
        scale, zero = self._constant(name + ".input_scale", np.array(step)), self._constant(name + ".input_zero", np.array(point))
        return self._node("QuantizeLinear", [state, scale, zero]), scale, zero

    def _norm(self, name: str, norm: Norm, state: str) -> str:
        inputs = [state, self._constant(name + ".weight", norm.weight), self._constant(name + ".bias", norm.bias)]
        return self._node("LayerNormalization", inputs, axis=-1, epsilon=self._encoder.epsilon)

    def _activation(self, name: str, state: str, *, reduced: bool = False) -> str:
        """`reduced`: what comes out is rounded to int8."""
        if name in ("gelu", "gelu_tanh"):
            if reduced:  # 2 % of a pass faster; what the tanh form changes (0.005 in the logit) is little beside the rounding
                return self._node("FastGelu", [state], domain=_CONTRIB)
            return self._node("Gelu", [state], approximate="tanh" if name == "gelu_tanh" else "none")
        return self._node({"relu": "Relu", "tanh": "Tanh"}[name], [state])

    def _constant(self, name: str, values: NDArray[Any]) -> str:
        array = np.asarray(values, dtype=np.int64) if values.dtype.kind == "i" and values.dtype != np.int8 else values
        self.weights[name] = np.ascontiguousarray(array)
        return name

    def _node(self, kind: str, inputs: list[str], *, domain: str = "", name: str = "", **attributes: Any) -> str:
        name = name or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, domain=domain, **attributes))
        return name
