"""What a worker may be doing when something happens to it."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Any

from host import Host, request

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LOADING = ("--model", "load_ms=20000")
STATES = ["loading", "idle", "scoring", "engine stopped", "draining"]
PROMPT = 1.0  # promised: 100 ms; the rest is for a loaded machine


def while_importing(directory: Path, code: str, after: str = "") -> dict[str, str]:
    """Variables for a worker: each of its processes runs `code` at its first import, and `after` behind it; `here` is the directory."""
    lines = ["import os, select, signal, sys, time", "here = os.path.dirname(__file__)", code, "sys.path.remove(here); del sys.modules['orjson']"]
    (directory / "orjson.py").write_text("\n".join([*lines, "import orjson", after]))
    return {"PYTHONPATH": str(directory)}


def bring_to(spawn: Callable[..., Host], state: str, **options: Any) -> Host:
    """A worker in one of STATES."""
    host = spawn(*(LOADING if state == "loading" else ()), **options)
    if state == "loading":
        assert host.ask({"type": "health"})["status"] == "loading"
        host.wait_engines()
        return host
    host.wait_ready()
    if state == "engine stopped":
        os.kill(host.wait_engines()[0], signal.SIGSTOP)
    if state != "idle":
        host.send(request(["fake:sleep 20000"], id="slow"))
        host.until(lambda: in_flight(host), 5, "a batch in flight")
    if state == "draining":
        host.signal(signal.SIGTERM)
        host.logged("draining")
    return host


def in_flight(host: Host) -> bool:
    return host.ask({"type": "health"})["engines"][0]["in_flight_batches"] > 0


def seconds_to_exit(host: Host, within: float) -> float:
    begin = time.monotonic()
    host.wait_exit(within)
    return time.monotonic() - begin
