"""What the fast backends share: a BERT-like cross-encoder whose pairs are laid end to end and scored by some runtime.

A subclass gives `_run`. Logits equal those of `CrossEncoder.predict` without activation, within the runtime's rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from reranker_worker.backends import BackendInfo, Pair, Tokens
from reranker_worker.backends.labels import check_scale, relevance_index
from reranker_worker.backends.packing import Packed, pack

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from reranker_worker.backends.declared import Declared
    from reranker_worker.config import Config

# On a CPU a pass should fit the caches, and passes run side by side with a thread each: the threads of one pass would wait for each other at
# every operator. Measured on 2 idle cores with MiniLM-L6 and 128 mixed passages in requests of 8 (general torch path): passes of 512 tokens side by
# side 1.92 times as fast as `predict`; passes of 1,024 one after the other on both threads 1.63 times.
CPU_PASS_TOKENS = 512
MOST_PARALLEL_PASSES = 4
# Smaller passes cost more for each token (measured: 128 tokens as fast as 256, within 4 %).
_LEAST_PASS_TOKENS = 128


class PackedBackend:
    """A `Backend` but for `info` and `_run`, which the runtime's own class gives."""

    info: BackendInfo
    _rows = _columns = 1  # tokens of a pass, and of the longest pair in attention's table, are rounded up to a multiple of so many

    def __init__(self, config: Config, declared: Declared) -> None:
        """Raises BackendError when the settings and the model's labels do not go together."""
        self._declared = declared
        self._label = relevance_index(declared.labels, config.relevance_label)
        check_scale(config.scores, declared.labels)

    def _info(self, config: Config, *, backend: str, device: str, dtype: str, positions: int, pass_tokens: int, parallel: int) -> BackendInfo:
        declared = self._declared
        limits = [declared.max_length, positions, config.max_length or positions]
        return BackendInfo(
            backend=backend,
            device=device,
            dtype=dtype,
            max_length=min(limits),
            activation=declared.activation,
            max_pass_tokens=config.max_pass_tokens or pass_tokens,
            parallel_passes=parallel,
            packed=True,
            least_batch_tokens=parallel * _LEAST_PASS_TOKENS,
            num_labels=len(declared.labels),
            relevance_label=declared.labels[self._label] if len(declared.labels) > 1 else "",
        )

    def tokenize(self, pairs: Sequence[Pair]) -> list[Tokens]:
        """One `Tokens` per pair, in order; `inputs` is a `PairIds`. Cuts the document only."""
        return self._declared.tokenizer.tokenize(pairs)

    def score(self, batch: Sequence[Tokens]) -> list[float]:
        """Logits of one forward pass, in order; raises OutOfMemoryError when the pass was too large for the memory."""
        if not batch:
            return []
        return self._logits(self._run(pack([tokens.inputs for tokens in batch], self._rows, self._columns)))

    def activate(self, logits: list[float]) -> list[float]:
        """What `predict` returns by default for one label; for several, the softmax probability of the relevance label."""
        if self.info.activation == "identity" and self.info.num_labels == 1:
            return logits
        values = np.asarray(logits, dtype=np.float32)
        with np.errstate(over="ignore"):
            return list(map(float, 1.0 / (1.0 + np.exp(-values))))

    def _run(self, packed: Packed) -> NDArray[np.float32]:
        """(pairs, labels) of one forward pass; raises OutOfMemoryError."""
        raise NotImplementedError

    def _logits(self, scores: NDArray[np.float32]) -> list[float]:
        """One float per row; for several labels ln(p / (1 - p)) of the relevance label's softmax probability p."""
        if scores.shape[1] == 1:
            return [float(score) for score in scores[:, 0]]
        wide = scores.astype(np.float64)
        others = np.delete(wide, self._label, axis=1)
        top = others.max(axis=1)
        return [float(value) for value in wide[:, self._label] - top - np.log(np.exp(others - top[:, None]).sum(axis=1))]
