#!/usr/bin/env python3
"""Packs files for a node into a tar whose bytes depend on names, content and the executable bit alone, and prints its SHA-256.

    pack.py CHECKOUT [TAR]          the worker's own files (no tests, benchmarks, training or deployment)
    pack.py --all DIRECTORY [TAR]   everything in a directory, such as a wheelhouse
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tarfile
from pathlib import Path
from typing import Any

PRODUCT = (
    "reranking_server.py reranker_worker deploy/example-host requirements.txt requirements-lock.txt README.md INSTALL.md CHANGELOG.md LICENSE".split()
)


class Digest:
    """A file that is hashed, and written where a file is given."""

    def __init__(self, path: str) -> None:
        self.hash = hashlib.sha256()
        self._file: Any = open(path or os.devnull, "wb")  # noqa: SIM115  # lives as long as the program

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self._file.write(data)
        return len(data)

    def close(self) -> None:
        self._file.close()


def files(root: Path, names: list[str]) -> list[Path]:
    """Every file of the named ones, sorted; no bytecode, no hidden files."""
    found = [path for name in names for path in ([root / name] if (root / name).is_file() else (root / name).rglob("*")) if path.is_file()]
    return sorted(path for path in found if not any(part == "__pycache__" or part.startswith(".") for part in path.relative_to(root).parts))


def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without what differs from controller to controller."""
    info.mtime = info.uid = info.gid = 0
    info.uname = info.gname = ""
    info.mode = 0o755 if info.mode & 0o100 else 0o644
    return info


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true")
    parser.add_argument("root", type=Path)
    parser.add_argument("tar", nargs="?", default="")
    given = parser.parse_args()
    chosen = files(given.root, ["."] if given.all else PRODUCT)
    if not chosen:
        sys.exit(f"There is nothing to pack in {given.root}.")
    out = Digest(given.tar)
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.GNU_FORMAT) as tar:  # type: ignore[call-overload]
        for path in chosen:
            tar.add(path, arcname=str(path.relative_to(given.root)), recursive=False, filter=plain)
    out.close()
    print(out.hash.hexdigest())


if __name__ == "__main__":
    main()
