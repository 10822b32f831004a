"""Backends: what turns (query, document) pairs into logits. One file per runtime; each imports its own runtime alone.

The engine drives a backend through two calls: `tokenize` from one thread, `score` from `info.parallel_passes` threads. Everything that is
common to all runtimes (sorting by length, passes, halving, probabilities, checks) lives in `engine.scoring`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from reranker_worker.config import Config
    from reranker_worker.models import ResolvedModel


class OutOfMemoryError(Exception):
    """A pass did not fit into memory; the same pairs in smaller passes may."""


class BackendError(Exception):
    """The backend cannot be opened, and a restart would not help. The text is a sentence for the operator.

    `exit_code` is the worker's exit code (65 model corrupt, 66 missing, 71 machine unfit, 78 unsafe or bad configuration).
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


# Named tuples, not dataclasses: one of each is made for every pair, and a frozen dataclass costs a microsecond more.
class Pair(NamedTuple):
    """One (query, document) pair as the engine hands it to `tokenize`.

    `max_length` is in tokens, already capped to the model's. `max_document_tokens` > 0 cuts the document to so many tokens
    of its own before it meets the query (Cohere's `max_tokens_per_doc`); a document cut so counts as truncated.
    """

    query: str
    document: str
    max_length: int
    instruction: str = ""
    max_document_tokens: int = 0


class Tokens(NamedTuple):
    """A tokenized pair: `inputs` is the backend's own, `length` counts tokens after truncation, special ones included.

    `truncated`: the document was cut (also at a bound in characters, beyond which nobody looks).
    `fits` is False when the query alone leaves no room for any document token
    (the pair is then not scored; `inputs` may be None).
    """

    inputs: Any
    length: int
    truncated: bool = False
    fits: bool = True


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """What `ready` and `info` report of a backend."""

    backend: str  # "onnx", "torch", "openvino", "fake"
    device: str  # "cpu", "cuda:0", "mps", "xpu:0"
    dtype: str  # "float32", "bfloat16", "float16", "int8"
    max_length: int  # tokens per pair, special tokens included
    activation: str  # what the model itself declares: "sigmoid", "identity" or another function's name
    max_pass_tokens: int  # padded tokens that one forward pass should hold on this device
    parallel_passes: int = 1  # forward passes that may run at the same time, each called from a thread of its own
    packed: bool = False  # whether a pass costs what its tokens cost, and not its longest pair times their number
    least_batch_tokens: int = 0  # fewer tokens in a batch would leave threads idle
    num_labels: int = 1
    relevance_label: str = ""  # which of several labels is the relevance
    instruction: bool = False  # True when the model takes a per-request instruction


class Backend(Protocol):
    """A loaded model. `logit` is one float per pair: the model's only output before any activation, or, for several labels,
    the log-odds of the relevance label, so that sigmoid(logit) is its softmax probability."""

    info: BackendInfo

    def tokenize(self, pairs: Sequence[Pair]) -> list[Tokens]:
        """One `Tokens` per pair, in order. Cuts the document only. Never raises for valid Unicode text."""

    def score(self, batch: Sequence[Tokens]) -> list[float]:
        """Logits of one forward pass over `batch`, in order. Raises OutOfMemoryError when the pass was too large."""

    def activate(self, logits: list[float]) -> list[float]:
        """Exactly what the model's own `predict` returns by default for these logits."""


def library_versions(backend: Backend) -> dict[str, str]:
    """Versions of the libraries that decide the scores, as the backend's own module tells them."""
    versions = getattr(sys.modules[type(backend).__module__], "versions", dict)
    return dict(versions())


def open_backend(config: Config, model: ResolvedModel, threads: int, log: Callable[[str], None] = lambda text: None) -> Backend:
    """Open the backend that `config.backend` names, or the one that suits the model; raises BackendError with a sentence.

    `log` is told which backends were passed over, and why.
    """
    if config.backend == "fake":
        from reranker_worker.backends.fake import FakeBackend

        return FakeBackend(model.name)
    from reranker_worker.backends.choosing import choose_backend

    return choose_backend(config, model, threads, log)
