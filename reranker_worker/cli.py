"""The commands: serve (default), prewarm, check, bench, rerank. `serve` claims stdout before anything is imported that could print."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reranker_worker.config import Config
    from reranker_worker.engine.handle import EngineProcess

USAGE_ERROR = 64
INTERNAL_ERROR = 70
COMMANDS = ("serve", "prewarm", "check", "bench", "rerank")
HELP = frozenset({"-h", "--help", "--version"})


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command and end the process with its exit code (sysexits.h; see README)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "serve"
    if command == "serve" and HELP.isdisjoint(arguments):
        _serve(arguments)
    if command not in COMMANDS:
        sys.stderr.write(f"Unknown command {command!a}; known are {', '.join(COMMANDS)} (without one: serve).\n")
        sys.exit(USAGE_ERROR)
    if command == "serve":
        _explain(arguments)
    from reranker_worker import byhand

    sys.exit(byhand.main(command, arguments))


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
    from reranker_worker.streams import claim, last_words, refuse_start

    streams = claim()
    try:
        from reranker_worker.config import ConfigError, load_config

        try:
            config = load_config(arguments, os.environ)
            processes = _start_engines(config)
            from reranker_worker.stdio import serve

            code = serve(config, streams, processes)
        except ConfigError as error:
            refuse_start(streams, str(error))
            code = USAGE_ERROR
    except Exception as error:  # the process boundary: never a traceback with request text
        last_words(f"internal error: {type(error).__name__} in {_where(error)}")
        code = INTERNAL_ERROR
    os._exit(code)


def _start_engines(config: Config) -> list[EngineProcess]:
    """The first begins to load while the rest of the front is imported: `ready` comes a ninth sooner (measured, prewarmed MiniLM-L6). More, or one
    on a single CPU, would keep the front from its first answers: with four that of a heartbeat came after three times as long.
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
