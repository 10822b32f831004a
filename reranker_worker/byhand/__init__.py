"""The commands for people: `rerank` scores texts, `check` says whether this machine can serve, `bench` how fast, `prewarm` makes ready.

All but `prewarm` ask a real worker through `client.Client`, so that what they show is what serves.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = {
    "rerank": "reranker_worker.byhand.rerank",
    "check": "reranker_worker.byhand.check",
    "bench": "reranker_worker.byhand.bench",
    "prewarm": "reranker_worker.prewarm",
}
_INTERRUPTED = 130


def main(command: str, arguments: Sequence[str]) -> int:
    """Run one of the commands; the exit code. Expected failures become one sentence on standard error."""
    from reranker_worker.byhand.failures import Failure, failures

    try:
        with failures():
            return int(importlib.import_module(COMMANDS[command]).run(arguments))
    except Failure as failure:
        print(f"{command}: {failure}", file=sys.stderr)
        return failure.exit_code
    except KeyboardInterrupt:
        print(f"{command}: interrupted.", file=sys.stderr)
        return _INTERRUPTED
