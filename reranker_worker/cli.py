"""The commands: serve (default), rerank, check. `serve` claims stdout before anything is imported that could print."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Sequence

USAGE_ERROR = 64
INTERNAL_ERROR = 70
COMMANDS = ("serve", "rerank", "check")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command and end the process with its exit code (sysexits.h; see README)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in ("rerank", "check"):
        from reranker_worker import byhand

        sys.exit(byhand.main(arguments[0], arguments[1:]))
    _serve(arguments[1:] if arguments and arguments[0] == "serve" else arguments)


def _serve(arguments: list[str]) -> NoReturn:
    """Serve until the host is done. Ends by `os._exit`: threads that a deaf host blocks must not hold the process."""
    if not {"-h", "--help", "--version"} & set(arguments):
        from reranker_worker import stdio

        streams = stdio.claim()
    from reranker_worker import __version__
    from reranker_worker.config import ConfigError, load_config

    if "--version" in arguments:
        print(__version__)
        sys.exit(0)
    try:
        config = load_config(arguments, os.environ)
        code = stdio.serve(config, streams, os.environ)
    except ConfigError as error:
        stdio.refuse_start(streams, str(error))
        code = USAGE_ERROR
    except Exception as error:  # the process boundary: never a traceback with request text
        stdio.last_words(f"internal error: {type(error).__name__} in {_where(error)}")
        code = INTERNAL_ERROR
    os._exit(code)


def _where(error: Exception) -> str:
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    return " < ".join(f"{os.path.basename(frame.filename)}:{frame.lineno}" for frame in reversed(frames[-6:]))
