"""Step 2: build the groups of every set and store them as tokens (`python -m training.build`)."""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from training.backbone import BiEncoder, plain_tokenizer
from training.groups import ClozeTask, Group, Miner, SentenceTask, cloze_tasks, sentence_tasks
from training.sets import SEED, SETS, Row, read_rows
from training.teacher import Vectors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

STORED_TOKENS = 460
_AT_ONCE = 500


def groups_of_set(miner: Miner, vectors: Vectors, queries: Sequence[str]) -> Iterator[Group]:
    """The passage groups of a set."""
    for start in range(0, len(queries), _AT_ONCE):
        part = queries[start : start + _AT_ONCE]
        for query, logits in zip(part, miner.logits(part, vectors.of(part)), strict=True):
            if (group := miner.passage_group(query, logits)) is not None:
                yield group


def groups_of_tasks(tasks: Sequence[SentenceTask | ClozeTask], queries: Vectors) -> Iterator[Group]:
    """What waited for vectors of texts that are no passages."""
    texts: dict[str, None] = {}
    for task in tasks:
        texts.update(dict.fromkeys([*task.answering, *task.others] if isinstance(task, SentenceTask) else [task.query]))
    print(f"{len(texts)} sentences", flush=True)
    vectors = dict(zip(texts, BiEncoder().vectors(list(texts)).astype(np.float32), strict=True))
    for task in tasks:
        group = task.group(vectors, queries.of([task.query])[0]) if isinstance(task, SentenceTask) else task.group(vectors)
        if group is not None:
            yield group


def build(data: Path, work: Path, banned: frozenset[str]) -> list[Group]:
    """All groups."""
    rng = random.Random(SEED)
    passages, queries = Vectors(work, "passages"), Vectors(work, "queries")
    groups: list[Group] = []
    tasks: list[SentenceTask | ClozeTask] = []
    for name, share in SETS.items():
        rows: list[Row] = [row for row in read_rows(data, name, banned) if row.positive in passages]
        miner = Miner(name, rows, passages, rng)
        chosen = sorted(miner.positives)
        rng.shuffle(chosen)
        groups += groups_of_set(miner, queries, chosen[: share.queries])
        rng.shuffle(rows)
        tasks += sentence_tasks(miner, rows, share.sentence_queries)
        tasks += cloze_tasks(miner, share.cloze_queries)
        print(f"{name}: {len(miner.pool)} passages, {len(chosen)} queries; {len(groups)} groups, {len(tasks)} tasks so far", flush=True)
    return groups + list(groups_of_tasks(tasks, queries))


def store(groups: Sequence[Group], work: Path) -> None:
    """groups.jsonl (numbers of texts), tokens.npz (their tokens), texts.json (for the leakage check)."""
    numbers: dict[str, int] = {}
    with (work / "groups.jsonl").open("w", encoding="utf-8") as lines:
        for group in groups:
            query, *texts = (numbers.setdefault(text, len(numbers)) for text in (group.query, *group.texts))
            logits, probabilities = ([round(float(value), 3) for value in values] for values in (group.logits, group.probabilities))
            row = {"kind": group.kind, "query": query, "texts": texts, "logits": logits, "probabilities": probabilities, "length": group.length}
            lines.write(json.dumps(row) + "\n")
    tokenizer = plain_tokenizer(work / "tokenizer.json")
    rows = [np.asarray(one.ids[:STORED_TOKENS], np.uint16) for one in tokenizer.encode_batch(list(numbers), add_special_tokens=False)]
    ends = np.cumsum([0, *map(len, rows)])
    np.savez(work / "tokens.npz", tokens=np.concatenate(rows), ends=ends)
    (work / "texts.json").write_text(json.dumps(list(numbers), ensure_ascii=False), encoding="utf-8")
    _print_sizes(groups, numbers, np.diff(ends))


def _print_sizes(groups: Sequence[Group], numbers: dict[str, int], lengths: np.ndarray) -> None:
    count, pairs, tokens = Counter[str](), Counter[str](), Counter[str]()
    for group in groups:
        count[group.kind] += 1
        pairs[group.kind] += len(group.texts)
        tokens[group.kind] += sum(min(group.length, int(lengths[numbers[text]] + lengths[numbers[group.query]] + 3)) for text in group.texts)
    for kind in count:
        print(f"{kind}: {count[kind]} groups, {pairs[kind]} pairs, {tokens[kind] / 1e6:.1f} million tokens")


def main() -> None:
    """Build and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="directory of the training sets (gzip JSONL)")
    parser.add_argument("--work", type=Path, required=True, help="directory that training.teacher has filled")
    parser.add_argument("--banned", type=Path, help="texts to leave out (written by training.check_leakage)")
    options = parser.parse_args()
    banned = frozenset(json.loads(options.banned.read_text(encoding="utf-8"))) if options.banned else frozenset()
    store(build(options.data, options.work, banned), options.work)


if __name__ == "__main__":
    main()
