"""Checks before anything is loaded: weights that cannot run code, whole files, no code of the model's own, hashes that match.

Nothing here opens a pickle, imports a model library or follows a name out of the model's directory.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from reranker_worker.models.errors import CORRUPT, MISSING, UNSAFE, ModelError, shown
from reranker_worker.models.manifest import MANIFEST_NAME, verify_manifest
from reranker_worker.models.safetensors import tensor_names

if TYPE_CHECKING:
    from collections.abc import Callable

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_INDEX = "model.safetensors.index.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model", "spm.model")
_CODE_CONFIGS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


def verify(
    directory: Path,
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[str, int, int], None] = lambda stage, done_bytes, total_bytes: None,
) -> None:
    """Raise ModelError (65, 66 or 78) unless the model in `directory` is whole and safe to load. With a manifest 1 ms per MB."""
    try:
        if (directory / MANIFEST_NAME).is_file():
            verify_manifest(directory, progress)
        places = _module_directories(directory, trust_remote_code)
        for place in places:
            _verify_json_files(place)
            if not trust_remote_code:
                _refuse_own_code(place)
            _verify_weights(place, allow_pickle)
        _verify_presence(directory, places, allow_pickle)
    except OSError as error:
        name = shown(Path(error.filename).name if isinstance(error.filename, str) else directory)
        raise ModelError(
            f"The model file {name} cannot be read ({error.strerror}); check the permissions or fetch the model again.", MISSING
        ) from error


def _module_directories(directory: Path, trust_remote_code: bool) -> list[Path]:
    """The directories that a loader reads: the model's own, and those of the sentence-transformers modules."""
    places = [directory]
    path = directory / "modules.json"
    if not path.is_file():
        return places
    modules = _read_json(path, list)
    for module in modules:
        kind, place = (module.get("type"), module.get("path", "")) if isinstance(module, dict) else (None, "")
        if not isinstance(kind, str) or not isinstance(place, str):
            raise ModelError("modules.json is not a list of modules with a type and a path; fetch the model again.", CORRUPT)
        if not kind.startswith("sentence_transformers.") and not trust_remote_code:
            _refuse_code("modules.json", f"the module {shown(kind)}")
        if PurePosixPath(place).is_absolute() or ".." in PurePosixPath(place).parts or "\\" in place or ":" in place:
            raise ModelError(f"modules.json names {shown(place)}, which lies outside the model's directory; use another copy of the model.", UNSAFE)
        if (directory / place).is_dir():
            places.append(directory / place)
    return list(dict.fromkeys(places))


def _verify_json_files(place: Path) -> None:
    """Every JSON file of a model directory is read when it is loaded, so each must be whole."""
    for path in sorted(place.glob("*.json")):
        objects = path.name in ("config.json", "tokenizer.json")
        if not _read_json(path, dict if objects else object) and objects:
            raise ModelError(f"{path.name} is empty ({path.stat().st_size} bytes); fetch the model again.", CORRUPT)
    if (place / "adapter_config.json").is_file():
        text = "The directory holds an adapter (adapter_config.json), which needs another model that it names and that is not checked; "
        raise ModelError(text + "merge the two and name the merged model.", UNSAFE)


def _refuse_own_code(place: Path) -> None:
    for name in _CODE_CONFIGS:
        if (place / name).is_file() and _read_json(place / name, dict).get("auto_map"):
            _refuse_code(name, "auto_map")


def _refuse_code(file: str, what: str) -> None:
    text = f"The model brings its own Python code ({what} in {file}), which is not run. "
    raise ModelError(text + "If you trust its authors, set RERANKING_TRUST_REMOTE_CODE=true; else use another model.", UNSAFE)


def _verify_weights(place: Path, allow_pickle: bool) -> None:
    weights = {path.name: tensor_names(path) for path in sorted(place.glob("*.safetensors"))}
    if (place / _INDEX).is_file():
        _verify_index(_read_json(place / _INDEX, dict), weights)
    if allow_pickle or weights:
        return
    # Beside safetensors weights a pickle (training_args.bin, a second copy) is never opened; alone it would be.
    pickles = sorted(path.name for path in place.iterdir() if path.suffix.lower() in PICKLE_SUFFIXES)
    if pickles:
        text = f"The weights {shown(pickles[0])} are pickled and can run code when loaded, so they are refused. "
        raise ModelError(text + "Use a copy with .safetensors weights, or set RERANKING_ALLOW_PICKLE=true if you trust the file.", UNSAFE)


def _verify_index(index: dict[str, Any], weights: dict[str, frozenset[str]]) -> None:
    """Each tensor that the index of sharded weights promises is in the file that it names."""
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ModelError(f"{_INDEX} has no weight_map; fetch the model again.", CORRUPT)
    for tensor, file in places.items():
        if file not in weights:
            raise ModelError(f"The weights are incomplete: {_INDEX} names {shown(file)}, which is not there; fetch the model again.", CORRUPT)
        if tensor not in weights[file]:
            raise ModelError(f"The weights are incomplete: {shown(file)} lacks the tensor {shown(tensor)}; fetch the model again.", CORRUPT)


def _verify_presence(directory: Path, places: list[Path], allow_pickle: bool) -> None:
    if not any((place / "config.json").is_file() for place in places):
        raise ModelError(f"The directory {shown(directory)} holds no config.json, so it is not a model; name the directory that does.", MISSING)
    if not any((place / name).is_file() for place in places for name in _TOKENIZERS):
        raise ModelError(f"The model in {shown(directory)} has no tokenizer (tokenizer.json); fetch all of its files.", MISSING)
    suffixes = (".safetensors", *PICKLE_SUFFIXES) if allow_pickle else (".safetensors",)
    if not any(path.suffix.lower() in suffixes for place in places for path in place.iterdir()):
        text = f"The model in {shown(directory)} has no .safetensors weights (pickled weights are never downloaded); "
        raise ModelError(text + "fetch all of its files, or use a copy that has them.", MISSING)


def _read_json(path: Path, kind: type) -> Any:
    data = path.read_bytes()
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        problem = "is empty" if not data.strip() else "is not valid JSON"
        raise ModelError(f"{path.name} {problem} ({len(data)} bytes), the file is damaged or cut short; fetch the model again.", CORRUPT) from error
    if not isinstance(value, kind):
        raise ModelError(f"{path.name} holds a JSON {type(value).__name__} where a {kind.__name__} belongs; fetch the model again.", CORRUPT)
    return value
