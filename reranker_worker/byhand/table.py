"""Text for a terminal: what would move the cursor is made visible, wide characters count twice, lines are cut to the width. Pure."""

from __future__ import annotations

import math
import unicodedata
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

_BAR_CELLS = 10
_BLOCKS = " ▏▎▍▌▋▊▉█"
_PLAIN = str.maketrans({"…": "~", "█": "#", **dict.fromkeys("▌▋▊▉", "="), **dict.fromkeys("▏▎▍", "-")})
_PICTURES = 0x2400  # the Unicode pictures of the 32 control characters, in their order
_DELETE = 0x7F
_JOINERS = "\u200c\u200d"  # parts of Persian words and of emoji; they take no cell and do no harm
_LEAST_TEXT_CELLS = 20
_LEAST_SOURCE_CELLS = 12


class Row(NamedTuple):
    """One line of the ranking; `part` is the filled part of the bar, from 0 to 1."""

    rank: int
    score: float
    part: float
    source: str
    text: str


def visible(text: str) -> str:
    """The text with every control, format and unassigned character shown instead of obeyed."""
    return text if text.isprintable() else "".join(map(_visible, text))


def _visible(char: str) -> str:
    if char.isprintable() or char in _JOINERS:
        return char
    code = ord(char)
    if code < 0x20:
        return chr(_PICTURES + code)
    if code == _DELETE:
        return "␡"
    return " " if char.isspace() and unicodedata.category(char) == "Zs" else char.encode("unicode_escape").decode("ascii")


def cells(text: str) -> int:
    """Columns that visible text takes: 2 for East Asian wide characters and emoji, 0 for combining marks and joiners."""
    return len(text) if text.isascii() else sum(map(_cells, text))


def _cells(char: str) -> int:
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in ("W", "F") else 1


def cut(text: str, width: int, *, keep_end: bool = False) -> str:
    """At most `width` columns of visible text, with an ellipsis for what is missing at the end (or at the beginning)."""
    if cells(text) <= width:
        return text
    kept: list[str] = []
    left = width - 1
    for char in reversed(text) if keep_end else text:
        left -= _cells(char)
        if left < 0:
            break
        kept.append(char)
    return "…" + "".join(reversed(kept)) if keep_end else "".join(kept) + "…"


def bar(part: float) -> str:
    """A bar of ten columns, filled to an eighth of a column."""
    eighths = round(max(0.0, min(1.0, part)) * _BAR_CELLS * 8)
    return (_BLOCKS[8] * (eighths // 8) + (_BLOCKS[eighths % 8] if eighths % 8 else "")).ljust(_BAR_CELLS)


def sigmoid(logit: float) -> float:
    """Where a score that is no probability lies between none and all, for its bar."""
    return 0.5 * (1.0 + math.tanh(logit / 2.0))


def table(rows: Iterable[Row], width: int) -> list[str]:
    """Lines of at most `width` columns, a heading first."""
    shown = [(f"{row.rank}", f"{row.score:.4f}", bar(row.part), visible(row.source), visible(row.text)) for row in rows]
    rank_width = max(len("rank"), *(len(row[0]) for row in shown))
    score_width = max(len("score"), *(len(row[1]) for row in shown))
    rest = width - rank_width - score_width - _BAR_CELLS - 6
    longest = max(len("source"), *(cells(row[3]) for row in shown))
    source_width = max(min(longest, _LEAST_SOURCE_CELLS), min(longest, rest // 3, rest - _LEAST_TEXT_CELLS))
    text_width = max(1, rest - source_width)
    lines = [f"{'rank':>{rank_width}}  {'score':>{score_width}} {'':{_BAR_CELLS}}  {'source':{source_width}} text"]
    for rank, score, blocks, source, text in shown:
        short = cut(source, source_width, keep_end=True)
        gap = " " * (source_width - cells(short))
        lines.append(f"{rank:>{rank_width}}  {score:>{score_width}} {blocks}  {short}{gap} {cut(text, text_width)}".rstrip())
    return [cut(line, width) for line in lines]


def encoded(text: str, encoding: str) -> bytes:
    """The text in a terminal's encoding; one without block elements gets plain bars and escapes."""
    try:
        return text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_PLAIN).encode(encoding, "backslashreplace")
