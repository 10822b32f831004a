"""Birth and death: the worker lives exactly as long as its host wants it, and its engines exactly as long as it."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys

import pytest
from host import HostError, is_running, request
from states import PROMPT, STATES, bring_to, seconds_to_exit, while_importing

GONE_WITHIN = 1.5  # promised: 1 s after the host's death


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
    code = "open(here + '/importing', 'w').close()\nwhile not os.path.exists(here + '/go'): select.select([], [], [], 0.01)"
    host = spawn(keeper=True, env=while_importing(tmp_path, code))
    host.until((tmp_path / "importing").exists, 10, "the import")
    host.kill_keeper()
    (tmp_path / "go").touch()
    host.wait_exit(3)


def test_without_a_descriptor_of_the_host_its_death_is_seen_by_the_changed_parent(spawn, tmp_path):
    host = bring_to(spawn, "idle", keeper=True, env=while_importing(tmp_path, "del os.pidfd_open"))
    host.kill_keeper()
    host.wait_exit(GONE_WITHIN)


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
