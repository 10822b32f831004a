"""A smaller WordPiece vocabulary: the pieces that the training texts and the backbone's own order speak for."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from tokenizers import Tokenizer

SIZE = 26_700  # nearly all that English has; with eight layers just under 30 MB
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_NEW_NAMES = {"[MASK]": "[DOC]"}  # nothing is masked here; a document begins with it
_FIRST_WORD = 1996  # before it the backbone's vocabulary holds single characters and unused places
_LAST_LETTER, _SYMBOLS = 0x500, range(0x2000, 0x2300)  # Latin, Greek, Cyrillic; punctuation, currency, arrows, mathematics


def count_pieces(tokenizer: Tokenizer, texts: Iterable[str]) -> Counter[str]:
    """How often each piece occurs."""
    counts: Counter[str] = Counter()
    for part in _parts(texts, 5000):
        for one in tokenizer.encode_batch(part):
            counts.update(one.tokens)
    return counts


def prune(source: Path, counts: Counter[str], size: int = SIZE) -> tuple[dict[str, Any], list[int]]:
    """(the content of a new tokenizer.json, the backbone's row for each new id). The order of ids stays the backbone's."""
    content = json.loads(source.read_text(encoding="utf-8"))
    old = content["model"]["vocab"]
    kept = {*_SPECIAL, *(piece for piece in old if _is_single(piece))}
    rank = {piece: place for place, (piece, _) in enumerate(counts.most_common())}

    def score(piece: str) -> float:
        own = old[piece] - 900 if old[piece] >= _FIRST_WORD else 20_000
        return float((rank.get(piece, len(old)) + 20) * own**0.5)

    for piece in sorted((piece for piece in old if not piece.startswith("[unused")), key=score):
        if len(kept) >= size:
            break
        kept.add(piece)
    pieces = sorted(kept, key=old.__getitem__)
    content["model"]["vocab"] = {_NEW_NAMES.get(piece, piece): number for number, piece in enumerate(pieces)}
    _renumber(content)
    return content, [old[piece] for piece in pieces]


def _renumber(content: dict[str, Any]) -> None:
    new = content["model"]["vocab"]
    for token in content["added_tokens"]:
        token["content"] = _NEW_NAMES.get(token["content"], token["content"])
        token["id"] = new[token["content"]]
    for piece, special in content["post_processor"]["special_tokens"].items():
        special["ids"] = [new[piece]]
    content["truncation"] = None
    content["padding"] = None


def _is_single(piece: str) -> bool:
    """One character, alone or as a continuation, of a script that English texts contain: no word becomes [UNK] for the lack of it."""
    return len(piece.removeprefix("##")) == 1 and (ord(piece[-1]) < _LAST_LETTER or ord(piece[-1]) in _SYMBOLS)


def _parts(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    part: list[str] = []
    for text in texts:
        part.append(text)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part
