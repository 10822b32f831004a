"""The Python host against real workers with the fake backend."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from reranker_worker.backends.fake import fake_probability
from reranker_worker.client import Client, WorkerError, WorkerGoneError, WorkerTimeoutError

if TYPE_CHECKING:
    from collections.abc import Iterator

DEADLINE_S = 20.0


def start(**options: Any) -> Client:
    return Client(**{"backend": "fake", "timeout_s": DEADLINE_S, "start_timeout_s": DEADLINE_S, "stderr": subprocess.DEVNULL} | options)


@pytest.fixture(scope="module")
def shared() -> Iterator[Client]:
    with start() as client:
        yield client


def expected(query: str, documents: list[str]) -> list[float]:
    return [fake_probability(query, document) for document in documents]


def test_scores_come_in_the_order_of_the_documents(shared: Client) -> None:
    documents = ["one", "two", "three"]
    assert shared.rerank("q", documents)["scores"] == pytest.approx(expected("q", documents))


def test_options_travel_with_the_request(shared: Client) -> None:
    answer = shared.rerank("q", [{"text": "one", "id": "first"}, {"text": "two"}], top_k=1, return_documents=True)
    assert len(answer["results"]) == 1


def test_the_callers_id_comes_back_and_the_clients_own_does_not(shared: Client) -> None:
    assert shared.request({"type": "heartbeat", "id": "mine"})["id"] == "mine"
    assert "id" not in shared.request({"type": "heartbeat"})


def test_two_requests_in_flight_may_carry_the_same_id(shared: Client) -> None:
    futures = [shared.submit({"id": 7, "query": f"q{number}", "documents": ["d"]}) for number in range(2)]
    assert [future.result(DEADLINE_S)["scores"] for future in futures] == [pytest.approx(expected(f"q{n}", ["d"])) for n in range(2)]


def test_pipelined_requests_each_get_their_own_scores(shared: Client) -> None:
    futures = [shared.submit({"query": str(number), "documents": ["a", "b"]}) for number in range(500)]
    for number, future in enumerate(futures):
        assert future.result(DEADLINE_S)["scores"] == pytest.approx(expected(str(number), ["a", "b"]))


def test_threads_may_share_a_client(shared: Client) -> None:
    wrong: list[str] = []

    def ask(name: str) -> None:
        for number in range(50):
            query = f"{name}-{number}"
            if shared.rerank(query, ["a"])["scores"] != pytest.approx(expected(query, ["a"])):
                wrong.append(query)

    threads = [threading.Thread(target=ask, args=(f"thread{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)


def test_an_error_answer_is_raised_with_its_code(shared: Client) -> None:
    with pytest.raises(WorkerError, match="query is missing") as caught:
        shared.request({"documents": []})
    assert caught.value.code == "INVALID_REQUEST"
    assert not caught.value.retryable


def test_what_json_cannot_hold_is_refused_before_it_is_sent(shared: Client) -> None:
    with pytest.raises(WorkerError, match="cannot be written as JSON") as caught:
        shared.rerank("a lone surrogate \ud800", ["d"])
    assert caught.value.code == "INVALID_REQUEST"


def test_a_line_that_the_worker_cannot_read_does_not_leave_its_caller_waiting(shared: Client) -> None:
    nested: Any = "deep"
    for _ in range(20):
        nested = [nested]
    with pytest.raises(WorkerError) as caught:
        shared.request({"query": "q", "documents": nested})
    assert caught.value.code == "INVALID_JSON"
    assert shared.request({"type": "heartbeat"})["status"] == "alive"


def test_a_request_longer_than_the_workers_limit_is_refused_and_the_next_is_served() -> None:
    with start(max_line_bytes=2048) as client:
        with pytest.raises(WorkerError, match="max_line_bytes") as caught:
            client.rerank("q", ["long " * 1000])
        assert caught.value.code == "REQUEST_TOO_LARGE"
        assert client.rerank("q", ["short"])["num_documents"] == 1


def test_a_late_answer_is_forgotten_and_the_next_request_gets_its_own() -> None:
    with start() as client:
        with pytest.raises(WorkerTimeoutError):
            client.rerank("q", ["fake:sleep 400"], timeout_s=0.1)
        assert client.rerank("q", ["d"])["scores"] == pytest.approx(expected("q", ["d"]))


def test_a_future_that_nobody_waits_for_fails_at_its_deadline() -> None:
    with start() as client:
        future = client.submit({"query": "q", "documents": ["fake:sleep 5000"]}, timeout_s=0.1)
        with pytest.raises(WorkerTimeoutError):
            future.result(3.0)
        client.stop(0.0)


def test_control_requests_are_answered_while_the_model_loads() -> None:
    client = start(model="load_ms=60000")
    try:
        assert client.request({"type": "heartbeat"})["status"] == "alive"
        assert not client.is_ready
        with pytest.raises(WorkerTimeoutError, match="not ready within"):
            client.wait_ready(0.05)
    finally:
        client.stop(0.0)


def test_what_was_accepted_is_answered_before_the_worker_stops() -> None:
    with start() as client:
        futures = [client.submit({"query": str(number), "documents": ["d"] * 20}) for number in range(200)]
        assert client.stop() == 0
        assert all(len(future.result(0)["scores"]) == 20 for future in futures)


def test_an_exception_inside_the_block_ends_the_worker_at_once() -> None:
    begin = time.monotonic()
    client = start()

    def fail() -> None:
        with client:
            client.submit({"query": "q", "documents": ["fake:sleep 60000"]})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert client.exit_code is not None
    assert time.monotonic() - begin < DEADLINE_S / 2


def test_a_stopped_client_refuses_instead_of_hanging() -> None:
    with start() as client:
        pass
    with pytest.raises(WorkerGoneError, match="exit code 0"):
        client.rerank("q", ["d"])


def test_the_death_of_the_worker_reaches_everyone_who_waits() -> None:
    with start() as client:
        futures = [client.submit({"query": "q", "documents": ["fake:sleep 30000"]}) for _ in range(3)]
        os.kill(client.pid, signal.SIGKILL)
        for future in futures:
            with pytest.raises(WorkerGoneError, match="by signal 9") as caught:
                future.result(DEADLINE_S)
            assert caught.value.exit_code == -signal.SIGKILL
        with pytest.raises(WorkerGoneError):
            client.request({"type": "heartbeat"})


def test_a_worker_that_takes_no_input_costs_no_more_than_the_deadline() -> None:
    with start() as client:
        os.kill(client.pid, signal.SIGSTOP)
        with pytest.raises(WorkerTimeoutError, match="does not read"):
            client.rerank("q", ["x" * 1_000_000], timeout_s=0.2)
        assert client.stop(0.0) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("settings", "sentence", "exit_code"),
    [
        ({"backend": "auto", "model": "/nowhere/model"}, "does not exist", 66),
        ({"threads": "many"}, "whole number", 64),
        ({"model": "fail=71&x=1"}, "told to fail", 71),
    ],
)
def test_a_start_that_fails_says_why_and_with_which_exit_code(settings: dict[str, str], sentence: str, exit_code: int) -> None:
    with pytest.raises(WorkerGoneError, match=sentence) as caught, start(**settings):
        pass
    assert (caught.value.code, caught.value.exit_code) == ("MODEL_LOAD_ERROR", exit_code)


def test_a_name_that_is_no_setting_is_refused() -> None:
    with pytest.raises(ValueError, match="modle: not a setting"):
        start(modle="bundled")


def test_the_log_goes_where_the_caller_wants_it() -> None:
    with tempfile.TemporaryFile() as log:
        with start(stderr=log):
            pass
        log.seek(0)
        assert b"ready" in log.read()


def test_a_program_that_is_no_worker_is_reported_as_such() -> None:
    program = "import sys; sys.stdin.readline(); print('hello'); sys.stdin.read()"
    client = Client(command=[sys.executable, "-c", program], timeout_s=DEADLINE_S)
    try:
        with pytest.raises(WorkerError, match="not a JSON object"):
            client.request({"type": "heartbeat"})
    finally:
        client.stop(2.0)
