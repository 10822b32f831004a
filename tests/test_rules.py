"""Rules that no single test of a module can guard: clocks, imports, one direction of floors."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "reranker_worker"
# No clock, no thread, no I/O: time is an argument.
PURE = [
    "admission desk jobs metrics ordering outbox pace quarantine reports scheduler sharing worker",
    "engine/fleet engine/restarts engine/frames protocol/answers protocol/framing protocol/messages protocol/parsing",
]
FRONT = {"torch", "transformers", "sentence_transformers", "numpy", "tokenizers", "huggingface_hub", "asyncio", "multiprocessing"}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("name", " ".join(PURE).split())
def test_a_pure_module_has_no_clock_no_thread_and_no_descriptor(name: str) -> None:
    forbidden = {"time", "datetime", "threading", "select", "socket", "subprocess", "signal", "asyncio"}
    if name == "engine/fleet":
        forbidden -= {"signal"}  # it names the signal that ended an engine
    assert not imports(PACKAGE / f"{name}.py") & forbidden


def test_logic_uses_the_monotonic_clock_alone() -> None:
    # The wall clock may jump; it only dates log lines and error answers.
    users = {path.name for path in PACKAGE.rglob("*.py") if "time.time" in path.read_text()}
    assert users <= {"cli.py", "logs.py", "stdio.py", "streams.py"}


def test_the_front_imports_nothing_heavy() -> None:
    program = "import sys, json; import reranker_worker.cli, reranker_worker.stdio, reranker_worker.worker, reranker_worker.engine.handle; "
    done = subprocess.run(
        [sys.executable, "-c", program + "print(json.dumps(sorted(sys.modules)))"], cwd=PACKAGE.parent, stdout=subprocess.PIPE, timeout=30, check=True
    )
    assert not {name.split(".")[0] for name in json.loads(done.stdout)} & FRONT


def test_the_threads_of_an_engine_follow_the_affinity_of_the_worker(spawn) -> None:  # type: ignore[no-untyped-def]
    host = spawn(wrapper=["taskset", "-c", "0"])
    assert host.wait_ready()["threads"] == 1


def test_the_engine_is_a_program_of_its_own_and_no_copy_of_the_front(spawn) -> None:  # type: ignore[no-untyped-def]
    # A process forked from one with threads, or with CUDA in use, may hang in a lock that nobody holds any more.
    host = spawn()
    host.wait_ready()
    (engine,) = host.engine_pids()
    assert b"reranker_worker.engine.child" in Path(f"/proc/{engine}/cmdline").read_bytes()
