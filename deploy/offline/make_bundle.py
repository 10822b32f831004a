#!/usr/bin/env python3
"""Makes one file that installs the worker on a machine without a network: wheels, code, model, what was prewarmed, checksums, install.sh.

    .venv/bin/python deploy/offline/make_bundle.py --light --output reranker-worker.tar

Run it on a connected machine, with a Python that has the whole requirements.txt, because prewarming compares with the reference. Standard library
and pip only. The same inputs give the same bytes, except for what prewarming measures (the speed in artefact.json).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = "deploy/systemd/worker.env"  # what install.sh makes a node's settings of
CODE = "reranker_worker reranking_server.py deploy requirements.txt requirements-lock.txt pyproject.toml".split()
CODE += "README.md INSTALL.md CHANGELOG.md LICENSE".split()
LIGHT = "onnxruntime onnx tokenizers numpy orjson".split()
FULL = [*LIGHT, *"torch transformers sentence-transformers".split()]
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
# Every file's time: that of the zip format's beginning. A start compares the times of an artefact's source files, so they must be equal everywhere.
EPOCH = 315532800
_GLIBC = range(17, 40)


class BundleError(Exception):
    """The bundle cannot be made; the text says why and what to do."""


class Target(NamedTuple):
    """The machine that installs: a Python such as "3.11", and pip's platform tags (none: this machine's)."""

    python: str
    platforms: tuple[str, ...]

    @property
    def is_here(self) -> bool:
        return not self.platforms and self.python == _here()

    def flags(self) -> list[str]:
        """What makes pip choose for the target instead of for this machine."""
        if self.is_here:
            return []
        # pip takes a tag literally: manylinux_2_28 does not include the wheels of older systems.
        machine = platform.machine()
        tags = self.platforms or (*(f"manylinux_2_{minor}_{machine}" for minor in reversed(_GLIBC)), f"manylinux2014_{machine}", f"linux_{machine}")
        abis = ("cp" + self.python.replace(".", ""), "abi3", "none")
        several = [word for abi in abis for word in ("--abi", abi)] + [word for tag in tags for word in ("--platform", tag)]
        return ["--python-version", self.python, "--implementation", "cp", *several]


class Steps:
    """What is being done, on standard error and only on a terminal."""

    def __init__(self) -> None:
        self.on = sys.stderr.isatty()

    def say(self, text: str) -> None:
        """Begin a step."""
        if self.on:
            sys.stderr.write(f"\r\x1b[K{text}\n")

    def bar(self, what: str, done: int, total: int) -> None:
        """Rewrite the line of the step that can count."""
        if self.on:
            filled = 30 * done // max(1, total)
            sys.stderr.write(f"\r\x1b[K{what} [{'#' * filled}{'.' * (30 - filled)}] {100 * done // max(1, total)} %")
            if done >= total:
                sys.stderr.write("\r\x1b[K")


def main() -> int:
    """The command; its exit code."""
    given = _arguments()
    try:
        with tempfile.TemporaryDirectory(prefix=".bundle-", dir=given.output.absolute().parent) as scratch:
            print(make(given, Path(scratch), Steps()))
    except (BundleError, OSError) as error:
        print(f"make_bundle: {error}", file=sys.stderr)
        return 1
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.set_defaults(full=False)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--light", dest="full", action="store_false", help="what serves on a CPU: BERT-like models, no torch (the default)")
    kind.add_argument("--full", action="store_true", help="torch for the CPU and sentence-transformers too: any model, and prewarming there")
    parser.add_argument("--model", default="bundled", help="a hub id or a directory (default: the bundled model)")
    parser.add_argument("--revision", default="", help="commit, tag or branch of a hub model")
    parser.add_argument("--dtype", action="append", choices=["float32", "int8", "bfloat16"], help="prewarm this precision (again for more)")
    parser.add_argument("--no-prewarm", action="store_true", help="no artefact: a light installation then serves the bundled model alone")
    parser.add_argument("--python-version", default=_here(), metavar="3.N", help="the target's Python (default: this one's)")
    parser.add_argument("--platform", action="append", default=[], metavar="TAG", help="wheels of the target, for instance manylinux_2_28_aarch64")
    parser.add_argument("--torch-index", default=TORCH_INDEX, metavar="URL", help=f"where torch's CPU build comes from (default {TORCH_INDEX})")
    parser.add_argument("--output", required=True, type=Path, metavar="PATH", help="a name ending in .tar, or a directory to be made")
    return parser.parse_args()


def make(given: argparse.Namespace, scratch: Path, steps: Steps) -> str:
    """Make the bundle; a sentence about it."""
    if given.output.exists():
        raise BundleError(f"{given.output} exists; name another or remove it.")
    version = _version()
    stage = scratch / f"reranker-worker-{version}"
    target = Target(given.python_version, tuple(given.platform))
    steps.say("1/4 copying the code")
    copy_code(stage / "code")
    steps.say("2/4 downloading the wheels")
    download(given, target, stage, steps)
    facts: dict[str, object] = {"name": "reranker-worker", "version": version, "kind": "full" if given.full else "light", "python": target.python}
    facts["platforms"] = list(target.platforms) or [f"{platform.system().lower()}_{platform.machine()}"]
    facts["wheels"] = sorted(path.name for path in (stage / "wheels").iterdir())
    steps.say("3/4 prewarming the model")
    facts |= unprepared(given) if given.no_prewarm else prewarm(given, stage, steps)
    steps.say("4/4 writing the bundle")
    _write_install(stage, facts)
    return write(stage, given.output, steps)


def _version() -> str:
    match = re.search(r'__version__ = "([^"]+)"', (ROOT / "reranker_worker" / "__init__.py").read_text(encoding="utf-8"))
    if match is None:
        raise BundleError("reranker_worker/__init__.py names no version.")
    return match[1]


def _here() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def copy_code(place: Path) -> None:
    """The worker's files, all with the same time."""
    place.mkdir(parents=True)
    for name in CODE:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, place / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        elif path.exists():
            shutil.copyfile(path, place / name)
    if not (place / SETTINGS).is_file():
        raise BundleError(f"{SETTINGS} is missing, and the installer makes the node's settings of it.")
    same_times(place)


def same_times(place: Path) -> None:
    """Give everything below one time and plain modes."""
    for path in sorted(place.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or (path.suffix == ".sh") or path.read_bytes()[:2] == b"#!" else 0o644)
        os.utime(path, (EPOCH, EPOCH), follow_symlinks=False)


# --- wheels ------------------------------------------------------------------------------------------------------------------


def download(given: argparse.Namespace, target: Target, stage: Path, steps: Steps) -> None:
    """The wheels in the lock file's versions, a file of their hashes, and pip itself, so that the target needs nothing but Python."""
    wheels = stage / "wheels"
    wheels.mkdir()
    constraints = stage.parent / "constraints.txt"
    lines = [line + "+cpu" if line.startswith("torch==") else line for line in pins(target.python)]
    constraints.write_text("\n".join(lines) + "\n", encoding="utf-8")
    common = ["--only-binary", ":all:", "--dest", str(wheels)]
    if given.full:
        # The local version keeps the CUDA build out, and PyTorch's index is asked for nothing else.
        torch = next(line for line in lines if line.startswith("torch=="))
        _pip(["download", *common, *target.flags(), "--no-deps", "--extra-index-url", given.torch_index, torch], steps)
    _pip(["download", *common, *target.flags(), "--find-links", str(wheels), "-c", str(constraints), *(FULL if given.full else LIGHT)], steps)
    _pip(["download", *common, "--no-deps", f"pip=={_pip_version()}"], steps)
    hashes = stage / "requirements-hashes.txt"
    hashes.write_text("".join(_pinned(path) for path in sorted(wheels.glob("*.whl")) if not path.name.startswith("pip-")), encoding="utf-8")
    check = ["install", "--dry-run", "--no-index", "--find-links", str(wheels), "--require-hashes", "--ignore-installed", "-r", str(hashes)]
    there = [] if target.is_here else ["--target", str(stage.parent / "nowhere"), "--only-binary", ":all:", *target.flags()]
    _pip([*check, *there], steps)


def pins(python: str) -> list[str]:
    """The lock file's lines that hold for the target's Python, without their conditions (pip would judge those by the Python it runs in)."""
    from pip._vendor.packaging.markers import Marker

    found = []
    for line in (ROOT / "requirements-lock.txt").read_text(encoding="utf-8").splitlines():
        pin, _, condition = line.partition(";")
        if pin.strip() and not pin.startswith("#"):
            holds = not condition or Marker(condition.strip()).evaluate({"python_version": python, "python_full_version": f"{python}.0"})
            found += [pin.strip()] if holds else []
    return found


def _pip(arguments: Sequence[str], steps: Steps) -> None:
    quiet = [] if steps.on else ["-q"]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *quiet, *arguments]
    shown, kept = (sys.stderr, None) if steps.on else (subprocess.PIPE, subprocess.PIPE)  # on a terminal pip draws its own bars
    done = subprocess.run(command, stdout=shown, stderr=kept, text=True, check=False)  # noqa: S603  # our own pip
    if done.returncode:
        told = "" if steps.on else "\n" + "\n".join((done.stderr or done.stdout or "").splitlines()[-8:])
        raise BundleError(f"pip {arguments[0]} failed with exit code {done.returncode}.{told}")


def _pip_version() -> str:
    import pip

    return str(pip.__version__)


def _pinned(wheel: Path) -> str:
    name, version = wheel.name.split("-")[:2]
    return f"{name.replace('_', '-').lower()}=={version} --hash=sha256:{sha256(wheel)}\n"


# --- model -------------------------------------------------------------------------------------------------------------------


def prewarm(given: argparse.Namespace, stage: Path, steps: Steps) -> dict[str, object]:
    """Prewarm with the code that is shipped; what the target must set and what there is, for the manifest."""
    cache = stage / "cache"
    is_directory = Path(given.model).expanduser().is_dir() and given.model != "bundled"
    made, setting = [], given.model
    for dtype in given.dtype or ["float32"]:
        arguments = ["--model", given.model, "--dtype", dtype, "--artefacts", str(cache / "artefacts"), "--json"]
        arguments += ["--revision", given.revision] if given.revision else []
        if is_directory:
            # A directory's artefact is found by the directory's own path, which the target does not have: there it is named itself.
            name = f"{Path(given.model).resolve().name}-{dtype}"
            arguments += ["--output", str(cache / "artefacts" / name)]
            setting = f"/var/cache/reranker-worker/artefacts/{name}"
        made.append(_prewarm(arguments, stage / "code", steps))
    revision = str(made[0].get("revision") or "")
    if revision and not is_directory:
        _snapshot(given.model, revision, cache / "huggingface" / "hub")
    for left in [*cache.rglob(".*.lock"), *stage.glob("code/**/__pycache__")]:
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    artefacts = [{"path": Path(str(facts["path"])).name, "backend": facts["backend"], "dtype": facts["dtype"]} for facts in made]
    # An artefact that is named by its directory has no revision to ask for.
    return {"model": given.model, "model_revision": "" if is_directory else revision, "model_setting": setting, "artefacts": artefacts}


def unprepared(given: argparse.Namespace) -> dict[str, object]:
    """The same facts where nothing was prewarmed."""
    return {"model": given.model, "model_revision": given.revision, "model_setting": given.model, "artefacts": []}


def _prewarm(arguments: Sequence[str], code: Path, steps: Steps) -> dict[str, object]:
    command = [sys.executable, "-B", "-m", "reranker_worker", "prewarm", *arguments]
    kept = None if steps.on else subprocess.PIPE
    done = subprocess.run(command, cwd=code, stdout=subprocess.PIPE, stderr=kept, text=True, check=False)  # noqa: S603  # our own code
    if done.returncode:
        raise BundleError(f"prewarm failed with exit code {done.returncode}: {(done.stdout or done.stderr or '').strip()}")
    return dict(json.loads(done.stdout))


def _snapshot(model: str, revision: str, place: Path) -> None:
    """A hub model's files, in the cache's layout but without its links."""
    from huggingface_hub import constants

    found = constants.HF_HUB_CACHE
    entry = "models--" + model.replace("/", "--")
    shutil.copytree(Path(found) / entry / "snapshots" / revision, place / entry / "snapshots" / revision)
    (place / entry / "refs").mkdir()
    (place / entry / "refs" / "main").write_text(revision, encoding="ascii")


# --- the bundle --------------------------------------------------------------------------------------------------------------


def _write_install(stage: Path, facts: Mapping[str, object]) -> None:
    here = Path(__file__).resolve().parent
    shutil.copyfile(here / "install.sh", stage / "install.sh")
    if (here / "README.md").exists():
        shutil.copyfile(here / "README.md", stage / "README.md")
    (stage / "bundle.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write(stage: Path, output: Path, steps: Steps) -> str:
    """Checksums, then one file or one directory; a sentence about it."""
    same_times(stage)
    files = [path for path in sorted(stage.rglob("*")) if path.is_file()]
    lines = []
    for number, path in enumerate(files, start=1):
        lines.append(f"{sha256(path)}  {path.relative_to(stage).as_posix()}\n")
        steps.bar("checksums", number, len(files))
    (stage / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")
    same_times(stage)
    if output.suffix == ".tar":
        draft = stage.parent / "bundle.tar"
        _tar(stage, draft, steps)
        os.replace(draft, output)
    else:
        os.replace(stage, output)
    size = output.stat().st_size if output.is_file() else sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    return f"{output}: {size / 1e6:,.0f} MB, {len(files)} files; sha256 of its SHA256SUMS: {hashlib.sha256(''.join(lines).encode()).hexdigest()}"


def _tar(stage: Path, draft: Path, steps: Steps) -> None:
    """Not compressed: nearly all of it is compressed already."""
    paths = sorted([stage, *stage.rglob("*")], key=lambda path: path.as_posix())
    with tarfile.open(draft, "w", format=tarfile.GNU_FORMAT) as archive:
        for number, path in enumerate(paths, start=1):
            archive.add(path, path.relative_to(stage.parent).as_posix(), recursive=False, filter=_owned_by_root)
            steps.bar("bundle", number, len(paths))


def _owned_by_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    member.mtime = EPOCH
    member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
    return member


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
