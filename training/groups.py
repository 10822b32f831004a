"""Groups of one query and eight texts, with the teacher's scores.

The teacher's score is a logit: 20 x cosine of the bi-encoder + 6 x scaled BM25 + 4 for a labelled answer. Three kinds of groups: passages
(labelled answers, given negatives, mined ones, random ones), sentences (of a passage that answers and of some that do not), and cloze (a sentence
taken out of a passage must find it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from training.bm25 import BM25
from training.texts import sentences, vary

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator, Sequence

    from training.sets import Row
    from training.teacher import Vectors

COSINE, LEXICAL, LABEL, SAME_PASSAGE = 20.0, 6.0, 4.0, 1.5
SIZE = 8
LENGTH, LONG_LENGTH = 224, 448  # tokens of a pair
LONG_SHARE, LONG_SIZE, LONG_WORDS = 0.04, 6, 50
WORST_RANK, WORST_CLOZE_RANK = 200, 60  # a labelled answer that the teacher ranks below is taken for noise
CLAIMS_LAST = ("acl_title", "pubmedqa", "covidqa")  # the last sentence of an abstract is its claim

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Group:
    """A query and texts; logits to be matched as a distribution, probabilities to be matched one by one."""

    kind: str
    query: str
    texts: Sequence[str]
    logits: Sequence[float]
    probabilities: Sequence[float]
    length: int = LENGTH


def labelled(kind: str, query: str, texts: Sequence[str], logits: Array, length: int = LENGTH) -> Group:
    """The first text is the answer; another is as probable as the teacher finds it beside the answer."""
    rest = np.minimum(0.6, np.exp(np.minimum(logits[1:] - logits[0], 0)))
    return Group(kind, query, texts, logits.tolist(), [0.95, *rest.tolist()], length)


def unlabelled(query: str, texts: Sequence[str], logits: Array) -> Group:
    """No text is known to be the answer; the best probably is."""
    return Group("sentences", query, texts, logits.tolist(), (0.7 * np.exp(logits - logits.max())).tolist())


class Miner:
    """The passages of one set, seen by the teacher."""

    def __init__(self, name: str, rows: Sequence[Row], vectors: Vectors, rng: random.Random) -> None:
        self.name, self.rng = name, rng
        texts = {text for row in rows for text in (row.positive, *row.negatives)}
        self.pool = sorted(text for text in texts if text in vectors)
        self.place = {text: place for place, text in enumerate(self.pool)}
        self.bm25 = BM25(self.pool)
        self.vectors = vectors.of(self.pool)
        self.positives: dict[str, list[int]] = {}
        self.negatives: dict[str, list[int]] = {}
        for row in rows:
            self.positives.setdefault(row.query, []).append(self.place[row.positive])
            self.negatives.setdefault(row.query, []).extend(self.place[text] for text in row.negatives if text in self.place)

    def logits(self, queries: Sequence[str], vectors: Array) -> Array:
        """The teacher's logits of every passage, without labels."""
        logits: Array = COSINE * (vectors @ self.vectors.T) + LEXICAL * self.bm25.score(queries)
        return logits

    def pick(self, logits: Array, positives: Sequence[int], given: Sequence[int]) -> list[int]:
        """Negatives: two given, two of the ten best, one of the fifty after them, the rest random."""
        best = [int(place) for place in np.argsort(-logits)[:60] if place not in positives]
        found = list(dict.fromkeys(self.rng.sample(sorted(set(given)), min(2, len(set(given))))))
        for source, count in ((best[:10], 2), (best[10:], 1)):
            fresh = [place for place in source if place not in found]
            found += self.rng.sample(fresh, min(count, len(fresh)))
        for place in self.rng.sample(range(len(self.pool)), min(len(self.pool), 2 * SIZE)):
            if len(found) < SIZE - 1 and place not in found and place not in positives:
                found.append(place)
        return found

    def passage_group(self, query: str, logits: Array) -> Group | None:
        """The labelled answer among negatives; a few with every text made long."""
        positives = sorted(set(self.positives[query]), key=lambda place: -logits[place])
        answer = positives[0] if self.rng.random() < 0.5 else self.rng.choice(positives)
        if (logits > logits[answer]).sum() > WORST_RANK:
            return None
        places = [answer, *self.pick(logits, positives, [place for place in self.negatives[query] if place not in positives])]
        if self.rng.random() < LONG_SHARE and len(self.pool[answer].split()) > LONG_WORDS:
            return self._long_group(query, logits, places[:LONG_SIZE], positives)
        return labelled("passages", vary(query, self.rng), [self.pool[place] for place in places], self._with_label(logits[places]))

    def _long_group(self, query: str, logits: Array, places: Sequence[int], positives: Sequence[int]) -> Group:
        """Every text between two random ones: as good as its best part."""
        texts, best = [], []
        for place in places:
            parts = [place, *(other for other in self.rng.choices(range(len(self.pool)), k=2) if other not in positives)]
            best.append(max(logits[part] for part in parts))
            self.rng.shuffle(parts)
            texts.append(" ".join(self.pool[part] for part in parts))
        return labelled("long", vary(query, self.rng), texts, self._with_label(np.array(best)), LONG_LENGTH)

    @staticmethod
    def _with_label(logits: Array) -> Array:
        logits = logits.astype(np.float64)
        logits[0] += LABEL
        return logits


@dataclass(frozen=True, slots=True)
class SentenceTask:
    """Sentences that wait for their vectors."""

    miner: Miner
    query: str
    answering: list[str]
    others: list[str]

    def group(self, vectors: dict[str, Array], query_vector: Array) -> Group:
        """Half of it the best by the teacher, half random."""
        texts = list(dict.fromkeys(self.answering + self.others))
        bonus = SAME_PASSAGE * np.isin(texts, self.answering)
        lexical = LEXICAL * self.miner.bm25.score([self.query], texts)[0]
        logits = COSINE * (np.array([vectors[text] for text in texts]) @ query_vector) + lexical + bonus
        order = np.argsort(-logits).tolist()
        places = order[: SIZE // 2] + self.miner.rng.sample(order[SIZE // 2 :], min(SIZE // 2, max(0, len(order) - SIZE // 2)))
        return unlabelled(vary(self.query, self.miner.rng), [texts[place] for place in places], logits[places])


@dataclass(frozen=True, slots=True)
class ClozeTask:
    """A sentence that waits for its vector, and the passage that it was taken from."""

    miner: Miner
    query: str
    body: str
    own: int

    def group(self, vectors: dict[str, Array]) -> Group | None:
        """The rest of the passage among other passages."""
        logits = self.miner.logits([self.query], vectors[self.query][None])[0]
        lexical = float(self.miner.bm25.score([self.query], [self.body])[0, 0])
        body = COSINE * float(self.miner.vectors[self.own] @ vectors[self.query]) - 2 + LEXICAL * lexical  # 2: it has lost the sentence
        if (logits > body).sum() > WORST_CLOZE_RANK:
            return None
        places = self.miner.pick(logits, [self.own], [])
        texts = [self.body, *(self.miner.pool[place] for place in places)]
        return labelled("cloze", vary(self.query, self.miner.rng), texts, np.array([body + LABEL, *logits[places]]))


def sentence_tasks(miner: Miner, rows: Sequence[Row], count: int) -> Iterator[SentenceTask]:
    """For some queries."""
    for row in rows[:count]:
        answering = sentences(row.positive)
        others = [part for text in miner.rng.sample(row.negatives, min(2, len(row.negatives))) for part in sentences(text)]
        miner.rng.shuffle(answering)
        miner.rng.shuffle(others)
        if len(answering) > 1 and len(answering) + len(others) >= SIZE // 2:
            yield SentenceTask(miner, row.query, answering[:5], others[:4])


def cloze_tasks(miner: Miner, count: int) -> Iterator[ClozeTask]:
    """For some passages of at least four sentences."""
    passages = [text for text in miner.pool if len(text.split()) >= LONG_WORDS]
    miner.rng.shuffle(passages)
    for text in passages[:count]:
        parts = sentences(text)
        usable = [part for part in parts if 7 <= len(part.split()) <= 35]
        if len(parts) < 4 or not usable:
            continue
        query = usable[-1] if miner.name in CLAIMS_LAST and miner.rng.random() < 0.5 else miner.rng.choice(usable)
        yield ClozeTask(miner, query, " ".join(text.replace(query, " ").split()), miner.place[text])
