"""`python -m benchmarks picture FIGURES.json OUT.png`: the picture of `peers`, from what its `--json` kept. Horizontal bars of pairs per second.

Draws with matplotlib in an environment of its own, so that nobody needs to have it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

_OURS, _OTHERS, _LINE = "#0b6e4f", "#b8bec6", "#33383f"
_INCHES_A_ROW, _INCHES_A_LOAD = 0.26, 3.1
_DOTS = 150


def main(arguments: Sequence[str]) -> int:
    """The command; its exit code."""
    from benchmarks.environments import UnavailableError, cache_directory

    parser = argparse.ArgumentParser(prog="python -m benchmarks picture", description=__doc__.partition("\n")[0])
    parser.add_argument("figures", type=Path, help="what `peers --json` wrote")
    parser.add_argument("out", type=Path, help="the picture (.png, .svg)")
    parser.add_argument("--cache", metavar="DIR", help="where environments are kept")
    given = parser.parse_args(list(arguments))
    try:
        draw(json.loads(given.figures.read_text(encoding="utf-8")), given.out, cache_directory(given.cache))
    except UnavailableError as error:
        print(f"picture: {error}", file=sys.stderr)
        return 1
    return 0


def draw(body: dict[str, Any], out: Path, cache: Path) -> None:
    """Draw in the environment `picture`. Raises UnavailableError when that cannot be had."""
    from benchmarks.environments import UnavailableError, environment

    python = environment("picture", cache)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as figures:
        json.dump(body, figures)
        figures.flush()
        done = subprocess.run([str(python), __file__, figures.name, str(out)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnavailableError(f"the picture could not be drawn: {(done.stderr.splitlines() or ['no reason given'])[-1]}")


def bars(body: dict[str, Any]) -> dict[str, list[tuple[str, float, bool]]]:
    """By load: (label, median pairs per second, ours), fastest first."""
    found: dict[str, list[tuple[str, float, bool]]] = {}
    for name, side in body["contestants"].items():
        for load, rates in side["pairs_per_s"].items():
            precision = "" if not side["reduced"] or any(word in name for word in ("int8", "bf16")) else " (reduced)"
            found.setdefault(load, []).append((name + precision, statistics.median(rates), side["ours"]))
    return {load: sorted(rows, key=lambda row: -row[1]) for load, rows in found.items()}


def _paint(body: dict[str, Any], out: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    loads = bars(body)
    rows = max(map(len, loads.values()))
    figure, axes = plt.subplots(1, len(loads), figsize=(_INCHES_A_LOAD * len(loads), 0.9 + _INCHES_A_ROW * rows), squeeze=False)
    for axis, (load, found) in zip(axes[0], loads.items(), strict=True):
        labels, rates, ours = zip(*found, strict=True)
        places = range(len(found))
        drawn = axis.barh(places, rates, color=[_OURS if mine else _OTHERS for mine in ours], height=0.72)
        axis.bar_label(drawn, fmt="{:,.0f}", padding=2, fontsize=7, color=_LINE)
        axis.set_yticks(places, labels, fontsize=7)
        for tick, mine in zip(axis.get_yticklabels(), ours, strict=True):
            tick.set_fontweight("bold" if mine else "normal")
        axis.invert_yaxis()
        axis.set_title(load, fontsize=9)
        axis.set_xlim(0, max(rates) * 1.18)
        axis.tick_params(axis="x", labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("pairs per second, median (green: reranker worker)", fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=_DOTS)


if __name__ == "__main__":
    _paint(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), sys.argv[2])
