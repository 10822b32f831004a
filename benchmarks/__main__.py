"""`python -m benchmarks overhead | peers | ... [flags]`; see README.md."""

from __future__ import annotations

import importlib
import sys

_COMMANDS = ("overhead", "frontdoor", "peers", "picture", "latency", "startup", "memory", "owncost", "quality")
_USAGE_ERROR = 64


def main(arguments: list[str]) -> int:
    """Run one benchmark; its exit code (1 when a goal is missed and `--strict` was given)."""
    if not arguments or arguments[0] not in _COMMANDS:
        print(f"usage: python -m benchmarks {{{','.join(_COMMANDS)}}} [--help]", file=sys.stderr)
        return _USAGE_ERROR
    return int(importlib.import_module(f"benchmarks.{arguments[0]}").main(arguments[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
