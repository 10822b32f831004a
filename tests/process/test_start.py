"""Starts that fail or hang, and wrong usage."""

from __future__ import annotations

import subprocess
import sys

import pytest
from host import request
from states import LOADING


def test_a_start_that_hangs_is_given_up_while_controls_are_answered(spawn):
    host = spawn(*LOADING, "--start-timeout-ms", "1000")
    assert host.ask({"type": "heartbeat"}, 3)["status"] == "alive"
    assert host.ask({"type": "ready"})["reason"] == "loading"
    host.send(request(["a"], id=1))
    cause, refusal = host.read_lines(2)
    assert cause["code"] == "MODEL_LOAD_ERROR"
    assert isinstance(cause["error"], str)
    assert "id" not in cause
    assert (refusal["id"], refusal["code"]) == (1, "NOT_READY")
    assert host.wait_exit() == 70


USAGE = [
    ["--no-such-flag"],
    ["--batch-size", "zero"],
    ["--batch-size", "0"],
    ["--backend", "magic"],
    ["surprise"],
    ["--log-level"],
    [b"--model", b"bad\xffname"],
    [b"--\xff\xfe"],
    ["--model", ""],
    ["--two\nlines"],
]


@pytest.mark.parametrize("arguments", USAGE, ids=repr)
def test_wrong_usage_is_said_in_the_host_s_language_and_ends_with_64(spawn, arguments):
    host = spawn(*arguments)
    assert host.wait_exit() == 64
    answer = host.read_line()
    assert answer["code"] == "MODEL_LOAD_ERROR"
    assert isinstance(answer["error"], str)
    assert not host.has_line()
    assert [record["level"] for record in host.log()] == ["ERROR"]


def test_wrong_usage_ends_although_nobody_reads_a_full_stderr(spawn):
    setup = "os.set_blocking(2, False)\ntry:\n    while True: os.write(2, b'x')\nexcept BlockingIOError: os.set_blocking(2, True)"
    host = spawn("--no-such-flag", stderr="never", setup=setup)
    assert host.wait_exit(5) == 64


def test_help_and_version_go_to_stdout_and_end_with_0():
    for flag, text in (("--help", "RERANKING_MODEL_PATH"), ("--version", ".")):
        done = subprocess.run([sys.executable, "reranking_server.py", flag], capture_output=True, text=True, timeout=20, check=False)
        assert done.returncode == 0
        assert text in done.stdout
