"""From pairs to scores, whatever the runtime: tokenize once, sort by length, passes by token budget, halve when memory runs out."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reranker_worker.backends import Backend, OutOfMemoryError, Pair, Tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from reranker_worker.config import Config

_MOST_BROKEN_PAIRS = 3
_NO_ROOM = ("INVALID_REQUEST", "The query alone fills the model's max_length; shorten it.")
_NO_INSTRUCTION = ("INVALID_REQUEST", "This model takes no instruction; leave the field out.")
_NO_MEMORY = ("INFERENCE_ERROR", "There is not enough memory to score one of the documents even alone.")
_NOT_FINITE = ("INFERENCE_ERROR", "The model gave no finite score for one of the documents.")
_RAISED = ("INFERENCE_ERROR", "The model failed on one of the documents; the worker's log names the kind of error.")


class EngineSickError(Exception):
    """The device's state is lost; only a new process helps."""


@dataclass(slots=True)
class Prepared:
    """A tokenized batch on its way to the model."""

    batch: int
    tokens: list[Tokens]
    refused: set[int]  # pairs with an instruction that the model cannot take
    tokenize_ms: float


@dataclass(slots=True)
class _Outcome:
    logits: list[float | None]
    failures: dict[int, tuple[str, str]] = field(default_factory=dict)
    passes: int = 0


def plan_passes(lengths: Sequence[int], max_pass_tokens: int, max_pass_pairs: int) -> list[list[int]]:
    """Cut pairs, sorted by length, into forward passes: each holds at most `max_pass_pairs` pairs and, padded to its longest,
    at most `max_pass_tokens` tokens (a single longer pair makes a pass of its own). The longest come first: if memory is short,
    it shows at once."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    passes: list[list[int]] = []
    start = 0
    while start < len(order):
        longest = max(1, lengths[order[start]])
        size = max(1, min(max_pass_pairs, max_pass_tokens // longest))
        passes.append(order[start : start + size])
        start += size
    return passes


class Scorer:
    """Scores batches on one backend. `prepare` and `score` may be called from two different threads."""

    def __init__(self, backend: Backend, config: Config, log: Callable[[str], None]) -> None:
        self._backend = backend
        self._log = log
        self._max_length = backend.info.max_length
        self._batch_size = config.batch_size
        self._want_model_scores = config.scores == "model"
        self.max_pass_tokens = config.max_pass_tokens or backend.info.max_pass_tokens

    def prepare(self, frame: dict[str, Any]) -> Prepared:
        """Tokenize a `score` frame."""
        begin = time.perf_counter()
        pairs = [
            Pair(query, document, min(max_length or self._max_length, self._max_length), instruction, document_tokens)
            for query, max_length, document_tokens, instruction, documents in frame["groups"]
            for document in documents
        ]
        tokens = self._backend.tokenize(pairs)
        refused = {index for index, pair in enumerate(pairs) if pair.instruction} if not self._backend.info.instruction else set()
        return Prepared(frame["batch"], tokens, refused, (time.perf_counter() - begin) * 1e3)

    def score(self, prepared: Prepared, progress: Callable[[int], None]) -> dict[str, Any]:
        """The `scored` frame of a batch. `progress` is called after each pass. Raises EngineSickError when the device is lost."""
        begin = time.perf_counter()
        tokens = prepared.tokens
        failures = {index: _NO_ROOM for index, item in enumerate(tokens) if not item.fits} | dict.fromkeys(prepared.refused, _NO_INSTRUCTION)
        outcome = _Outcome([None] * len(tokens), failures)
        able = [index for index in range(len(tokens)) if index not in failures]
        for plan in plan_passes([tokens[index].length for index in able], self.max_pass_tokens, self._batch_size):
            self._pass(tokens, [able[position] for position in plan], outcome)
            progress(prepared.batch)
        return self._frame(prepared, outcome, (time.perf_counter() - begin) * 1e3)

    def _pass(self, tokens: Sequence[Tokens], indices: list[int], outcome: _Outcome) -> None:
        outcome.passes += 1
        try:
            logits = self._backend.score([tokens[index] for index in indices])
        except (OutOfMemoryError, MemoryError):
            self._halve(tokens, indices, outcome)
        except Exception as error:  # the batch boundary: one bad pair must not fail its mates
            self._isolate(tokens, indices, outcome, error)
        else:
            for index, logit in zip(indices, logits, strict=True):
                if math.isfinite(logit):
                    outcome.logits[index] = logit
                else:
                    outcome.failures[index] = _NOT_FINITE

    def _halve(self, tokens: Sequence[Tokens], indices: list[int], outcome: _Outcome) -> None:
        if len(indices) == 1:
            outcome.failures[indices[0]] = _NO_MEMORY
            return
        middle = (len(indices) + 1) // 2
        # Remember the ceiling, so that the next batch does not run into it again.
        self.max_pass_tokens = min(self.max_pass_tokens, max(tokens[index].length for index in indices) * middle)
        self._log(f"out of memory with {len(indices)} pairs in a pass; a pass now holds {self.max_pass_tokens} tokens")
        self._pass(tokens, indices[:middle], outcome)
        self._pass(tokens, indices[middle:], outcome)

    def _isolate(self, tokens: Sequence[Tokens], indices: list[int], outcome: _Outcome, error: Exception) -> None:
        # Only the error's type is logged: its text may quote a document.
        self._log(f"{type(error).__name__} in a pass of {len(indices)} pairs")
        if "CUDA error" in str(error) or "device-side assert" in str(error):
            raise EngineSickError(type(error).__name__) from None
        if len(indices) == 1:
            outcome.failures[indices[0]] = _RAISED
            return
        broken = sum(failure is _RAISED for failure in outcome.failures.values())
        for position, index in enumerate(indices):
            if sum(failure is _RAISED for failure in outcome.failures.values()) - broken >= _MOST_BROKEN_PAIRS:
                outcome.failures.update(dict.fromkeys(indices[position:], _RAISED))
                return
            self._pass(tokens, [index], outcome)

    def _frame(self, prepared: Prepared, outcome: _Outcome, inference_ms: float) -> dict[str, Any]:
        logits = outcome.logits
        frame: dict[str, Any] = {
            "event": "scored",
            "batch": prepared.batch,
            "logits": logits,
            "probabilities": [None if logit is None else _sigmoid(logit) for logit in logits],
            "tokens": [item.length for item in prepared.tokens],
            "truncated": [index for index, item in enumerate(prepared.tokens) if item.truncated],
            "failures": [[index, *failure] for index, failure in sorted(outcome.failures.items())],
            "tokenize_ms": round(prepared.tokenize_ms, 3),
            "inference_ms": round(inference_ms, 3),
            "passes": outcome.passes,
        }
        if self._want_model_scores:
            activated = iter(self._backend.activate([logit for logit in logits if logit is not None]))
            frame["model_scores"] = [None if logit is None else next(activated) for logit in logits]
        return frame


def _sigmoid(logit: float) -> float:
    """1 / (1 + e^-x) without overflow at either end."""
    if logit >= 0:
        return 1.0 / (1.0 + math.exp(-logit))
    power = math.exp(logit)
    return power / (1.0 + power)
