"""The weights of a BERT-like cross-encoder as arrays, under one set of names: BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, DistilBERT.

Layouts after the model classes of the same names in `transformers` (`...ForSequenceClassification`). What differs between the families
(names, position offset, token types, the head) ends here; the graph builders behind it know one kind of model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reranker_worker.backends.declared import UnsupportedModelError
from reranker_worker.models.safetensors import Tensor, as_float32, map_tensors

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

_ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_NOT_THE_MODEL = ("position_ids", "embeddings.token_type_ids")


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """y = x @ weight.T + bias; `weight` (outputs, inputs), `bias` (outputs,), both float32."""

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """Layer normalization over the last axis: `weight` and `bias` (hidden,), float32."""

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One transformer layer, normalized after each half (post-norm)."""

    query: Linear
    key: Linear
    value: Linear
    attention_output: Linear
    attention_norm: Norm
    up: Linear
    down: Linear
    output_norm: Norm


@dataclass(frozen=True, slots=True, eq=False)
class Encoder:
    """A whole cross-encoder. `word` (vocabulary, width) keeps the file's float16 or float32; `position` (positions, width) begins with a
    text's first token; `token_type` (types, width) is None where the model is given no types (its row is then part of `position`).
    The score is classifier(head_activation(pooler(first token)))."""

    heads: int
    epsilon: float
    activation: str  # "gelu", "gelu_tanh" or "relu"
    word: NDArray[Any]
    position: NDArray[np.float32]
    token_type: NDArray[np.float32] | None
    embedding_norm: Norm
    projection: Linear | None
    layers: list[Layer]
    pooler: Linear
    pooler_activation: str  # "tanh", "gelu" or "relu"
    classifier: Linear


@dataclass(frozen=True, slots=True)
class _Names:
    """How a family names its tensors; `{}` stands for the layer's number."""

    prefix: str
    layer: str = "encoder.layer.{}."
    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    attention_output: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    up: str = "intermediate.dense"
    down: str = "output.dense"
    output_norm: str = "output.LayerNorm"
    pooler: str = "classifier.dense"
    pooler_activation: str = "tanh"
    classifier: str = "classifier.out_proj"
    first_position: bool = False  # positions begin behind the padding token's


_DISTILBERT = _Names(
    prefix="distilbert.",
    layer="transformer.layer.{}.",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    attention_output="attention.out_lin",
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    down="ffn.lin2",
    output_norm="output_layer_norm",
    pooler="pre_classifier",
    pooler_activation="relu",
    classifier="classifier",
)
_ROBERTA = _Names(prefix="roberta.", first_position=True)
_FAMILIES = {
    "bert": ("BertForSequenceClassification", _Names(prefix="bert.", pooler="bert.pooler.dense", classifier="classifier")),
    "roberta": ("RobertaForSequenceClassification", _ROBERTA),
    "xlm-roberta": ("XLMRobertaForSequenceClassification", _ROBERTA),
    "camembert": ("CamembertForSequenceClassification", _ROBERTA),
    "electra": ("ElectraForSequenceClassification", _Names(prefix="electra.", pooler_activation="gelu")),
    "distilbert": ("DistilBertForSequenceClassification", _DISTILBERT),
}


def read_encoder(directory: Path, config: dict[str, Any], *, typed: bool) -> Encoder:
    """The encoder in a verified model directory; `config` is its config.json, `typed` whether the model is given token types.

    Raises UnsupportedModelError when the model is of another kind or its tensors are not exactly those of its kind.
    """
    names = _names(config)
    reader = _Reader(directory)
    try:
        encoder = _read(reader, names, config, typed)
    except KeyError as error:
        raise UnsupportedModelError(f"the tensor {error} is missing") from error
    except ValueError as error:
        raise UnsupportedModelError(f"it has {error}") from error
    reader.refuse_leftovers()
    return encoder


def _names(config: dict[str, Any]) -> _Names:
    kind = config.get("model_type")
    if kind not in _FAMILIES:
        raise UnsupportedModelError(f"its architecture is {kind}")
    architecture, names = _FAMILIES[str(kind)]
    if config.get("architectures") != [architecture]:
        raise UnsupportedModelError(f"its class is {config.get('architectures')}, not {architecture}")
    relative = config.get("position_embedding_type", "absolute") != "absolute" or config.get("sinusoidal_pos_embds")
    if relative or config.get("is_decoder") or config.get("pruned_heads") or config.get("add_cross_attention"):
        raise UnsupportedModelError("its attention is not plain")
    return names


class _Reader:
    """The tensors of all weight files, and which of them have been asked for."""

    def __init__(self, directory: Path) -> None:
        index = directory / "model.safetensors.index.json"
        files = sorted(directory.glob("model*.safetensors")) if index.is_file() else [directory / "model.safetensors"]
        if not all(path.is_file() for path in files):
            raise UnsupportedModelError("it has no model.safetensors")
        self._tensors = {name: tensor for path in files for name, tensor in map_tensors(path).items()}
        self._asked: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def tensor(self, name: str) -> Tensor:
        self._asked.add(name)
        return self._tensors[name]

    def floats(self, name: str) -> NDArray[np.float32]:
        return as_float32(self.tensor(name))

    def linear(self, name: str) -> Linear:
        return Linear(self.floats(name + ".weight"), self.floats(name + ".bias"))

    def norm(self, name: str) -> Norm:
        return Norm(self.floats(name + ".weight"), self.floats(name + ".bias"))

    def refuse_leftovers(self) -> None:
        """A tensor that nobody asked for means a model that is not what it seems."""
        left = sorted(name for name in self._tensors.keys() - self._asked if not name.endswith(_NOT_THE_MODEL) and ".pooler." not in name)
        if left:
            raise UnsupportedModelError(f"it has the tensor {left[0]!a}, which its kind does not have")


def _words(word: Tensor) -> NDArray[Any]:
    """The word embeddings, mapped where numpy has their type; float16 holds every float8."""
    if word.dtype in ("F16", "F32"):
        return word.data
    return as_float32(word).astype("float16") if word.dtype == "F8_E4M3" else as_float32(word)


def _read(reader: _Reader, names: _Names, config: dict[str, Any], typed: bool) -> Encoder:
    prefix = names.prefix + "embeddings"
    word = reader.tensor(prefix + ".word_embeddings.weight")
    position = reader.floats(prefix + ".position_embeddings.weight")
    if names.first_position:
        position = position[int(config.get("pad_token_id") or 0) + 1 :]
    token_type = reader.floats(prefix + ".token_type_embeddings.weight") if prefix + ".token_type_embeddings.weight" in reader else None
    if token_type is not None and (len(token_type) == 1 or not typed):
        position, token_type = position + token_type[0], None
    projection = names.prefix + "embeddings_project"
    count = int(config.get("num_hidden_layers") or config.get("n_layers") or 0)
    encoder = Encoder(
        heads=int(config.get("num_attention_heads") or config.get("n_heads") or 0),
        epsilon=float(config.get("layer_norm_eps", 1e-12)),
        activation=_activation(config),
        word=_words(word),
        position=position,
        token_type=token_type,
        embedding_norm=reader.norm(prefix + ".LayerNorm"),
        projection=reader.linear(projection) if projection + ".weight" in reader else None,
        layers=[_layer(reader, names, names.prefix + names.layer.format(number)) for number in range(count)],
        pooler=reader.linear(names.pooler),
        pooler_activation=names.pooler_activation,
        classifier=reader.linear(names.classifier),
    )
    width = len(encoder.embedding_norm.weight) if encoder.projection is None else len(encoder.projection.bias)
    if not encoder.layers or encoder.heads < 1 or width % encoder.heads:
        raise ValueError(f"{len(encoder.layers)} layers of {width} numbers and {encoder.heads} heads")
    return encoder


def _layer(reader: _Reader, names: _Names, place: str) -> Layer:
    return Layer(
        query=reader.linear(place + names.query),
        key=reader.linear(place + names.key),
        value=reader.linear(place + names.value),
        attention_output=reader.linear(place + names.attention_output),
        attention_norm=reader.norm(place + names.attention_norm),
        up=reader.linear(place + names.up),
        down=reader.linear(place + names.down),
        output_norm=reader.norm(place + names.output_norm),
    )


def _activation(config: dict[str, Any]) -> str:
    name = str(config.get("hidden_act") or config.get("activation") or "gelu")
    if name not in _ACTIVATIONS:
        raise UnsupportedModelError(f"its activation is {name}")
    return _ACTIVATIONS[name]
