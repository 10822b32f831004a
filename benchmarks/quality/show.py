"""The figures of a run: as a Markdown table and as a picture."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.quality.metrics import NAMES, Threshold

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

FIRST_STAGE, BI_ENCODER, MODEL = "BM25", "bi-encoder", "model"
ORDERS = (FIRST_STAGE, BI_ENCODER, MODEL)
_COLOURS = {FIRST_STAGE: "#9aa5b1", BI_ENCODER: "#f0a33c", MODEL: "#2b6cb0"}


@dataclass(frozen=True, slots=True)
class Line:
    """One set: measures by order (an order that was not computed is absent)."""

    name: str
    questions: int
    pairs: int
    pairs_per_second: float
    measures: dict[str, dict[str, float]]
    threshold: Threshold


def mean(lines: Sequence[Line], order: str, measure: str) -> float | None:
    """The mean over the sets that have the figure."""
    values = [line.measures[order][measure] for line in lines if order in line.measures]
    return statistics.fmean(values) if values else None


def table(lines: Sequence[Line]) -> str:
    """Markdown; in each of the three groups: first stage / bi-encoder / model."""
    at = lines[0].threshold.at if lines else 0.5
    head = ["set", "queries", *(f"{name}: {' / '.join(ORDERS)}" for name in NAMES), f"precision, recall at {at:g}", "pairs/s"]
    rows = [[line.name, str(line.questions), *(_three(line, name) for name in NAMES), _pair(line.threshold), f"{line.pairs_per_second:,.0f}"]
            for line in lines]  # fmt: skip
    means = [" / ".join(_bold(_shown(mean(lines, order, name)), order) for order in ORDERS) for name in NAMES]
    pairs, seconds = sum(line.pairs for line in lines), sum(line.pairs / line.pairs_per_second for line in lines if line.pairs)
    rows.append(["mean", str(sum(line.questions for line in lines)), *means, "", f"{pairs / seconds:,.0f}" if seconds else "-"])
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def picture(lines: Sequence[Line], model: str, path: Path) -> None:
    """NDCG@10 by set as grouped bars. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure  # type: ignore[import-not-found,import-untyped,unused-ignore]  # optional

    names = [line.name for line in lines] + ["mean"]
    shown = [order for order in ORDERS if any(order in line.measures for line in lines)]
    figure = Figure(figsize=(1.5 + 0.85 * len(names), 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(shown)
    for place, order in enumerate(shown):
        values = [line.measures.get(order, {}).get(NAMES[0], 0.0) for line in lines] + [mean(lines, order, NAMES[0]) or 0.0]
        spots = [at + (place - (len(shown) - 1) / 2) * width for at in range(len(names))]
        axes.bar(spots, values, width * 0.95, label=model if order == MODEL else order, color=_COLOURS[order])
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_ylabel(NAMES[0])
    axes.set_ylim(0, 1)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(shown), frameon=False)
    figure.savefig(path, dpi=130)


def _three(line: Line, measure: str) -> str:
    return " / ".join(_bold(_shown(line.measures.get(order, {}).get(measure)), order) for order in ORDERS)


def _pair(found: Threshold) -> str:
    return f"{_shown(found.precision)}, {_shown(found.recall)}"


def _bold(text: str, order: str) -> str:
    return f"**{text}**" if order == MODEL else text


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
