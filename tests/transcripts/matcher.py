"""Does an answer match what a transcript expects? The rules stand in README.md; they are few, so that any language can have them."""

from __future__ import annotations

import math
from typing import Any

TOLERANCE = 1e-9


def mismatch(expected: Any, actual: Any, path: str = "answer") -> str | None:
    """None when it matches, else where and why not."""
    if isinstance(expected, str) and expected.startswith("$"):
        return _placeholder(expected, actual, path)
    if isinstance(expected, dict):
        return _object(expected, actual, path)
    if isinstance(expected, list):
        if not isinstance(actual, list) or len(actual) != len(expected):
            return f"{path}: {len(expected)} elements are expected, not {_shown(actual)}"
        return next((fault for index, item in enumerate(expected) if (fault := mismatch(item, actual[index], f"{path}[{index}]"))), None)
    if _is_number(expected) and _is_number(actual):
        same = math.isclose(expected, actual, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
        return None if same else f"{path}: {expected} is expected, not {actual}"
    if type(expected) is not type(actual) or expected != actual:
        return f"{path}: {_shown(expected)} is expected, not {_shown(actual)}"
    return None


def _object(expected: dict[str, Any], actual: Any, path: str) -> str | None:
    if not isinstance(actual, dict):
        return f"{path}: an object is expected, not {_shown(actual)}"
    for name, value in expected.items():
        if value == "$absent":
            if name in actual:
                return f"{path}.{name}: must be absent, not {_shown(actual[name])}"
        elif name not in actual:
            return f"{path}.{name}: is missing"
        elif fault := mismatch(value, actual[name], f"{path}.{name}"):
            return fault
    return None


def _placeholder(expected: str, actual: Any, path: str) -> str | None:
    if expected == "$number":
        return None if _is_number(actual) and math.isfinite(actual) else f"{path}: a number is expected, not {_shown(actual)}"
    if expected == "$string":
        return None if isinstance(actual, str) else f"{path}: a string is expected, not {_shown(actual)}"
    if expected == "$any":
        return None
    raise ValueError(f"unknown placeholder {expected}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
