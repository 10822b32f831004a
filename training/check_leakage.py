"""Does anything that is trained on occur in an evaluation set? Exact queries, and 10-word shingles of texts."""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SHINGLE_WORDS = 10
OFFENDING_SHARE = 0.05  # a quoted sentence in a long passage stays below, a shared paragraph does not
_WORD = re.compile(r"\w+")


def normalise(text: str) -> str:
    """Lower case, words alone."""
    return " ".join(_WORD.findall(text.lower()))


def shingles(text: str) -> set[int]:
    """Hashes of every run of ten words; a shorter text is one shingle."""
    words = _WORD.findall(text.lower())
    last = max(1, len(words) - SHINGLE_WORDS + 1)
    return {hash(tuple(words[at : at + SHINGLE_WORDS])) for at in range(last)}


@dataclass(slots=True)
class Overlap:
    """What one evaluation set shares with the training texts."""

    queries: int = 0
    documents: int = 0
    same_queries: list[str] = field(default_factory=list)
    touched: int = 0
    offenders: list[str] = field(default_factory=list)
    largest: float = 0.0


class Evaluation:
    """Queries and shingles of every evaluation set under a directory."""

    def __init__(self, folder: Path) -> None:
        self.sets: dict[str, Overlap] = {}
        self._queries: dict[str, set[str]] = defaultdict(set)
        self._shingles: dict[int, set[str]] = defaultdict(set)
        for path in sorted(folder.glob("*/*.jsonl.gz")):
            self._read(path.name.removesuffix(".jsonl.gz"), path)

    def _read(self, name: str, path: Path) -> None:
        seen: set[str] = set()
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                self._queries[normalise(row["query"])].add(name)
                seen.update(document["text"] for document in row["documents"])
                self.sets.setdefault(name, Overlap()).queries += 1
        self.sets[name].documents = len(seen)
        for text in seen:
            if len(_WORD.findall(text)) >= SHINGLE_WORDS:
                for shingle in shingles(text):
                    self._shingles[shingle].add(name)

    def check(self, text: str) -> bool:
        """Record what `text` shares with each set; True when it must not be trained on."""
        bad = False
        for name in self._queries.get(normalise(text), ()):
            self.sets[name].same_queries.append(text)
            bad = True
        own = shingles(text)
        counts: dict[str, int] = defaultdict(int)
        for shingle in own:
            for name in self._shingles.get(shingle, ()):
                counts[name] += 1
        for name, count in counts.items():
            bad |= self._record(self.sets[name], text, count / len(own))
        return bad

    @staticmethod
    def _record(overlap: Overlap, text: str, share: float) -> bool:
        overlap.touched += 1
        overlap.largest = max(overlap.largest, share)
        if share > OFFENDING_SHARE:
            overlap.offenders.append(text)
        return share > OFFENDING_SHARE


def offenders(texts: Iterable[str], evaluation: Evaluation) -> list[str]:
    """The texts that must be left out, in order."""
    return [text for text in texts if evaluation.check(text)]


def table(evaluation: Evaluation) -> str:
    """What was found, as a Markdown table."""
    lines = [
        "| set | queries | documents | equal queries | share a shingle | largest share | over the limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in evaluation.sets.items():
        lines.append(
            f"| {name} | {found.queries} | {found.documents} | {len(found.same_queries)} | {found.touched} "
            f"| {found.largest:.1%} | {len(found.offenders)} |"
        )
    return "\n".join(lines)


def read_texts(path: Path) -> Iterator[str]:
    """The texts of a JSON list, or every query, positive and negative of a gzip JSONL set."""
    if path.suffix == ".json":
        yield from json.loads(path.read_text(encoding="utf-8"))
        return
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield from (row["query"], row["positive"], *row["negatives"])


def main() -> None:
    """Check files; write the offenders when asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--eval", type=Path, required=True, help="directory of the evaluation sets")
    parser.add_argument("--write", type=Path, help="write the offending texts there, as a JSON list")
    parser.add_argument("files", type=Path, nargs="+", help="texts.json of a prepared directory, or sets (gzip JSONL)")
    options = parser.parse_args()
    evaluation = Evaluation(options.eval)
    texts = dict.fromkeys(text for path in options.files for text in read_texts(path))
    bad = offenders(texts, evaluation)
    print(f"{len(texts)} texts, {len(bad)} of them offending\n\n{table(evaluation)}")
    if options.write:
        options.write.write_text(json.dumps(bad, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
