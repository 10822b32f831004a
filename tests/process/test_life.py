"""Birth and death: the worker lives exactly as long as its host wants it, and its engines exactly as long as it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from host import Host, HostError, is_running, request

LOADING = ("--model", "load_ms=20000")
# What a worker may be doing when something happens to it.
STATES = ["loading", "idle", "scoring", "engine stopped", "draining"]
GONE_WITHIN = 1.5  # promised: 1 s after the host's death
HARMLESS = [signal.SIGINT, signal.SIGPIPE, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD, signal.SIGWINCH]
PROMPT = 1.0  # promised: 100 ms; the rest is for a loaded machine


def bring_to(spawn, state: str, **options) -> Host:
    """A worker in one of STATES."""
    host = spawn(*(LOADING if state == "loading" else ()), **options)
    if state == "loading":
        assert host.ask({"type": "health"})["status"] == "loading"
        host.wait_engines()
        return host
    host.wait_ready()
    if state == "engine stopped":
        os.kill(host.wait_engines()[0], signal.SIGSTOP)
    if state != "idle":
        host.send(request(["fake:sleep 20000"], id="slow"))
        host.until(lambda: in_flight(host), 5, "a batch in flight")
    if state == "draining":
        host.signal(signal.SIGTERM)
        host.logged("draining")
    return host


def in_flight(host: Host) -> bool:
    return host.ask({"type": "health"})["engines"][0]["in_flight_batches"] > 0


def is_pending(pid: int, number: int) -> bool:
    """True while a signal waits for the process: a second one would be merged with it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    pending = next(line.split()[1] for line in status.splitlines() if line.startswith("ShdPnd"))
    return bool(int(pending, 16) >> (number - 1) & 1)


def seconds_to_exit(host: Host, within: float) -> float:
    begin = time.monotonic()
    host.wait_exit(within)
    return time.monotonic() - begin


# --- the host's death ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("sibling", [True, False], ids=["a sibling holds the pipes", "the pipes close"])
def test_the_worker_is_gone_soon_after_its_host_was_killed(spawn, state, sibling):
    host = bring_to(spawn, state, keeper=True)
    host.torn_ok = not sibling
    host.kill_keeper()
    if not sibling:
        host.close_stdin()
        host.close_stdout()
    host.wait_exit(GONE_WITHIN)
    host.until(lambda: not host.group_pids(), GONE_WITHIN, "an empty process group")


def test_the_host_s_death_ends_a_worker_that_waits_for_its_last_answers_to_be_read(spawn):
    host = spawn(keeper=True, setup="fcntl.fcntl(1, 1031, 4096)")
    host.wait_ready()
    host.reading = False
    host.torn_ok = True
    host.send(request(["x" * 1_000_000], return_documents=True), {"type": "shutdown"})
    host.logged("draining")
    host.kill_keeper()
    host.until(host.exited, GONE_WITHIN, "the worker's exit")


def test_a_host_that_died_while_python_started_is_noticed(spawn, tmp_path):
    """The parent is remembered before the imports: here they wait until the host is dead."""
    (tmp_path / "orjson.py").write_text(
        "import os, select, sys, time\n"
        f"open({str(tmp_path / 'importing')!r}, 'w').close()\n"
        f"while not os.path.exists({str(tmp_path / 'go')!r}): select.select([], [], [], 0.01)\n"
        "sys.path.remove(os.path.dirname(__file__)); del sys.modules['orjson']\n"
        "import orjson\n"
    )
    host = spawn(keeper=True, env={"PYTHONPATH": str(tmp_path)})
    host.until((tmp_path / "importing").exists, 10, "the import")
    host.kill_keeper()
    (tmp_path / "go").touch()
    host.wait_exit(3)


def test_a_worker_whose_host_is_the_first_process_of_a_container_serves(spawn):
    """There the parent is process 1 from the start: `getppid() == 1` is no sign of an orphan."""
    unshare = shutil.which("unshare")
    probe = [unshare or "unshare", "--pid", "--fork", "true"]
    if unshare is None or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not permit a new process namespace")
    first = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)"
    host = spawn(wrapper=[unshare, "--pid", "--fork", sys.executable, "-I", "-c", first])
    host.wait_ready()
    assert host.silent_for(0.7), "two polls of the parent's id"
    assert host.ask(request(["a"]))["num_documents"] == 1
    host.close_stdin()
    assert host.wait_exit() == 0


# --- end of input --------------------------------------------------------------------------------------------------------------


def test_end_of_input_while_idle_ends_the_worker_at_once_with_0(spawn):
    host = spawn()
    host.wait_ready()
    host.close_stdin()
    assert seconds_to_exit(host, 5) < PROMPT
    assert host.code == 0


def test_end_of_input_during_inference_is_noticed_and_what_was_accepted_is_answered(spawn):
    host = spawn()
    host.wait_ready()
    host.send(request(["fake:sleep 700"], id=1), request(["a"], id=2))
    host.close_stdin()
    host.logged("draining", 0.6)  # long before the inference ends
    assert sorted(answer["id"] for answer in host.read_lines(2)) == [1, 2]
    assert host.wait_exit() == 0


def test_an_incomplete_drain_answers_the_rest_with_shutting_down_and_ends_with_75(spawn):
    host = spawn("--drain-timeout-ms", "300")
    host.wait_ready()
    host.send(request(["fake:sleep 20000"], id=1), request(["a"], id=2))
    host.close_stdin()
    answers = {answer["id"]: answer for answer in host.read_lines(2)}
    assert answers[1]["code"] == "SHUTTING_DOWN"
    assert answers[1]["retryable"] is True
    assert set(answers) == {1, 2}
    assert host.wait_exit(2) == 75


def test_requests_that_arrive_while_draining_are_refused_and_controls_are_answered(spawn):
    host = spawn()
    host.wait_ready()
    host.send(request(["fake:sleep 600"], id=1), {"type": "shutdown"}, request(["a"], id=2), {"type": "heartbeat"}, {"type": "ready"})
    answers = host.read_lines(5)
    kinds = [answer.get("type") or answer.get("code") or answer["id"] for answer in answers]
    assert kinds == ["shutdown", "SHUTTING_DOWN", "heartbeat", "readiness", 1]
    assert answers[3]["reason"] == "draining"
    assert host.wait_exit() == 0


def test_requests_queued_before_ready_are_served_although_the_input_has_ended(spawn):
    host = spawn("--model", "load_ms=1500", "--drain-timeout-ms", "1000")
    host.send(request(["a"], id=1), request(["b"], id=2))
    host.close_stdin()
    host.wait_ready()
    assert sorted(answer["id"] for answer in host.read_lines(2)) == [1, 2]
    assert host.wait_exit() == 0


def test_end_of_input_before_ready_without_requests_ends_the_worker_at_once(spawn):
    host = bring_to(spawn, "loading")
    host.close_stdin()
    assert seconds_to_exit(host, 5) < PROMPT
    assert host.code == 0


def test_shutdown_is_acknowledged_and_the_exit_fits_into_the_known_host_s_half_second(spawn):
    host = spawn()
    host.wait_ready()
    answer = host.ask({"type": "shutdown"})
    assert answer == {"type": "shutdown", "status": "acknowledged"}
    assert seconds_to_exit(host, 5) < PROMPT
    assert host.code == 0


# --- signals -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("state", ["loading", "idle", "scoring", "engine stopped"])
def test_sigterm_and_sighup_drain(spawn, number, state):
    host = bring_to(spawn, state, env={"RERANKING_DRAIN_TIMEOUT_MS": "200"})
    host.signal(number)
    busy = state in ("scoring", "engine stopped")
    if busy:
        answer = host.read_line(3)
        assert (answer["id"], answer["code"]) == ("slow", "SHUTTING_DOWN")
    assert seconds_to_exit(host, 5) < PROMPT
    assert host.code == (75 if busy else 0)


@pytest.mark.parametrize("number", HARMLESS, ids=lambda number: number.name)
@pytest.mark.parametrize("state", ["loading", "idle", "scoring"])
def test_signals_that_reach_the_whole_group_of_the_host_change_nothing(spawn, number, state):
    """Ctrl-C in the host's terminal is the host's business; the engine must not fall to it either."""
    host = bring_to(spawn, state)
    engines = host.engine_pids()
    for pid in (host.pid, *(engines if state != "loading" else ())):
        os.kill(pid, number)
    assert host.ask({"type": "live"})["live"] is True
    assert host.engine_pids() == engines
    host.torn_ok = True
    host.signal(signal.SIGKILL)


def test_an_interrupt_while_python_imports_changes_nothing(spawn, tmp_path):
    (tmp_path / "orjson.py").write_text(
        "import os, signal, sys\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.path.remove(os.path.dirname(__file__)); del sys.modules['orjson']\n"
        "import orjson\n"
    )
    host = spawn(env={"PYTHONPATH": str(tmp_path)})
    host.wait_ready()


@pytest.mark.parametrize("state", ["scoring", "engine stopped", "draining"])
def test_a_second_sigterm_ends_the_worker_at_once_with_143(spawn, state):
    host = bring_to(spawn, state)
    if state != "draining":
        host.signal(signal.SIGTERM)
        host.logged("draining")
    assert host.silent_for(0.05)
    host.signal(signal.SIGTERM)
    assert seconds_to_exit(host, 5) < PROMPT
    assert host.code == 143


def test_a_second_sigterm_ends_the_wait_for_a_host_that_does_not_read_its_last_answers(spawn):
    host = spawn(setup="fcntl.fcntl(1, 1031, 4096)")
    host.wait_ready()
    host.reading = False
    host.torn_ok = True
    host.send(request(["x" * 1_000_000], id=1, return_documents=True), {"type": "shutdown"})
    host.logged("draining")
    for _ in range(2):
        host.signal(signal.SIGTERM)
        host.until(lambda: not is_pending(host.pid, signal.SIGTERM), 5, "the signal's arrival")
    host.until(host.exited, 2, "the worker's exit")
    assert host.code == 143


def test_a_host_that_does_not_read_the_last_answers_gets_74(spawn):
    host = spawn("--drain-timeout-ms", "200", setup="fcntl.fcntl(1, 1031, 4096)")
    host.wait_ready()
    host.reading = False
    host.torn_ok = True
    host.send(request(["x" * 1_000_000], id=1, return_documents=True), {"type": "shutdown"})
    host.until(host.exited, 4, "the worker's exit")
    assert host.code == 74


BLOCKED = "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))"
IGNORED = "for n in set(range(1, 32)) - {9, 19}:\n    signal.signal(n, signal.SIG_IGN)"


@pytest.mark.parametrize("setup", [BLOCKED, IGNORED, f"{IGNORED}\n{BLOCKED}"], ids=["blocked", "ignored", "both"])
def test_blocked_and_ignored_signals_of_the_spawner_do_not_last(spawn, setup):
    host = spawn("--drain-timeout-ms", "200", setup=setup)
    host.wait_ready()
    os.kill(host.wait_engines()[0], signal.SIGKILL)
    host.logged("it was killed by SIGKILL")
    host.logged("an engine is back")
    host.send(request(["fake:exit 3"]), request(["a"]))
    answers = host.read_lines(2)
    assert [answers[0].get("code"), answers[1].get("num_documents")] == ["POISONED", 1]
    host.logged("it exited with code 3")
    host.signal(signal.SIGTERM)
    assert host.wait_exit(3) == 0


@pytest.mark.parametrize("pause_ms", [50, 700, 1500])
def test_a_stopped_worker_goes_on_and_late_requests_are_expired_once(spawn, pause_ms):
    host = spawn()
    host.wait_ready()
    host.send(request(["fake:sleep 300"], id="late", timeout_ms=600), request(["a"], id="later", timeout_ms=60_000))
    host.until(lambda: in_flight(host), 5, "a batch in flight")
    os.killpg(host.group, signal.SIGSTOP)
    assert host.silent_for(pause_ms / 1e3)
    os.killpg(host.group, signal.SIGCONT)
    answers = {answer["id"]: answer for answer in host.read_lines(2)}
    assert "scores" in answers["later"]
    if pause_ms > 600:
        assert answers["late"]["code"] == "DEADLINE_EXCEEDED"
    else:
        assert "scores" in answers["late"]
    assert host.silent_for(0.1)
    assert host.ask({"type": "health"})["status"] == "serving"


# --- engines live with the front -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["loading", "idle", "scoring", "engine stopped"])
def test_engines_are_gone_soon_after_the_front_was_killed(spawn, state):
    host = bring_to(spawn, state, env={"RERANKING_ENGINES": "2"} if state == "idle" else {})
    host.torn_ok = True
    engines = host.engine_pids()
    assert engines
    host.signal(signal.SIGKILL)
    assert host.wait_exit() == -signal.SIGKILL
    host.until(lambda: not any(map(is_running, engines)), 1.5, "the engines' end")


def test_no_engine_survives_a_front_killed_at_any_moment_of_its_start(spawn):
    for step in range(12):
        host = spawn()
        host.torn_ok = True
        with pytest.raises(HostError):
            host.until(lambda: False, step * 0.025, "the moment of the kill")
        host.signal(signal.SIGKILL)
        host.wait_exit()
        host.finish()  # demands an empty group


# --- start ---------------------------------------------------------------------------------------------------------------------


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


def test_help_and_version_go_to_stdout_and_end_with_0():
    for flag, text in (("--help", "RERANKING_MODEL_PATH"), ("--version", ".")):
        done = subprocess.run([sys.executable, "reranking_server.py", flag], capture_output=True, text=True, timeout=20, check=False)
        assert done.returncode == 0
        assert text in done.stdout
