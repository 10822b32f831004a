"""Evaluation sets: gzip JSONL, one query a line with its candidates."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_SEED = 0
_SUFFIX = ".jsonl.gz"


class SetsError(Exception):
    """The data are not there, or not in the format."""


@dataclass(frozen=True, slots=True)
class Question:
    """A query, its candidates, and how relevant each is (0: not). `ranked`: a first stage put the candidates in this order."""

    qid: str
    query: str
    texts: tuple[str, ...]
    labels: tuple[int, ...]
    ranked: bool = True


def read_sets(folder: Path, names: Sequence[str], limit: int | None) -> dict[str, list[Question]]:
    """The sets under `folder` (all, or those named), each with at most `limit` questions, sampled with a fixed seed."""
    files = {path.name.removesuffix(_SUFFIX): path for path in sorted(folder.glob(f"**/*{_SUFFIX}"))}
    missing = sorted(set(names) - files.keys())
    if missing or not files:
        raise SetsError(f"{folder} has no set {', '.join(missing) or f'(*{_SUFFIX})'}.")
    sets = {name: _read(files[name]) for name in (names or files)}
    if limit is None:
        return sets
    return {name: random.Random(_SEED).sample(questions, min(limit, len(questions))) for name, questions in sets.items()}


def _read(path: Path) -> list[Question]:
    questions = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                questions.append(_parse(json.loads(line)))
            except (KeyError, TypeError, ValueError) as error:
                raise SetsError(f"{path.name}, line {number}: {error!r}.") from None
    return questions


def _parse(row: dict[str, object]) -> Question:
    documents = row["documents"]
    if not isinstance(documents, list) or not documents:
        raise ValueError("no documents")
    labels = tuple(max(0, int(document.get("label", 0))) for document in documents)
    # Candidates with an origin were listed by the makers of the set, in no order of a search (or the right ones first).
    ranked = all("rank" in document and "origin" not in document for document in documents)
    return Question(str(row["qid"]), str(row["query"]), tuple(str(document["text"]) for document in documents), labels, ranked)
