"""The README's promises: its settings table is the dataclass's, its transcript is what the worker really says.

`python -m tests.test_readme` writes the settings table into the README after a setting changed.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

from reranker_worker.config import settings_table

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- settings -->\n", "<!-- end of settings -->"
# The bundled model may be trained anew without a change of the README's last digits.
SCORE_TOLERANCE = 0.01


def table() -> str:
    rows = [f"| `{flag}` | `{variable}` | {default} | {text.replace('|', chr(92) + '|')} |" for flag, variable, default, text in settings_table()]
    return "\n".join(["| flag | variable | default | meaning |", "|---|---|---|---|", *rows]) + "\n"


def transcript() -> list[tuple[str, str]]:
    text = README.read_text().split("<!-- transcript -->")[1].split("```")[1]
    return [(line[0], line[2:]) for line in text.strip().splitlines()]


def test_the_settings_table_is_the_dataclass() -> None:
    written = README.read_text().split(BEGIN)[1].split(END)[0]
    assert written == table(), "run `python -m tests.test_readme` to write it anew"


def test_the_transcript_is_what_the_bundled_worker_says() -> None:
    command = [sys.executable, str(ROOT / "reranking_server.py"), "--log-level", "ERROR"]
    # The test's own deadline (pytest-timeout) ends a read that never comes.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        for side, line in transcript():
            if side == ">":
                worker.stdin.write(line.encode() + b"\n")
                worker.stdin.flush()
            else:
                said = json.loads(worker.stdout.readline())
                assert agrees(json.loads(re.sub(r", ?\.\.\.}$", "}", line)), said), (line, said)
        assert worker.wait() == 0


def agrees(promised: object, said: object) -> bool:
    """Everything promised is said; latencies may differ, scores a little."""
    if isinstance(promised, dict) and isinstance(said, dict):
        return all(name in said and (name == "latency_ms" or agrees(value, said[name])) for name, value in promised.items())
    if isinstance(promised, list) and isinstance(said, list):
        return len(promised) == len(said) and all(agrees(a, b) for a, b in zip(promised, said, strict=True))
    if isinstance(promised, float) and isinstance(said, float):
        return math.isclose(promised, said, abs_tol=SCORE_TOLERANCE)
    return promised == said


if __name__ == "__main__":
    head, rest = README.read_text().split(BEGIN)
    README.write_text(head + BEGIN + table() + END + rest.split(END)[1])
