"""The one kind of failure that looking for a model can have."""

from __future__ import annotations

CORRUPT = 65
MISSING = 66
NETWORK = 69
CANNOT_CREATE = 73
UNSAFE = 78

_LONGEST_NAME = 200


class ModelError(Exception):
    """A model cannot be used. The text is a sentence or two for the operator: what is wrong and what to do.

    `exit_code` is the worker's exit code: 65 corrupt, 66 missing, 69 network needed, 71 machine unfit, 73 cannot create,
    78 unsafe or bad configuration.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def shown(name: object) -> str:
    """A name for a message: quoted, printable ASCII, and no longer than a line (names come from outside)."""
    text = ascii(str(name))
    return text if len(text) <= _LONGEST_NAME else text[:_LONGEST_NAME] + "...'"
