"""Descriptors: closed ones are replaced, inherited ones closed, our own kept from children and never leaked."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path

import pytest
from host import Host, request

from reranker_worker.backends.fake import fake_probability

CLOSED_SUBSETS = [subset for size in (1, 2, 3) for subset in itertools.combinations((0, 1, 2), size)]


def expect_scores(answer: dict, documents: list[str], query: str = "query") -> None:
    assert answer["scores"] == pytest.approx([fake_probability(query, document) for document in documents])


@pytest.mark.parametrize("closed", CLOSED_SUBSETS, ids=str)
def test_closed_standard_descriptors_end_in_service_or_a_clean_exit(spawn, tmp_path, closed):
    """The next opened file would take the number and receive log lines or answers."""
    canary = tmp_path / "canary"
    canary.write_text("untouched")
    setup = "\n".join(f"os.close({descriptor})" for descriptor in closed)
    host = spawn(setup=setup, cwd=tmp_path)
    if 1 not in closed and 0 not in closed:
        host.wait_ready()
        expect_scores(host.ask(request(["a", "b"])), ["a", "b"])
    host.close_stdin()
    assert host.wait_exit() in (0, 74)
    assert os.listdir(tmp_path) == ["canary"]
    assert canary.read_text() == "untouched"


def test_the_front_and_the_engine_hold_exactly_their_own_descriptors(spawn, tmp_path):
    leak = tmp_path / "leak"
    leak.touch()
    # The known host leaks descriptors without CLOEXEC, of other workers' pipes among them.
    setup = f"for _ in range(20):\n    os.set_inheritable(os.open({str(leak)!r}, os.O_RDWR), True)\na, b = os.pipe()\nos.set_inheritable(b, True)"
    host = spawn(setup=setup)
    host.wait_ready()
    front, engine = descriptors(host.pid), descriptors(host.wait_engines()[0])
    for listing in (front, engine):
        assert not any("leak" in target for target, _ in listing.values())
        assert listing[0][0] == os.devnull
    assert all(cloexec for fd, (_, cloexec) in front.items() if fd > 2), front
    assert front[1][0] == front[2][0], "everything but answers goes to stderr"
    # stdin and stdout of the conversation, the signals' pipe (2), the host's pidfd, three pipes of the engine
    assert len(front) == 3 + 2 + 2 + 1 + 3, front
    assert len(engine) == 3 + 2, engine
    assert engine[1][0] == engine[2][0]
    assert all(cloexec for fd, (_, cloexec) in engine.items() if fd > 2), "a child of the engine would keep its pipes open"
    theirs = {target for fd, (target, _) in front.items() if fd > 2 and target.startswith("pipe")}
    shared = {target for target, _ in engine.values() if target.startswith("pipe")}
    assert len(shared) == 3
    assert shared <= theirs


def test_descriptors_do_not_accumulate_over_engine_restarts(spawn):
    host = spawn()
    host.wait_ready()
    before = len(descriptors(host.pid))
    for starts in (2, 3):
        os.kill(host.wait_engines()[0], signal.SIGKILL)
        host.until(lambda starts=starts: ready_engine_starts(host) == starts, 10, "the next engine")
    assert len(descriptors(host.pid)) == before


def descriptors(pid: int) -> dict[int, tuple[str, bool]]:
    """fd -> (what it refers to, close-on-exec)."""
    found = {}
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except PermissionError:
        pytest.skip("only root can list the descriptors of an undumpable process")
    for name in names:
        flags = Path(f"/proc/{pid}/fdinfo/{name}").read_text().split("flags:")[1].split()[0]
        found[int(name)] = (os.readlink(f"/proc/{pid}/fd/{name}"), bool(int(flags, 8) & os.O_CLOEXEC))
    return found


def ready_engine_starts(host: Host) -> int:
    engine = host.ask({"type": "health"})["engines"][0]
    return engine["starts"] if engine["state"] == "ready" else 0
