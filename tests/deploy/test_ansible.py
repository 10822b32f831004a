"""deploy/ansible: the playbook is clean, and really run (twice, in check mode, to another release and back) into a throw-away root.

The walk over two nodes with systemd and ssh is `python -m tests.deploy.walk_node`.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "ansible"
ROLE = FOLDER / "roles" / "reranker_worker"
PACK = ROLE / "files" / "pack.py"
# What is installed beside the interpreter is found without an activated environment.
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
QUIET = {"ANSIBLE_NOCOWS": "1", "ANSIBLE_FORCE_COLOR": "0", "NO_COLOR": "1", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"}


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program, path=PATH) is None, reason=f"{program} is not installed here (pip install the extra `deploy`)")


def run(*command: str, timeout: float = 55, cwd: Path = FOLDER, home: Path | None = None) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, **QUIET, "PATH": PATH} | ({"HOME": str(home)} if home else {})
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=timeout)


# --- what the files say ------------------------------------------------------------------------------------------------------


@needs("ansible-playbook")
def test_the_playbook_has_no_syntax_error() -> None:
    found = run("ansible-playbook", "-i", "inventory.example.yml", "site.yml", "--syntax-check")
    assert found.returncode == 0, found.stderr


@needs("ansible-lint")
@pytest.mark.timeout(120)
def test_ansible_lint_has_nothing_to_say_in_its_strictest_profile(tmp_path: Path) -> None:
    # In a copy: it leaves a cache behind, and it must not look at the rest of the repository.
    copy = tmp_path / "ansible"
    shutil.copytree(FOLDER, copy, ignore=shutil.ignore_patterns(".ansible", "__pycache__"))
    found = run("ansible-lint", "--offline", "--strict", "--profile", "production", "-q", cwd=copy, timeout=110)
    assert found.returncode == 0, found.stdout + found.stderr


@needs("yamllint")
def test_yamllint_has_nothing_to_say() -> None:
    found = run("yamllint", "--strict", ".")
    assert found.returncode == 0, found.stdout


def test_only_modules_that_come_with_ansible_core_are_used() -> None:
    modules = {found for path in FOLDER.rglob("*.yml") for found in re.findall(r"\b([a-z]+\.[a-z]+\.[a-z_]+):", path.read_text())}
    assert modules
    assert all(name.startswith("ansible.builtin.") for name in modules)


def test_every_variable_has_a_default_a_reason_and_a_type() -> None:
    text = (ROLE / "defaults/main.yml").read_text()
    defaults = re.findall(r"^(reranker_worker_\w+):", text, re.MULTILINE)
    specified = re.findall(r"^ {6}(reranker_worker_\w+):", (ROLE / "meta/argument_specs.yml").read_text(), re.MULTILINE)
    assert sorted(defaults) == sorted(specified)
    readme = (FOLDER / "README.md").read_text()
    named = set(re.findall(r"reranker_worker_\w+", readme)) - {"reranker_worker"}
    assert named <= set(defaults), "README names a variable that does not exist"


# --- the pack ----------------------------------------------------------------------------------------------------------------


def test_a_node_gets_the_product_and_nothing_else(tmp_path: Path) -> None:
    tar = tmp_path / "code.tar"
    assert run(sys.executable, str(PACK), str(ROOT), str(tar)).returncode == 0
    names = run("tar", "-tf", str(tar)).stdout.split()
    assert {"reranking_server.py", "requirements-lock.txt", "reranker_worker/config.py", "deploy/example-host/example_host.py"} <= set(names)
    product = "reranker_worker reranking_server.py deploy requirements.txt requirements-lock.txt README.md INSTALL.md CHANGELOG.md LICENSE"
    assert {name.split("/")[0] for name in names} <= set(product.split())
    assert not [name for name in names if "__pycache__" in name or (name.startswith("deploy/") and "example-host/" not in name)]


def test_the_digest_depends_on_the_content_and_on_nothing_else(tmp_path: Path) -> None:
    def digest(content: str, mode: int) -> str:
        file = tmp_path / "reranker_worker" / "module.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(content)
        file.chmod(mode)
        os.utime(file, (mode, mode))
        return run(sys.executable, str(PACK), str(tmp_path)).stdout

    first = digest("a = 1", 0o644)
    assert digest("a = 1", 0o640) == first
    assert digest("a = 2", 0o644) != first
    assert digest("a = 1", 0o755) != first


# --- a real run --------------------------------------------------------------------------------------------------------------


class Node:
    """A throw-away root on this machine, and the playbook run into it without systemd and with the fake model."""

    def __init__(self, place: Path, wheels: Path) -> None:
        self.place, self.root = place, place / "opt"
        self._values = {
            "reranker_worker_root": str(self.root),
            "reranker_worker_config_directory": str(place / "etc"),
            "reranker_worker_cache_directory": str(place / "cache"),
            "reranker_worker_unit_directory": str(place / "units"),
            "reranker_worker_user": getpass.getuser(),
            "reranker_worker_group": str(os.getgid()),
            "reranker_worker_owner": getpass.getuser(),
            "reranker_worker_create_user": False,
            "reranker_worker_as_user": [],
            "reranker_worker_services": False,
            "reranker_worker_system_packages": [],
            "reranker_worker_python": sys.executable,
            "reranker_worker_wheelhouse": str(wheels),
            "reranker_worker_packages": ["orjson"],
            "reranker_worker_settings": {"RERANKING_BACKEND": "fake"},
            "ansible_become": False,
            "ansible_connection": "local",
            "ansible_python_interpreter": sys.executable,
        }
        (place / "units").mkdir(parents=True)
        (place / "inventory").write_text("[reranker_nodes]\nnode\n")

    def play(self, *options: str, **values: object) -> dict[str, int]:
        """Run the playbook; the counters of its recap, which must name no failure."""
        done = self.try_to_play(*options, **values)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr
        return {name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", done.stdout.rpartition("PLAY RECAP")[2])}

    def try_to_play(self, *options: str, **values: object) -> subprocess.CompletedProcess[str]:
        given = json.dumps(self._values | values)
        command = ["ansible-playbook", "-i", str(self.place / "inventory"), "site.yml", "-e", given, *options]
        return run(*command, timeout=280, home=self.place)

    @property
    def current(self) -> str:
        return os.readlink(self.root / "current")

    @property
    def releases(self) -> set[str]:
        return {path.name for path in (self.root / "releases").iterdir()}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wheels")
    lock = str(ROOT / "requirements-lock.txt")
    found = run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-c", lock, "orjson", "-d", str(place))
    if found.returncode:
        pytest.skip("pip reaches no registry here, and the run needs the wheel of orjson")
    return place


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, wheels: Path) -> Node:
    """A node that the playbook has been run on once."""
    made = Node(tmp_path_factory.mktemp("node"), wheels)
    made.play()
    return made


@needs("ansible-playbook")
@pytest.mark.skipif(not os.environ.get("SLOW_TESTS"), reason="a dozen runs of the playbook, one to ten minutes: set SLOW_TESTS=1")
@pytest.mark.timeout(600)
class TestRun:
    """One node, module-wide: every test leaves it in working order."""

    def test_check_mode_on_a_bare_node_says_what_it_would_do_and_does_nothing(self, tmp_path: Path, wheels: Path) -> None:
        bare = Node(tmp_path / "bare", wheels)
        assert bare.play("--check", "--diff")["changed"] > 5
        assert not bare.root.exists()
        assert not list((bare.place / "units").iterdir())

    def test_a_second_run_changes_nothing(self, node: Node) -> None:
        assert node.play("--diff")["changed"] == 0

    def test_what_was_installed_scores_from_where_the_units_look_for_it(self, node: Node) -> None:
        line = json.dumps({"query": "a", "documents": ["a", "b"]}) + "\n"
        current, environ = node.root / "current", {"RERANKING_BACKEND": "fake"}
        command = [str(current / ".venv/bin/python"), str(current / "reranking_server.py")]
        told = subprocess.run(command, input=line, env=environ, capture_output=True, text=True, timeout=30).stdout
        assert len(json.loads(told.splitlines()[-1])["scores"]) == 2
        assert (node.place / "units/jadevectordb.service.d/reranker.conf").is_file()
        assert (node.place / "etc/worker.env").read_text().endswith("RERANKING_BACKEND=fake\n")

    def test_a_release_that_cannot_score_is_not_switched_to_then_one_that_can_is_and_back(self, node: Node) -> None:
        first = node.current
        version = first.removeprefix("releases/")
        left = node.root / "releases" / f"{version}-2" / "left by an interrupted run"
        left.parent.mkdir()
        left.touch()
        told = node.try_to_play(reranker_worker_version=f"{version}-2", reranker_worker_settings={"RERANKING_THREADS": "many"})
        assert told.returncode != 0
        assert "RERANKING_THREADS must be a whole number" in told.stdout
        assert (node.current, left.exists()) == (first, False)
        node.play(reranker_worker_version=f"{version}-2")
        assert node.current == first + "-2"
        changed = node.play(reranker_worker_version=version, reranker_worker_keep_releases=0)["changed"]
        assert changed == 2, "a rollback moves one link and copies nothing; and here it removes an old release"
        assert (node.current, node.releases) == (first, {version})

    def test_a_version_that_is_nowhere_is_refused_before_anything_changes(self, node: Node) -> None:
        before = node.current
        told = node.try_to_play(reranker_worker_version="0.0.7")
        assert told.returncode != 0
        assert "is not on this node, and the checkout is" in told.stdout
        assert node.current == before

    def test_a_prewarming_that_fails_is_told_in_the_workers_words_and_nothing_is_switched(self, node: Node) -> None:
        told = node.try_to_play(reranker_worker_prewarm="make", reranker_worker_install="full")
        assert told.returncode != 0
        assert "there is nothing to prewarm" in told.stdout

    def test_a_release_is_not_passed_over_when_the_checkout_has_other_code(self, node: Node, tmp_path: Path) -> None:
        copy = tmp_path / "checkout"
        shutil.copytree(ROOT / "reranker_worker", copy / "reranker_worker", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
        shutil.copy(ROOT / "requirements-lock.txt", copy)
        told = node.try_to_play(reranker_worker_checkout=str(copy))
        assert told.returncode != 0
        assert "with other code than the checkout's" in told.stdout
