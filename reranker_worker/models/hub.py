"""Hub models: first the local cache without any network, then a download of the files that a safe start needs, and no others."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reranker_worker.models.errors import CANNOT_CREATE, MISSING, NETWORK, UNSAFE, ModelError, shown
from reranker_worker.models.verify import PICKLE_SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from reranker_worker.config import Config

_WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*vocab*.txt", "*merges.txt", "MANIFEST.sha256")
# Other runtimes' copies of the same weights, and training states.
_UNWANTED = ("onnx/*", "openvino/*", "coreml/*", "original/*", "checkpoint-*/*")
_CANNOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EFBIG)
_PROGRESS_INTERVAL_S = 0.1


def find_on_hub(config: Config, progress: Callable[[str, int, int], None]) -> tuple[Path, str]:
    """(snapshot directory, "cache" or "hub") of the hub model `config.model`; raises ModelError.

    A cached snapshot is used as it stands, with no network call: pin `model_revision` to get a certain one, or clear the cache for the newest.
    """
    from huggingface_hub import constants, utils
    from huggingface_hub.errors import HFValidationError

    hub_utils: Any = utils
    try:
        hub_utils.validate_repo_id(config.model)
    except HFValidationError as error:
        text = f"The model name {shown(config.model)} is neither a directory nor a hub id such as org/name; correct it."
        raise ModelError(text, UNSAFE) from error
    cached = _from_cache(config)
    if cached is not None and (_is_complete(cached, config) or constants.HF_HUB_OFFLINE or config.local_files_only):
        return cached, "cache"
    if constants.HF_HUB_OFFLINE or config.local_files_only:
        text = f"The model {shown(config.model)}{_at(config)} is not in the local cache and the network is switched off; "
        raise ModelError(text + "run `python -m reranker_worker prewarm` with the network once, or name a directory.", MISSING)
    return _download(config, progress), "hub"


def _from_cache(config: Config) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(config.model, revision=config.model_revision or None, local_files_only=True, **_patterns(config)))
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None


def _is_complete(snapshot: Path, config: Config) -> bool:
    """Caches written by other tools may hold a part of the files: tokenizer only, or pickled weights only."""
    suffixes = (".safetensors", *PICKLE_SUFFIXES) if config.allow_pickle else (".safetensors",)
    named = any((snapshot / name).is_file() for name in ("config.json", "modules.json"))
    return named and any(path.suffix in suffixes and path.is_file() for path in snapshot.rglob("*"))


def _download(config: Config, progress: Callable[[str, int, int], None]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        path = snapshot_download(config.model, revision=config.model_revision or None, tqdm_class=_progress_class(progress), **_patterns(config))
    except Exception as error:  # the library raises its own, httpx's and the system's errors; each becomes one sentence
        raise _explained(error, config) from error
    return Path(path)


def _patterns(config: Config) -> dict[str, Any]:
    code = ("*.py",) if config.trust_remote_code else ()
    return {"allow_patterns": [*_WANTED, *code], "ignore_patterns": list(_UNWANTED)}


def _explained(error: Exception, config: Config) -> ModelError:
    """One sentence and one exit code for whatever a download can fail with."""
    from huggingface_hub import constants, errors

    name, causes = shown(config.model) + _at(config), list(_causes(error))
    status = next((cause.response.status_code for cause in causes if isinstance(cause, errors.HfHubHTTPError) and cause.response is not None), 0)
    login = "set HF_TOKEN to a token that may read it"
    if any(isinstance(cause, errors.GatedRepoError) for cause in causes):
        return ModelError(f"The model {name} is gated: accept its conditions on the hub, then {login}.", MISSING)
    if any(isinstance(cause, errors.RevisionNotFoundError) for cause in causes):
        return ModelError(f"The hub has no such revision: {name}; correct RERANKING_MODEL_REVISION.", MISSING)
    if any(isinstance(cause, errors.RepositoryNotFoundError) for cause in causes) or status in (401, 403, 404):
        return ModelError(f"The hub has no model {name}, or it is private; correct the name (org/name), or {login}.", MISSING)
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno in _CANNOT_WRITE:
            text = f"The model {name} cannot be written to the cache {shown(constants.HF_HUB_CACHE)} ({cause.strerror}); "
            return ModelError(text + "free some space or set HF_HOME to a directory that can be written.", CANNOT_CREATE)
    reason = f"HTTP {status}" if status else type(causes[-1]).__name__
    text = f"The model {name} is not in the local cache and the hub {shown(constants.ENDPOINT)} cannot be reached ({reason}); "
    return ModelError(text + "check the network, or bring the cache (HF_HOME) from a machine that has one.", NETWORK)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _at(config: Config) -> str:
    return f" at revision {shown(config.model_revision)}" if config.model_revision else ""


def _progress_class(progress: Callable[[str, int, int], None]) -> Any:
    """A tqdm class for huggingface_hub that draws nothing and reports downloaded bytes to `progress`.

    The hub makes two bars in bytes (received, and written to disk) and one that counts files. The written one has the true total; the
    other's is a guess that only grows. `done` is the larger of the two and never falls.
    """
    from tqdm.std import tqdm  # type: ignore[import-untyped]  # tqdm ships no types

    bars: list[Any] = []
    lock = threading.Lock()
    last = [0.0, 0.0]  # bytes reported, when

    def report() -> None:
        totals = [int(bar.total) for bar in bars if bar.total]
        if not totals:
            return
        total = min(totals)
        done = max(int(last[0]), min(total, max(int(bar.n) for bar in bars)))
        now = time.monotonic()
        if done > last[0] and (done == total or now - last[1] >= _PROGRESS_INTERVAL_S):
            last[:] = [done, now]
            progress("download", done, total)

    class Silent(tqdm):  # type: ignore[misc]  # a base of unknown type, as above
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs["disable"] = True
            is_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **kwargs)
            if is_bytes:
                with lock:
                    bars.append(self)

        def update(self, n: float | None = 1) -> None:
            with lock:
                self.n += n or 0
                report()

    # tqdm's own lock is a multiprocessing one, which may start a helper process.
    Silent.set_lock(threading.RLock())
    return Silent
