"""A worker for as long as a command runs: started, watched while it loads, stopped; its log kept for the case that it dies."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from typing import IO, TYPE_CHECKING, Any

from reranker_worker.client import Client, WorkerError, WorkerGoneError, WorkerTimeoutError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from reranker_worker.byhand.progress import Progress
    from reranker_worker.client import Answer

_POLL_SECONDS = 0.1
_STOP_SECONDS = 2.0
_MOST_LOG_BYTES = 4096
_STAGES = {
    "starting": "starting the engine",
    "resolving": "looking for the model",
    "download": "downloading the model",
    "verify": "verifying the model's files",
    "loading": "loading the model",
    "testing": "testing the model",
}


@contextlib.contextmanager
def serving(settings: dict[str, Any], timeout_s: float, progress: Progress) -> Iterator[tuple[Client, Answer]]:
    """A worker that is ready, and its `ready` line. Raises WorkerGoneError when it cannot start."""
    with _log(passed_through="log_level" in settings) as log:
        client = Client(timeout_s=timeout_s, stop_timeout_s=_STOP_SECONDS, stderr=log, **settings)
        try:
            yield client, _wait_ready(client, progress)
        except BaseException:
            client.stop(0.0)
            raise
        client.stop()


@contextlib.contextmanager
def _log(*, passed_through: bool) -> Iterator[IO[bytes] | None]:
    """Where the worker's log goes: who sets a level sees it, else its end is shown only when the worker dies without a word."""
    with tempfile.TemporaryFile() as log:
        try:
            yield None if passed_through else log
        except WorkerGoneError as error:
            if error.code == "SERVER_ERROR":
                log.seek(max(0, log.seek(0, os.SEEK_END) - _MOST_LOG_BYTES))
                sys.stderr.write(log.read().decode("ascii", "backslashreplace"))
            raise


def _wait_ready(client: Client, progress: Progress) -> Answer:
    """Wait for the worker, telling what it does meanwhile. It gives up by itself when its start makes no progress."""
    while True:
        try:
            return client.wait_ready(_POLL_SECONDS)
        except WorkerTimeoutError:
            progress.show(_stage(client) + " ...")


def _stage(client: Client) -> str:
    try:
        engines = client.request({"type": "health"}, timeout_s=_POLL_SECONDS)["engines"]
    except WorkerError:  # just born, busy or gone: the next wait tells
        return _STAGES["starting"]
    return _STAGES.get(str(engines[0]["stage"]) if engines else "", _STAGES["starting"])
