"""The container files without building an image: linted, valid, in step with the requirements, and closed to secrets. `tests.deploy.walk_containers`
builds and runs them for real."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from reranker_worker import __version__
from reranker_worker.config import load_config, settings_table

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "deploy" / "docker"
DOCKERFILE = DOCKER / "Dockerfile"
IGNORE_FILE = DOCKER / "Dockerfile.dockerignore"
COMPOSE_FILES = sorted(DOCKER.glob("compose*.yml"))
TARGETS = ("worker", "example-host", "prewarm")

pytestmark = pytest.mark.timeout(120)
each_compose_file = pytest.mark.parametrize("file", COMPOSE_FILES, ids=lambda file: file.name)


def tool(name: str) -> str:
    """The path of a program beside this Python or on PATH; without it the test is skipped."""
    path = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    return path or pytest.skip(f"{name} is not installed")


def run(*command: str, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a program; its output with it."""
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds)


@cache
def stages() -> dict[str, list[tuple[str, str]]]:
    """The Dockerfile as stage -> [(instruction, rest)], in order; what stands before the first stage is under ""."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, list[tuple[str, str]]] = {"": []}
    current = ""
    for line in filter(None, map(str.strip, text.splitlines())):
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            current = rest.rsplit(" AS ", 1)[1]
            found[current] = []
        found[current].append((instruction, rest))
    return found


def whole(stage: str) -> list[tuple[str, str]]:
    """A stage's instructions with those of the stages that it starts from."""
    lines = stages()[stage]
    parent = lines[0][1].split(" AS ")[0]
    return [*(whole(parent) if parent in stages() else []), *lines[1:]]


def environment(stage: str) -> dict[str, str]:
    """The variables that a stage sets, with the defaults of its arguments."""
    defaults = dict(re.findall(r"^(\w+)=(.*)$", "\n".join(rest for instruction, rest in whole(stage) if instruction == "ARG"), re.MULTILINE))
    pairs = (item.split("=", 1) for instruction, rest in whole(stage) if instruction == "ENV" for item in shlex.split(rest))
    return {name: re.sub(r"\$(\w+)", lambda match: defaults.get(match[1], match[0]), value) for name, value in pairs}


def wanted_by_requirements() -> set[str]:
    """Names in requirements.txt, as the Dockerfile cuts it."""
    (cut,) = {match[1] for match in re.finditer(r"sed '([^']+)' requirements.txt", DOCKERFILE.read_text())}
    text = run("sed", cut, str(ROOT / "requirements.txt")).stdout
    return {line for line in text.splitlines() if re.match(r"[a-z]", line)}


def test_hadolint_finds_nothing() -> None:
    done = run(tool("hadolint"), str(DOCKERFILE))
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@each_compose_file
def test_compose_files_follow_the_compose_specification(file: Path) -> None:
    done = run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(file))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_light_variant_installs_what_the_guide_says_and_the_lock_pins() -> None:
    (light,) = re.findall(r"install -c requirements-lock.txt (onnxruntime .*)$", DOCKERFILE.read_text(), re.MULTILINE)
    (guide,) = re.findall(r"pip install -c requirements-lock.txt (onnxruntime .*)$", (ROOT / "INSTALL.md").read_text(), re.MULTILINE)
    assert light.split() == guide.split()
    pinned = set(re.findall(r"^([a-z-]+)==", (ROOT / "requirements-lock.txt").read_text(), re.MULTILINE))
    assert set(light.split()) <= pinned


def test_the_full_variants_install_what_the_package_needs_and_no_test_tools() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert wanted_by_requirements() == {re.split(r"[<>=~ ]", dependency)[0] for dependency in project["dependencies"]}


def test_no_version_is_written_twice() -> None:
    assert not re.search(r"[a-z]==\d", DOCKERFILE.read_text())
    base = dict(rest.split("=", 1) for instruction, rest in stages()[""] if instruction == "ARG")["PYTHON_IMAGE"]
    version = re.search(r":(3\.\d+)-", base)[1]  # type: ignore[index]
    assert f"--python-version {version} " in (ROOT / "requirements-lock.txt").read_text()


def test_arguments_choose_stages_that_exist() -> None:
    text = DOCKERFILE.read_text()
    names = {"VARIANT": "packages-", "PREWARM": "model-"}
    for argument, prefix in names.items():
        (comment,) = re.findall(rf"^# (.*)\nARG {argument}=", text, re.MULTILINE)
        values = re.findall(r"(?:^|\. )([a-z-]+):", comment)
        assert len(values) == 3
        assert {prefix + value for value in values} <= set(stages())
        assert re.search(rf"^ARG {argument}=({'|'.join(values)})$", text, re.MULTILINE)


@pytest.mark.parametrize("target", TARGETS)
def test_what_runs_is_no_root_and_has_an_entry_point_without_a_shell(target: str) -> None:
    lines = whole(target)
    assert [rest for instruction, rest in lines if instruction == "USER"][-1] == "10001:10001"
    assert isinstance(json.loads([rest for instruction, rest in lines if instruction == "ENTRYPOINT"][-1]), list)
    assert "apt-get" not in DOCKERFILE.read_text()  # no compilers, no packages of the distribution


def test_the_worker_is_the_default_target() -> None:
    assert list(stages())[-1] == "worker"
    assert set(TARGETS) <= set(stages())


@pytest.mark.parametrize("target", ["worker", "example-host"])
def test_serving_images_never_use_the_network_and_only_prewarming_may(target: str) -> None:
    variables = environment(target)
    assert (variables["RERANKING_LOCAL_FILES_ONLY"], variables["HF_HUB_OFFLINE"]) == ("1", "1")
    assert not {"RERANKING_LOCAL_FILES_ONLY", "HF_HUB_OFFLINE"} & set(environment("prewarm"))


@pytest.mark.parametrize("target", TARGETS)
def test_every_variable_of_an_image_is_a_setting_with_a_valid_value(target: str) -> None:
    known = {variable for _, variable, _, _ in settings_table()} | {"RERANKING_PYTHON", "RERANKING_SCRIPT_PATH"}
    given = {name: value for name, value in environment(target).items() if name.startswith("RERANKING_")}
    assert set(given) <= known
    assert load_config([], given).model == "bundled"


def test_serving_images_check_their_health_by_asking_or_scoring() -> None:
    checks = {target: [rest for instruction, rest in whole(target) if instruction == "HEALTHCHECK"] for target in ("worker", "example-host")}
    assert checks["worker"][0].endswith('CMD ["python", "-m", "reranker_worker", "check", "--deploy"]')
    assert "/readyz" in checks["example-host"][0]


def test_no_instruction_copies_more_than_named_files() -> None:
    for instruction, rest in (line for lines in stages().values() for line in lines):
        assert instruction != "ADD"
        if instruction == "COPY" and "--from=" not in rest:
            for source in rest.split()[:-1]:
                assert source not in (".", "./", "/", "*")
                assert (ROOT / source).exists()


SECRETS = (
    ".env",
    ".git/config",
    ".venv/bin/python",
    "id_rsa",
    "prewarm.env",
    "deploy/docker/prewarm.env",
    "deploy/example-host/.env",
    "deploy/example-host/notes.txt",
    "reranker_worker/.env.local",
    "reranker_worker/tls.key",
    "reranker_worker/models/ca.pem",
    "reranker_worker/__pycache__/cli.cpython-311.pyc",
    "tests/test_x.py",
)


def test_the_ignore_file_lets_in_what_is_copied_and_keeps_secrets_out(tmp_path: Path) -> None:
    """Asked of a real builder: an image from nothing with the whole context in it."""
    builder = tool("buildah")
    context, seen = tmp_path / "context", tmp_path / "seen"
    copied = {source for lines in stages().values() for i, rest in lines if i == "COPY" and "--from=" not in rest for source in rest.split()[:-1]}
    for name in (*SECRETS, *copied):
        place = context / (f"{name}/module.py" if (ROOT / name).is_dir() else name)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("x")
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    storage = ("--root", str(tmp_path / "root"), "--runroot", str(tmp_path / "run"), "--storage-driver", "vfs")
    options = ("--isolation", "chroot", "--ignorefile", str(IGNORE_FILE), "--output", f"type=local,dest={seen}", "-f", str(tmp_path / "Dockerfile"))
    done = run(builder, *storage, "bud", *options, str(context))
    if done.returncode != 0 and not seen.exists():
        pytest.skip(f"buildah cannot build here: {done.stderr.strip().splitlines()[-1]}")
    files = {str(path.relative_to(seen)) for path in seen.rglob("*") if path.is_file()}
    assert files == {f"{name}/module.py" if (ROOT / name).is_dir() else name for name in copied}


# --- compose -----------------------------------------------------------------------------------------------------------------


def services(file: Path) -> dict[str, dict[str, Any]]:
    """The services of a compose file."""
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    return dict(yaml.safe_load(file.read_text())["services"])


def mebibytes(text: str) -> int:
    """`512m` or `2g` as a number."""
    return int(text[:-1]) * {"m": 1, "g": 1024}[text[-1]]


@each_compose_file
def test_every_service_is_confined_and_has_room_for_what_was_measured(file: Path) -> None:
    for name, service in services(file).items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["read_only"] is True, name
        assert service["user"] == "10001:10001", name
        assert service["tmpfs"], name
        assert service["pids_limit"] >= 128, name
        assert mebibytes(service["mem_limit"]) >= (1024 if name == "prewarm" else 213 + 66 + 30), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name


@each_compose_file
def test_every_serving_service_has_time_to_drain_and_the_image_s_health_check(file: Path) -> None:
    host = (ROOT / "deploy" / "example-host" / "example_host.py").read_text()
    drain = float(re.search(r"^DRAIN_SECONDS = ([0-9.]+)", host, re.MULTILINE)[1])  # type: ignore[index]
    (image_check,) = (rest for instruction, rest in stages()["example-host"] if instruction == "HEALTHCHECK")
    for name, service in services(file).items():
        if name != "prewarm":
            assert float(service["stop_grace_period"].removesuffix("s")) > drain
            assert service["healthcheck"]["test"] == ["CMD", *json.loads(image_check.split("CMD ")[1])]


@each_compose_file
def test_services_build_targets_and_arguments_that_exist_and_set_variables_that_exist(file: Path) -> None:
    known = {variable for _, variable, _, _ in settings_table()}
    arguments = {rest.split("=")[0] for lines in stages().values() for instruction, rest in lines if instruction == "ARG"}
    for name, service in services(file).items():
        assert set(service.get("environment", {})) <= known, name
        assert service["image"].partition(":")[2].startswith(__version__), name
        if "build" in service:
            assert (file.parent / service["build"]["context"]).resolve() == ROOT
            assert (ROOT / service["build"]["dockerfile"]) == DOCKERFILE
            assert service["build"]["target"] in TARGETS
            assert set(service["build"].get("args", {})) <= arguments


def test_in_the_cluster_the_cache_is_written_before_the_hosts_start_and_only_then() -> None:
    found = services(DOCKER / "compose.cluster.yml")
    assert found["prewarm"]["restart"] == "no"
    assert found["prewarm"]["volumes"] == ["model-cache:/var/cache/reranker-worker"]
    hosts = [service for name, service in found.items() if name != "prewarm"]
    assert len(hosts) == 3
    for host in hosts:
        assert host["depends_on"] == {"prewarm": {"condition": "service_completed_successfully"}}
        assert [(volume["source"], volume["read_only"]) for volume in host["volumes"]] == [("model-cache", True)]
        assert host["environment"] == found["prewarm"]["environment"]
