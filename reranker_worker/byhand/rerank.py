"""`python -m reranker_worker rerank QUERY [FILE ...]`: the best documents first, as a table on a terminal and as JSON lines in a pipe."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from reranker_worker.byhand.documents import STDIN, UNITS, Document, read_documents
from reranker_worker.byhand.failures import BAD_DATA, USAGE, Failure, Parser
from reranker_worker.byhand.progress import Progress
from reranker_worker.byhand.serving import serving
from reranker_worker.byhand.table import Row, encoded, sigmoid, table
from reranker_worker.client import WorkerError
from reranker_worker.config import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from concurrent.futures import Future

    from reranker_worker.client import Answer, Client

# Few enough that progress moves, enough that the engine's passes are full; four in flight keep it busy.
_CHUNK_DOCUMENTS = 64
_MOST_IN_FLIGHT = 4
_LONGEST_WAIT_MS = 3_600_000  # a person at the terminal has Ctrl-C; the wire allows no more
_ENVELOPE_BYTES = 256


@dataclass(slots=True)
class Ranking:
    """Scores in input order, and which documents the model saw only the beginning of."""

    scores: list[float]
    truncated: list[int]


def run(arguments: Sequence[str]) -> int:
    """The command; its exit code."""
    parser = Parser("rerank", "Score texts for a query with the worker's model and print them, best first.")
    parser.add_argument("query", metavar="QUERY", nargs="?", help="what the documents are to be ranked for")
    parser.add_argument("files", metavar="FILE", nargs="*", help="text files; none or - is standard input")
    parser.add_argument("--by", choices=UNITS, help="what one document is (default: a line; JSON lines with text and id are recognised)")
    parser.add_argument("--top", metavar="N", help="print the best N only")
    parser.add_argument("--json", action="store_true", help="JSON lines even on a terminal")
    parser.add_argument("--raw", action="store_true", help="the model's raw output (logit) instead of the probability")
    given, settings = parser.parse(list(arguments))
    query, top = _query(given.query), _top(given.top)
    documents = _documents(given.files or [STDIN], given.by)
    options: dict[str, Any] = {"raw_scores": given.raw}
    if given.request_timeout_ms is None:
        options["timeout_ms"] = _LONGEST_WAIT_MS
    with Progress() as progress, serving(settings, _LONGEST_WAIT_MS / 1e3 + 10.0, progress) as (client, ready):
        ranking = _score(client, ready, query, documents, options, progress)
    order = sorted(range(len(documents)), key=lambda index: (-ranking.scores[index], index))[:top]
    _print(order, ranking, documents, as_json=given.json or not sys.stdout.isatty(), raw=given.raw or ready["score_kind"] != "probability")
    if ranking.truncated:
        text = f"longer than the model's {ready['max_length']} tokens: only its beginning counted"
        print(f"rerank: {len(ranking.truncated)} of {len(documents)} documents {text}.", file=sys.stderr)
    return 0


def _query(raw: str | None) -> str:
    if raw is None:
        raise ConfigError("What are the documents to be ranked for? Give the query as the first argument, in quotes.")
    if not raw.strip():
        raise Failure("The query is empty.", USAGE)
    if any("\ud800" <= char <= "\udfff" for char in raw):
        raise Failure("The query is not valid UTF-8.", USAGE)
    return raw


def _top(raw: str | None) -> int | None:
    if raw is None:
        return None
    if not raw.isdecimal() or int(raw) < 1:
        raise ConfigError(f"--top must be a whole number from 1, not {raw[:64]!r}.")
    return int(raw)


def _documents(names: Sequence[str], unit: str | None) -> list[Document]:
    if STDIN in names and sys.stdin.isatty():
        print("rerank: type the documents, one a line; end with Ctrl-D.", file=sys.stderr)
    return read_documents(names, unit)


# --- scoring -----------------------------------------------------------------------------------------------------------------


def _score(
    client: Client, ready: Answer, query: str, documents: Sequence[Document], options: dict[str, Any], progress: Progress
) -> Ranking:
    """Send the documents in requests that the worker takes, a few at a time, and put the scores together: they are absolute."""
    ranking = Ranking([0.0] * len(documents), [])
    waiting = deque(_chunks(query, documents, ready["limits"]))
    flying: deque[tuple[range, Future[Answer]]] = deque()
    most, done = _MOST_IN_FLIGHT, 0
    while waiting or flying:
        progress.show(f"scored {done:,} of {len(documents):,} documents ...")
        while waiting and len(flying) < most:
            part = waiting.popleft()
            texts = [documents[index].text for index in part]
            flying.append((part, client.submit({"query": query, "documents": texts, **options})))
        part, future = flying.popleft()
        try:
            answer = future.result()
        except WorkerError as error:
            if error.code != "OVERLOADED":
                raise
            # The limits are set low; one request at a time always fits.
            most = 1
            waiting.appendleft(part)
            if not flying:
                time.sleep((error.retry_after_ms or 1) / 1e3)
            continue
        ranking.scores[part.start : part.stop] = answer["scores"]
        ranking.truncated += [part.start + index for index in answer.get("truncated", ())]
        done += len(part)
    return ranking


def _chunks(query: str, documents: Sequence[Document], limits: dict[str, int]) -> Iterator[range]:
    """Ranges of documents for one request each: within the worker's documents and bytes."""
    most = min(_CHUNK_DOCUMENTS, limits["max_documents"], limits["max_waiting_pairs"])
    room = limits["max_line_bytes"] - len(orjson.dumps(query)) - _ENVELOPE_BYTES
    start, used = 0, 0
    for index, document in enumerate(documents):
        size = len(orjson.dumps(document.text)) + 1
        if size > room:
            text = f"{document.source}: this document is {size:,} bytes long, and a request may be {limits['max_line_bytes']:,}"
            raise Failure(f"{text}; split it (--by line, --by paragraph) or raise --max-line-bytes.", BAD_DATA)
        if index - start >= most or used + size > room:
            yield range(start, index)
            start, used = index, 0
        used += size
    yield range(start, len(documents))


# --- printing ----------------------------------------------------------------------------------------------------------------


def _print(order: Sequence[int], ranking: Ranking, documents: Sequence[Document], *, as_json: bool, raw: bool) -> None:
    scores = ranking.scores
    if as_json:
        data = b"".join(_json_line(rank, index, scores[index], documents[index]) for rank, index in enumerate(order, 1))
    else:
        rows = [
            Row(rank, scores[i], sigmoid(scores[i]) if raw else scores[i], documents[i].source, documents[i].text)
            for rank, i in enumerate(order, 1)
        ]
        lines = table(rows, shutil.get_terminal_size().columns)
        data = encoded("".join(line + "\n" for line in lines), sys.stdout.encoding)
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _json_line(rank: int, index: int, score: float, document: Document) -> bytes:
    body: dict[str, object] = {"rank": rank, "index": index, "score": score}
    if document.id is not None:
        body["id"] = document.id
    return orjson.dumps(body | {"source": document.source, "text": document.text}, option=orjson.OPT_APPEND_NEWLINE)
