"""`known_pairs.json` beside a model: a few pairs and the logits that every runtime must give for them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

KNOWN_PAIRS_FILE = "known_pairs.json"
# For a model that brings none: nothing is known of their logits but that they are numbers.
ANY_PAIRS = (
    ("What is the capital of France?", "Paris is the capital and largest city of France."),
    ("What is the capital of France?", "Bread is baked from flour, water and salt."),
)
_TOLERANCE = {"float32": 1e-3}  # other kinds of CPU differ by about 1e-5
_REDUCED_TOLERANCE = 0.5  # of logits that span tens: bfloat16 moves one of the bundled model's by 0.3, a wrong file by several


class KnownPair(NamedTuple):
    """A pair, and its logit as the model's makers measured it."""

    query: str
    document: str
    logit: float


def tolerance(dtype: str) -> float:
    """How far from its known logit a pair's may be in that precision."""
    return _TOLERANCE.get(dtype, _REDUCED_TOLERANCE)


def read_known_pairs(directory: Path) -> list[KnownPair]:
    """The pairs of a model directory; none where it has no such file."""
    file = directory / KNOWN_PAIRS_FILE
    return [KnownPair(pair["query"], pair["document"], pair["logit"]) for pair in json.loads(file.read_bytes())] if file.is_file() else []


def write_known_pairs(directory: Path, pairs: Sequence[KnownPair]) -> None:
    """Write the file, logits to six places."""
    known = [pair._asdict() | {"logit": round(pair.logit, 6)} for pair in pairs]
    (directory / KNOWN_PAIRS_FILE).write_text(json.dumps(known, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
