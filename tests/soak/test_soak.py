"""A short soak: under mixed load with faults nothing grows. And the checker does see each kind of leak."""

from __future__ import annotations

import sys

import pytest

from tests.soak.soak import COMMAND, soak, table

SECONDS = 10.0
LEAK_SECONDS = 2.4


def test_sustained_load_with_faults_grows_neither_memory_nor_descriptors_threads_or_children() -> None:
    outcome = soak(SECONDS)
    assert not outcome.faults, f"{outcome.faults}\n{table(outcome)}"
    assert outcome.kills >= 1
    assert sum(outcome.codes.values()) > 1_000
    assert outcome.codes["INFERENCE_ERROR"]
    assert outcome.codes["INVALID_JSON"]


@pytest.mark.parametrize(
    ("kind", "complaint"), [("memory", "the front grew"), ("fds", "descriptors grew"), ("threads", "threads grew"), ("children", "children grew")]
)
def test_a_worker_that_leaks_is_found_out(kind: str, complaint: str) -> None:
    command = [sys.executable, "-m", "tests.soak.leaky", kind, *COMMAND[2:]]
    outcome = soak(LEAK_SECONDS, command=command, kills=False)
    if kind == "fds" and outcome.last is not None and outcome.last.fds is None:
        pytest.skip("this system shows no descriptors of other processes to this user")
    assert any(complaint in fault for fault in outcome.faults), f"{outcome.faults}\n{table(outcome)}"
