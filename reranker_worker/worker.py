"""The middle of the front: joins the wire, the scheduler and the engines. `receive(bytes)`, `tick(now)`; no descriptor, no thread, no clock.

Everything a host can observe is decided here and in the rooms it calls; `stdio` only moves bytes. Times are monotonic seconds.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from reranker_worker import reports
from reranker_worker.admission import POISONED, SHUTTING_DOWN, Admission
from reranker_worker.desk import Desk, Many, Ticket
from reranker_worker.engine.fleet import Engine, Event, Fleet, LoadFailed, Loading, Lost, Ready, Scored
from reranker_worker.jobs import Job, in_input_order, longest_first
from reranker_worker.metrics import Counters
from reranker_worker.outbox import Outbox
from reranker_worker.protocol import (
    Batch,
    Cancel,
    Code,
    Configure,
    Control,
    Decoder,
    Limits,
    Message,
    Refusal,
    Rerank,
    error_answer,
    serialize,
)
from reranker_worker.quarantine import Quarantine
from reranker_worker.scheduler import Scheduler

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from reranker_worker.config import Config
    from reranker_worker.engine.fleet import Link

_LEAST_SHARE_PAIRS = 8
_DRAINED = 0
_DRAINED_INCOMPLETELY = 75
RESTART_HELPS = frozenset({70, 71, 74, 75})  # exit codes after which a host should start the worker again
_DUPLICATE = "A request with this id is still in flight; use another id."


class Worker:
    """One host's worker. Feed it bytes, frames and the time; take lines from `take_lines`."""

    def __init__(self, config: Config, links: Sequence[Link], *, now: float, wall_clock: Callable[[], float], pid: int) -> None:
        self.config = config
        self.fleet = Fleet(config, links)
        self.scheduler = Scheduler(max_batch_pairs=config.max_batch_pairs, batch_target_ms=config.batch_target_ms)
        self.counters = Counters()
        self.log_level = config.log_level
        self.started_at = now
        self.pid = pid
        self.ready_body: dict[str, Any] | None = None
        self.draining = False
        self.last_batch_good = True
        self.exit_code: int | None = None
        self.lost_log_lines = 0  # set by the log's owner
        self.notes: list[tuple[str, str]] = []  # (level, text) for the log
        self._wall_clock = wall_clock
        self._decoder = Decoder(Limits(config.max_line_bytes, config.max_documents))
        self._quarantine = Quarantine()
        self._admission = Admission(config, self.scheduler, self.fleet, self._quarantine)
        self._outbox = Outbox()
        self._desk = Desk(config, self.counters, self._outbox, wall_clock)
        self._numbers = 0
        self._load_seen = ("", 0)
        self._drain_until = math.inf
        self._left_something = False

    # --- what comes in -------------------------------------------------------------------------------------------------------

    def receive(self, data: bytes, now: float) -> None:
        """Bytes from the host."""
        for message in self._decoder.feed(data):
            self._handle(message, now)
        self._dispatch(now)

    def end_of_input(self, now: float) -> None:
        """The host closed its side: serve what it sent, then leave."""
        for message in self._decoder.finish():
            self._handle(message, now)
        # Piped by hand, the input ends before the model is loaded: the drain time then counts from `ready`.
        self.drain(now, until=None if self.fleet.ever_ready else math.inf)

    def on_frame(self, engine: Engine, frame: dict[str, Any], now: float) -> None:
        """A frame from an engine."""
        self._expire(now)
        self._on_event(self.fleet.on_frame(engine, frame, now), now)

    def on_death(self, engine: Engine, return_code: int, now: float) -> None:
        """An engine process ended."""
        for event in self.fleet.on_death(engine, return_code, now):
            self._on_event(event, now)

    def drain(self, now: float, *, until: float | None = None) -> None:
        """Stop admitting; finish what was accepted within drain_timeout_ms, or until the given time."""
        if not self.draining:
            self.draining = True
            self._note("INFO", f"draining: {len(self._desk)} requests left")
        limit = now + self.config.drain_timeout_ms / 1e3 if until is None else until
        self._drain_until = min(self._drain_until, limit)

    def tick(self, now: float) -> None:
        """Whatever time brings: deadlines, hung engines, restarts, the end of a drain. Call it at `next_wakeup` and after input."""
        self._expire(now)
        for event in self.fleet.tick(now):
            self._on_event(event, now)
        self._dispatch(now)
        if self.draining and self.exit_code is None:
            self._finish_drain(now)

    def next_wakeup(self) -> float:
        """When `tick` has something to do next, in monotonic seconds."""
        moments = [self.fleet.next_wakeup(), self._drain_until if self.draining else math.inf]
        deadline = self.scheduler.next_deadline
        if deadline is not None:
            moments.append(deadline)
        return min(*moments, self._outbox.next_wakeup)

    def take_lines(self, now: float) -> list[bytes]:
        """The lines that may be written now, each whole."""
        return self._outbox.take(now)

    @property
    def held_bytes(self) -> int:
        """Bytes of answers that wait for the answer to an earlier request without an id."""
        return self._outbox.held_bytes

    @property
    def has_lines(self) -> bool:
        """True while lines wait to be taken."""
        return not self._outbox.is_empty

    def status(self, now: float) -> reports.Status:
        """A snapshot for reports."""
        scheduler = self.scheduler
        oldest = scheduler.oldest
        received = self._desk.received_at(oldest) if oldest else now
        first = next((engine.info for engine in self.fleet.engines if engine.info), {})
        return reports.Status(
            config=self.config,
            counters=self.counters,
            ready_body=self.ready_body,
            model_path=str(first.get("model_path", "")),
            model_source=str(first.get("model_source", "")),
            engine_versions=first.get("versions", {}),
            draining=self.draining,
            last_batch_good=self.last_batch_good,
            log_level=self.log_level,
            uptime_ms=round((now - self.started_at) * 1e3, 3),
            waiting_requests=scheduler.waiting_jobs,
            waiting_pairs=scheduler.waiting_pairs,
            waiting_bytes=scheduler.waiting_bytes,
            oldest_in_flight_ms=round((now - received) * 1e3, 3),
            engines=[engine.status(now) for engine in self.fleet.engines],
            tokens_per_ms=scheduler.pace.tokens_per_ms,
            lost_log_lines=self.lost_log_lines,
        )

    # --- messages ------------------------------------------------------------------------------------------------------------

    def _handle(self, message: Message, now: float) -> None:
        self.counters.received += 1
        match message:
            case Rerank():
                self._rerank(message, now)
            case Control():
                self._control(message, now)
            case Refusal():
                self._desk.error(message, self._desk.place(message.id))
            case Batch():
                self._batch(message, now)
            case Cancel():
                self._cancel(message)
            case Configure():
                self.log_level = message.log_level or self.log_level
                self._desk.say(reports.tagged("configure", message.id, {"log_level": self.log_level}))

    def _rerank(self, request: Rerank, now: float) -> None:
        place = self._desk.place(request.id)
        if self._desk.is_open(request.id):
            self._desk.error(Refusal(request.id, Code.INVALID_REQUEST, _DUPLICATE))
        else:
            self._admit(Ticket(request, now, place), now)

    def _batch(self, message: Batch, now: float) -> None:
        place = self._desk.place(message.id)
        if self._desk.is_open(message.id):
            self._desk.error(Refusal(message.id, Code.INVALID_REQUEST, _DUPLICATE))
            return
        many = Many(message.id, place, [None] * len(message.requests), len(message.requests))
        if not message.requests:
            self._desk.close_many(many)
        for part, request in enumerate(message.requests):
            if isinstance(request, Refusal):
                self.counters.errors[request.code.value] += 1
                self._desk.part(many, part, error_answer(request, self._wall_clock()))
            else:
                self._admit(Ticket(request, now, None, many, part), now)
        self._desk.open_many(many)

    def _admit(self, ticket: Ticket, now: float) -> None:
        """Put a request into the queue, or answer why not."""
        request, options = ticket.request, ticket.request.options
        self._numbers += 1
        # Pairs of like length waste little on padding; a partial answer is better made of the documents that the host put first.
        groups, order = (in_input_order if options.partial else longest_first)(request.groups)
        job = Job(
            number=self._numbers,
            groups=groups,
            order=order,
            deadline=ticket.received_at + (options.timeout_ms or self.config.request_timeout_ms) / 1e3,
            priority=options.priority,
            max_length=options.max_length,
            max_document_tokens=options.max_document_tokens,
            instruction=options.instruction,
        )
        if self.draining:
            self._desk.refuse_ticket(ticket, Refusal(request.id, Code.SHUTTING_DOWN, SHUTTING_DOWN))
            return
        refusal, retry_after_ms = self._admission.why_not(request.id, job, now)
        if refusal is not None:
            self._desk.refuse_ticket(ticket, refusal, retry_after_ms)
        elif not job.num_pairs:
            self._desk.scores(ticket, job, now)
        else:
            self._desk.open(ticket, job)
            self.scheduler.add(job)

    def _cancel(self, message: Cancel) -> None:
        jobs = self._desk.take_back(message.target)
        for job in jobs or ():
            self.scheduler.drop(job)
        status = "not_found" if jobs is None else "cancelled"
        self._desk.say(reports.tagged("cancel", message.id, {"target": message.target, "status": status}))

    def _control(self, message: Control, now: float) -> None:
        """Answered at once, whatever is queued; never part of the order of answers without ids."""
        self._desk.say(reports.control(message, self.status(now)))
        if message.type == "shutdown":
            self.drain(now)

    # --- engines -------------------------------------------------------------------------------------------------------------

    def _dispatch(self, now: float) -> None:
        """Keep every engine supplied: each gets its first batch before any gets its second."""
        self._expire(now)
        supplied = True
        while supplied and self.scheduler.has_unsent:
            supplied = False
            ready = self.fleet.ready
            share = max(_LEAST_SHARE_PAIRS, -(-self.scheduler.waiting_pairs // len(ready))) if len(ready) > 1 else None
            for engine in ready:
                if not (room := engine.room):
                    continue
                batch = self.scheduler.next_batch(now, idle=not engine.in_flight, max_pairs=share, room=room)
                if batch is not None:
                    self.fleet.send(engine, batch, now)
                    supplied = True

    def _on_event(self, event: Event, now: float) -> None:
        match event:
            case Loading():
                self._on_loading(event)
            case Ready():
                self._on_ready(event, now)
            case Scored():
                self._on_scored(event, now)
            case Lost():
                self._on_lost(event, now)
            case LoadFailed():
                self._on_load_failed(event)
        self._dispatch(now)

    def _on_loading(self, event: Loading) -> None:
        """Log a download at every tenth: the operator of a slow start should see why."""
        tenth = 10 * event.done // event.total if event.total else 0
        if (event.stage, tenth) == self._load_seen:
            return
        self._load_seen = (event.stage, tenth)
        size = f": {event.done / 1e6:.0f} of {event.total / 1e6:.0f} MB" if event.total else ""
        self._note("INFO" if event.stage == "download" else "DEBUG", event.stage + size)

    def _on_ready(self, event: Ready, now: float) -> None:
        self.last_batch_good = True
        self.scheduler.pace.longest_tokens = int(event.info["max_length"])
        self.scheduler.pace.packed = bool(event.info.get("packed"))
        self.scheduler.pace.parallel = int(event.info.get("parallel_passes", 1))
        self.scheduler.pace.pass_tokens = int(event.info.get("least_batch_tokens", 0))
        if self.ready_body is not None:
            self._note("INFO", "an engine is back" if self.counters.engine_deaths else "another engine is ready")
            return
        self.scheduler.pace.assume(float(event.info.get("tokens_per_ms", 1.0)))
        self._desk.info = event.info
        self.ready_body = reports.ready(self.config, event.info, round((now - self.started_at) * 1e3), self.pid)
        self._outbox.put_hello(serialize(self.ready_body))
        if self.draining and self._drain_until == math.inf:
            self._drain_until = now + self.config.drain_timeout_ms / 1e3
        self._note("INFO", f"ready: {event.info['model']} on {event.info['device']} ({event.info['backend']}, {event.info['dtype']})")

    def _on_scored(self, event: Scored, now: float) -> None:
        counters, result = self.counters, event.result
        counters.batches += 1
        counters.pairs += len(result.tokens)
        counters.tokens += sum(result.tokens)
        self.last_batch_good = len(result.failures) < len(result.tokens) or any(code == "INVALID_REQUEST" for _, code, _ in result.failures)
        for job in self.scheduler.complete(event.batch, result):
            self._desk.finish(job, now)

    def _on_lost(self, event: Lost, now: float) -> None:
        self.counters.engine_deaths += 1
        self.last_batch_good = False
        if self.exit_code is None:
            self._note("WARNING", f"an engine ended: {event.reason.rstrip('.')}; {len(event.batches)} batches are sent again")
        poisoned = self.scheduler.requeue(*event.batches)
        for job in poisoned:
            self._quarantine.add(job.groups, now)
            self._desk.finish(job, now)
        if poisoned:
            self._refuse_quarantined(now)
        # Before the first `ready` the fleet decides when to give up, and `LoadFailed` says so.
        if self.fleet.ever_ready and self.fleet.unavailable(now) is not None:
            self._refuse_all(Code.ENGINE_UNAVAILABLE, "The engine keeps failing; see the log.")

    def _on_load_failed(self, event: LoadFailed) -> None:
        """The first start failed for good: say so once, and leave nothing unanswered."""
        if self.exit_code is not None:  # the other engines fail for the same reason
            return
        # First the cause: a host takes the first error line as the reason of the failed start.
        self._desk.error(Refusal(None, Code.MODEL_LOAD_ERROR, event.error))
        final = event.exit_code not in RESTART_HELPS
        self._refuse_jobs(self.scheduler.jobs(), Code.NOT_READY, "The model could not be loaded.", final=final)
        self._note("ERROR", event.error)
        self.exit_code = event.exit_code
        self.draining = True  # what still comes is refused

    # --- beginning and end ---------------------------------------------------------------------------------------------------

    def _expire(self, now: float) -> None:
        for job in self.scheduler.expire(now):
            self._desk.expire(job, now)

    def _refuse_all(self, code: Code, text: str) -> None:
        self._refuse_jobs(self.scheduler.jobs(), code, text)

    def _refuse_quarantined(self, now: float) -> None:
        """Refuse the copies that wait of what was just quarantined: each would cost two more engines."""
        jobs = [job for job in self.scheduler.jobs() if self._quarantine.holds(job.groups, now)]
        self._refuse_jobs(jobs, Code.POISONED, POISONED)

    def _refuse_jobs(self, jobs: Sequence[Job], code: Code, text: str, *, final: bool = False) -> None:
        for job in jobs:
            self.scheduler.drop(job)
            self._desk.refuse(job, code, text, final=final)

    def _finish_drain(self, now: float) -> None:
        if self._desk and now >= self._drain_until:
            self._left_something = True
            self._refuse_all(Code.SHUTTING_DOWN, "The worker is shutting down and had no time left for this request.")
        if not self._desk:
            self.exit_code = _DRAINED_INCOMPLETELY if self._left_something else _DRAINED

    def _note(self, level: str, text: str) -> None:
        self.notes.append((level, text))
