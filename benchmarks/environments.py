"""What the peers need, made on demand and kept in a cache outside the repository: an environment each, and the model as ONNX files."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.host import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_REQUIREMENTS = ROOT / "benchmarks" / "requirements"
_EXPORTER = ROOT / "benchmarks" / "export.py"
_COMPLETE = "complete"  # the last file that is written
_PATIENCE_SECONDS = 1800.0
_SHOWN_CHARS = 300


class UnavailableError(Exception):
    """Something of a peer cannot be had here; the text says what."""


def cache_directory(named: str | None) -> Path:
    """Where environments and exported models are kept: never in the repository, whose tools would search them."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = Path(named).resolve() if named else base / "reranker-worker-benchmarks"
    if place.is_relative_to(ROOT):
        raise UnavailableError(f"The cache {place} would lie in the repository; name a directory outside it (--cache).")
    return place


def environment(name: str, cache: Path) -> Path:
    """The interpreter of an environment; made with the versions of `requirements/NAME.txt` if it is not there yet."""
    listed = _REQUIREMENTS / f"{name}.txt"
    key = hashlib.sha256(listed.read_bytes() + sys.version.encode()).hexdigest()[:12]
    place = cache / "environments" / f"{name}-{key}"
    python = place / "bin" / "python"
    with _alone(place):
        if not (place / _COMPLETE).exists():
            print(f"making the environment of {name} in {place} ...", file=sys.stderr)
            shutil.rmtree(place, ignore_errors=True)
            _run([sys.executable, "-m", "venv", str(place)])
            # The lists are complete; what they leave out is left out on purpose.
            _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "-r", str(listed)])
            (place / _COMPLETE).touch()
    return python


def exported(model: Path, cache: Path) -> Path:
    """The model as ONNX files (float32, int8), as the exporter writes them by default; made once for each content of the directory."""
    digest = hashlib.sha256(_EXPORTER.read_bytes())
    for item in sorted(path for path in model.iterdir() if path.is_file()):
        digest.update(item.name.encode() + item.read_bytes())
    place = cache / "models" / digest.hexdigest()[:12]
    with _alone(place):
        if not place.exists():
            python = environment("onnx", cache)
            print(f"exporting the model to {place} ...", file=sys.stderr)
            with tempfile.TemporaryDirectory(dir=cache) as fresh:
                _run([str(python), str(_EXPORTER), str(model), fresh])
                shutil.copytree(fresh, place.with_suffix(".part"), dirs_exist_ok=True)
            place.with_suffix(".part").rename(place)
    return place


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Only one process makes a thing; the others wait and find it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(command: Sequence[str]) -> None:
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_SECONDS, env=environ, check=False)
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"{Path(command[0]).name} took longer than {_PATIENCE_SECONDS:g} s") from None
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip() and not line.startswith("WARNING")]
        raise UnavailableError(lines[-1][:_SHOWN_CHARS] if lines else f"exit code {done.returncode}")
