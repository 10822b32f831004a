"""Which of a model's outputs means "relevant"."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reranker_worker.backends import BackendError

if TYPE_CHECKING:
    from collections.abc import Sequence

_BAD_CONFIGURATION = 78

# Names that declare relevance when exactly one label of a model bears one of them. LABEL_0, LABEL_1 and the like declare nothing.
RELEVANT_NAMES = frozenset({"relevant", "relevance", "is_relevant", "yes", "true", "positive", "entailment"})


def relevance_index(labels: Sequence[str], wanted: str) -> int:
    """Index of the label that `wanted` names (by name, else by number), or that declares itself; raises BackendError(78)."""
    names = [_normalized(label) for label in labels]
    if wanted:
        if names.count(_normalized(wanted)) == 1:
            return names.index(_normalized(wanted))
        if wanted.isdecimal() and int(wanted) < len(labels):
            return int(wanted)
        text = f"RERANKING_RELEVANCE_LABEL={wanted!a} is no label of this model; its labels are {_listed(labels)}."
        raise BackendError(text, _BAD_CONFIGURATION)
    if len(labels) == 1:
        return 0
    declared = [index for index, name in enumerate(names) if name in RELEVANT_NAMES]
    if len(declared) != 1:
        text = f"The model has {len(labels)} labels ({_listed(labels)}) and does not say which of them means relevant; "
        raise BackendError(text + "set RERANKING_RELEVANCE_LABEL to its name or number.", _BAD_CONFIGURATION)
    return declared[0]


def check_scale(scores: str, labels: Sequence[str]) -> None:
    """Raise BackendError(78) when the scale that the settings want (`RERANKING_SCORES`) cannot be had of a model with these labels."""
    if scores == "model" and len(labels) > 1:
        text = f"RERANKING_SCORES=model needs a model with one output, and this one has {len(labels)}; use probability or logit."
        raise BackendError(text, _BAD_CONFIGURATION)


def _normalized(label: str) -> str:
    return label.strip().lower().replace(" ", "_").replace("-", "_")


def _listed(labels: Sequence[str]) -> str:
    shown = ", ".join(f"{index} {label!a}" for index, label in enumerate(labels[:12]))
    return shown + (", ..." if len(labels) > 12 else "")
