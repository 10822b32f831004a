"""Files and standard input to documents: by line, paragraph or file, or JSON lines. Every document knows where it came from."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from reranker_worker.byhand.failures import BAD_DATA, NO_INPUT, Failure

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

UNITS = ("line", "paragraph", "file", "jsonl")
STDIN = "-"
_JSON_LINES = (".jsonl", ".ndjson")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Document:
    """One text to score. `source` is file:line, or the file alone when it is one document."""

    text: str
    source: str
    id: str | int | None = None


def read_documents(names: Sequence[str], unit: str | None) -> list[Document]:
    """All documents of the named files in order ("-" is standard input); raises Failure."""
    documents = [document for name in names for document in split(_read(name), _shown(name), unit or _unit(name))]
    if not documents:
        where = "standard input" if list(names) == [STDIN] else "the files"
        raise Failure(f"There is nothing to score: {where} held no text.", NO_INPUT)
    return documents


def split(data: bytes, source: str, unit: str) -> Iterator[Document]:
    """The documents in one file's bytes; raises Failure for bytes that are not text, naming the line."""
    data = data.removeprefix(_BOM)
    lines = [_decoded(line, source, number) for number, line in enumerate(data.split(b"\n"), 1)]
    if unit == "auto":
        unit = "jsonl" if _is_json_document(next((line for line in lines if line.strip()), "")) else "line"
    if unit == "jsonl":
        return (_json_document(line, f"{source}:{number}") for number, line in enumerate(lines, 1) if line.strip())
    if unit == "paragraph":
        return _paragraphs(lines, source)
    if unit == "file":
        return iter([Document("\n".join(lines).strip(), source)] if any(line.strip() for line in lines) else [])
    return (Document(line.strip(), f"{source}:{number}") for number, line in enumerate(lines, 1) if line.strip())


def _paragraphs(lines: Sequence[str], source: str) -> Iterator[Document]:
    held: list[str] = []
    for number, line in enumerate([*lines, ""], 1):
        if line.strip():
            held.append(line.strip())
        elif held:
            yield Document("\n".join(held), f"{source}:{number - len(held)}")
            held = []


def _json_document(line: str, source: str) -> Document:
    try:
        body = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise Failure(f"{source}: this line is not valid JSON (character {error.pos + 1}); --by line takes lines as they are.", BAD_DATA) from None
    if not isinstance(body, dict) or not isinstance(body.get("text"), str):
        raise Failure(f'{source}: expected an object with a string "text", such as {{"text": "...", "id": 7}}.', BAD_DATA)
    if not isinstance(body.get("id"), (str, int, type(None))) or isinstance(body.get("id"), bool):
        raise Failure(f'{source}: "id" must be a string or an integer.', BAD_DATA)
    return Document(body["text"], source, body.get("id"))


def _is_json_document(line: str) -> bool:
    try:
        body = orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return isinstance(body, dict) and isinstance(body.get("text"), str)


def _decoded(line: bytes, source: str, number: int) -> str:
    if b"\0" in line:
        raise Failure(f"{source}:{number}: a NUL byte, so this is not a text file.", BAD_DATA)
    try:
        return line.removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError as error:
        bad = line[error.start]
        text = f"{source}:{number}: byte {error.start + 1} of this line (0x{bad:02x}) is not UTF-8; convert the file first."
        raise Failure(text, BAD_DATA) from None


def _read(name: str) -> bytes:
    try:
        if name == STDIN:
            return sys.stdin.buffer.read()
        return Path(name).read_bytes()
    except OSError as error:
        reason = {FileNotFoundError: "there is no such file", IsADirectoryError: "this is a directory; name the files in it"}
        why = reason.get(type(error), error.strerror or type(error).__name__)
        raise Failure(f"{_shown(name)}: {why}.", NO_INPUT) from None


def _unit(name: str) -> str:
    return "jsonl" if name.endswith(_JSON_LINES) else "auto"


def _shown(name: str) -> str:
    """A file's name for people and for JSON: bytes of it that are not text are escaped."""
    return "stdin" if name == STDIN else name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
