"""The engine process: loads the model, then answers batches from one pipe on another until the front is gone.

Work overlaps: one thread reads frames (and sees the front's end), one tokenizes and starts batches, some score, the main one answers.
Nothing that a request contains is ever logged: of an exception only its type and place.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import sys
import threading
import time
import traceback
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from reranker_worker.backends import Backend, BackendError, library_versions, open_backend
from reranker_worker.config import Config
from reranker_worker.engine.frames import FrameReader, pack
from reranker_worker.engine.scoring import NO_MEMORY, NO_ROOM, EngineSickError, Scorer, Started
from reranker_worker.machine import die_first, no_core_dump, usable_threads
from reranker_worker.models import ModelError, ResolvedModel, resolve
from reranker_worker.models.known_pairs import ANY_PAIRS, read_known_pairs, tolerance

if TYPE_CHECKING:
    from collections.abc import Sequence

_CHUNK_BYTES = 1 << 20
_PROGRESS_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1
_INTERNAL_ERROR = 70
_CORRUPT = 65
_UNFIT = 71
_BAD_CONFIGURATION = 78


def main(argv: Sequence[str]) -> None:
    """Run until the front goes away. argv: the results descriptor, the front's process id."""
    results_fd, front_pid = int(argv[0]), int(argv[1])
    _isolate(front_pid)
    # A child that a library starts must not hold our pipe open: the front sees our end by its closing.
    os.set_inheritable(results_fd, False)
    requests_fd = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    engine = _Engine(requests_fd, results_fd)
    try:
        engine.run()
    except EngineSickError as error:
        _log(f"the device is lost ({error}); ending for a restart")
    except BaseException as error:  # the process boundary
        _log(_place(error))
    finally:
        _abandon()


def _abandon() -> NoReturn:
    """End for a restart, whatever the other threads do: without memory even reporting an error may fail, and waiting never ends."""
    os._exit(_INTERNAL_ERROR)


def _isolate(front_pid: int) -> None:
    """Live exactly as long as the front: its signals are not ours (it drains), its death is."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # behind: what came meanwhile would end us
    die_first()
    no_core_dump()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != front_pid:
        os._exit(0)


class _Engine:
    """The loop. `_incoming` carries frames to the tokenizing thread, `_passed` a batch to the answering one each time that a share of it ends."""

    def __init__(self, requests_fd: int, results_fd: int) -> None:
        self._requests_fd = requests_fd
        self._results_fd = results_fd
        self._incoming: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._passed: queue.SimpleQueue[Started | BaseException] = queue.SimpleQueue()
        self._sending = threading.Lock()
        self._last_sent = 0.0

    def run(self) -> None:
        """Load, report, serve; returns only by an exception."""
        threading.Thread(target=self._read, name="read", daemon=True).start()
        config = Config(**self._incoming.get()["config"])
        scorer = self._load(config)
        while True:
            started = self._passed.get()
            if isinstance(started, BaseException):
                raise started
            # Whatever is whole is answered: a batch that ends before one that began earlier does not wait for it.
            started.unfinished -= 1
            if started.unfinished <= 0:
                self._send(scorer.finish(started))

    def _read(self) -> None:
        frames = FrameReader()
        code = _INTERNAL_ERROR
        try:
            while data := os.read(self._requests_fd, _CHUNK_BYTES):
                for frame in frames.feed(data):
                    self._incoming.put(frame)
            code = 0  # the front is gone; whatever the other threads do is for nobody
        except BaseException as error:  # no memory, a broken frame: without this thread the engine would hang, deaf
            _log(_place(error))
        finally:
            os._exit(code)

    def _tokenize(self, scorer: Scorer) -> None:
        try:
            while True:
                started = scorer.start(scorer.prepare(self._incoming.get()), self._progress)
                if not started.futures:
                    self._passed.put(started)
                for future in started.futures:
                    future.add_done_callback(partial(self._tell, started))
        except BaseException as error:  # handed to the main thread, which ends the process; what is being scored is scored again
            self._tell(error)

    def _tell(self, news: Started | BaseException, _: object = None) -> None:
        try:
            self._passed.put(news)
        except MemoryError:  # the main thread would wait for ever
            _abandon()

    def _load(self, config: Config) -> Scorer:
        """Open the model and make every thread before `ready`: afterwards there may be no memory for one, and nobody would be told."""
        begin = time.monotonic()
        try:
            self._stage("resolving", 0, 0)
            model = _resolve(config, self._stage)
            self._stage("loading", 0, 0)
            threads = config.threads or max(1, usable_threads() // config.engines)
            backend = open_backend(config, model, threads, _log)
            self._stage("testing", 0, 0)
            scorer = Scorer(backend, config, _log, _abandon)
            speed = _self_test(scorer, backend, model, config)
            threading.Thread(target=self._tokenize, args=(scorer,), name="tokenize", daemon=True).start()
        except (ModelError, BackendError) as error:
            self._give_up(str(error), error.exit_code)
        except ModuleNotFoundError as error:
            self._give_up(f"The Python package {error.name} is not installed; run pip install -r requirements.txt.", _BAD_CONFIGURATION)
        except Exception as error:  # a broken model can raise anything
            _log(_place(error))
            self._give_up(f"The model could not be loaded: {_summary(error)}", _CORRUPT)
        info = {name: getattr(backend.info, name) for name in backend.info.__slots__}
        info |= {"model": model.name, "model_path": str(model.path), "model_revision": model.revision, "model_source": model.source}
        info |= {"load_time_ms": round((time.monotonic() - begin) * 1e3), "threads": threads, "tokens_per_ms": speed}
        info["versions"] = library_versions(backend)
        self._send({"event": "ready", "info": info})
        return scorer

    def _give_up(self, error: str, exit_code: int) -> None:
        self._send({"event": "load_failed", "error": error, "exit_code": exit_code})
        os._exit(exit_code)

    def _stage(self, stage: str, done: int, total: int) -> None:
        self._send({"event": "loading", "stage": stage, "done": done, "total": total})

    def _progress(self, batch: int) -> None:
        if time.monotonic() - self._last_sent >= _PROGRESS_SECONDS:
            self._send({"event": "progress", "batch": batch})

    def _send(self, body: dict[str, Any]) -> None:
        frame = memoryview(pack(body))
        with self._sending:
            while frame:
                frame = frame[os.write(self._results_fd, frame) :]
            self._last_sent = time.monotonic()


def _resolve(config: Config, stage: Any) -> ResolvedModel:
    if config.backend == "fake":
        from pathlib import Path

        return ResolvedModel(name=config.model, path=Path(), revision=None, source="fake")
    return resolve(config, stage)


def _self_test(scorer: Scorer, backend: Backend, model: ResolvedModel, config: Config) -> float:
    """Score known pairs before `ready`; returns the speed seen, in tokens per millisecond. Raises BackendError if a score is wrong."""
    expected: list[tuple[str, str, float | None]] = [(query, document, None) for query, document in ANY_PAIRS]
    if config.backend != "fake":
        expected += read_known_pairs(model.path)
    groups = [[query, 0, 0, "", [document]] for query, document, _ in expected]
    frame = scorer.score(scorer.prepare({"batch": 0, "groups": groups}), lambda batch: None)
    if frame["failures"]:
        raise _refusal(tuple(frame["failures"][0][1:]), backend, config)
    allowed = tolerance(backend.info.dtype)
    for (_, _, wanted), logit in zip(expected, frame["logits"], strict=True):
        if wanted is not None and abs(wanted - logit) > allowed:
            text = f"The model scores a known pair {logit:.4f} where {wanted:.4f} is expected; its files are not what was tested."
            raise BackendError(text, _CORRUPT)
    # The first pass warmed up; this one tells the speed, by so little text that a fast start stays fast.
    passages = [f"{number} reranking" + " speed" * 60 for number in range(4)]
    frame = scorer.score(scorer.prepare({"batch": 0, "groups": [["speed", 0, 0, "", passages]]}), lambda batch: None)
    return float(sum(frame["tokens"]) / max(0.05, frame["tokenize_ms"] + frame["inference_ms"]))


def _refusal(failure: tuple[str, str], backend: Backend, config: Config) -> BackendError:
    """Why not even a short pair can be scored."""
    if failure == NO_MEMORY:
        text = "There is not enough memory to score one short pair; free some, or raise the limit of this process "
        return BackendError(text + "(ulimit -v, the container's or the unit's).", _UNFIT)
    if failure == NO_ROOM and backend.info.max_length == config.max_length:
        text = f"--max-length {config.max_length} leaves a short query no room for a document; set more, or 0 for all that the model can read."
        return BackendError(text, _BAD_CONFIGURATION)
    return BackendError(f"The model cannot score a known pair: {failure[1]}", _CORRUPT)


def _summary(error: Exception) -> str:
    """One line of a loading error; no request has been seen yet, so its text is the model's or the library's."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first[:300]}".rstrip(": ")


def _place(error: BaseException) -> str:
    """Type and place of an exception, without its text, which may quote a document."""
    frames = traceback.extract_tb(error.__traceback__)
    where = " < ".join(f"{os.path.basename(frame.filename)}:{frame.lineno} {frame.name}" for frame in reversed(frames[-6:]))
    return f"{type(error).__name__} at {where}"


def _log(message: str) -> None:
    """One line to the front, which wraps it as a log record."""
    os.write(2, message.replace("\n", " ").encode("ascii", "backslashreplace")[:4000] + b"\n")
