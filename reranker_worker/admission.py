"""The one admission rule for every shape of request: what is refused at once, with which code, and when to try again. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from reranker_worker.protocol import Code, Id, Refusal

if TYPE_CHECKING:
    from reranker_worker.config import Config
    from reranker_worker.engine.fleet import Fleet
    from reranker_worker.quarantine import Quarantine
    from reranker_worker.scheduler import Job, Scheduler

_MOST_RETRY_MS = 60_000
POISONED = "This request killed the engine twice a short while ago; it is not tried again."
SHUTTING_DOWN = "The worker is shutting down."


class Admission:
    """Decides from the state of the queue, the engines and the quarantine."""

    def __init__(self, config: Config, scheduler: Scheduler, fleet: Fleet, quarantine: Quarantine) -> None:
        self._config = config
        self._scheduler = scheduler
        self._fleet = fleet
        self._quarantine = quarantine

    def why_not(self, request_id: Id, job: Job, now: float) -> tuple[Refusal | None, int | None]:
        """(why the job is not admitted, retry_after_ms where one can be told); (None, None) when it is. `now` in seconds."""
        if job.num_pairs > self._config.max_waiting_pairs or job.num_bytes > self._config.max_waiting_bytes:
            text = "The request alone is larger than max_waiting_pairs or max_waiting_bytes; send fewer documents at a time."
            return Refusal(request_id, Code.REQUEST_TOO_LARGE, text), None
        away = self._fleet.unavailable(now)
        if away is not None:
            text = "The engine keeps failing and is restarted later." if away < math.inf else "The engine cannot be started again; see the log."
            return Refusal(request_id, Code.ENGINE_UNAVAILABLE, text), None if away == math.inf else max(1, round(away * 1e3))
        if self._quarantine.holds(job.groups, now):
            return Refusal(request_id, Code.POISONED, POISONED), None
        return self._overloaded(request_id, job)

    def _overloaded(self, request_id: Id, job: Job) -> tuple[Refusal | None, int | None]:
        config, scheduler = self._config, self._scheduler
        excess = (
            scheduler.waiting_pairs + job.num_pairs - config.max_waiting_pairs,
            scheduler.waiting_bytes + job.num_bytes - config.max_waiting_bytes,
            scheduler.waiting_jobs + 1 - config.max_waiting_requests,
        )
        if max(excess) <= 0 or not scheduler.waiting_jobs:
            return None, None
        wait_ms = scheduler.ms_until_free(*excess, len(self._fleet.ready))
        text = "Too much work is waiting (max_waiting_pairs, max_waiting_bytes or max_waiting_requests); try again later."
        return Refusal(request_id, Code.OVERLOADED, text), max(1, min(_MOST_RETRY_MS, round(wait_ms)))
