"""Engines that die, hang, run out of memory or give no number: it costs at most the culprit, and the host never notices a restart."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path

import pytest
from host import Host, is_running, request

from reranker_worker.backends.fake import fake_probability

MATES = [f"mate {n}" for n in range(40)]
DEADLY = {
    "killed": "fake:kill 9",
    "segmentation fault": "fake:kill 11",
    "abort": "fake:kill 6",
    "bus error": "fake:kill 7",
    "illegal instruction": "fake:kill 4",
    "exit 0": "fake:exit 0",
    "exit 1": "fake:exit 1",
    "an error of the tokenizer": "fake:tokenize",
}


def expect_scores(answer: dict, documents: list[str], query: str = "query") -> None:
    assert answer.get("scores") == pytest.approx([fake_probability(query, document) for document in documents]), answer


def health(host: Host) -> dict:
    return host.ask({"type": "health"})


def health_among(host: Host) -> tuple[dict, list[dict]]:
    """The health report, and the answers that came before it."""
    host.send({"type": "health"})
    others = []
    while (line := host.read_line()).get("type") != "health":
        others.append(line)
    return line, others


def served_again(host: Host, within: float = 10.0) -> None:
    """The worker is ready and scores."""
    host.until(lambda: host.ask({"type": "ready"})["ready"], within, "readiness")
    expect_scores(host.ask(request(["after"])), ["after"])


@pytest.mark.parametrize("fault", DEADLY)
def test_a_deadly_request_is_poisoned_and_its_mates_are_answered(spawn, fault):
    host = spawn()
    host.wait_ready()
    # The first keeps the engine busy, so that the others travel together.
    host.send(request(["fake:sleep 200"], id=0), *(request([f"a{n}", f"b{n}"], id=n) for n in (1, 2)))
    host.send(request(["c", DEADLY[fault], "d"], id="culprit"), *(request([f"a{n}", f"b{n}"], id=n) for n in (3, 4)))
    answers = {answer["id"]: answer for answer in host.read_lines(6)}
    assert answers["culprit"]["code"] == "POISONED"
    assert answers["culprit"]["retryable"] is False
    for n in (1, 2, 3, 4):
        expect_scores(answers[n], [f"a{n}", f"b{n}"])
    host.send(request(["c", DEADLY[fault], "d"], id="again"))
    assert host.read_line()["code"] == "POISONED"
    assert host.ask({"type": "stats"})["engine_deaths"] == 2, "the second time it is refused, not tried"
    served_again(host)


@pytest.mark.parametrize("in_flight", [1, 40, 1000])
def test_a_request_in_flight_when_the_engine_is_killed_is_scored_all_the_same(spawn, in_flight):
    """A large request has several batches in flight at once: one crash, not two."""
    host = spawn("--model", "pair_us=500", "--max-batch-pairs", "100")
    host.wait_ready()
    documents = ["fake:sleep 300", *(f"document {n}" for n in range(in_flight - 1))]
    host.send(request(documents, id=1), request(["small"], id=2))
    host.send({"type": "health", "id": "look"})
    while not (line := host.read_line())["engines"][0]["in_flight_batches"]:
        host.send({"type": "health", "id": "look"})
    for pid in host.engine_pids():
        os.kill(pid, signal.SIGKILL)
    answers = {answer["id"]: answer for answer in host.read_lines(2)}
    assert answers[1].get("scores", [])[1:] == pytest.approx([fake_probability("query", document) for document in documents[1:]]), answers[1]
    expect_scores(answers[2], ["small"])
    assert line["waiting_requests"] == 2
    assert host.ask({"type": "stats"})["engine_deaths"] == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV], ids=lambda number: number.name)
def test_an_idle_engine_that_dies_is_reported_at_once_and_replaced(spawn, number):
    host = spawn()
    host.wait_ready()
    (engine,) = host.wait_engines()
    os.kill(engine, number)
    begin = time.monotonic()
    while (report := health(host))["ready"]:
        assert time.monotonic() - begin < 1.0
    assert report["engines"][0]["starts"] <= 2
    assert report["live"] is True
    assert report["status"] == "restarting the engine"
    assert host.ask({"type": "ready"}).get("reason") in (None, "restarting the engine", "the last batch failed")
    expect_scores(host.ask(request(["queued"])), ["queued"])
    assert host.wait_engines() != [engine]
    assert health(host)["engines"][0]["starts"] == 2
    host.logged("an engine ended: it was killed by " + number.name)


@pytest.mark.parametrize("how", ["stopped", "hung"])
def test_an_engine_that_hangs_is_killed_after_the_last_deadline_and_replaced(spawn, how):
    host = spawn()
    host.wait_ready()
    (engine,) = host.wait_engines()
    if how == "stopped":
        os.kill(engine, signal.SIGSTOP)
    host.send(request(["a" if how == "stopped" else "fake:hang"], id=1, timeout_ms=400))
    begin = time.monotonic()
    assert host.read_line(5)["code"] == "DEADLINE_EXCEEDED"
    assert 0.3 < time.monotonic() - begin < 1.4
    host.until(lambda: not is_running(engine), 3, "the hung engine's end")  # a second after the deadline
    host.logged("it hung while scoring")
    served_again(host)
    assert host.silent_for(0.1), "the expired request is not answered twice"


def test_a_thread_that_hangs_is_noticed_while_another_scores_on(spawn):
    host = spawn("--model", "parallel=2")
    host.wait_ready()
    (engine,) = host.wait_engines()
    host.send(request(["fake:hang"], id="hung", timeout_ms=400))
    answers = []

    def another_is_scored() -> bool:
        answers.append(host.ask(request([f"{len(answers)}"], id=len(answers))))
        return not is_running(engine)

    host.until(another_is_scored, 15, "the end of the engine whose thread hangs")
    answers.append(host.read_line())  # of the hung one or of the last
    assert [answer["id"] for answer in answers if "code" in answer] == ["hung"]
    host.logged("it hung while scoring")
    served_again(host)


def test_an_engine_without_progress_is_killed_although_somebody_waits(spawn):
    host = spawn("--engine-stall-ms", "500")
    host.wait_ready()
    host.send(request(["fake:hang"], id="culprit"), request(["a"], id=1))
    answers = {answer["id"]: answer for answer in host.read_lines(2)}
    assert answers["culprit"]["code"] == "POISONED"
    expect_scores(answers[1], ["a"])


def test_health_tells_a_busy_engine_from_a_dead_one(spawn):
    host = spawn()
    host.wait_ready()
    host.send(request(["fake:sleep 1200"], id=1))
    reports = []
    while (line := host.ask({"type": "health"})).get("type") == "health":
        reports.append(line)
    assert line["id"] == 1
    assert host.read_line()["type"] == "health"
    assert all(report["ready"] and report["live"] for report in reports)
    assert reports[-1]["oldest_in_flight_ms"] > 800
    # The first report may come before the request is sent on, the last when its answer is about to come.
    assert max(report["engines"][0]["progress_ms"] or 0 for report in reports) > 800
    assert reports[-1]["waiting_requests"] == 1


def test_memory_that_runs_out_halves_the_pass_down_to_one_pair(spawn):
    host = spawn()
    host.wait_ready()
    documents = [*MATES, "fake:oom", *MATES]
    answer = host.ask(request(documents))
    assert len(answer["scores"]) == 81
    assert answer["scores"][:40] == pytest.approx([fake_probability("query", mate) for mate in MATES])
    host.logged("out of memory")
    assert host.ask({"type": "stats"})["engine_deaths"] == 0


@pytest.mark.parametrize("fault", ["fake:oom1", "fake:nan", "fake:raise"])
def test_a_pair_without_a_score_fails_its_request_alone_and_is_never_invented(spawn, fault):
    host = spawn()
    host.wait_ready()
    host.send(request(["fake:sleep 200"], id=0), request(MATES, id=1), request(["x", fault, "y"], id="culprit"), request(MATES[:3], id=2))
    answers = {answer["id"]: answer for answer in host.read_lines(4)}
    assert answers["culprit"]["code"] == "INFERENCE_ERROR"
    assert "scores" not in answers["culprit"]
    expect_scores(answers[1], MATES)
    expect_scores(answers[2], MATES[:3])
    assert b"NaN" not in host.raw
    served_again(host)


def test_an_engine_with_too_little_memory_to_go_on_does_not_take_the_worker_along(spawn):
    host = spawn()
    host.wait_ready()
    (engine,) = host.wait_engines()
    resource.prlimit(engine, resource.RLIMIT_AS, (1 << 20, 1 << 20))
    answer = host.ask(request(["x" * 1000] * 900 + ["y"], id=1), 20)
    assert answer["id"] == 1
    assert "scores" in answer or answer["code"] in ("POISONED", "INFERENCE_ERROR")
    served_again(host)


@pytest.mark.parametrize("count", [2, 3])
def test_several_engines_share_the_work_and_survive_each_other(spawn, count):
    host = spawn("--model", "pair_us=300", env={"RERANKING_ENGINES": str(count)})
    assert host.wait_ready()["engines"] == count
    host.until(lambda: [engine["state"] for engine in health(host)["engines"]] == ["ready"] * count, 10, "all engines")
    requests = {n: [f"{n} {m}" for m in range(50)] for n in range(30)}
    host.send(*(request(documents, id=n) for n, documents in requests.items()))
    busy, early = health_among(host)
    while not all(engine["in_flight_batches"] for engine in busy["engines"]):
        busy, more = health_among(host)
        early += more
    answers = {answer["id"]: answer for answer in (*early, *host.read_lines(30 - len(early)))}
    for n, documents in requests.items():
        expect_scores(answers[n], documents)
    pids = host.wait_engines(count)
    host.send(*(request(documents, id=n) for n, documents in requests.items()))
    os.kill(pids[0], signal.SIGKILL)
    answers = {answer["id"]: answer for answer in host.read_lines(30)}
    for n, documents in requests.items():
        expect_scores(answers[n], documents)
    host.until(lambda: len(host.engine_pids()) == count and pids[0] not in host.engine_pids(), 10, "a new engine")
    assert set(pids[1:]) < set(host.engine_pids())


def test_one_dead_engine_of_two_leaves_the_worker_ready(spawn):
    host = spawn("--model", "load_ms=700", env={"RERANKING_ENGINES": "2"})
    host.wait_ready()
    host.until(lambda: [engine["state"] for engine in health(host)["engines"]] == ["ready"] * 2, 10, "both engines")
    os.kill(host.wait_engines(2)[0], signal.SIGKILL)
    host.until(lambda: [engine["state"] for engine in health(host)["engines"]].count("ready") == 1, 2, "the loss in the report")
    expect_scores(host.ask(request(["a"], id=1)), ["a"])
    assert health(host)["ready"] is True


def test_a_restart_storm_is_answered_with_engine_unavailable_and_the_worker_stays(spawn):
    host = spawn()
    host.wait_ready()
    deadly = [request([f"fake:exit {n}"], id=n) for n in range(1, 4)]
    codes = [host.ask(message, 15)["code"] for message in deadly]
    assert codes[:2] == ["POISONED", "POISONED"]
    answer = host.ask(request(["innocent"], id="x"), 15)
    assert answer["code"] == codes[2] == "ENGINE_UNAVAILABLE"
    assert answer["retryable"] is True
    assert 1 <= answer["retry_after_ms"] <= 30_000
    assert host.ask({"type": "live"})["live"] is True
    assert host.ask({"type": "ready"})["ready"] is False


@pytest.mark.parametrize("room", [1, 2, 4, 6, 7])
def test_an_engine_that_cannot_be_spawned_does_not_take_the_worker_along(spawn, room):
    """Too few free descriptors, as beside a host that leaks them: tried again, and served when there are enough."""
    host = spawn()
    host.wait_ready()
    (engine,) = host.wait_engines()
    before = os.listdir(f"/proc/{host.pid}/fd")
    soft, hard = resource.prlimit(host.pid, resource.RLIMIT_NOFILE)
    taken = sum(name.isdigit() for name in before) - 3  # an engine's death frees its three
    resource.prlimit(host.pid, resource.RLIMIT_NOFILE, (taken + room, hard))
    os.kill(engine, signal.SIGKILL)
    host.until(lambda: not is_running(engine), 5, "the engine's end")
    host.until(lambda: health(host)["engines"][0]["starts"] >= 2, 5, "a failed start")
    resource.prlimit(host.pid, resource.RLIMIT_NOFILE, (soft, hard))
    served_again(host)
    assert len(os.listdir(f"/proc/{host.pid}/fd")) == len(before)


# --- the first start -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "count"), [(65, 1), (66, 1), (66, 3), (69, 1), (71, 1), (78, 1), (78, 3)])
def test_a_model_that_cannot_be_loaded_is_said_once_and_the_exit_code_tells_whether_to_retry(spawn, code, count):
    host = spawn("--model", f"fail={code}", env={"RERANKING_ENGINES": str(count)})
    host.send(request(["a"], id=1))
    assert host.wait_exit() == code
    *lines, rest = bytes(host.raw).split(b"\n")
    answers = [Host.parse(line + b"\n") for line in lines]
    assert rest == b""
    assert answers[0]["code"] == "MODEL_LOAD_ERROR", "the known host shows the first error to its user"
    assert [answer["code"] for answer in answers].count("MODEL_LOAD_ERROR") == 1
    assert [answer["code"] for answer in answers[1:]] in ([], ["NOT_READY"]), "a request read before the failure is answered"


def test_engines_that_fail_to_load_at_the_same_moment_are_one_failure(spawn):
    host = spawn("--model", "fail=66", env={"RERANKING_ENGINES": "3"})
    host.until(
        lambda: len([pid for pid in host.engine_pids() if b"engine.child" in Path(f"/proc/{pid}/cmdline").read_bytes()]) == 3, 10, "three engines"
    )
    engines = host.engine_pids()
    for pid in engines:
        os.kill(pid, signal.SIGSTOP)
    assert len(health(host)["engines"]) == 3
    host.send(request(["a"], id=1))
    host.signal(signal.SIGSTOP)  # so that the front sees all ends together
    for pid in engines:
        os.kill(pid, signal.SIGCONT)
    host.until(lambda: not host.engine_pids(), 10, "the engines' ends")
    host.signal(signal.SIGCONT)
    assert host.wait_exit() == 66
    assert [answer["code"] for answer in host.read_lines(2)] == ["MODEL_LOAD_ERROR", "NOT_READY"]
    assert not host.has_line()


def test_an_engine_that_dies_while_loading_is_started_again(spawn):
    host = spawn("--model", "load_ms=600")
    host.send(request(["a"], id=1))
    (engine,) = host.wait_engines()
    os.kill(engine, signal.SIGKILL)
    host.wait_ready()
    expect_scores(host.read_line(), ["a"])


def test_an_engine_that_always_dies_while_loading_ends_the_start_with_70(spawn):
    host = spawn("--model", "load_ms=20000")
    killed: set[int] = set()

    def killing() -> bool:
        for pid in set(host.engine_pids()) - killed:
            killed.add(pid)
            os.kill(pid, signal.SIGKILL)
        return host.exited()

    host.until(killing, 15, "the end of the start")
    assert host.code == 70
    assert host.read_line()["code"] == "MODEL_LOAD_ERROR"
    assert not host.has_line()
    assert len(killed) == 5


@pytest.mark.skipif(not Path("/proc/self/oom_score_adj").exists(), reason="only Linux has it")
def test_where_memory_runs_out_the_kernel_takes_the_engine_and_neither_the_front_nor_the_host(spawn):
    host = spawn()
    host.wait_ready()
    (engine,) = host.engine_pids()
    scores = [int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in (engine, host.pid, os.getpid())]
    assert scores[0] == 1000
    assert scores[1] == scores[2] < 1000
