"""The soak's negative control: the real worker with a leak put in from outside, `python -m tests.soak.leaky KIND [FLAGS...]`."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import Any

_EVERY_SECONDS = 0.1
_LEAKED: list[Any] = []


def _leak(kind: str) -> None:
    if kind == "memory":
        _LEAKED.append(bytearray(os.urandom(1)) * 2_000_000)
    elif kind == "fds":
        _LEAKED.append(os.dup(2))
    elif kind == "threads":
        _LEAKED.append(threading.Thread(target=threading.Event().wait, daemon=True))
        _LEAKED[-1].start()
    elif kind == "children":
        _LEAKED.append(subprocess.Popen(["sleep", "60"]))


def main() -> None:
    """Serve, leaking something ten times a second while there is input."""
    from reranker_worker import cli
    from reranker_worker.worker import Worker

    kind = sys.argv[1]
    receive = Worker.receive
    last = 0.0

    def leaking(self: Worker, data: bytes, now: float) -> None:
        nonlocal last
        if now - last >= _EVERY_SECONDS:
            last = now
            _leak(kind)
        receive(self, data, now)

    Worker.receive = leaking  # type: ignore[method-assign]
    cli.main(["serve", *sys.argv[2:]])


if __name__ == "__main__":
    main()
