"""Scale and shift of the logits that make their sigmoid a probability, fitted on labelled groups that were not trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

from training.sets import SEED
from training.student import Tokens, logits_of, pairs_of
from training.train import plan, read_groups

if TYPE_CHECKING:
    from pathlib import Path

GROUPS = 600
_AT_ONCE = 8


@torch.inference_mode()
def held_out_logits(model: Any, work: Path, trained_steps: int) -> tuple[list[float], list[int]]:
    """Logits and labels of groups that come after the last step of the training."""
    tokens, groups = Tokens(work), read_groups(work)
    later = [groups[index] for step in plan(groups, tokens, SEED)[trained_steps:] for index in step]
    chosen = [group for group in later if group["kind"] == "passages"][:GROUPS]
    logits: list[float] = []
    for start in range(0, len(chosen), _AT_ONCE):
        part = chosen[start : start + _AT_ONCE]
        logits += logits_of(model, [pair for group in part for pair in pairs_of(group, tokens)]).tolist()
    labels = [int(place == 0) for group in chosen for place in range(len(group["texts"]))]
    return logits, labels


def fit(logits: list[float], labels: list[int]) -> tuple[float, float]:
    """(scale, shift) by logistic regression.."""
    regression = LogisticRegression(C=1e6).fit(np.array(logits)[:, None], np.array(labels))
    return float(regression.coef_[0, 0]), float(regression.intercept_[0])


def fold(model: Any, scale: float, shift: float) -> None:
    """Put scale and shift into the classifier."""
    with torch.no_grad():
        model.classifier.weight.mul_(scale)
        model.classifier.bias.mul_(scale).add_(shift)
