"""`MANIFEST.sha256` beside a model: the sha256sum of each of its files, as `sha256sum` writes and checks it."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from reranker_worker.models.errors import CORRUPT, UNSAFE, ModelError, shown

if TYPE_CHECKING:
    from collections.abc import Callable

MANIFEST_NAME = "MANIFEST.sha256"
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
_CHUNK_BYTES = 1 << 20


def verify_manifest(directory: Path, progress: Callable[[str, int, int], None]) -> None:
    """Hash every file that the manifest names; raises ModelError(65) on a difference, (78) on a name that leaves the directory."""
    expected = parse_manifest((directory / MANIFEST_NAME).read_bytes())
    files = {name: _confined(directory, name) for name in expected}
    missing = [name for name, path in files.items() if not path.is_file()]
    if missing:
        raise ModelError(f"The model is incomplete: {MANIFEST_NAME} names {shown(missing[0])}, which is not there; fetch it again.", CORRUPT)
    done, total = 0, sum(path.stat().st_size for path in files.values())
    for name, path in files.items():
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                done += len(chunk)
                progress("verify", done, total)
        if digest.hexdigest() != expected[name]:
            text = f"The model file {shown(name)} is damaged: expected sha256 {expected[name]}, got {digest.hexdigest()}"
            raise ModelError(f"{text} ({path.stat().st_size} bytes); fetch the model again.", CORRUPT)


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(directory: Path) -> None:
    """Write the manifest of every other file in a directory and below it."""
    lines = []
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name != MANIFEST_NAME:
            lines.append(f"{sha256_of(path)}  {name}\n")
    (directory / MANIFEST_NAME).write_text("".join(lines), encoding="utf-8")


def parse_manifest(data: bytes) -> dict[str, str]:
    """{file name: lower-case sha256} from a manifest; raises ModelError(65) when it is not one."""
    entries: dict[str, str] = {}
    for number, line in enumerate(data.decode("utf-8", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ModelError(f"Line {number} of {MANIFEST_NAME} is not a sha256sum line; fetch the model again.", CORRUPT)
        entries[match[2]] = match[1].lower()
    if not entries:
        raise ModelError(f"{MANIFEST_NAME} names no files; fetch the model again.", CORRUPT)
    return entries


def _confined(directory: Path, name: str) -> Path:
    """The path of a manifest's name, which must stay below the directory (or in the blobs of the same hub cache entry)."""
    pure = PurePosixPath(name)
    outside = pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name or "\0" in name
    path = directory / name
    if not outside:
        real, home = path.resolve(), directory.resolve()
        blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
        outside = not real.is_relative_to(home) and (blobs is None or not real.is_relative_to(blobs))
    if outside:
        raise ModelError(f"{MANIFEST_NAME} names {shown(name)}, which lies outside the model's directory; use another copy of the model.", UNSAFE)
    return path
