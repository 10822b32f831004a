"""Loads on a worker: lone requests, many at once, arrivals at a rate, clients of every kind. `bench` and the repository's benchmarks use them.

A request is counted once, by what became of it. Latency runs from the moment at which a request was due, so that a worker that falls behind
cannot hide it.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from concurrent.futures import wait
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from reranker_worker.client import WorkerError, WorkerGoneError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from reranker_worker.client import Answer, Client

    Make = Callable[[int], dict[str, Any]]  # a request of so many documents; no two have a pair in common

SCORED = "scored"
GIVEN_UP = "given up"
LOST = "lost"
_LAST_SECONDS = 5.0  # beyond the requests' own time-out: an answer that has not come by then is lost
_GIVE_UP_SECONDS = 0.02
_GIVE_UP_SHARE, _LATE_SHARE = 0.1, 0.05


@dataclass(slots=True)
class Outcome:
    """What became of the requests of one run: how many of each kind (`scored`, a wire code, `lost`), and the latencies of those scored."""

    counts: Counter[str] = field(default_factory=Counter)
    latencies_ms: list[float] = field(default_factory=list)
    pairs: int = 0
    seconds: float = 0.0
    due: float = 0.0  # seconds that the arrivals were drawn for

    @property
    def sent(self) -> int:
        """All of them."""
        return sum(self.counts.values())

    @property
    def failed(self) -> int:
        """Those without scores."""
        return self.sent - self.counts[SCORED]


class _Tally:
    """Counts answers as they come, from the client's thread."""

    def __init__(self) -> None:
        self.outcome = Outcome()
        self._lock = threading.Lock()
        self._futures: list[Future[Answer]] = []
        self._begin = time.perf_counter()

    def send(self, client: Client, body: dict[str, Any], due: float | None = None, then: Callable[[], None] | None = None) -> None:
        """Send a request that was due then (default: now); `then` is called when its answer is there."""
        due = time.perf_counter() if due is None else due
        try:
            future = client.submit(body)
        except WorkerGoneError:
            raise
        except WorkerError as error:
            self.count(error.code)
            if then:
                then()
            return
        self._futures.append(future)
        future.add_done_callback(partial(self._answered, due, len(body["documents"]), then))

    def _answered(self, due: float, documents: int, then: Callable[[], None] | None, future: Future[Answer]) -> None:
        latency_ms = (time.perf_counter() - due) * 1e3
        error = future.exception()
        if error is None and len(future.result()["scores"]) == documents:
            self.count(SCORED, latency_ms, documents)
        else:
            self.count(error.code if isinstance(error, WorkerError) else LOST)
        if then:
            then()

    def count(self, kind: str, latency_ms: float | None = None, pairs: int = 0) -> None:
        """One request more, and what became of it."""
        with self._lock:
            self.outcome.counts[kind] += 1
            self.outcome.pairs += pairs
            if latency_ms is not None:
                self.outcome.latencies_ms.append(latency_ms)

    def finish(self, client: Client) -> Outcome:
        """Wait for every answer; what has none by then is lost."""
        late = wait(self._futures, client.timeout_s + _LAST_SECONDS).not_done
        self.outcome.seconds = time.perf_counter() - self._begin
        for _ in late:
            self.count(LOST)
        return self.outcome


def lone(client: Client, make: Make, documents: int, count: int, until: float) -> list[float]:
    """Milliseconds of requests sent one at a time: `count` of them, fewer when the time is up (but one at least)."""
    taken: list[float] = []
    while len(taken) < count and (not taken or time.perf_counter() < until):
        body = make(documents)
        begin = time.perf_counter()
        client.request(body)
        taken.append((time.perf_counter() - begin) * 1e3)
    return taken


def at_once(client: Client, make: Make, requests: int, documents: int) -> float:
    """Pairs per second of so many requests, all in flight at once."""
    bodies = [make(documents) for _ in range(requests)]
    begin = time.perf_counter()
    for future in [client.submit(body) for body in bodies]:
        future.result()
    return requests * documents / (time.perf_counter() - begin)


def closed(client: Client, make: Make, documents: int, window: int, seconds: float) -> Outcome:
    """Keep `window` requests in flight for so long, and wait for the rest: what the worker can do."""
    tally, free = _Tally(), threading.Semaphore(window)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        if free.acquire(timeout=max(0.0, until - time.perf_counter())):
            tally.send(client, make(documents), then=free.release)
    return tally.finish(client)


def arrivals(rate: float, seconds: float, source: random.Random) -> list[float]:
    """Seconds at which requests arrive by chance, `rate` a second on average: a Poisson process. One at least."""
    times = [source.expovariate(rate)]
    while times[-1] < seconds:
        times.append(times[-1] + source.expovariate(rate))
    return times[:-1] or [0.0]


def open_loop(client: Client, make: Make, documents: int, times: Sequence[float]) -> Outcome:
    """Requests at given times, whether or not the worker keeps up."""
    bodies = [make(documents) for _ in times]
    tally = _Tally()
    begin = time.perf_counter()
    for at, body in zip(times, bodies, strict=True):
        time.sleep(max(0.0, begin + at - time.perf_counter()))
        tally.send(client, body, due=begin + at)
    outcome = tally.finish(client)
    outcome.due = times[-1]
    return outcome


def beside(client: Client, make: Make, large: int, small: int, priority: int = 0) -> tuple[float, list[float]]:
    """Milliseconds of a large request of this priority, and of the small ones sent one after the other while it ran."""
    done = threading.Event()
    begin = time.perf_counter()
    future = client.submit(make(large) | {"priority": priority})
    future.add_done_callback(lambda _: done.set())
    taken: list[float] = []
    while not done.is_set():
        taken += lone(client, make, small, 1, 0.0)
    future.result()
    return (time.perf_counter() - begin) * 1e3, taken


def stress(client: Client, make: Make, documents: int, clients: int, until: float, seed: int) -> Outcome:
    """Many clients at once until the time is up: requests of 1 to `documents` documents with options by chance, some of them given up at
    once, some with hardly any time. Every one must be answered, or refused with a code."""
    tallies = [_Tally() for _ in range(clients)]
    threads = [
        threading.Thread(target=_one_client, args=(client, make, documents, until, random.Random(seed + number), tally), name="client", daemon=True)
        for number, tally in enumerate(tallies)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = Outcome()
    for tally in tallies:
        part = tally.finish(client)
        whole.counts += part.counts
        whole.latencies_ms += part.latencies_ms
        whole.pairs += part.pairs
        whole.seconds = max(whole.seconds, part.seconds)
    return whole


def _one_client(client: Client, make: Make, documents: int, until: float, source: random.Random, tally: _Tally) -> None:
    while time.perf_counter() < until:
        body = make(min(documents, int(source.expovariate(3.0 / documents)) + 1)) | _options(source)
        if source.random() < _GIVE_UP_SHARE:
            _given_up(client, body, tally)
            continue
        answered = threading.Event()
        try:
            tally.send(client, body, then=answered.set)
        except WorkerGoneError:
            return  # everything in flight has been told so
        while not answered.wait(_GIVE_UP_SECONDS) and time.perf_counter() < until:
            pass


def _options(source: random.Random) -> dict[str, Any]:
    """Options of a request; one in twenty has hardly any time."""
    chosen: dict[str, Any] = source.choice([{}, {"top_k": 3}, {"return_documents": True}, {"raw_scores": True}, {"priority": 5}, {"details": True}])
    return chosen | ({"timeout_ms": source.randint(1, 20)} if source.random() < _LATE_SHARE else {})


def _given_up(client: Client, body: dict[str, Any], tally: _Tally) -> None:
    """A request whose host stops waiting: the client cancels it."""
    try:
        client.request(body, timeout_s=_GIVE_UP_SECONDS)
        tally.count(GIVEN_UP)  # it was quicker than our patience, which is just as well
    except WorkerError as error:
        tally.count(GIVEN_UP if error.code == "DEADLINE_EXCEEDED" else error.code)
