"""Opening a model directory with sentence-transformers: device, precision, and the refusal of models that are not cross-encoders."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import huggingface_hub
import sentence_transformers
import torch
import transformers
from torch import nn

from reranker_worker.backends import BackendError
from reranker_worker.backends.torch_device import is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from reranker_worker.config import Config
    from reranker_worker.models import ResolvedModel

# These libraries type a part of what they offer, and each release another part.
_transformers: Any = transformers
_sentence_transformers: Any = sentence_transformers
_huggingface_hub: Any = huggingface_hub

_CORRUPT, _UNFIT, _UNSAFE = 65, 71, 78
_DTYPES = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Tokenizers without a limit of their own state one of about 10^30.
_NO_LIMIT_TOKENS = 1_000_000
_DEFAULT_MAX_LENGTH = 512


def load_cross_encoder(config: Config, model: ResolvedModel, device: torch.device) -> Any:
    """The library's CrossEncoder in eval mode on `device`; raises BackendError with a sentence. Never touches the network."""
    silence_libraries()
    options: dict[str, Any] = {"dtype": _DTYPES[config.dtype]}
    if not config.allow_pickle:
        options["use_safetensors"] = True
    reports: list[tuple[nn.Module, dict[str, Any]]] = []
    try:
        with _loading_reports(reports):
            loaded = _sentence_transformers.CrossEncoder(
                str(model.path),
                device=str(device),
                local_files_only=True,
                trust_remote_code=config.trust_remote_code,
                model_kwargs=options,
            )
    except Exception as error:  # the libraries raise whatever their parsers raise; each becomes one sentence
        raise _explained(error, model.name, device) from error
    for network, report in reports:
        _refuse_untrained(network, report, model.name)
    loaded.eval()
    return loaded


def silence_libraries() -> None:
    """No progress bars and no advice on standard error; failures still arrive as exceptions."""
    _transformers.logging.set_verbosity_error()
    _transformers.logging.disable_progress_bar()
    _huggingface_hub.utils.disable_progress_bars()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)


def longest_pair(loaded: Any, configured: int) -> int:
    """Tokens per pair: the smallest of what the settings, the tokenizer, the model's configuration and its position table allow."""
    limits = [configured, getattr(loaded.tokenizer, "model_max_length", 0), getattr(loaded.config, "max_position_embeddings", 0)]
    limits.append(getattr(loaded[0], "processing_kwargs", {}).get("text", {}).get("max_length", 0))
    for name, part in loaded.named_modules():
        if name.endswith("position_embeddings") and isinstance(part, nn.Embedding):
            # RoBERTa and its family number positions from padding_idx + 1 on, so that many rows of the table are out of reach.
            limits.append(part.num_embeddings - (0 if part.padding_idx is None else part.padding_idx + 1))
    return min((limit for limit in limits if isinstance(limit, int) and 0 < limit < _NO_LIMIT_TOKENS), default=_DEFAULT_MAX_LENGTH)


@contextmanager
def _loading_reports(reports: list[tuple[nn.Module, dict[str, Any]]]) -> Iterator[None]:
    """Collect what transformers knows of missing weights, for each model that is loaded inside.

    sentence-transformers offers no way to ask for it, and transformers only logs it: a bi-encoder given as a cross-encoder would
    score with a random head. `output_loading_info` is the public switch; it is set on the way through.
    """
    original = _transformers.PreTrainedModel.__dict__["from_pretrained"]

    def watched(cls: type, *args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.pop("output_loading_info", False)
        network, report = original.__func__(cls, *args, output_loading_info=True, **kwargs)
        reports.append((network, report))
        return (network, report) if wanted else network

    _transformers.PreTrainedModel.from_pretrained = classmethod(watched)
    try:
        yield
    finally:
        _transformers.PreTrainedModel.from_pretrained = original


def _refuse_untrained(network: nn.Module, report: dict[str, Any], name: str) -> None:
    mismatched = {key[0] if isinstance(key, tuple) else key for key in report.get("mismatched_keys", ())}
    trained = {key for key, _ in network.named_parameters()}
    missing = sorted((set(report.get("missing_keys", ())) | mismatched) & trained)
    if not missing:
        return
    backbone = str(getattr(network, "base_model_prefix", "")) + "."
    listed = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
    if all(not key.startswith(backbone) or ".pooler." in key for key in missing):
        text = f"The model {name!a} is not a cross-encoder: it has no trained classification head ({listed} are missing). "
        raise BackendError(text + "Name a reranking model; a bi-encoder (embedding model) cannot score pairs.", _UNSAFE)
    raise BackendError(f"The weights of the model {name!a} are incomplete ({listed} are missing); fetch the model again.", _CORRUPT)


def _explained(error: Exception, name: str, device: torch.device) -> BackendError:
    reason = " ".join(str(error).split())[:300]
    if is_out_of_memory(error):
        return BackendError(f"The model {name!a} does not fit into the memory of {device}; use a smaller model or another device.", _UNFIT)
    if isinstance(error, ImportError):
        return BackendError(f"The model {name!a} needs a package that is not installed: {reason!a}", _UNSAFE)
    return BackendError(f"The model {name!a} cannot be loaded ({type(error).__name__}: {reason!a}).", _CORRUPT)
