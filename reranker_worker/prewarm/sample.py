"""The texts that an artefact is calibrated and compared on: 48 queries with 8 passages each, of which a few are labelled relevant.

From SQuAD 1.1 (16 queries, CC BY-SA 4.0), SelQA (16, Apache-2.0; text from Wikipedia, CC BY-SA) and the Amazon S3 user guide (16, CC BY-SA 4.0).
It tells whether a reduced precision keeps a model's ranking. It is far too small to tell how good a model is.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import NamedTuple

_FILE = Path(__file__).parent / "sample.jsonl.gz"
_CALIBRATION_QUERIES = 16


class Question(NamedTuple):
    """One query, its passages, and the indices of the relevant ones."""

    query: str
    documents: list[str]
    relevant: list[int]


def for_calibration() -> list[Question]:
    """The part that scales are chosen on."""
    return _questions()[:_CALIBRATION_QUERIES]


def for_comparison() -> list[Question]:
    """The part that nothing was chosen on."""
    return _questions()[_CALIBRATION_QUERIES:]


def _questions() -> list[Question]:
    with gzip.open(_FILE, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [Question(row["query"], row["documents"], row["relevant"]) for row in rows]
