"""Starts that fail or hang, and wrong usage."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from host import request
from states import LOADING, while_importing

from reranker_worker.machine import usable_threads


def test_a_start_that_hangs_is_given_up_while_controls_are_answered(spawn):
    host = spawn(*LOADING, "--start-timeout-ms", "1000")
    assert host.ask({"type": "heartbeat"}, 3)["status"] == "alive"
    assert host.ask({"type": "ready"})["reason"] == "loading"
    host.send(request(["a"], id=1))
    cause, refusal = host.read_lines(2)
    assert cause["code"] == "MODEL_LOAD_ERROR"
    assert isinstance(cause["error"], str)
    assert "id" not in cause
    assert (refusal["id"], refusal["code"]) == (1, "NOT_READY")
    assert host.wait_exit() == 70


# Imported by the front before it spawns engines, and by each engine: runs FRONT in the first process, `import_worker` when that imports the rest.
_BETWEEN = """
def tell(name): open(os.path.join(here, name), "w").close()
def told(name): return os.path.exists(os.path.join(here, name))
if told("front"):
    tell("engine")
else:
    tell("front")
    {front}
    class Finder:
        def find_spec(name, path=None, target=None):
            if name == "reranker_worker.worker":
                {import_worker}
    sys.meta_path.insert(0, Finder)
"""


def _shadowed(directory, front, import_worker):
    return while_importing(directory, _BETWEEN.format(front=front, import_worker=import_worker))


@pytest.mark.skipif(usable_threads() < 2, reason="on one CPU the engine would keep the front from its first answers")
def test_the_engine_starts_before_the_rest_of_the_front_is_imported(spawn, tmp_path):
    """Here the import waits for the engine, which would not come if it were started afterwards."""
    wait = "until = time.monotonic() + 10\n"
    wait += " " * 16 + "while not told('engine') and time.monotonic() < until: select.select([], [], [], 0.01)\n"
    wait += " " * 16 + "tell('early' if told('engine') else 'late')"
    spawn(env=_shadowed(tmp_path, "pass", wait)).wait_ready()
    assert (tmp_path / "early").exists()


def test_an_engine_that_could_not_be_started_early_is_started_later(spawn, tmp_path):
    front = "python, sys.executable = sys.executable, os.path.join(here, 'nothing')"
    host = spawn(env=_shadowed(tmp_path, front, "sys.executable = python; tell('restored')"))
    host.wait_ready()
    assert (tmp_path / "restored").exists()


def test_an_engine_that_cannot_be_started_at_all_is_said_once(spawn, tmp_path):
    host = spawn(env=_shadowed(tmp_path, "sys.executable = os.path.join(here, 'nothing')", "pass"))
    assert host.read_line()["error"] == "The engine process cannot be started: No such file or directory."
    assert host.wait_exit() == 71
    assert not host.has_line()


def test_a_max_length_without_room_for_a_document_is_the_settings_fault(spawn):
    host = spawn("--max-length", "3", backend=None)
    assert host.read_line(60)["error"].startswith("--max-length 3 leaves a short query no room for a document; ")
    assert host.wait_exit() == 78


def test_too_little_memory_for_one_pair_is_not_the_model_s_fault(spawn, tmp_path):
    after = "import reranker_worker.models.known_pairs as known\nknown.ANY_PAIRS = [('a question', 'fake:oom1')]"
    host = spawn(env=while_importing(tmp_path, "", after))
    assert host.read_line()["error"].startswith("There is not enough memory to score one short pair; ")
    assert host.wait_exit() == 71


USAGE = [
    ["--no-such-flag"],
    ["--batch-size", "zero"],
    ["--batch-size", "0"],
    ["--backend", "magic"],
    ["surprise"],
    ["--log-level"],
    [b"--model", b"bad\xffname"],
    [b"--\xff\xfe"],
    ["--model", ""],
    ["--two\nlines"],
]


@pytest.mark.parametrize("arguments", USAGE, ids=repr)
def test_wrong_usage_is_said_in_the_host_s_language_and_ends_with_64(spawn, arguments):
    host = spawn(*arguments)
    assert host.wait_exit() == 64
    answer = host.read_line()
    assert answer["code"] == "MODEL_LOAD_ERROR"
    assert isinstance(answer["error"], str)
    assert not host.has_line()
    assert [record["level"] for record in host.log()] == ["ERROR"]


def test_wrong_usage_ends_although_nobody_reads_a_full_stderr(spawn):
    setup = "os.set_blocking(2, False)\ntry:\n    while True: os.write(2, b'x')\nexcept BlockingIOError: os.set_blocking(2, True)"
    host = spawn("--no-such-flag", stderr="never", setup=setup)
    assert host.wait_exit(5) == 64


def test_a_misnamed_variable_is_a_warning(spawn):
    host = spawn(env={"RERANKING_MODEL": "elsewhere"})
    host.wait_ready()
    host.logged("did you mean RERANKING_MODEL_PATH?")


WITHOUT_PACKAGES = ["-S"]
TOO_OLD = ["-c", "import sys; sys.version_info = (3, 10, 4); from reranker_worker.cli import main; main(sys.argv[1:])"]
NO_ORJSON, OLD = "The Python package orjson is not installed for ", "The worker needs Python 3.11 or newer, and "


@pytest.mark.parametrize(("python", "sentence"), [([*WITHOUT_PACKAGES, "reranking_server.py"], NO_ORJSON), ([*TOO_OLD, "serve"], OLD)])
def test_a_host_that_starts_the_wrong_python_is_told_so(python, sentence):
    done = subprocess.run([sys.executable, *python], input=b"{}\n", capture_output=True, timeout=20, check=False)
    assert done.returncode == 78
    answer = json.loads(done.stdout)
    assert (answer["code"], answer["retryable"]) == ("MODEL_LOAD_ERROR", False)
    assert answer["error"].startswith(sentence + sys.executable)
    assert json.loads(done.stderr)["message"] == answer["error"]


@pytest.mark.parametrize("command", ["check", "rerank", "bench", "prewarm"])
@pytest.mark.parametrize(("python", "sentence"), [([*WITHOUT_PACKAGES, "-m", "reranker_worker"], NO_ORJSON), (TOO_OLD, OLD)])
def test_a_person_who_starts_the_wrong_python_is_told_so(command, python, sentence):
    done = subprocess.run([sys.executable, *python, command], capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.startswith(f"{command}: {sentence}{sys.executable}")
    assert done.stderr.count("\n") == 1


def test_help_and_version_go_to_stdout_and_end_with_0():
    for flag, text in (("--help", "RERANKING_MODEL_PATH"), ("--version", ".")):
        done = subprocess.run([sys.executable, "reranking_server.py", flag], capture_output=True, text=True, timeout=20, check=False)
        assert done.returncode == 0
        assert text in done.stdout
