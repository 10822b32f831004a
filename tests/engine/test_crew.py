"""The scoring threads: what they are given is done, an error reaches who waits for it, and they end with their crew. (Order: test_scoring.)"""

from __future__ import annotations

import threading

import pytest

from reranker_worker.engine.crew import Crew

DEADLINE_S = 30.0


def test_an_error_reaches_who_waits_for_the_call_and_the_thread_goes_on() -> None:
    crew = Crew(1)

    def fail() -> None:
        raise MemoryError("none left")

    done = threading.Event()
    failed, good = crew.submit(0, fail), crew.submit(1, done.set)
    with pytest.raises(MemoryError, match="none left"):
        failed.result(DEADLINE_S)
    assert good.result(DEADLINE_S) is None
    assert done.is_set()


def test_every_thread_takes_calls() -> None:
    crew = Crew(3)
    everyone = threading.Barrier(3)

    def meet() -> None:
        everyone.wait(DEADLINE_S)

    for future in [crew.submit(0, meet) for _ in range(3)]:
        future.result(DEADLINE_S)


def test_the_threads_of_a_crew_that_nobody_holds_end() -> None:
    crew = Crew(2)
    threads: list[threading.Thread] = []
    both = threading.Barrier(2)

    def tell() -> None:
        threads.append(threading.current_thread())
        both.wait(DEADLINE_S)

    for future in [crew.submit(0, tell) for _ in range(2)]:
        future.result(DEADLINE_S)
    del crew
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
