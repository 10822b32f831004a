"""Fixtures for all tests. Being here also puts `tests/` on the path, so that `host` and the other helpers are importable."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from host import Host
from hypothesis import Phase, settings
from tiny_models import make_tiny_cross_encoder

if TYPE_CHECKING:
    from pathlib import Path

# Must be set before the hub library is imported, which reads it once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Loaded machines make any deadline a coin toss; in CI the same examples are tried each time.
# Explaining a failure takes longer than pytest's time-out allows.
_PHASES = [phase for phase in Phase if phase is not Phase.explain]
settings.register_profile("suite", deadline=None, derandomize=bool(os.environ.get("CI")), print_blob=True, phases=_PHASES)
settings.load_profile("suite")

Spawn = Callable[..., Host]


@pytest.fixture(scope="session", autouse=True)
def _no_artefacts_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the user has prewarmed must not decide how a test goes."""
    os.environ["RERANKING_ARTEFACTS"] = str(tmp_path_factory.mktemp("artefacts"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny("roberta", num_labels=3, ...)`: the directory of such a model, made on first use."""
    made: dict[str, Path] = {}

    def make(architecture: str = "bert", **options: Any) -> Path:
        key = architecture + repr(sorted(options.items()))
        if key not in made:
            made[key] = make_tiny_cross_encoder(tmp_path_factory.mktemp("tiny"), architecture=architecture, **options)
        return made[key]

    return make


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
