"""What can go wrong for a person at the command line: a sentence and an exit code (sysexits.h, as the worker's own)."""

from __future__ import annotations

import argparse
import contextlib
import os
from typing import TYPE_CHECKING, Any, NoReturn

from reranker_worker.client import WorkerError, WorkerGoneError
from reranker_worker.config import Config, ConfigError, add_flags, from_flags

if TYPE_CHECKING:
    from collections.abc import Iterator

USAGE = 64
BAD_DATA = 65
NO_INPUT = 66
INTERNAL = 70
IO_ERROR = 74
_SIGNALLED = 128
# What to do, by the worker's exit code; its own sentence comes first and is more exact.
_ADVICE = {
    64: "Correct the setting; `--help` lists all of them.",
    65: "Fetch the model again, and check that its files are complete.",
    66: "Correct the name or the path of the model (--model, RERANKING_MODEL_PATH).",
    69: "Connect this machine to the network once, or copy the model's directory to it and name that.",
    70: "Run the check again with --log-level DEBUG and read the log above.",
    71: "Use a smaller model, another device (--device cpu), or packages built for this machine.",
    73: "Check the permissions and the free space of the cache's directory.",
    78: "Change the setting that the sentence above names.",
}


def advice(exit_code: int) -> str:
    """What to do about a worker that ended so."""
    return _ADVICE.get(exit_code, _ADVICE[INTERNAL])


class Failure(Exception):  # noqa: N818  # "could not" is what a person reads, not "error"
    """An expected failure: the text is a sentence or two, `exit_code` is the command's."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextlib.contextmanager
def failures() -> Iterator[None]:
    """Turn what settings and the worker raise into a `Failure`; a reader that left early (`| head`) ends the command quietly."""
    try:
        yield
    except ConfigError as error:
        raise Failure(str(error), USAGE) from None
    except WorkerGoneError as error:
        raise Failure(str(error), exit_code_of(error)) from None
    except WorkerError as error:
        raise Failure(str(error), INTERNAL) from None


def exit_code_of(error: WorkerGoneError) -> int:
    """The worker's exit code passed on, as a shell would for a signal. A worker that left without a complaint still failed."""
    if error.exit_code is None:
        return INTERNAL
    return error.exit_code or INTERNAL if error.exit_code >= 0 else _SIGNALLED - error.exit_code


class Parser(argparse.ArgumentParser):
    """argparse with the settings' flags; a usage error is a ConfigError, as everywhere in the worker."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(
            prog=f"python -m reranker_worker {command}",
            description=description,
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=120),
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message[0].upper()}{message[1:]}. Run {self.prog} --help for the list of flags.")

    def parse(self, arguments: list[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
        """(all flags, the worker's settings among them that were given); settings are validated before anything starts."""
        add_flags(self.add_argument_group("settings of the worker"))  # type: ignore[arg-type]  # a group takes the same calls
        given = self.parse_intermixed_args(arguments)
        from_flags(given, os.environ)
        return given, {name: value for name, value in vars(given).items() if name in Config.__slots__ and value is not None}
