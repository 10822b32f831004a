"""Figures: medians with their spread, tables, and what the machine and the packages are (without names of hosts or users)."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import platform
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reranker_worker import __version__, machine
from reranker_worker.packages import installed_version

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

_PACKAGES = ("torch", "transformers", "sentence-transformers", "tokenizers", "onnxruntime", "openvino", "numpy", "orjson")
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd")


@dataclass(frozen=True, slots=True)
class Cell:
    """One measured quantity: `runs` values of `unit`, summed up. `goal` is in words."""

    name: str
    unit: str
    median: float
    low: float
    high: float
    runs: int
    goal: str = ""
    ok: bool | None = None


def cell(name: str, unit: str, values: Sequence[float], *, at_least: float | None = None, at_most: float | None = None) -> Cell:
    """The median of `values` with the smallest and the largest, and whether the median meets a goal."""
    if not values:
        return Cell(name, unit, math.nan, math.nan, math.nan, 0)
    median = statistics.median(values)
    goal, ok = "", None
    if at_least is not None:
        goal, ok = f">= {at_least:,g}", median >= at_least
    elif at_most is not None:
        goal, ok = f"<= {at_most:,g}", median <= at_most
    return Cell(name, unit, median, min(values), max(values), len(values), goal, ok)


def quantile(values: Sequence[float], part: float) -> float:
    """The value below which `part` of the values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(part * len(ordered)) - 1 if part < 1 else len(ordered) - 1)] if ordered else math.nan


def table(cells: Sequence[Cell]) -> str:
    """The cells as aligned text."""
    rows = [("what", "unit", "median", "lowest", "highest", "runs", "goal", "")]
    for item in cells:
        met = "" if item.ok is None else ("met" if item.ok else "missed")
        rows.append((item.name, item.unit, _shown(item.median), _shown(item.low), _shown(item.high), str(item.runs), item.goal, met))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    numeric = {2, 3, 4, 5}
    lines = [
        "  ".join(text.rjust(width) if column in numeric else text.ljust(width) for column, (text, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _shown(value: float) -> str:
    if math.isnan(value):
        return "-"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def surroundings() -> dict[str, Any]:
    """The machine and the packages."""
    memory = machine.memory_limit_bytes()
    return {
        "cpu": _cpu(),
        "cpu_flags": _cpu_flags(),
        "threads": machine.usable_threads(),
        "memory_gib": round(memory / 2**30, 1) if memory else None,
        "system": f"{platform.system()} {platform.machine()}",
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "bytecode": "" if _keeps_bytecode() else "not kept (see `startup` in benchmarks/README.md)",
        "reranker_worker": __version__,
        **{name: version for name in _PACKAGES if (version := installed_version(name))},
    }


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """`--json FILE` and `--strict`."""
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.add_argument("--strict", action="store_true", help="exit 1 when a goal is missed")


def report(name: str, cells: Sequence[Cell], given: argparse.Namespace, extra: dict[str, Any] | None = None) -> int:
    """Print the table and the surroundings, write `--json`; the exit code."""
    around = surroundings()
    print(table(cells))
    print("\n" + ", ".join(f"{key} {value}" for key, value in around.items() if value not in (None, "")))
    if given.json:
        settings = {key: value for key, value in vars(given).items() if key not in ("json", "strict")}
        body = {"benchmark": name, "settings": settings, "surroundings": around, "cells": [asdict(item) for item in cells], **(extra or {})}
        Path(given.json).write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
    return 1 if given.strict and any(item.ok is False for item in cells) else 0


def _keeps_bytecode() -> bool:
    """Whether the worker's modules are compiled already; else each start compiles them."""
    return Path(importlib.util.cache_from_source(str(Path(machine.__file__).with_name("worker.py")))).is_file()


def _cpu() -> str:
    return next((line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor())


def _cpu_flags() -> str:
    present = next((line.partition(":")[2].split() for line in _cpuinfo() if line.startswith(("flags", "Features"))), [])
    return " ".join(flag for flag in _FLAGS if flag in present)


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
