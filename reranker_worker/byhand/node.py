"""What `check --deploy` asks of a node without starting anything: settings, files and their permissions, versions, the model, limits.

Each question is a function that gives one `Point`. Nothing here writes, uses the network or needs torch.
"""

from __future__ import annotations

import difflib
import os
import re
import resource
import stat
import sys
import sysconfig
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reranker_worker import machine
from reranker_worker.config import env_name, settings_table
from reranker_worker.models import ModelError, ResolvedModel, resolve
from reranker_worker.models.artefacts import Artefact, artefact_name, artefacts_directory, fits, is_stale, key_of, read_artefact
from reranker_worker.models.errors import MISSING, UNSAFE, shown
from reranker_worker.models.manifest import verify_manifest
from reranker_worker.packages import installed_version

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from reranker_worker.config import Config

OK, WARNING, FAILED, SKIPPED = "ok", "warning", "failed", "skipped"
PERMISSION, UNFIT = 73, 71
PACKAGE = Path(__file__).resolve().parents[1]
LOCK_FILE = PACKAGE.parent / "requirements-lock.txt"
PREWARM = "python -m reranker_worker prewarm"
# What computes scores or finds the model; the version of a test runner does not matter on a node.
_RUNTIME = "onnxruntime onnx tokenizers numpy orjson safetensors huggingface-hub torch transformers sentence-transformers openvino".split()
_PINNED = re.compile(r"([A-Za-z0-9._-]+)==([^\s;]+)")
_CPU_TORCH = "https://download.pytorch.org/whl/cpu"
_OTHERS_VARIABLES = {"RERANKING_SCRIPT_PATH", "RERANKING_PYTHON"}  # the host's own, about the worker
_MIB = 1024 * 1024
_WEIGHTS = (".safetensors", ".weights", ".bin", ".pt")
# Resident beside the weights, measured: both processes with their libraries, and what long texts add in time.
_BASE_BYTES, _TORCH_BYTES, _GROWTH_BYTES = 160 * _MIB, 400 * _MIB, 66 * _MIB
_DESCRIPTORS, _DESCRIPTORS_EACH_ENGINE = 64, 32


@dataclass(frozen=True, slots=True)
class Point:
    """One line: what was asked, how it came out, and what to do. `facts` are for `--json`."""

    name: str
    status: str
    text: str
    do: str = ""
    exit_code: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


def failed(name: str, text: str, do: str, exit_code: int) -> Point:
    """A point that stops the deployment."""
    return Point(name, FAILED, text, do, exit_code)


# --- settings ----------------------------------------------------------------------------------------------------------------


def settings_point(environ: Mapping[str, str], given: int) -> Point:
    """The settings could be read; a variable that is none of them is probably misspelt."""
    known = {variable for _, variable, _, _ in settings_table()}
    named = {name for name in environ if name.startswith("RERANKING_")} - _OTHERS_VARIABLES
    unknown = sorted(named - known)
    text = f"valid, {len(named & known)} of them from the environment and {given} from flags"
    if not unknown:
        return Point("settings", OK, text)
    meant = difflib.get_close_matches(unknown[0], known, 1)
    do = f"Is {meant[0]} meant?" if meant else "Remove it; --help lists the settings."
    return Point("settings", WARNING, f"{text}; no setting of the worker: {', '.join(unknown)}", do, facts={"unknown": unknown})


def network_point(config: Config, environ: Mapping[str, str]) -> Point:
    """A start must neither wait for a network nor download in the night what a deployment forgot."""
    if config.local_files_only or environ.get("HF_HUB_OFFLINE", "").strip().upper() in ("1", "TRUE", "YES", "ON"):
        return Point("network", OK, "switched off for the model")
    if not _on_hub(config):
        return Point("network", OK, "not needed: the model is no hub model")
    do = f"Set {env_name('local_files_only')}=1 and HF_HUB_OFFLINE=1 for the worker."
    return Point("network", WARNING, "a start without the model would download it", do)


def _on_hub(config: Config) -> bool:
    return key_of(config) == config.model != "bundled" and "/" in config.model and config.model[0] not in "/.~"


# --- files and their permissions ---------------------------------------------------------------------------------------------


def code_point() -> Point:
    """This user can read the whole code, and not change it."""
    files = [PACKAGE.parent, *_below(PACKAGE), *filter(Path.exists, (PACKAGE.parent / "reranking_server.py", LOCK_FILE))]
    files += [Path(sys.prefix), Path(sysconfig.get_path("purelib"))]
    user, top = os.geteuid(), shown(PACKAGE.parent)
    hidden = first_hidden(files)
    if hidden is not None:
        return failed("code", f"user {user} cannot read {shown(hidden)}", f"Run chmod -R a+rX {top}.", PERMISSION)
    # On a read-only file system nobody can write, whatever the modes say; `access` knows.
    writable = [path for path in files if os.access(path, os.W_OK)]
    anyone = next((path for path in writable if path.stat().st_mode & stat.S_IWOTH), None)
    if anyone is not None:
        return failed("code", f"any user may change {shown(anyone)}", f"Run chmod -R o-w {shown(anyone)}.", PERMISSION)
    text = f"{len(files)} files and directories below {top} and the interpreter's, readable by user {user}"
    if user == 0:
        return Point("code", OK, f"{text} (root may read all: ask again as the user who serves)")
    if writable:
        do = "Where it serves, let root own the code, so that a fault in the host cannot change it."
        return Point("code", WARNING, f"{text}, who may also change it", do)
    return Point("code", OK, f"{text}, who cannot change it")


def caches_point(config: Config) -> Point:
    """This user can read what was prewarmed, and the snapshot of a hub model."""
    places = [artefacts_directory(config)] + ([_hub_cache() / ("models--" + config.model.replace("/", "--"))] if _on_hub(config) else [])
    texts = []
    for place in places:
        if not _reaches(place):
            texts.append(f"{place} is not there")
            continue
        hidden = first_hidden([place, *(_below(place) if place != places[0] else _of_model(config))])
        if hidden is not None:
            do = f"Run chmod -R a+rX {shown(place)} as its owner, and a+x on the directories above."
            return failed("caches", f"user {os.geteuid()} cannot read {shown(hidden)}", do, PERMISSION)
        texts.append(f"{place} is readable")
    return Point("caches", OK, "; ".join(texts), facts={"directories": [str(place) for place in places]})


def _reaches(place: Path) -> bool:
    """Whether the place is there, or hidden by a directory that this user may not enter: both are worth a look."""
    try:
        place.lstat()
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _of_model(config: Config) -> Iterator[Path]:
    for path in _artefact_paths(config):
        yield path
        yield from _below(path)


def _below(directory: Path) -> Iterator[Path]:
    """Everything below a directory that a start reads: not the compiled files, which are only a cache."""
    for parent, names, files in os.walk(directory):
        names[:] = [name for name in names if name != "__pycache__"]
        yield from (Path(parent, name) for name in (*names, *files))


def first_hidden(paths: Iterable[Path]) -> Path | None:
    """The first file or directory that this user cannot read."""
    return next((path for path in paths if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0))), None)


# --- versions ----------------------------------------------------------------------------------------------------------------


def packages_point() -> Point:
    """Installed versions are those of the lock file, with which this release was tested."""
    installed = {name: version for name in _RUNTIME if (version := installed_version(name))}
    facts = {"python": sys.version.split()[0], "installed": installed, "lock": str(LOCK_FILE)}
    listed = ", ".join(f"{name} {version}" for name, version in installed.items())
    try:
        pinned = pins(LOCK_FILE.read_text(encoding="utf-8"))
    except OSError:
        return Point("packages", WARNING, f"{LOCK_FILE} is not there to compare with; installed: {listed}", "Copy it beside the code.", facts=facts)
    other = {name: pinned[name] for name, version in installed.items() if name in pinned and version.partition("+")[0] not in pinned[name]}
    if not other:
        return Point("packages", OK, f"as in {LOCK_FILE.name}: {listed}", facts=facts)
    text = "; ".join(f"{name} is {installed[name]} and {LOCK_FILE.name} says {' or '.join(versions)}" for name, versions in other.items())
    index = f" --extra-index-url {_CPU_TORCH}" if "torch" in other and installed["torch"].endswith("+cpu") else ""
    do = f"Run {sys.executable} -m pip install -c {LOCK_FILE}{index} {' '.join(other)}."
    return replace(failed("packages", text, do, UNSAFE), facts=facts)


def pins(text: str) -> dict[str, list[str]]:
    """{package: versions} of a lock file; one that has several (for different Pythons) may be installed in any of them."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        match = _PINNED.match(line)
        if match:
            found.setdefault(re.sub(r"[-_.]+", "-", match[1]).lower(), []).append(match[2].partition("+")[0])
    return found


# --- the model and what was prewarmed ----------------------------------------------------------------------------------------


def model_point(config: Config, progress: Callable[[str, int, int], None]) -> tuple[Point, ResolvedModel | None]:
    """The model is there, whole, and needs no network; what serves without its source's files is an artefact of a hub revision."""
    fixed = next((artefact for artefact in _readable_artefacts(config) if artefact.source.revision and _is_wanted(artefact, config)), None)
    if fixed is not None:
        text = f"{config.model} at {fixed.source.revision}, prewarmed"
        return Point("model", OK, text, facts={"path": str(fixed.path)}), ResolvedModel(
            config.model, fixed.path, fixed.source.revision, "artefact", fixed
        )
    try:
        model = resolve(replace(config, local_files_only=True), progress, use_artefacts=False)
    except ModelError as error:
        return failed("model", str(error).rstrip("."), "", error.exit_code), None  # its sentence says what to do
    except ModuleNotFoundError as error:
        return failed("model", f"finding it needs the Python package {error.name}", f"Install {error.name}.", UNSAFE), None
    mib = sum(path.stat().st_size for path in _below(model.path) if path.is_file()) / _MIB
    text = f"{config.model}, {mib:,.0f} MiB in {model.path}, whole"
    return Point("model", OK, text, facts={"path": str(model.path), "revision": model.revision}), model


def artefact_point(config: Config, model: ResolvedModel | None, progress: Callable[[str, int, int], None]) -> Point:
    """What was prewarmed is whole and made from the files that the model has now."""
    if model is not None and model.artefact is not None and model.path not in _artefact_paths(config):  # the settings name its directory
        return Point("artefact", OK, f"{model.artefact.backend} {model.artefact.dtype}, whole", facts={"path": str(model.path)})
    current: list[Artefact] = []
    for path in _artefact_paths(config):
        try:
            artefact = read_artefact(path)
            if artefact.source.model != key_of(config) or not fits(artefact, config):
                continue
            verify_manifest(path, progress)
        except ModelError as error:
            return failed("artefact", f"{path}: {str(error).rstrip('.')}", f"Remove that directory and run {PREWARM} again.", error.exit_code)
        if _is_old(artefact, config, model):
            text = f"{path} was made from other files than the model has now"
            return failed("artefact", text, f"Run {PREWARM} again with the same settings.", UNSAFE)
        current.append(artefact)
    if current:
        text = "; ".join(f"{artefact.backend} {artefact.dtype} in {artefact.path}" for artefact in current)
        return Point("artefact", OK, f"{text}, whole and up to date", facts={"paths": [str(artefact.path) for artefact in current]})
    return _none(config)


def _none(config: Config) -> Point:
    if config.device not in ("auto", "cpu") or machine.may_have_accelerator():
        return Point("artefact", OK, "none, and none is used on this device")
    where = artefacts_directory(config)
    if config.model == "bundled" and config.dtype != "int8":
        return Point("artefact", OK, f"none in {where}; the bundled model needs none ({PREWARM} saves 0.3 s of every start)")
    return failed("artefact", f"{shown(config.model)} is not prewarmed in {where}", f"Run {PREWARM} with the same settings.", MISSING)


def _artefact_paths(config: Config) -> list[Path]:
    """Directories of this model's artefacts; the prefix is that of `artefact_name`."""
    prefix = artefact_name(key_of(config), "", "").removesuffix("-")
    return sorted(path for path in artefacts_directory(config).glob(prefix + "*") if path.is_dir())


def _readable_artefacts(config: Config) -> Iterator[Artefact]:
    for path in _artefact_paths(config):
        try:
            yield read_artefact(path)
        except ModelError:
            continue  # `artefact_point` tells of it


def _is_wanted(artefact: Artefact, config: Config) -> bool:
    same = artefact.source.model == key_of(config) and fits(artefact, config)
    return same and config.model_revision in ("", artefact.source.revision)


def _is_old(artefact: Artefact, config: Config, model: ResolvedModel | None) -> bool:
    if artefact.source.revision:
        return config.model_revision not in ("", artefact.source.revision)
    return model is not None and model.source != "artefact" and is_stale(artefact, model.path)


# --- limits of the machine ---------------------------------------------------------------------------------------------------


def memory_point(config: Config, model: ResolvedModel | None) -> Point:
    """There is room for what was measured of such a worker; asked before one is started, because a node without room kills what it likes."""
    weights = sum(path.stat().st_size for path in _below(model.path) if path.suffix in _WEIGHTS) if model else 0
    torch = config.backend == "torch" or bool(model and model.artefact and model.artefact.backend == "torch")
    need = (weights + (_TORCH_BYTES if torch else _BASE_BYTES) + _GROWTH_BYTES) * config.engines
    limit, free = machine.memory_limit_bytes(), machine.available_bytes()
    facts = {"needed_bytes": need, "limit_bytes": limit, "available_bytes": free}
    room = min((bytes_ for bytes_ in (limit, free) if bytes_ is not None), default=None)
    if room is None:
        return Point("memory", WARNING, f"about {need // _MIB:,} MiB needed; this system does not tell what there is", facts=facts)
    text = f"about {need // _MIB:,} MiB needed, {room // _MIB:,} MiB to be had"
    if need > room:
        do = "Give the node or the container more memory, use fewer engines, or prewarm with --dtype int8."
        return replace(failed("memory", text, do, UNFIT), facts=facts)
    return Point("memory", OK, text, facts=facts)


def descriptors_point(config: Config) -> Point:
    """Enough files may be open at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = _DESCRIPTORS + _DESCRIPTORS_EACH_ENGINE * config.engines
    text = f"{need} needed at most, {soft} allowed"
    if soft != resource.RLIM_INFINITY and soft < need:
        return failed("descriptors", text, f"Run ulimit -n {max(1024, need)} before, or LimitNOFILE= in the unit (the hard limit is {hard}).", UNFIT)
    return Point("descriptors", OK, text, facts={"soft": soft, "hard": hard})


def threads_point(config: Config) -> Point:
    """No more threads than the affinity and the cgroup's quota let run."""
    usable, quota = machine.usable_threads(), machine.cpu_quota()
    facts = {"usable": usable, "quota": quota, "threads": config.threads, "engines": config.engines}
    granted = f"{usable} of {os.cpu_count()} processors (" + ("no quota" if quota is None else f"a quota of {quota:g}") + ")"
    asked = max(1, config.threads) * config.engines
    if asked <= usable:
        by = f"{asked} asked for" if config.threads else "as many as there are"
        return Point("threads", OK, f"{by}: {granted}", facts=facts)
    do = f"Set {env_name('threads')}=0, and {env_name('engines')} to at most {usable}."
    return Point("threads", WARNING, f"{config.engines} x {config.threads or 1} threads share {granted}, and are slowed down", do, facts=facts)
