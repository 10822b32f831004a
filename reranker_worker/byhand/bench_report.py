"""What `bench` shows: quantiles, a small table for people, JSON for programs, a plot on request."""

from __future__ import annotations

import importlib
import importlib.util
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reranker_worker.byhand.failures import IO_ERROR, Failure

if TYPE_CHECKING:
    from collections.abc import Sequence

_MISSING_PACKAGE = 78
_DOTS = 120


@dataclass(slots=True)
class Table:
    """Rows of named values, and what to draw: the column along x and those along y. Columns whose names end in _ms are milliseconds."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    x: str = ""
    ys: Sequence[str] = ()
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Aligned text, a heading first."""
        if not self.rows:
            return list(self.notes)
        names = list(self.rows[0])
        cells = [[_heading(name) for name in names], *([_shown(row[name]) for name in names] for row in self.rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(names))]
        left = [isinstance(self.rows[0][name], str) for name in names]
        texts = [
            "  ".join(text.ljust(width) if to_left else text.rjust(width) for text, width, to_left in zip(row, widths, left, strict=True)).rstrip()
            for row in cells
        ]
        return [*texts, *self.notes]


def quantiles(values: Sequence[float]) -> dict[str, float | None]:
    """p50_ms, p95_ms and p99_ms by nearest rank; None without values."""
    ordered = sorted(values)
    ranks = {part: max(0, math.ceil(part / 100 * len(ordered)) - 1) for part in (50, 95, 99)}
    return {f"p{part}_ms": round(ordered[rank], 3) if ordered else None for part, rank in ranks.items()}


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median with the lowest and the highest."""
    found = {"pairs_per_s": statistics.median(values), "lowest": min(values), "highest": max(values)}
    return {name: round(value, 1) for name, value in found.items()} | {"runs": len(values)}


def check_drawable(file: str) -> None:
    """Raise Failure when a plot could not be drawn there: before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise Failure("--plot needs the Python package matplotlib, which is not installed; run pip install matplotlib.", _MISSING_PACKAGE)
    if not Path(file).resolve().parent.is_dir():
        raise Failure(f"--plot: the directory of {file} does not exist.", IO_ERROR)


def draw(table: Table, title: str, file: str) -> None:
    """Draw the table's columns. Raises Failure when the file cannot be written."""
    importlib.import_module("matplotlib").use("Agg")  # no display; by name, for checkers that have no matplotlib
    plt: Any = importlib.import_module("matplotlib.pyplot")
    figure, axis = plt.subplots(figsize=(6.4, 3.6))
    xs = [row[table.x] for row in table.rows]
    for name in table.ys:
        ys = [math.nan if row[name] is None else row[name] for row in table.rows]
        if isinstance(xs[0], str):
            axis.barh(xs[::-1], ys[::-1], height=0.6)
            axis.set_xlabel(_heading(name))
        else:
            axis.plot(xs, ys, marker="o", label=_heading(name))
    if not isinstance(xs[0], str):
        axis.set_xlabel(_heading(table.x))
        axis.set_ylim(bottom=0)
        axis.legend()
    axis.set_title(title, fontsize=9)
    figure.tight_layout()
    try:
        figure.savefig(file, dpi=_DOTS)
    except (OSError, ValueError) as error:
        raise Failure(f"--plot: {file} could not be written: {error}.", IO_ERROR) from None


def _heading(name: str) -> str:
    return name.replace("_per_s", "/s").replace("_ms", " ms").replace("_", " ")


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
