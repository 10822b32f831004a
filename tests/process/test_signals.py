"""Signals, also inherited, blocked, ignored, doubled, and sent to the whole group."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from host import request
from states import PROMPT, bring_to, in_flight, seconds_to_exit, while_importing

HARMLESS = [signal.SIGINT, signal.SIGPIPE, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD, signal.SIGWINCH]


def is_pending(pid: int, number: int) -> bool:
    """True while a signal waits for the process: a second one would be merged with it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    pending = next(line.split()[1] for line in status.splitlines() if line.startswith("ShdPnd"))
    return bool(int(pending, 16) >> (number - 1) & 1)


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


@pytest.mark.parametrize("state", ["loading", "idle", "scoring"])
def test_signals_that_reach_the_whole_group_of_the_host_change_nothing(spawn, state):
    """Ctrl-C in the host's terminal is the host's business; the engine must not fall to it either."""
    host = bring_to(spawn, state)
    engines = host.engine_pids()
    for number in HARMLESS:
        for pid in (host.pid, *(engines if state != "loading" else ())):
            os.kill(pid, number)
        assert host.ask({"type": "live"})["live"] is True
    assert host.engine_pids() == engines
    host.torn_ok = True
    host.signal(signal.SIGKILL)


def test_an_interrupt_while_python_imports_changes_nothing(spawn, tmp_path):
    host = spawn(env=while_importing(tmp_path, "os.kill(os.getpid(), signal.SIGINT)"))
    host.wait_ready()


@pytest.mark.parametrize("number", [*HARMLESS, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_no_signal_while_python_imports_loses_a_request(spawn, tmp_path, number):
    host = spawn(env=while_importing(tmp_path, f"os.kill(os.getpid(), {int(number)})"))
    host.send(request(["a"], id=1))
    while (answer := host.read_line()).get("id") != 1:
        assert answer["type"] == "ready"
    assert answer["num_documents"] == 1
    host.close_stdin()
    assert host.wait_exit() == 0


def test_the_engine_does_not_inherit_that_the_ends_of_children_are_ignored(spawn):
    host = spawn(setup="signal.signal(signal.SIGCHLD, signal.SIG_IGN)")
    host.wait_ready()
    status = Path(f"/proc/{host.wait_engines()[0]}/status").read_text(encoding="ascii").splitlines()
    ignored = next(line.split()[1] for line in status if line.startswith("SigIgn"))
    assert not int(ignored, 16) >> (signal.SIGCHLD - 1) & 1


def test_an_interrupt_on_a_terminal_drains(spawn):
    master, slave = os.openpty()
    host = spawn(stdin=Path(os.ttyname(slave)))
    host.wait_ready()
    host.signal(signal.SIGINT)
    assert host.wait_exit(3) == 0
    os.close(master)
    os.close(slave)


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
