"""Makes an artefact: find the model, export it, reduce it, compare it with the reference, and only then put it in its place.

Safe when run twice, by several processes or nodes on one shared directory, and when interrupted: all is written beside the target and renamed
at the end, under a lock where the file system has locks.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from reranker_worker.backends import Backend, BackendError, Pair, library_versions
from reranker_worker.backends.choosing import choose_backend
from reranker_worker.backends.declared import UnsupportedModelError, read_declared
from reranker_worker.backends.encoder import read_encoder
from reranker_worker.machine import usable_threads
from reranker_worker.models import ModelError, ResolvedModel, resolve
from reranker_worker.models.artefacts import (
    ARTEFACT_FILE,
    Artefact,
    Source,
    artefact_name,
    artefacts_directory,
    fingerprint,
    is_artefact,
    is_stale,
    key_of,
    read_artefact,
)
from reranker_worker.models.errors import CANNOT_CREATE, MISSING, UNSAFE, shown
from reranker_worker.models.known_pairs import ANY_PAIRS, KNOWN_PAIRS_FILE, KnownPair, read_known_pairs, write_known_pairs
from reranker_worker.models.manifest import MANIFEST_NAME, verify_manifest, write_manifest
from reranker_worker.prewarm.parity import compare, score_questions
from reranker_worker.prewarm.sample import for_calibration, for_comparison

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from reranker_worker.config import Config

_PARITY = 65
_LEFT_BEHIND = (MANIFEST_NAME, KNOWN_PAIRS_FILE, ARTEFACT_FILE, "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.onnx", "*.md", ".git*")


class _ParityError(BackendError):
    """What was made ranks differently."""


@dataclass(frozen=True, slots=True)
class Made:
    """An artefact and whether it was there already."""

    artefact: Artefact
    was_there: bool


def target_of(config: Config, output: str) -> Path:
    """Where the artefact of these settings belongs."""
    if output:
        return Path(output).expanduser().absolute()
    backend, dtype = _wanted(config)
    return artefacts_directory(config).absolute() / artefact_name(key_of(config), backend, dtype)


def check(config: Config, output: str, progress: Callable[[str, int, int], None]) -> Artefact:
    """The artefact of these settings, verified and made from the files that the model has now; raises ModelError (65, 66, 78)."""
    target = target_of(config, output)
    if not is_artefact(target):
        raise ModelError(f"The model {shown(config.model)} is not prewarmed: {shown(target)} is not there.", MISSING)
    artefact = read_artefact(target)
    verify_manifest(target, progress)
    if artefact.source.model != key_of(config) or (artefact.backend, artefact.dtype) != _wanted(config, artefact):
        text = f"{shown(target)} holds {shown(artefact.source.model)} for {artefact.backend} {artefact.dtype}, not what the settings name."
        raise ModelError(text, UNSAFE)
    if artefact.source.revision:
        if config.model_revision not in ("", artefact.source.revision):
            raise ModelError(f"{shown(target)} was made from revision {artefact.source.revision}; prewarm it again.", UNSAFE)
    elif is_stale(artefact, resolve(config, progress, use_artefacts=False).path):
        raise ModelError(f"{shown(target)} was made from other files than the model has now; prewarm it again.", UNSAFE)
    return artefact


def make(config: Config, output: str, progress: Callable[[str, int, int], None]) -> Made:
    """Make the artefact unless it is there; raises ModelError or BackendError with a sentence."""
    target = target_of(config, output)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            with contextlib.suppress(ModelError):
                return Made(check(config, output, progress), was_there=True)
            if output and target.exists() and not is_artefact(target) and (not target.is_dir() or any(target.iterdir())):
                raise ModelError(f"{shown(target)} exists and is no artefact; name an empty or a new directory.", CANNOT_CREATE)
            return Made(_make(config, target, progress), was_there=False)
    except OSError as error:
        text = f"The artefact {shown(target)} cannot be written ({error.strerror}); "
        raise ModelError(text + "free some space or name a directory that can be written (--output).", CANNOT_CREATE) from error


def _wanted(config: Config, known: Artefact | None = None) -> tuple[str, str]:
    """(backend, dtype) that the settings mean; what they leave open is `known`'s."""
    dtype = config.dtype
    if dtype == "auto":
        dtype = known.dtype if known else "float32"
    backend = config.backend
    if backend == "auto":
        backend = known.backend if known else ("torch" if dtype in ("bfloat16", "float16") else "onnx")
    return backend, dtype


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """One at a time for each target; where locks are not to be had, the rename alone keeps the result whole."""
    with (target.parent / f".{target.name}.lock").open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
            for left in target.parent.glob(f".{target.name}.*.tmp"):
                shutil.rmtree(left, ignore_errors=True)  # of one that was interrupted
        yield


def _make(config: Config, target: Path, progress: Callable[[str, int, int], None]) -> Artefact:
    source = resolve(config, progress, use_artefacts=False)
    if source.artefact is not None:
        raise ModelError(f"{shown(config.model)} is an artefact already; name the model that it was made from.", UNSAFE)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent) as scratch:
        place = Path(scratch) / "artefact"
        place.mkdir()
        artefact = _write(config, source, place, progress)
        write_manifest(place)
        if target.exists():
            # A stale artefact or an empty directory; a worker that starts in this instant does not find one and serves without.
            os.rename(target, Path(scratch) / "old")
        os.rename(place, target)
    return replace(artefact, path=target)


def _write(config: Config, source: ResolvedModel, place: Path, progress: Callable[[str, int, int], None]) -> Artefact:
    """Everything but the manifest; where int8 changes the ranking, once more with the sensitive layers left out."""
    expected = functools.cache(lambda: _reference(config, source, progress))  # the same for both, and dear
    try:
        return _write_once(config, source, place, progress, expected, careful=False)
    except _ParityError:
        if _wanted(config)[1] != "int8":
            raise
    shutil.rmtree(place)  # rather than written over: what was opened is mapped into memory
    place.mkdir()
    return _write_once(config, source, place, progress, expected, careful=True)


def _write_once(
    config: Config,
    source: ResolvedModel,
    place: Path,
    progress: Callable[[str, int, int], None],
    expected: Callable[[], list[list[float]]],
    *,
    careful: bool,
) -> Artefact:
    backend, dtype = _wanted(config)
    progress("exporting the model", 0, 0)
    try:
        positions = _export(source, backend, dtype, place, careful=careful)
    except UnsupportedModelError as error:
        if config.backend != "auto" or dtype == "int8":
            raise BackendError(f"The backend {backend} cannot run the model {shown(config.model)}: {error}.", UNSAFE) from error
        backend, positions = "torch", _export(source, "torch", dtype, place, careful=careful)
    names = sorted(path.relative_to(source.path).as_posix() for path in source.path.rglob("*") if path.is_file() and path.name[0] != ".")
    origin = Source(key_of(config), source.revision, fingerprint(source.path, names))
    draft = Artefact(backend, dtype, origin, positions, {}, 0.0, {}, path=place)
    settings = replace(config, backend=backend, dtype=dtype, device="cpu", scores="logit")
    opened = choose_backend(settings, ResolvedModel(config.model, place, source.revision, "artefact", draft), _threads(config), lambda text: None)
    logits, speed = _score(opened, settings, progress)
    parity = compare(for_comparison(), logits, expected())
    problem = parity.problem(exact=dtype == "float32")
    if problem is not None:
        raise _ParityError(f"{backend} {dtype} does not give the ranking of {shown(config.model)}: {problem}. Use another dtype.", _PARITY)
    _write_known_pairs(opened, source, place)
    figures = {name: round(value, 6) for name, value in asdict(parity).items()}
    artefact = replace(draft, parity=figures, pairs_per_second=round(speed, 1), versions=library_versions(opened))
    (place / ARTEFACT_FILE).write_bytes(artefact.to_json())
    return artefact


def _threads(config: Config) -> int:
    return config.threads or usable_threads()


def _export(source: ResolvedModel, backend: str, dtype: str, place: Path, *, careful: bool) -> int:
    """Write what the backend needs; the number of positions of a graph, else 0. `careful`: int8 for the less sensitive layers alone."""
    if backend == "torch":
        shutil.copytree(source.path, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*_LEFT_BEHIND))
        return 0
    declared = read_declared(source.path)
    encoder = read_encoder(source.path, declared.config, typed=declared.typed)
    from reranker_worker.backends.onnx_graph import save_graph

    ranges = None
    if dtype == "int8":
        from reranker_worker.prewarm.calibration import calibrate, less_sensitive, spread_outliers

        ranges, greatest = calibrate(encoder, declared, for_calibration())
        if careful:
            ranges = less_sensitive(ranges, len(encoder.layers))
        encoder, ranges = spread_outliers(encoder, ranges, greatest)
    save_graph(encoder, place, ranges)
    for path in sorted(source.path.glob("*.json")):
        if path.name not in (KNOWN_PAIRS_FILE, ARTEFACT_FILE) and not path.name.endswith(".index.json"):
            (place / path.name).write_bytes(path.read_bytes())
    return len(encoder.position)


def _score(opened: Backend, config: Config, progress: Callable[[str, int, int], None]) -> tuple[list[list[float]], float]:
    """(what the artefact makes of the sample, pairs per second)."""
    questions = for_comparison()
    score_questions(opened, config, questions[:1], lambda done, total: None)  # the first pass warms up
    return score_questions(opened, config, questions, lambda done, total: progress("scoring the sample", done, total))


def _reference(config: Config, source: ResolvedModel, progress: Callable[[str, int, int], None]) -> list[list[float]]:
    """What the model itself makes of the sample."""
    progress("loading the reference", 0, 0)
    from reranker_worker.backends.torch import TorchBackend

    exact = replace(config, backend="torch", dtype="float32", device="cpu", scores="logit")
    reference = TorchBackend(exact, source, _threads(config))
    logits, _ = score_questions(reference, exact, for_comparison(), lambda done, total: progress("scoring the reference", done, total))
    return logits


def _write_known_pairs(backend: Backend, source: ResolvedModel, place: Path) -> None:
    """The artefact's own scores of a few pairs: another machine whose arithmetic differs is found out at its start."""
    pairs = [(known.query, known.document) for known in read_known_pairs(source.path)] or ANY_PAIRS
    logits = backend.score(backend.tokenize([Pair(query, document, backend.info.max_length) for query, document in pairs]))
    write_known_pairs(place, [KnownPair(query, document, logit) for (query, document), logit in zip(pairs, logits, strict=True)])
