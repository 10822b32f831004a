"""Model directories and hub caches of a few hundred bytes, written by hand: no torch, no network."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = Path(__file__).resolve().parents[2]

# Resolves the model that the arguments describe and prints one JSON line: what was found, or the ModelError.
SCRIPT = """
import json, socket, sys
calls = []
def refuse(*args):
    calls.append(repr(args)); raise OSError("no network in this test")
if sys.argv[2] == "no-network":
    socket.socket.connect = refuse
    socket.getaddrinfo = refuse
from reranker_worker.config import Config
from reranker_worker.models import ModelError, resolve
progress = []
try:
    model = resolve(Config(**json.loads(sys.argv[1])), lambda *report: progress.append(report))
    answer = {"path": str(model.path), "source": model.source, "revision": model.revision, "name": model.name}
except ModelError as error:
    answer = {"error": str(error), "exit_code": error.exit_code}
answer |= {"progress": progress, "connections": calls, "hub_imported": "huggingface_hub" in sys.modules}
print(json.dumps(answer))
"""


def safetensors_bytes(tensors: dict[str, int] | None = None) -> bytes:
    """A valid file of float32 vectors: {name: number of elements}."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, count in (tensors or {"classifier.weight": 8, "encoder.weight": 16}).items():
        header[name] = {"dtype": "F32", "shape": [count], "data_offsets": [end, end + 4 * count]}
        end += 4 * count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + bytes(i % 251 for i in range(end))


def model_files() -> dict[str, bytes]:
    return {
        "config.json": json.dumps({"model_type": "bert", "architectures": ["BertForSequenceClassification"]}).encode(),
        "tokenizer.json": json.dumps({"version": "1.0", "model": {"type": "WordPiece", "vocab": {"a": 0}}}).encode(),
        "tokenizer_config.json": b'{"model_max_length": 512}',
        "model.safetensors": safetensors_bytes(),
    }


def write_model(directory: Path, files: dict[str, bytes] | None = None, *, manifest: bool = False) -> Path:
    contents = model_files() if files is None else files
    for name, data in contents.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    if manifest:
        lines = [f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in contents.items()]
        (directory / "MANIFEST.sha256").write_text("".join(lines))
    return directory


def write_cache(home: Path, repo: str = "org/tiny", files: dict[str, bytes] | None = None, *, ref: str = "main") -> Path:
    """A hub cache as the hub's own library lays it out (blobs, snapshots of links, refs) under HF_HOME; returns the snapshot."""
    entry = home / "hub" / ("models--" + repo.replace("/", "--"))
    snapshot = entry / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (entry / "blobs").mkdir()
    (entry / "refs").mkdir()
    (entry / "refs" / ref).write_text(COMMIT)
    for name, data in (model_files() if files is None else files).items():
        blob = entry / "blobs" / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def resolve_in_process(settings: dict[str, Any], environment: dict[str, str], *, network: bool = False, cwd: Path | None = None) -> dict[str, Any]:
    """Run `resolve(Config(**settings))` in a fresh interpreter (the hub library reads its environment once) and return what it says.

    Without `network` every attempt to connect raises and is listed under "connections".
    """
    kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH") if name in os.environ}
    command = [sys.executable, "-c", SCRIPT, json.dumps(settings), "network" if network else "no-network"]
    full = {**kept, "PYTHONPATH": str(REPOSITORY), "NO_PROXY": "127.0.0.1", **environment}
    done = subprocess.run(command, env=full, capture_output=True, text=True, timeout=40, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "nothing may be printed: " + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 1, lines
    answer: dict[str, Any] = json.loads(lines[0])
    return answer


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
