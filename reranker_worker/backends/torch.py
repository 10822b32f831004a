"""Any cross-encoder that sentence-transformers loads, on any device that torch knows. Imported in the engine process alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from reranker_worker.backends import BackendError, BackendInfo, OutOfMemoryError, Pair, Tokens
from reranker_worker.backends.chat_templates import MessageTokenizer
from reranker_worker.backends.labels import check_scale, relevance_index
from reranker_worker.backends.packed import CPU_PASS_TOKENS, MOST_PARALLEL_PASSES
from reranker_worker.backends.texts import PairIds, PairTokenizer, supports_pairs
from reranker_worker.backends.torch_device import (
    ACCELERATOR_PASS_TOKENS,
    bound_shape_caches,
    is_out_of_memory,
    release_memory,
    resolve_device,
    use_threads,
)
from reranker_worker.backends.torch_loading import load_cross_encoder, longest_pair
from reranker_worker.packages import package_versions

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from reranker_worker.config import Config
    from reranker_worker.models import ResolvedModel

_REMEMBERED_SHAPES = 16
_UNFIT, _UNSAFE = 71, 78
_TENSORS = {"input_ids", "attention_mask", "token_type_ids"}


class TorchBackend:
    """A `Backend` through `sentence_transformers.CrossEncoder`: logits equal those of its `predict` without activation.

    Unlike `predict` it cuts only the document of a pair that is too long. Raises BackendError when the model cannot be used.
    """

    def __init__(self, config: Config, model: ResolvedModel, threads: int) -> None:
        # Here every width of a padded pass is a shape of its own: without a bound the engine grew by 70 MiB over 1,200 random requests.
        bound_shape_caches(_REMEMBERED_SHAPES)
        self._device = resolve_device(config.device)
        parallel = min(threads, MOST_PARALLEL_PASSES) if self._device.type == "cpu" else 1
        use_threads(threads // parallel)
        self._model: Any = load_cross_encoder(config, model, self._device)
        labels = _labels(self._model)
        self._label = relevance_index(labels, config.relevance_label)
        check_scale(config.scores, labels)
        self._extra, self._typed = self._probe(model.name)
        # Read once: `tokenize` and `score` may run in two threads, and the tokenizer belongs to the first.
        tokenizer = self._model.tokenizer
        self._pad_id: int | None = tokenizer.pad_token_id
        self._pad_type_id: int = tokenizer.pad_token_type_id
        self._pads_left = tokenizer.padding_side == "left"
        self._tokenizer, takes_instruction = self._pair_tokenizer()
        pass_tokens = config.max_pass_tokens or (CPU_PASS_TOKENS if self._device.type == "cpu" else ACCELERATOR_PASS_TOKENS)
        self.info = BackendInfo(
            backend="torch",
            device=str(self._device),
            dtype=str(self._model.dtype).removeprefix("torch."),
            max_length=longest_pair(self._model, config.max_length),
            activation=type(self._model.activation_fn).__name__.lower(),
            max_pass_tokens=pass_tokens,
            parallel_passes=parallel,
            least_batch_tokens=pass_tokens * parallel,
            num_labels=len(labels),
            relevance_label=labels[self._label] if len(labels) > 1 else "",
            instruction=takes_instruction,
        )

    def tokenize(self, pairs: Sequence[Pair]) -> list[Tokens]:
        """One `Tokens` per pair, in order; `inputs` is a `PairIds`. Cuts the document only."""
        return self._tokenizer.tokenize(pairs)

    def score(self, batch: Sequence[Tokens]) -> list[float]:
        """Logits of one forward pass, in order; raises OutOfMemoryError when the pass was too large for the memory."""
        if not batch:
            return []
        pairs: list[PairIds] = [tokens.inputs for tokens in batch]
        if self._pad_id is None and len({len(pair.ids) for pair in pairs}) > 1:
            # A model without a padding token takes pairs of different lengths one by one only.
            return [logit for tokens in batch for logit in self.score([tokens])]
        try:
            with torch.inference_mode():
                return self._logits(self._model({**self._padded(pairs), **self._extra})["scores"])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside of the handler, so that the traceback no longer holds the failed pass's tensors when the cache is emptied.
        release_memory(self._device)
        raise OutOfMemoryError(f"{len(pairs)} pairs of at most {max(len(pair.ids) for pair in pairs)} tokens did not fit into memory")

    def activate(self, logits: list[float]) -> list[float]:
        """What `predict` returns by default for one label; for several, the softmax probability of the relevance label."""
        values = torch.tensor(logits, dtype=torch.float32)
        if self.info.num_labels > 1:
            return list(torch.sigmoid(values).tolist())
        with torch.inference_mode():
            return list(self._model.activation_fn(values.unsqueeze(-1)).squeeze(-1).tolist())

    def _pair_tokenizer(self) -> tuple[PairTokenizer | MessageTokenizer, bool]:
        """The cheap tokenizer for plain pairs of texts, or the library's own way (chat templates and whatever is unusual)."""
        tokenizer = self._model.tokenizer
        prompt = self._model._resolve_prompt(None, None) or ""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if self._extra.get("modality") == "message" or backend is None or tokenizer.truncation_side != "right" or not supports_pairs(backend):
            return MessageTokenizer(self._model, prompt), self._extra.get("modality") == "message"
        return PairTokenizer(backend, prompt), False

    def _probe(self, name: str) -> tuple[dict[str, Any], bool]:
        """Score one pair the library's way: (features that are not token tensors, whether the model takes token types)."""
        features = self._model.preprocess([("a", "b")], prompt=self._model._resolve_prompt(None, None))
        tensors = {key for key, value in features.items() if isinstance(value, torch.Tensor)}
        if not {"input_ids", "attention_mask"} <= tensors <= _TENSORS:
            raise BackendError(f"The model {name!a} takes inputs other than text ({', '.join(sorted(tensors))}), which is not supported.", _UNSAFE)
        extra = {key: value for key, value in features.items() if key not in tensors}
        try:
            with torch.inference_mode():
                moved = {key: value.to(self._device) if key in tensors else value for key, value in features.items()}
                scores = self._model(moved).get("scores")
        except (RuntimeError, MemoryError) as error:
            raise BackendError(f"The device {self._device} cannot run the model: {str(error)[:300]!a}", _UNFIT) from error
        if scores is None or scores.ndim > 2:
            raise BackendError(f"The model {name!a} is not a cross-encoder: it gives no score per pair. Name a reranking model.", _UNSAFE)
        return extra, "token_type_ids" in tensors

    def _padded(self, pairs: list[PairIds]) -> dict[str, torch.Tensor]:
        """Tensors of shape (pairs, longest pair) on the device, padded on the tokenizer's side."""
        lengths = [len(pair.ids) for pair in pairs]
        width = max(lengths)

        def table(rows: Iterable[list[int]], fill: int) -> torch.Tensor:
            blanks = [[fill] * (width - length) for length in lengths]
            filled = [blank + row if self._pads_left else row + blank for blank, row in zip(blanks, rows, strict=True)]
            return torch.tensor(filled, dtype=torch.int64).to(self._device)

        positions, sizes = torch.arange(width), torch.tensor(lengths).unsqueeze(1)
        mask = positions >= width - sizes if self._pads_left else positions < sizes
        tensors = {"input_ids": table((pair.ids for pair in pairs), self._pad_id or 0), "attention_mask": mask.to(self._device, torch.int64)}
        if self._typed:
            tensors["token_type_ids"] = table((pair.type_ids for pair in pairs), self._pad_type_id)
        return tensors

    def _logits(self, scores: torch.Tensor) -> list[float]:
        """One float per row; for several labels ln(p / (1 - p)) of the relevance label's softmax probability p."""
        rows = scores.float()
        if rows.ndim == 1 or rows.shape[1] == 1:
            return list(rows.reshape(-1).tolist())
        others = torch.cat([rows[:, : self._label], rows[:, self._label + 1 :]], dim=1)
        return list((rows[:, self._label] - torch.logsumexp(others, dim=1)).tolist())


def versions() -> dict[str, str]:
    """Versions of the libraries that decide the scores, read from the installed packages without importing them."""
    return package_versions("torch", "transformers", "sentence_transformers", "tokenizers")


def _labels(model: Any) -> list[str]:
    """Names of the model's outputs, in order; LABEL_0, LABEL_1, ... where its configuration names none."""
    count = int(model.num_labels)
    names = getattr(model.config, "id2label", None) or {}
    if len(names) != count:
        names = {}
    return [str(names.get(index, f"LABEL_{index}")) for index in range(count)]
