"""Prewarmed artefacts: model directories made ahead of time for one backend and precision, checked against the reference, and signed
by a manifest.

An artefact is a complete model directory with `artefact.json` beside its files: `--model DIRECTORY` serves it wherever it was copied
to. Those below `config.artefacts` are also found by the model's name, provided that they were made from the files (or the hub revision) that
the name means now; another one is refused with a sentence and never used by mistake.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reranker_worker.models.errors import CORRUPT, UNSAFE, ModelError, shown
from reranker_worker.models.manifest import MANIFEST_NAME, sha256_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from reranker_worker.config import Config

BUNDLED_DIRECTORY = Path(__file__).parent / "bundled"
ARTEFACT_FILE = "artefact.json"
# Raised whenever older artefacts would give other scores or cannot be opened any more.
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Source:
    """What an artefact was made from. `files`: name -> [bytes, sha256, mtime in ns] of the source directory."""

    model: str
    revision: str | None
    files: dict[str, list[Any]]


@dataclass(frozen=True, slots=True)
class Artefact:
    """The content of artefact.json. `positions` is the length of the graph's position table, in tokens; `parity` what the comparison with
    the reference gave; `pairs_per_second` the speed on the machine that made it."""

    backend: str
    dtype: str
    source: Source
    positions: int
    parity: dict[str, float]
    pairs_per_second: float
    versions: dict[str, str]
    format: int = FORMAT
    path: Path = field(default_factory=Path, compare=False)

    def to_json(self) -> bytes:
        """The file's content."""
        body = {key: value for key, value in asdict(self).items() if key != "path"}
        return json.dumps(body, indent=2, sort_keys=True).encode() + b"\n"


def is_artefact(directory: Path) -> bool:
    """Whether the directory says that it is one."""
    return (directory / ARTEFACT_FILE).is_file()


def read_artefact(directory: Path) -> Artefact:
    """The artefact in a directory; raises ModelError (65 damaged, 78 made by another version of the worker)."""
    try:
        body = json.loads((directory / ARTEFACT_FILE).read_bytes())
        if body["format"] != FORMAT:
            text = f"The artefact {shown(directory)} has format {body['format']!a} and this worker needs {FORMAT}; "
            raise ModelError(text + "make it again with `python -m reranker_worker prewarm`.", UNSAFE)
        artefact = Artefact(**{**body, "source": Source(**body["source"])}, path=directory)
    except (OSError, ValueError, TypeError, KeyError) as error:
        text = f"The artefact {shown(directory)} cannot be read ({type(error).__name__} in {ARTEFACT_FILE}); prewarm it again."
        raise ModelError(text, CORRUPT) from error
    if not (directory / MANIFEST_NAME).is_file():
        raise ModelError(f"The artefact {shown(directory)} has no {MANIFEST_NAME}; prewarm it again.", CORRUPT)
    return artefact


def artefacts_directory(config: Config) -> Path:
    """Where prewarmed artefacts are kept."""
    return Path(os.path.expanduser(config.artefacts))


def artefact_name(model: str, backend: str, dtype: str) -> str:
    """The directory name of an artefact: readable, and different for every model name."""
    slug = re.sub(r"[^A-Za-z0-9.-]+", "-", model).strip("-.")[-60:] or "model"
    return f"{slug}-{hashlib.sha256(model.encode()).hexdigest()[:8]}--{backend}-{dtype}"


def key_of(config: Config) -> str:
    """The name under which a model's artefacts are kept: a directory's is its real path, so that it means the same from everywhere."""
    path = os.path.realpath(os.path.expanduser(config.model))
    if config.model == "bundled" or not os.path.isdir(path):
        return config.model
    return "bundled" if path == os.path.realpath(BUNDLED_DIRECTORY) else path


def find_artefacts(config: Config) -> list[Artefact]:
    """Prewarmed artefacts of `config.model` that fit the settings, the fastest first. Damaged ones are passed over: a start that does not
    need them must not fail for them."""
    found = []
    prefix = artefact_name(key_of(config), "", "").removesuffix("-")
    for path in sorted(artefacts_directory(config).glob(prefix + "*")):
        try:
            artefact = read_artefact(path)
        except ModelError:
            continue
        if artefact.source.model == key_of(config) and fits(artefact, config):
            found.append(artefact)
    return sorted(found, key=lambda artefact: -artefact.pairs_per_second)


def fits(artefact: Artefact, config: Config) -> bool:
    """Whether the settings allow the artefact's backend, precision and device."""
    device = config.device in ("auto", "cpu")
    return device and config.backend in ("auto", artefact.backend) and config.dtype in ("auto", artefact.dtype)


def refusal(artefact: Artefact, config: Config) -> str | None:
    """Why an artefact named by the user cannot be used with these settings, as a sentence; None when it can."""
    if fits(artefact, config):
        return None
    wanted = f"backend {config.backend}, dtype {config.dtype}, device {config.device}"
    return f"The artefact {shown(artefact.path)} is for backend {artefact.backend}, dtype {artefact.dtype} on cpu, and the settings want {wanted}."


def fingerprint(directory: Path, names: Iterable[str]) -> dict[str, list[Any]]:
    """[bytes, sha256, mtime in ns] of each named file of a directory."""
    files = {}
    for name in names:
        path = directory / name
        stat = path.stat()
        files[name] = [stat.st_size, sha256_of(path), stat.st_mtime_ns]
    return files


def is_stale(artefact: Artefact, directory: Path) -> bool:
    """Whether the source files have changed since. A file whose size and time are the same is taken for the same; else it is hashed."""
    for name, (size, digest, mtime_ns) in artefact.source.files.items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != size:
            return True
        if path.stat().st_mtime_ns != mtime_ns and sha256_of(path) != digest:
            return True
    return False
