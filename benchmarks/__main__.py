"""`python -m benchmarks overhead | throughput | frontdoor [flags]`."""

from __future__ import annotations

import sys

from benchmarks import frontdoor, overhead, throughput

_COMMANDS = {"overhead": overhead.main, "throughput": throughput.main, "frontdoor": frontdoor.main}
_USAGE_ERROR = 64


def main(arguments: list[str]) -> int:
    """Run one benchmark; its exit code (1 when a goal is missed and `--strict` was given)."""
    if not arguments or arguments[0] not in _COMMANDS:
        print(f"usage: python -m benchmarks {{{','.join(_COMMANDS)}}} [--help]", file=sys.stderr)
        return _USAGE_ERROR
    return _COMMANDS[arguments[0]](arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
