"""Step 1: choose passages, and let the bi-encoder read them and the queries (`python -m training.teacher`)."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from training.backbone import BiEncoder, backbone_directory, plain_tokenizer
from training.sets import SEED, SETS, read_rows
from training.vocabulary import count_pieces, prune

if TYPE_CHECKING:
    from collections.abc import Sequence

_AT_ONCE = 4000


class Vectors:
    """Texts and their vectors, kept in a directory."""

    def __init__(self, directory: Path, name: str) -> None:
        self._place = {text: place for place, text in enumerate(json.loads((directory / f"{name}.json").read_text(encoding="utf-8")))}
        self._rows = np.load(directory / f"{name}.npy")

    def __contains__(self, text: str) -> bool:
        return text in self._place

    def of(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
        """One float32 row a text."""
        rows: np.ndarray[Any, Any] = self._rows[[self._place[text] for text in texts]].astype(np.float32)
        return rows


def choose(data: Path) -> tuple[list[str], list[str]]:
    """(passages, queries): a sample of the positives of every set, and its queries."""
    rng = random.Random(SEED)
    passages: dict[str, None] = {}
    queries: dict[str, None] = {}
    for name, share in SETS.items():
        rows = read_rows(data, name)
        positives = sorted({row.positive for row in rows})
        rng.shuffle(positives)
        passages.update(dict.fromkeys(positives[: share.passages]))
        if share.negatives_too:
            passages.update(dict.fromkeys(text for row in rows for text in row.negatives))
        queries.update(dict.fromkeys(row.query for row in rows))
    return list(passages), list(queries)


def every_text(data: Path) -> list[str]:
    """All passages and queries of all sets: what the vocabulary is chosen by."""
    passages: set[str] = set()
    queries: list[str] = []
    for name in sorted(SETS):
        for row in read_rows(data, name):
            passages.update((row.positive, *row.negatives))
            queries.append(row.query)
    return sorted(passages) + queries


def keep_vectors(directory: Path, name: str, texts: list[str], encoder: BiEncoder) -> None:
    """Write the texts and their vectors."""
    parts = []
    for start in range(0, len(texts), _AT_ONCE):
        parts.append(encoder.vectors(texts[start : start + _AT_ONCE]))
        print(f"{name}: {min(len(texts), start + _AT_ONCE)} of {len(texts)}", flush=True)
    np.save(directory / f"{name}.npy", np.concatenate(parts))
    (directory / f"{name}.json").write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")


def main() -> None:
    """Write passages, queries, their vectors, and the pruned tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="directory of the training sets (gzip JSONL)")
    parser.add_argument("--work", type=Path, required=True, help="directory for what the steps hand on, outside the repository")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    passages, queries = choose(options.data)
    tokenizer = backbone_directory() / "tokenizer.json"
    content, rows = prune(tokenizer, count_pieces(plain_tokenizer(tokenizer), every_text(options.data)))
    (options.work / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (options.work / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    encoder = BiEncoder()
    keep_vectors(options.work, "passages", passages, encoder)
    keep_vectors(options.work, "queries", queries, encoder)


if __name__ == "__main__":
    main()
