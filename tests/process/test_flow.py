"""Flow: nobody waits for a reader that does not read, a queue that is full, or a batch that is large."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from pathlib import Path

import pytest
from host import Host, request
from states import bring_to, in_flight, while_importing

from reranker_worker.backends.fake import fake_probability

SLOW_NOISE = 'if sys.argv[0] == "-c":\n    for n in range(2000): os.write(2, b"noise of a library %d " % n + b"x" * 100 + b"\\n")\n'


def expect_scores(answer: dict, documents: list[str], query: str = "query") -> None:
    assert answer.get("scores") == pytest.approx([fake_probability(query, document) for document in documents]), answer


# --- a host that never reads stderr --------------------------------------------------------------------------------------------


def test_a_full_stderr_that_nobody_reads_stops_nothing(spawn):
    host = spawn("--log-level", "DEBUG", stderr="never")
    host.wait_ready()
    for start in range(0, 1000, 100):
        host.send(*(request([f"a{n}", f"fake:print {n}"], id=n) for n in range(start, start + 100)))
        assert sorted(answer["id"] for answer in host.read_lines(100)) == list(range(start, start + 100))
    assert host.ask({"type": "stats"})["log_lines_lost"] > 1000, "lost lines are counted, so the pipe was full"
    begin = time.monotonic()
    host.close_stdin()
    assert host.wait_exit() == 0
    assert time.monotonic() - begin < 1.0


def test_a_stderr_that_is_full_before_the_model_is_loaded_stops_nothing(spawn, tmp_path):
    host = spawn(stderr="never", env=while_importing(tmp_path, SLOW_NOISE))
    host.wait_ready()
    expect_scores(host.ask(request(["a"])), ["a"])


def test_a_stderr_whose_reader_left_stops_nothing(spawn):
    host = spawn(stderr="never")
    os.close(host.stderr_fd)
    host.stderr_fd = -1
    host.wait_ready()
    for n in range(50):
        host.send(request(["fake:print"], id=n))
        assert host.read_line()["id"] == n


# --- a host that does not read its answers -------------------------------------------------------------------------------------


def test_a_host_that_writes_without_reading_is_drained_and_then_left_with_74(spawn):
    host = spawn("--max-unsent-bytes", "100000")
    host.wait_ready()
    host.reading = False
    host.torn_ok = True
    begin = time.monotonic()
    while not host.exited() and time.monotonic() - begin < 15:
        with contextlib.suppress(OSError):
            host.send(request(["x" * 20_000], return_documents=True))
    assert host.code == 74
    host.until(lambda: b"does not read" in bytes(host.errors), 2, "the reason")


def test_a_few_answers_that_nobody_reads_end_the_worker_after_the_write_timeout(spawn):
    host = spawn("--write-timeout-ms", "700", setup="fcntl.fcntl(1, 1031, 4096)")
    host.wait_ready()
    host.reading = False
    host.torn_ok = True
    host.send(request(["x" * 20_000], return_documents=True))
    begin = time.monotonic()
    host.until(host.exited, 5, "the worker's exit")
    assert host.code == 74
    assert time.monotonic() - begin > 0.5


def test_a_host_that_owes_no_reading_may_be_silent_for_longer_than_the_write_timeout(spawn):
    host = spawn("--write-timeout-ms", "300")
    host.wait_ready()
    host.send({"type": "heartbeat"})
    host.reading = False
    with pytest.raises(AssertionError):
        host.until(host.exited, 1.2, "an exit that must not come")
    host.reading = True
    assert host.read_line()["type"] == "heartbeat"
    expect_scores(host.ask(request(["a"])), ["a"])


@pytest.mark.parametrize("kind", ["pipe", "socketpair"])
def test_a_slow_reader_gets_everything(spawn, kind):
    setup = "fcntl.fcntl(1, 1031, 4096)" if kind == "pipe" else ""
    host = spawn("--write-timeout-ms", "1500", stdout=kind, setup=setup)
    host.wait_ready()
    host.reading = False
    # Through a pipe of one page a single write lasts longer than the time-out.
    count, length = (1, 100_000) if kind == "pipe" else (20, 20_000)
    host.send(*(request([f"{n % 10}" * length], id=n, return_documents=True) for n in range(count)))
    pause = 0.05 if kind == "pipe" else 0.02
    sizes = itertools.cycle((1900, 1300, 2300, 700, 1700) if kind == "pipe" else (10_000,))
    next_read = time.monotonic()

    def sip() -> bool:
        nonlocal next_read
        if time.monotonic() >= next_read:
            next_read = time.monotonic() + pause
            with contextlib.suppress(BlockingIOError):
                host.raw += os.read(host.stdout_fd, next(sizes))
        return host.raw.count(b"\n") > count

    host.until(sip, 30, "all answers in sips")
    assert sorted(answer["id"] for answer in host.read_lines(count)) == list(range(count))


# --- overload ------------------------------------------------------------------------------------------------------------------


def test_ten_times_the_load_is_refused_at_once_and_what_was_accepted_is_answered(spawn):
    host = spawn("--model", "pair_us=1000", "--max-waiting-requests", "40")
    host.wait_ready()
    total = 400
    host.queue(*(request([f"{n} {m}" for m in range(10)], id=n) for n in range(total)))
    answers = {}
    for _ in range(total):
        answer = host.read_line()
        assert answer["id"] not in answers
        answers[answer["id"]] = answer
        if "code" in answer:
            assert answer["code"] == "OVERLOADED"
            assert answer["retryable"] is True
            assert 1 <= answer["retry_after_ms"] <= 60_000
    accepted = {n: answer for n, answer in answers.items() if "scores" in answer}
    refused = total - len(accepted)
    assert len(accepted) >= 40
    assert refused > 100
    order = ["code" in answer for answer in answers.values()]
    assert order.index(True) < total - order[::-1].index(False) - 20, "refused long before the queue is done"
    for n, answer in accepted.items():
        expect_scores(answer, [f"{n} {m}" for m in range(10)])
    assert host.ask({"type": "stats"})["errors"] == {"OVERLOADED": refused}


@pytest.mark.parametrize(
    ("flags", "fill", "more"),
    [
        (["--max-waiting-pairs", "20"], ["a"] * 15, ["b"] * 10),
        (["--max-waiting-bytes", "20000"], ["a" * 15_000], ["b" * 10_000]),
        (["--max-waiting-requests", "1"], ["a"], ["b"]),
    ],
    ids=["pairs", "bytes", "requests"],
)
def test_each_limit_of_the_queue_refuses_and_a_retry_is_accepted_later(spawn, flags, fill, more):
    host = spawn(*flags)
    host.wait_ready()
    host.send(request(["fake:sleep 400", *fill], id="fill"))
    answer = host.ask(request(more, id="more"))  # the first line that comes: what fills the queue is still being scored
    assert (answer["id"], answer["code"]) == ("more", "OVERLOADED")
    assert host.read_line()["id"] == "fill"
    assert host.ask(request(more, id="more"))["num_documents"] == len(more)


def test_a_request_larger_than_the_whole_queue_is_told_that_no_retry_will_help(spawn):
    host = spawn("--max-waiting-pairs", "20")
    host.wait_ready()
    answer = host.ask(request(["a"] * 21, id=1))
    assert (answer["code"], answer["retryable"]) == ("REQUEST_TOO_LARGE", False)
    assert "retry_after_ms" not in answer


# --- what must not wait --------------------------------------------------------------------------------------------------------


def beats(host: Host, count: int) -> tuple[list[float], list[dict]]:
    """The seconds that `count` heartbeats took, and the other answers that came meanwhile."""
    seconds, others = [], []
    for _ in range(count):
        begin = time.monotonic()
        host.queue({"type": "heartbeat"})
        while (line := host.read_line()).get("type") != "heartbeat":
            others.append(line)
        seconds.append(time.monotonic() - begin)
        assert line["status"] == "alive"
    return sorted(seconds), others


def test_heartbeats_are_answered_at_once_under_full_load(spawn):
    host = spawn("--model", "pair_us=500", "--max-batch-pairs", "64")
    host.wait_ready()
    host.send(*(request([f"{n} {m}" for m in range(100)], id=n) for n in range(40)))
    seconds, others = beats(host, 60)
    assert len(others) < 40, "the load lasted longer than the heartbeats"
    assert seconds[54] < 0.1
    assert seconds[-1] < 1.0
    host.read_lines(40 - len(others), 30)


def test_heartbeats_are_answered_while_a_request_of_4_mib_is_scored(spawn):
    host = spawn("--model", "pair_us=1000")
    host.wait_ready()
    host.send(request([f"{n}" * 1000 for n in range(1000)], id="large"))
    seconds, others = beats(host, 20)
    assert not others
    assert seconds[17] < 0.25
    assert len(host.read_line()["scores"]) == 1000


def test_a_heartbeat_does_not_wait_for_requests_without_ids(spawn):
    host = spawn()
    host.wait_ready()
    host.send(request(["fake:sleep 500"]), {"type": "heartbeat"}, {"type": "live"})
    assert [line.get("type") for line in host.read_lines(3)] == ["heartbeat", "live", None]


def test_a_request_that_is_scored_beside_a_slower_one_does_not_wait_for_it(spawn):
    host = spawn("--model", "parallel=2")
    host.wait_ready()
    host.send(request(["fake:sleep 1500"], id="slow"))
    host.until(lambda: in_flight(host), 5, "a batch in flight")
    host.send(request(["a"], id="quick"))
    assert [line["id"] for line in host.read_lines(2)] == ["quick", "slow"]


def test_a_lone_request_is_not_delayed_by_batching(spawn):
    host = spawn()
    host.wait_ready()
    latencies = sorted(host.ask(request([f"{n}"]))["latency_ms"] for n in range(100))
    assert latencies[50] < 20


def test_a_small_request_behind_a_large_one_is_answered_first(spawn):
    host = spawn("--model", "pair_us=1000", "--max-batch-pairs", "64")
    host.wait_ready()
    host.send(request([f"{n}" for n in range(1000)], id="large"), request(["a"] * 10, id="small"))
    assert [line["id"] for line in host.read_lines(2)] == ["small", "large"]


def test_answers_without_ids_keep_the_order_of_their_requests(spawn):
    host = spawn("--model", "pair_us=200", "--max-batch-pairs", "16")
    host.wait_ready()
    sizes = [300, 1, 0, 50, 2, 120, 1, 0, 7]
    host.send(*(request([f"{n} {m}" for m in range(size)]) for n, size in enumerate(sizes)), b"not json\n", request([1]))
    answers = host.read_lines(len(sizes) + 2)
    for n, size in enumerate(sizes):
        expect_scores(answers[n], [f"{n} {m}" for m in range(size)])
    assert [answer["code"] for answer in answers[-2:]] == ["INVALID_JSON", "INVALID_REQUEST"]


def test_a_deadline_is_met_and_nothing_follows_it(spawn):
    host = spawn()
    host.wait_ready()
    host.send(request(["fake:sleep 900"], id=1, timeout_ms=300), request(["a"], id=2, timeout_ms=300), request(["b"], id=3))
    begin = time.monotonic()
    answers = host.read_lines(2)
    assert 0.2 < time.monotonic() - begin < 0.8
    assert {answer["id"]: answer["code"] for answer in answers} == {1: "DEADLINE_EXCEEDED", 2: "DEADLINE_EXCEEDED"}
    assert host.read_line()["id"] == 3
    assert host.silent_for(0.2)


def test_a_cancelled_request_is_answered_once_and_frees_the_queue(spawn):
    host = spawn("--model", "pair_us=1000", "--max-batch-pairs", "32")
    host.wait_ready()
    host.send(request([f"{n}" for n in range(1000)], id="target"), {"type": "cancel", "target": "target", "id": "c"})
    answers = host.read_lines(2)
    assert sorted((answer.get("code") or answer["status"], answer["id"]) for answer in answers) == [("CANCELLED", "target"), ("cancelled", "c")]
    begin = time.monotonic()
    expect_scores(host.ask(request(["a"], id=1)), ["a"])
    assert time.monotonic() - begin < 0.7, "the second that the rest would take is not spent"


# --- nothing to do -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["idle", "loading", "scoring", "engine stopped", "stdin closed"])
def test_a_worker_that_waits_does_not_spin(spawn, state):
    host = bring_to(spawn, "scoring" if state == "stdin closed" else state)
    if state == "stdin closed":
        host.close_stdin()
        host.logged("draining")
    before = cpu_seconds(host.pid)
    assert host.silent_for(0.6)
    assert cpu_seconds(host.pid) - before < 0.2
    host.torn_ok = True
    host.signal(signal.SIGKILL)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_thousand_copies_of_one_document_are_scored_once_and_answered(spawn):
    """With the bundled model on one thread a batch holds one of them."""
    host = spawn("--threads", "1", backend=None)
    host.wait_ready(60)
    host.send(request(["word text " * 200] * 1000, id=1), request(["a", "b"], id=2))
    answers = {answer["id"]: answer for answer in host.read_lines(2, 60)}
    assert len(set(answers[1]["scores"])) == 1
    assert len(answers[1]["scores"]) == 1000
    assert len(answers[2]["scores"]) == 2
