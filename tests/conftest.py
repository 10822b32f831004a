"""Fixtures for all tests. Being here also puts `tests/` on the path, so that `host` and the other helpers are importable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from host import Host

Spawn = Callable[..., Host]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """`spawn("--flag", ..., env={...}, stderr="never", ...)`: a Host with a running worker. At the end of the test each worker must
    end in time, leave no process behind and have written whole JSON lines only."""
    hosts: list[Host] = []

    def start(*args: Any, **options: Any) -> Host:
        hosts.append(Host(*args, **options))
        return hosts[-1]

    yield start
    failures: list[AssertionError] = []
    for host in hosts:
        try:
            host.finish()
        except AssertionError as failure:
            failures.append(failure)
    if failures:
        raise failures[0]
