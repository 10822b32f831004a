"""From a model's name to a verified local directory: bundled in the package, a directory, the hub's cache, or the hub itself.

A named model is never replaced by another: it is found, or the start fails with a `ModelError` that says what to do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from reranker_worker.models.artefacts import BUNDLED_DIRECTORY, Artefact, find_artefacts, is_artefact, is_stale, read_artefact, refusal
from reranker_worker.models.errors import MISSING, UNSAFE, ModelError, shown
from reranker_worker.models.manifest import verify_manifest
from reranker_worker.models.verify import verify

if TYPE_CHECKING:
    from reranker_worker.config import Config

__all__ = ["BUNDLED_DIRECTORY", "ModelError", "Progress", "ResolvedModel", "resolve", "verify"]

# (stage, done_bytes, total_bytes); stage is "download" or "verify". It may be called from any thread, one call at a time.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model directory that passed `verify`. `revision` is the hub's commit where one is known; `artefact` is set when the directory was
    prewarmed, `stale` names an artefact of the same name that was made from other files and is not used."""

    name: str
    path: Path
    revision: str | None
    source: str  # "bundled", "directory", "cache", "hub", "artefact"
    artefact: Artefact | None = None
    stale: str = ""


def resolve(config: Config, progress: Progress, *, use_artefacts: bool = True) -> ResolvedModel:
    """The verified directory of `config.model`, prewarmed if there is such a one; raises ModelError.

    Touches the network only for a hub model that is neither prewarmed nor cached.
    """
    _check_name(config.model)
    candidates = find_artefacts(config) if use_artefacts else []
    fixed = [artefact for artefact in candidates if artefact.source.revision and config.model_revision in ("", artefact.source.revision)]
    if fixed:
        # A hub model's artefact is of a commit, which never changes: the hub's cache, and its slow library, are not needed.
        return _prewarmed(config, fixed[0], progress)
    model = _find(config, progress)
    if is_artefact(model.path):
        return _named_artefact(config, model, progress)
    stale = ""
    for artefact in candidates:
        if not artefact.source.revision and not is_stale(artefact, model.path):
            return _prewarmed(config, artefact, progress)
        stale = f"The artefact {shown(artefact.path)} was made from other files than {shown(config.model)} has now and is not used; prewarm it again."
    verify(model.path, allow_pickle=config.allow_pickle, trust_remote_code=config.trust_remote_code, progress=progress)
    return replace(model, stale=stale)


def _check_name(name: str) -> None:
    if not name.strip() or len(name) > 4096 or not name.isprintable():
        raise ModelError(f"The model name {shown(name)} is empty, too long or holds control characters; name a directory or a hub id.", UNSAFE)


def _prewarmed(config: Config, artefact: Artefact, progress: Progress) -> ResolvedModel:
    verify_manifest(artefact.path, progress)
    return ResolvedModel(config.model, artefact.path, artefact.source.revision, "artefact", artefact)


def _named_artefact(config: Config, model: ResolvedModel, progress: Progress) -> ResolvedModel:
    artefact = read_artefact(model.path)
    problem = refusal(artefact, config)
    if problem is not None:
        raise ModelError(problem, UNSAFE)
    return replace(_prewarmed(config, artefact, progress), name=artefact.source.model)


def _find(config: Config, progress: Progress) -> ResolvedModel:
    name = config.model
    if name == "bundled":
        _refuse_revision(config)
        if not (BUNDLED_DIRECTORY / "config.json").is_file():
            text = "The bundled model is not part of this installation; install the complete package or name a model (RERANKING_MODEL_PATH)."
            raise ModelError(text, MISSING)
        return ResolvedModel(name, BUNDLED_DIRECTORY, None, "bundled")
    if _is_path(name):
        _refuse_revision(config)
        return ResolvedModel(name, _directory(name), None, "directory")
    from reranker_worker.models.hub import find_on_hub

    path, source = find_on_hub(config, progress)
    return ResolvedModel(name, path, path.name, source)


def _is_path(name: str) -> bool:
    """Whether the name means a local directory. `org/name` is one only if a model lies there; anything more path-like always is."""
    if os.path.isabs(name) or name.startswith(("~", "." + os.sep, "./", "..")) or name in (".", ".."):
        return True
    if name.count("/") > 1 or name.endswith("/") or "\\" in name:
        return True
    return os.path.isfile(os.path.join(name, "config.json")) or ("/" in name and os.path.isfile(name))


def _directory(name: str) -> Path:
    path = Path(os.path.abspath(os.path.expanduser(name)))
    try:
        if path.is_file():
            raise ModelError(f"The model path {shown(name)} is a file; name the directory that holds config.json and the weights.", MISSING)
        if not path.is_dir():
            raise ModelError(f"The model directory {shown(name)} does not exist; correct RERANKING_MODEL_PATH (or --model).", MISSING)
        if not (path / "config.json").is_file() and not (path / "modules.json").is_file():
            raise ModelError(f"The directory {shown(name)} holds no config.json, so it is not a model; name the directory that does.", MISSING)
    except OSError as error:
        raise ModelError(
            f"The model directory {shown(name)} cannot be read ({error.strerror}); check the path and its permissions.", MISSING
        ) from error
    return path


def _refuse_revision(config: Config) -> None:
    if config.model_revision:
        text = "RERANKING_MODEL_REVISION names a revision, but only models from the hub have revisions; unset it or name a hub model."
        raise ModelError(text, UNSAFE)
