"""The commands: serve (default), prewarm, check, bench, rerank. `serve` claims stdout before anything is imported that could print.

This file is read by any Python 3 from 3.7 on, so that one that is too old can be told so.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reranker_worker.config import Config
    from reranker_worker.engine.handle import EngineProcess

USAGE_ERROR = 64
INTERNAL_ERROR = 70
BAD_CONFIGURATION = 78
OLDEST_PYTHON = (3, 11)
COMMANDS = ("serve", "prewarm", "check", "bench", "rerank")
HELP = frozenset({"-h", "--help", "--version"})
_OTHER_PYTHON = "start it with the Python of its environment (such as .venv/bin/python)"


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command and end the process with its exit code (sysexits.h; see README)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "serve"
    if sys.version_info < OLDEST_PYTHON:
        version = ".".join(map(str, sys.version_info[:2]))
        needed = ".".join(map(str, OLDEST_PYTHON))
        _refuse_python(command, f"The worker needs Python {needed} or newer, and {sys.executable} is {version}; {_OTHER_PYTHON}.", 1)
    if command == "serve" and HELP.isdisjoint(arguments):
        _serve(arguments)
    if command not in COMMANDS:
        sys.stderr.write(f"Unknown command {command!a}; known are {', '.join(COMMANDS)} (without one: serve).\n")
        sys.exit(USAGE_ERROR)
    if command == "serve":
        _explain(arguments)
    try:
        from reranker_worker import byhand

        code = byhand.main(command, arguments)
    except ModuleNotFoundError as error:
        _refuse_python(command, _missing(error), 1)
    sys.exit(code)


def _explain(arguments: list[str]) -> NoReturn:
    """--help and --version: for people, so stdout stays theirs."""
    from reranker_worker import __version__
    from reranker_worker.config import load_config

    if "--version" in arguments:
        print(__version__)
    else:
        print(f"Commands: {', '.join(COMMANDS)} (python -m reranker_worker COMMAND --help). The flags of serve:\n")
        load_config(["--help"], {})
    sys.exit(0)


def _serve(arguments: list[str]) -> NoReturn:
    """Serve until the host is done. Ends by `os._exit`: threads that a deaf host blocks must not hold the process."""
    from reranker_worker.streams import claim, refuse_start

    streams = claim()
    try:
        from reranker_worker.config import ConfigError, load_config, misnamed

        try:
            config = load_config(arguments, os.environ)
            processes = _start_engines(config)
            from reranker_worker.stdio import serve

            code = serve(config, streams, processes, misnamed(os.environ))
        except ConfigError as error:
            refuse_start(streams, str(error))
            code = USAGE_ERROR
    except ModuleNotFoundError as error:
        _refuse_python("serve", _missing(error), streams.answers_fd)
    except Exception as error:  # the process boundary: never a traceback with request text
        from reranker_worker.logs import last_words  # not before: a start that goes well waits for no import that it can do without

        last_words(f"internal error: {type(error).__name__} in {_where(error)}")
        code = INTERNAL_ERROR
    os._exit(code)


def _missing(error: ModuleNotFoundError) -> str:
    return f"The Python package {error.name} is not installed for {sys.executable}; {_OTHER_PYTHON}, or run pip install -r requirements.txt."


def _refuse_python(command: str, sentence: str, answers_fd: int) -> NoReturn:
    """The host or the person started the wrong Python, as one does who forgets the virtual environment: say so with nothing but its own library."""
    if command != "serve":
        sys.stderr.write(f"{command}: {sentence}\n")
        sys.exit(BAD_CONFIGURATION)
    import json

    from reranker_worker.logs import last_words

    last_words(sentence)
    answer = {"error": sentence, "code": "MODEL_LOAD_ERROR", "retryable": False, "timestamp": round(time.time(), 3)}
    with contextlib.suppress(OSError):
        os.write(answers_fd, json.dumps(answer).encode() + b"\n")
    os._exit(BAD_CONFIGURATION)


def _start_engines(config: Config) -> list[EngineProcess]:
    """The first begins to load while the rest of the front is imported: `ready` comes 5 to 8 % sooner (measured with bytecode kept, prewarmed
    MiniLM-L6; without, a ninth). More, or one on a single CPU, would keep the front from its first answers: with four that of a heartbeat
    came after three times as long.
    """
    from reranker_worker.engine.handle import EngineProcess
    from reranker_worker.machine import usable_threads

    processes = [EngineProcess(config, os.environ) for _ in range(config.engines)]
    if usable_threads() > 1:
        processes[0].start_early()
    return processes


def _where(error: Exception) -> str:
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    return " < ".join(f"{os.path.basename(frame.filename)}:{frame.lineno}" for frame in reversed(frames[-6:]))
