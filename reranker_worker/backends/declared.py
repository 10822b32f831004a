"""What the files of a sequence-classification model declare, read without a model library: labels, activation, lengths, tokenizer.

It must mean exactly what `sentence_transformers.CrossEncoder(path)` makes of the same files. Where that is not certain the model is
`UnsupportedModelError`, and the general torch backend, which asks the library itself, takes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from reranker_worker.backends.texts import PairTokenizer, specials_of_pair, supports_pairs

if TYPE_CHECKING:
    from pathlib import Path

# Tokenizers without a limit of their own state one of about 10^30.
_NO_LIMIT_TOKENS = 1_000_000
_DEFAULT_MAX_LENGTH = 512
_ACTIVATIONS = {"Sigmoid": "sigmoid", "Identity": "identity"}
_TRANSFORMER_MODULES = ("sentence_transformers.models.Transformer", "sentence_transformers.base.modules.transformer.Transformer")
# Which tokenizer classes hand token types to the model, unless model_input_names says so.
_TYPED_TOKENIZERS = {"BertTokenizer", "BertTokenizerFast", "ElectraTokenizer", "ElectraTokenizerFast", "PreTrainedTokenizerFast"}
_UNTYPED_TOKENIZERS = {"RobertaTokenizer", "XLMRobertaTokenizer", "CamembertTokenizer", "DistilBertTokenizer"}
# How many special tokens a class puts before, between and after the texts of a pair, whatever tokenizer.json says.
_ONE_BETWEEN, _TWO_BETWEEN = (1, 1, 1), (1, 2, 1)
_PAIRS = {"Bert": _ONE_BETWEEN, "Electra": _ONE_BETWEEN, "DistilBert": _ONE_BETWEEN}
_PAIRS |= {"Roberta": _TWO_BETWEEN, "XLMRoberta": _TWO_BETWEEN, "Camembert": _TWO_BETWEEN}


class UnsupportedModelError(Exception):
    """This path cannot run the model with certainty; the text says why, as the end of a sentence."""


@dataclass(frozen=True, slots=True)
class Declared:
    """What a model directory says of itself. `max_length` in tokens, `prompt` goes before every query."""

    config: dict[str, Any]
    labels: list[str]
    activation: str  # "sigmoid" or "identity"
    max_length: int
    typed: bool  # whether the model is given the tokenizer's token types
    prompt: str
    tokenizer: PairTokenizer


def read_declared(directory: Path) -> Declared:
    """Read config.json and the files beside it; raises UnsupportedModelError."""
    config = _json(directory / "config.json")
    library = _library_settings(directory)
    settings = _json(directory / "tokenizer_config.json")
    labels = _labels(config)
    return Declared(
        config=config,
        labels=labels,
        activation=_activation(config, library, len(labels)),
        max_length=_max_length(library, config, settings),
        typed=_is_typed(settings),
        prompt=_prompt(library),
        tokenizer=PairTokenizer(_tokenizer(directory, settings), _prompt(library)),
    )


def _json(path: Path) -> dict[str, Any]:
    content = orjson.loads(path.read_bytes()) if path.is_file() else {}
    if not isinstance(content, dict):
        raise UnsupportedModelError(f"{path.name} is not an object")
    return content


def _library_settings(directory: Path) -> dict[str, Any]:
    """What sentence-transformers saved beside the model; it reads these files only where modules.json leads it to them."""
    path = directory / "modules.json"
    if not path.is_file():
        return {}
    modules = orjson.loads(path.read_bytes())
    if len(modules) != 1 or modules[0].get("path") or modules[0].get("type") not in _TRANSFORMER_MODULES:
        raise UnsupportedModelError("it is a chain of sentence-transformers modules")
    settings = _json(directory / "config_sentence_transformers.json")
    if settings.get("model_type") != "CrossEncoder":
        raise UnsupportedModelError("sentence-transformers did not save it as a cross-encoder")
    return _json(directory / "sentence_bert_config.json") | settings


def _labels(config: dict[str, Any]) -> list[str]:
    names = config.get("id2label") or {}
    count = int(config.get("num_labels") or len(names) or 2)
    if len(names) != count:
        names = {}
    return [str(names.get(str(index), f"LABEL_{index}")) for index in range(count)]


def _activation(config: dict[str, Any], library: dict[str, Any], labels: int) -> str:
    """The first that is declared, in the library's order; a name outside of torch is not trusted by it and counts as none."""
    declared = [library.get("activation_fn"), (config.get("sentence_transformers") or {}).get("activation_fn")]
    declared.append(config.get("sbert_ce_default_activation_function"))
    path = next((name for name in declared if isinstance(name, str) and name.startswith("torch.")), "")
    if not path:
        return "sigmoid" if labels == 1 else "identity"
    name = path.rpartition(".")[2]
    if name not in _ACTIVATIONS:
        raise UnsupportedModelError(f"its activation is {name}")
    return _ACTIVATIONS[name]


def _max_length(library: dict[str, Any], config: dict[str, Any], settings: dict[str, Any]) -> int:
    """The smallest of what the tokenizer, the library's file and the configuration allow; the position table bounds it later."""
    text = (library.get("processing_kwargs") or {}).get("text") or {}
    limits = [settings.get("model_max_length"), library.get("max_seq_length"), text.get("max_length"), config.get("max_position_embeddings")]
    return min((int(limit) for limit in limits if isinstance(limit, int) and 0 < limit < _NO_LIMIT_TOKENS), default=_DEFAULT_MAX_LENGTH)


def _is_typed(settings: dict[str, Any]) -> bool:
    names = settings.get("model_input_names")
    if names is not None:
        return "token_type_ids" in names
    kind = str(settings.get("tokenizer_class", ""))
    if kind in _TYPED_TOKENIZERS:
        return True
    if kind.removesuffix("Fast") in _UNTYPED_TOKENIZERS:
        return False
    raise UnsupportedModelError(f"its tokenizer class is {kind or 'not named'}")


def _prompt(library: dict[str, Any]) -> str:
    name = library.get("default_prompt_name")
    return str((library.get("prompts") or {})[name]) if name else ""


def _tokenizer(directory: Path, settings: dict[str, Any]) -> Any:
    """The `tokenizers.Tokenizer` of tokenizer.json, provided that transformers would not change it while loading."""
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    if not path.is_file():
        raise UnsupportedModelError("it has no tokenizer.json")
    if settings.get("truncation_side", "right") != "right":
        raise UnsupportedModelError("it truncates on the left")
    content = orjson.loads(path.read_bytes())
    _check_normalizer(content.get("normalizer") or {}, settings)
    for part in ("pre_tokenizer", "post_processor"):
        own = (content.get(part) or {}).get("add_prefix_space")
        if own is not None and settings.get("add_prefix_space", own) != own:
            raise UnsupportedModelError("tokenizer.json and tokenizer_config.json disagree on add_prefix_space")
    tokenizer = Tokenizer.from_file(str(path))
    if not supports_pairs(tokenizer):
        raise UnsupportedModelError("its tokenizer does not write a pair as query and then document")
    family = str(settings.get("tokenizer_class", "")).removesuffix("Fast").removesuffix("Tokenizer")
    if family in _PAIRS and specials_of_pair(tokenizer) != _PAIRS[family]:
        raise UnsupportedModelError("its tokenizer.json writes pairs in another way than its tokenizer class")
    return tokenizer


def _check_normalizer(normalizer: dict[str, Any], settings: dict[str, Any]) -> None:
    """transformers lets tokenizer_config.json overrule a BERT normalizer."""
    if normalizer.get("type") != "BertNormalizer":
        return
    for key, own in (("do_lower_case", "lowercase"), ("strip_accents", "strip_accents"), ("tokenize_chinese_chars", "handle_chinese_chars")):
        if key in settings and settings[key] != normalizer.get(own):
            raise UnsupportedModelError(f"tokenizer.json and tokenizer_config.json disagree on {key}")
