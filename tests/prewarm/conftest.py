"""Tiny models for the tests of prewarming, made once per session."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# The helper modules are importable under every import mode of pytest.
sys.path.insert(0, str(Path(__file__).parents[1]))
# Must be set before the hub library is imported, which reads it once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tiny_models import make_tiny_cross_encoder

ModelMaker = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelMaker:
    """`tiny("roberta", num_labels=3, ...)`: the directory of such a model, made on first use."""
    made: dict[str, Path] = {}

    def make(architecture: str = "bert", **options: Any) -> Path:
        key = architecture + repr(sorted(options.items()))
        if key not in made:
            made[key] = make_tiny_cross_encoder(tmp_path_factory.mktemp("tiny"), architecture=architecture, **options)
        return made[key]

    return make
