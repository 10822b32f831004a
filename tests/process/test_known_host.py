"""The known host works unchanged: its argv, its way of reading, its time-outs, its way of stopping."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from known_host import KnownHost, KnownHostError, StdioReader

from reranker_worker.backends.fake import fake_probability

START = Callable[..., KnownHost]


@pytest.fixture
def known() -> Iterator[START]:
    """`known(model, batch_size, env=..., limit_s=...)`: a started KnownHost."""
    hosts: list[KnownHost] = []

    def start(*args: Any, **options: Any) -> KnownHost:
        hosts.append(KnownHost(*args, **options))
        return hosts[-1]

    yield start
    for host in hosts:
        host.close()


def probabilities(query: str, documents: list[str]) -> Any:
    return pytest.approx([fake_probability(query, document) for document in documents])


# --- the replica itself --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [1, 2, 3, 8])
def test_the_replica_stalls_at_the_lengths_at_which_the_real_host_stalls(pieces):
    for length in range(4095 * pieces - 2, 4096 * pieces + 3):
        whole = (length - 1) // 4095
        reader_fd, writer_fd = os.pipe()
        os.write(writer_fd, b"x" * (length - 1) + b"\n")
        line = StdioReader(reader_fd).read_line(0.01)
        assert (line is None) is (whole >= 1 and length <= 4096 * whole), length
        os.close(reader_fd)
        os.close(writer_fd)


def test_the_replica_does_not_see_the_second_of_two_lines_in_one_read():
    reader_fd, writer_fd = os.pipe()
    os.write(writer_fd, b"one\ntwo\n")
    reader = StdioReader(reader_fd)
    assert reader.read_line(0.05) == b"one\n"
    assert reader.read_line(0.05) is None
    os.write(writer_fd, b"three\n")
    assert reader.read_line(1.0) == b"two\n"
    os.close(reader_fd)
    os.close(writer_fd)


def test_the_replica_takes_a_late_answer_for_the_next_request(known):
    """The harm that RERANKING_REQUEST_TIMEOUT_MS prevents, shown with a limit beyond the host's own."""
    host = known(limit_s=0.4)
    host.wait_ready()
    with pytest.raises(KnownHostError, match="Timeout"):
        host.rerank("first", ["fake:sleep 600", "a"])
    late = host.rerank("second", ["b", "c"])
    assert late != probabilities("second", ["b", "c"])


# --- service -------------------------------------------------------------------------------------------------------------------


def test_the_known_host_starts_reranks_beats_and_stops_within_its_half_second(known):
    host = known("cross-encoder/ms-marco-MiniLM-L-6-v2", 32)
    host.wait_ready()
    assert host.model == "cross-encoder/ms-marco-MiniLM-L-6-v2"
    for n in range(150):
        documents = [f"document {n} {m} \u00e4\U0001f600" for m in range(2 + n % 20)]
        assert host.rerank(f"query {n}", documents) == probabilities(f"query {n}", documents)
        if n % 10 == 0:
            assert host.heartbeat()
    assert host.stop() == "shutdown"
    assert host.process.returncode == 0


def test_every_number_of_documents_gets_its_scores_through_the_stdio_buffer(known):
    """Answers of 2 to 1,000 documents are 60 to 21,000 bytes long and meet the stalling lengths."""
    host = known(limit_s=3.0)
    host.wait_ready()
    for count in (*range(2, 60), *range(180, 215), *range(375, 425), *range(570, 620), 999, 1000):
        documents = [f"{count} {m}" for m in range(count)]
        assert host.rerank("q", documents) == probabilities("q", documents), count


def test_every_answer_length_around_the_stalling_ones_arrives(known):
    host = known(limit_s=3.0)
    host.wait_ready()
    base = len(str(host.call({"query": "q", "documents": ["x" * 1000], "return_documents": True}))) - 1000
    for pieces in (1, 2, 3, 4, 9):
        for length in range(4095 * pieces - base - 30, 4096 * pieces - base + 50):
            body = host.call({"query": "q", "documents": ["x" * length], "return_documents": True})
            assert body["results"][0]["document"] == "x" * length, length


def test_unread_noise_on_stderr_never_stops_the_known_host(known):
    host = known(env={"RERANKING_LOG_LEVEL": "DEBUG"})
    host.wait_ready()
    for n in range(700):
        scores = host.rerank(f"{n}", ["fake:print", "a"])
        assert scores[1] == pytest.approx(fake_probability(f"{n}", "a"))
    assert host.heartbeat()
    assert host.stop() == "shutdown"


def test_requests_that_fail_are_errors_with_a_text_and_the_next_one_is_served(known):
    host = known()
    host.wait_ready()
    for fault in ("fake:nan", "fake:raise", "fake:oom1", "fake:exit 1", "fake:kill 9"):
        with pytest.raises(KnownHostError, match=r"\w+ "):
            host.rerank("q", [fault, "a"])
        assert host.rerank("q", ["b", "c"]) == probabilities("q", ["b", "c"])
        assert host.heartbeat()


def test_documents_beyond_a_limit_are_an_error_and_the_next_request_is_served(known):
    host = known()
    host.wait_ready()
    with pytest.raises(KnownHostError, match="max_documents"):
        host.rerank("q", ["a"] * 1001)
    assert host.rerank("q", ["b", "c"]) == probabilities("q", ["b", "c"])


# --- time-outs -----------------------------------------------------------------------------------------------------------------


def test_a_slow_request_is_an_error_before_the_host_s_5_s_and_no_line_comes_after_it(known):
    host = known(env={"RERANKING_REQUEST_TIMEOUT_MS": "4500"})
    host.wait_ready()
    begin = time.monotonic()
    with pytest.raises(KnownHostError, match="4500 ms"):
        host.rerank("slow", ["fake:sleep 5200", "a"])
    assert 4.4 < time.monotonic() - begin < 5.0
    for n in range(3):
        assert host.rerank(f"{n}", ["b", "c"]) == probabilities(f"{n}", ["b", "c"])
    assert host.heartbeat()


def test_timeouts_of_many_requests_never_shift_an_answer(known):
    host = known(env={"RERANKING_REQUEST_TIMEOUT_MS": "250"}, limit_s=1.0)
    host.wait_ready()
    outcomes = []
    for n in range(24):
        documents = [f"fake:sleep {(0, 150, 240, 260, 300, 0)[n % 6]}", f"{n}"]
        try:
            scores = host.rerank("q", documents)
        except KnownHostError as error:
            outcomes.append(str(error))
        else:
            assert scores[1] == pytest.approx(fake_probability("q", f"{n}"))
            outcomes.append("scored")
        assert host.heartbeat()
    assert set(outcomes) == {"scored", "The request was not scored within 250 ms."}


# --- start and stop ------------------------------------------------------------------------------------------------------------


def test_the_reason_of_a_failed_start_reaches_the_user(known):
    host = known("fail=66")
    with pytest.raises(KnownHostError, match="told to fail"):
        host.wait_ready()
    assert host.process.wait(5) == 66


def test_a_wrong_setting_in_the_environment_reaches_the_user(known):
    host = known(env={"RERANKING_MAX_LENGTH": "many"})
    with pytest.raises(KnownHostError, match="RERANKING_MAX_LENGTH"):
        host.wait_ready()
    assert host.process.wait(5) == 64


def test_a_slow_load_is_waited_for_and_controls_before_it_do_not_hide_ready(known):
    host = known("load_ms=1200")
    host.send({"type": "heartbeat"})
    host.wait_ready()
    assert host.rerank("q", ["b", "c"]) == probabilities("q", ["b", "c"])


def test_the_known_host_can_stop_a_loading_and_a_busy_worker(known):
    loading = known("load_ms=30000")
    assert loading.stop() == "shutdown"
    busy = known(env={"RERANKING_DRAIN_TIMEOUT_MS": "300", "RERANKING_REQUEST_TIMEOUT_MS": "100"}, limit_s=0.05)
    busy.wait_ready()
    with pytest.raises(KnownHostError):
        busy.rerank("q", ["fake:sleep 20000", "a"])
    assert busy.stop() == "shutdown"
