"""The commands for people: `rerank` scores texts from files or standard input, `check` says whether this machine can serve.

Both ask a real worker through `client.Client`, so that what they show is what serves.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_INTERRUPTED = 130


def main(command: str, arguments: Sequence[str]) -> int:
    """Run `rerank` or `check`; the exit code. Expected failures become one sentence on standard error."""
    from reranker_worker.byhand import check, rerank
    from reranker_worker.byhand.failures import Failure, failures

    try:
        with failures():
            return rerank.run(arguments) if command == "rerank" else check.run(arguments)
    except Failure as failure:
        print(f"{command}: {failure}", file=sys.stderr)
        return failure.exit_code
    except KeyboardInterrupt:
        print(f"{command}: interrupted.", file=sys.stderr)
        return _INTERRUPTED
