"""deploy/systemd: units that systemd accepts without a word, hardening that holds, and a settings file that is complete and true."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from reranker_worker.config import Config, load_config, settings_table

ROOT = Path(__file__).resolve().parents[2]
UNITS = ROOT / "deploy" / "systemd"
HOST_DROP_INS = sorted((UNITS / "jadevectordb.service.d").glob("*.conf"))
PREWARM_OPTIONS = sorted((UNITS / "options").glob("*.conf"))
OUR_UNITS = ("reranker-prewarm.service", "reranker-example-host.service")
ENV = UNITS / "worker.env"
ASSIGNMENT = re.compile(r"#?([A-Z_]+)=(\S*)")
MOST_EXPOSURE = 16  # of 100; 14 and 15 when this was written

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed here")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="users and owners of another root file system can be made by root alone")


def run(*command: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=30, **options)  # type: ignore[call-overload,no-any-return]


def lines_of(path: Path, key: str) -> list[str]:
    """The values of a key, in order; continued lines joined."""
    text = path.read_text().replace("\\\n", "")
    return [line.partition("=")[2].strip() for line in text.splitlines() if line.startswith(key + "=")]


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A root file system with just the paths that the units name, and the units installed as README says."""
    python = tmp_path / "opt/reranker-worker/current/.venv/bin/python"
    units, theirs = tmp_path / "etc/systemd/system", tmp_path / "usr/lib/systemd/system"
    for directory in (python.parent, tmp_path / "bin", units, theirs, tmp_path / "etc/reranker-worker"):
        directory.mkdir(parents=True)
    for program in (python, tmp_path / "bin/sh"):
        program.write_bytes(b"#!\n")
        program.chmod(0o755)
    for target in [*Path("/usr/lib/systemd/system").glob("*.target"), *Path("/lib/systemd/system").glob("*.target")]:
        shutil.copy(target, theirs)
    for name in OUR_UNITS:
        shutil.copy(UNITS / name, units)
    (units / "jadevectordb.service").write_text("[Service]\nType=simple\nExecStart=/bin/sh\n")
    for name in ("jadevectordb.service", "reranker-example-host.service"):
        shutil.copytree(UNITS / "jadevectordb.service.d", units / (name + ".d"))
    shutil.copy(ENV, tmp_path / "etc/reranker-worker")
    return tmp_path


def verify(node: Path, *names: str) -> str:
    """What systemd says about the units. It exits 0 for most mistakes and merely mentions them."""
    found = run("systemd-analyze", "verify", "--man=no", f"--root={node}", *names)
    return found.stderr + (f"exit code {found.returncode}" if found.returncode else "")


# --- units -------------------------------------------------------------------------------------------------------------------


@needs_systemd
def test_systemd_has_nothing_to_say_about_the_units_and_the_drop_ins(node: Path) -> None:
    assert verify(node, "jadevectordb.service", *OUR_UNITS) == ""


@needs_systemd
@pytest.mark.parametrize("option", PREWARM_OPTIONS, ids=lambda path: path.stem)
def test_systemd_has_nothing_to_say_about_the_options_of_the_prewarming(node: Path, option: Path) -> None:
    directory = node / "etc/systemd/system/reranker-prewarm.service.d"
    directory.mkdir()
    shutil.copy(option, directory)
    assert verify(node, *OUR_UNITS) == ""


@needs_systemd
@pytest.mark.parametrize("mistake", ["NoNewPrivilege=yes", "Restart=on-fail", "SystemCallFilter=@system-servic", "MemoryMax=lots"])
def test_a_mistake_in_a_drop_in_is_noticed(node: Path, mistake: str) -> None:
    drop_in = node / "etc/systemd/system/jadevectordb.service.d/reranker-hardening.conf"
    drop_in.write_text(drop_in.read_text() + mistake + "\n")
    assert "reranker-hardening.conf" in verify(node, "jadevectordb.service")


@needs_systemd
@pytest.mark.parametrize("name", OUR_UNITS)
def test_a_unit_is_hardened(node: Path, name: str) -> None:
    found = run("systemd-analyze", "security", "--offline=true", "--no-pager", f"--root={node}", f"--threshold={MOST_EXPOSURE}", name)
    assert found.returncode == 0, found.stdout[-200:] + found.stderr


def test_allowed_and_refused_system_calls_never_share_a_line_and_a_refusal_is_an_error_not_a_kill() -> None:
    for path in (UNITS / "reranker-prewarm.service", UNITS / "jadevectordb.service.d/reranker-hardening.conf"):
        filters = lines_of(path, "SystemCallFilter")
        assert filters
        assert not [line for line in filters if "~" in line[1:]]
        assert lines_of(path, "SystemCallErrorNumber") == ["EPERM"]


def test_no_capability_and_no_new_privilege_is_left() -> None:
    for path in (UNITS / "reranker-prewarm.service", UNITS / "jadevectordb.service.d/reranker-hardening.conf"):
        assert (lines_of(path, "CapabilityBoundingSet"), lines_of(path, "NoNewPrivileges")) == ([""], ["yes"])


def test_machine_code_at_run_time_is_refused_only_where_nothing_but_onnx_runtime_serves() -> None:
    naming = [path.name for path in UNITS.rglob("*") if path.is_file() and lines_of_any(path, "MemoryDenyWriteExecute")]
    assert naming == ["reranker-cpu-only.conf"]


def lines_of_any(path: Path, key: str) -> list[str]:
    return lines_of(path, key) if path.suffix in (".conf", ".service") else []


def test_running_out_of_memory_costs_the_engine_and_not_the_host() -> None:
    drop_in = UNITS / "jadevectordb.service.d/reranker.conf"
    assert lines_of(drop_in, "OOMPolicy") == ["continue"]
    assert not [path.name for path in UNITS.rglob("*") if path.is_file() and lines_of_any(path, "MemoryHigh")], "MemoryHigh makes the host crawl"


def test_the_host_needs_the_prewarming_and_serves_offline() -> None:
    drop_in = UNITS / "jadevectordb.service.d/reranker.conf"
    assert lines_of(drop_in, "Requires") == lines_of(drop_in, "After") == ["reranker-prewarm.service"]
    offline = {"RERANKING_LOCAL_FILES_ONLY=1", "HF_HUB_OFFLINE=1", "ORT_DISABLE_TELEMETRY=1"}
    assert offline <= set(" ".join(lines_of(drop_in, "Environment")).split())


def test_only_settings_that_exist_are_set() -> None:
    known = {variable for _, variable, _, _ in settings_table()} | {"RERANKING_SCRIPT_PATH", "RERANKING_PYTHON"}
    for path in [*HOST_DROP_INS, *PREWARM_OPTIONS, *(UNITS / name for name in OUR_UNITS), UNITS / "README.md"]:
        assert set(re.findall(r"RERANKING_[A-Z_]+\b", path.read_text())) <= known, path.name


# --- the prewarming's command ------------------------------------------------------------------------------------------------


def prewarm_with(tmp_path: Path, *codes: int) -> tuple[int, int]:
    """Run the unit's ExecStart with a stand-in for Python that exits with these codes in turn; (exit code, calls). Nothing sleeps."""
    python, counter = tmp_path / "python", tmp_path / "calls"
    cases = "".join(f"{number}) exit {code};; " for number, code in enumerate(codes, 1))
    python.write_text(f'#!/bin/sh\necho call >> {counter}\ncase $(wc -l < {counter}) in {cases}*) exit 99;; esac\n')
    (tmp_path / "sleep").write_text("#!/bin/sh\n")
    for program in (python, tmp_path / "sleep"):
        program.chmod(0o755)
    (command,) = lines_of(UNITS / "reranker-prewarm.service", "ExecStart")
    words = [word.replace("$$", "$") for word in shlex.split(command.replace("/opt/reranker-worker/current/.venv/bin/python", str(python)))]
    done = run(*words, env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    return done.returncode, len(counter.read_text().splitlines())


@pytest.mark.parametrize(
    ("codes", "expected"),
    [((0,), (0, 1)), ((69, 69, 0), (0, 3)), ((66,), (66, 1)), ((69, 65), (65, 2)), ((69,) * 5, (69, 5))],
    ids=["success", "network comes back", "missing model", "corrupt after a retry", "network stays away"],
)
def test_prewarming_is_tried_again_for_the_network_alone(tmp_path: Path, codes: tuple[int, ...], expected: tuple[int, int]) -> None:
    assert prewarm_with(tmp_path, *codes) == expected


# --- settings ----------------------------------------------------------------------------------------------------------------


def test_the_settings_file_is_what_its_generator_writes() -> None:
    made = run(sys.executable, str(UNITS / "make_worker_env.py"))
    assert made.stdout == ENV.read_text(), "run: python deploy/systemd/make_worker_env.py > deploy/systemd/worker.env"


def test_every_setting_is_in_the_settings_file_once_with_its_default() -> None:
    entries = [match.groups() for line in ENV.read_text().splitlines() if (match := ASSIGNMENT.fullmatch(line))]
    ours = [(name, value) for name, value in entries if name.startswith("RERANKING_")]
    assert sorted(name for name, _ in ours) == sorted(variable for _, variable, _, _ in settings_table())
    defaults = {f"#{name}": value for name, value in ours if f"\n#{name}=" in ENV.read_text()}
    assert load_config([], {name[1:]: value for name, value in defaults.items()}) == Config()


def test_the_settings_file_means_the_same_to_systemd_a_shell_and_the_worker() -> None:
    text = ENV.read_text()
    active = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Z_]+=[\w./:-]+", line) for line in active), "a value that needs quotes reads differently in each"
    shown = run("sh", "-c", f"set -a; . {shlex.quote(str(ENV))}; env", env={"PATH": os.environ["PATH"]}).stdout.splitlines()
    assert set(active) <= set(shown)
    config = load_config([], dict(line.split("=", 1) for line in active))
    assert config.artefacts == "/var/cache/reranker-worker/artefacts"
    assert config.request_timeout_ms < 5000, "the host stops waiting after 5 s"


# --- users and directories ---------------------------------------------------------------------------------------------------


@needs_root
@pytest.mark.skipif(shutil.which("systemd-sysusers") is None, reason="systemd-sysusers is not installed here")
def test_the_snippets_make_the_user_and_the_directories(tmp_path: Path) -> None:
    for folder in ("sysusers.d", "tmpfiles.d"):
        shutil.copytree(UNITS / folder, tmp_path / "etc" / folder)
    assert run("systemd-sysusers", f"--root={tmp_path}").stderr.count("Creating user") <= 1
    passwd = (tmp_path / "etc/passwd").read_text()
    assert re.search(r"^reranker:!?\*?x?:\d+:\d+:Reranker worker:/var/cache/reranker-worker:/usr/sbin/nologin$", passwd, re.MULTILINE), passwd
    run("systemd-tmpfiles", "--create", f"--root={tmp_path}", check=True)
    uid = int(passwd.split("reranker:")[1].split(":")[1])
    cache, code = tmp_path / "var/cache/reranker-worker/artefacts", tmp_path / "opt/reranker-worker/releases"
    assert (cache.stat().st_uid, cache.stat().st_mode & 0o777) == (uid, 0o755)
    assert (code.stat().st_uid, code.stat().st_mode & 0o777) == (0, 0o755)


def test_the_folder_explains_itself() -> None:
    text = (UNITS / "README.md").read_text()
    files = [path for path in UNITS.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert not [path.name for path in files if path.name != "README.md" and path.name not in text]
    first = {path.name: path.read_text().splitlines()[0] for path in files}
    assert not [name for name, line in first.items() if not line.startswith("#")]
