"""The list of planted defects stays true: each old text stands once in its file, and each catcher names tests that exist."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.planted.defects import DEFECTS, Defect

ROOT = Path(__file__).resolve().parents[2]
AREAS = set("transport framing parsing admission ordering scheduling supervision drain scoring answers backends prewarming".split())


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name.replace(" ", "-"))
def test_a_planted_defect_still_has_its_place(defect: Defect) -> None:
    text = (ROOT / defect.file).read_text("utf-8")
    assert text.count(defect.old) == 1, f"{defect.file} holds {defect.old!r} {text.count(defect.old)} times"
    ast.parse(text.replace(defect.old, defect.new))


def test_every_area_has_defects_and_every_catcher_exists() -> None:
    assert len(DEFECTS) >= 30
    assert len({defect.name for defect in DEFECTS}) == len(DEFECTS)
    assert {defect.area for defect in DEFECTS} == AREAS
    for defect in DEFECTS:
        assert defect.catcher.startswith("chaos ") or (ROOT / defect.catcher.split()[0]).exists(), defect.catcher
