"""The hall: joins the wire, the scheduler and the engines. `receive(bytes)`, `tick(now)`; no descriptor, no thread, no clock.

Everything a host can observe is decided here; `stdio` only moves bytes. All times are monotonic seconds given by the caller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reranker_worker import reports
from reranker_worker.engine.fleet import Engine, Event, Fleet, LoadFailed, Loading, Lost, Ready, Scored
from reranker_worker.metrics import Counters
from reranker_worker.ordering import Order, Place
from reranker_worker.protocol import (
    Batch,
    Cancel,
    Code,
    Configure,
    Control,
    Decoder,
    Id,
    Limits,
    Message,
    Refusal,
    Rerank,
    Scores,
    error_answer,
    rerank_answer,
    serialize,
    v1_answer,
)
from reranker_worker.quarantine import Quarantine
from reranker_worker.scheduler import Job, Scheduler

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from reranker_worker.config import Config
    from reranker_worker.engine.fleet import Link

# The known host reads through a stdio buffer: a line that arrives together with `ready` would be hidden behind it.
READY_SILENCE_SECONDS = 0.02
_LEAST_SHARE_PAIRS = 8
_MOST_RETRY_MS = 60_000
_DRAINED = 0
_DRAINED_INCOMPLETELY = 75
_POISONED = "This request killed the engine twice a short while ago; it is not tried again."


@dataclass(slots=True, eq=False)
class _Many:
    """A `batch` request that collects its parts' answers."""

    id: Id
    place: Place | None
    parts: list[dict[str, Any] | None]
    tickets: list[_Ticket] = field(default_factory=list)
    missing: int = 0
    done: bool = False


@dataclass(slots=True, eq=False)
class _Ticket:
    """An admitted request: what to answer, and where the answer goes."""

    request: Rerank
    received_at: float
    place: Place | None
    parent: _Many | None = None
    part: int = 0
    job: Job | None = None


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
        self._order = Order()
        self._tickets: dict[int, _Ticket] = {}  # by job number
        self._by_id: dict[Id, _Ticket | _Many] = {}
        self._numbers = 0
        self._lines: list[bytes] = []
        self._silent_until = -math.inf
        self._last_line_at = -math.inf
        self._hello: bytes | None = None
        self._load_seen = ("", 0)
        self._input_ended = False
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
        self._input_ended = True
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
            self._note("INFO", f"draining: {len(self._tickets)} requests left")
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
        if self._hello is not None or self._lines:
            moments.append(self._silent_until)
        return min(moments)

    def take_lines(self, now: float) -> list[bytes]:
        """The lines that may be written now, each whole. `ready` goes out alone, some time after and before any other line."""
        if now < self._silent_until:
            return []
        if self._hello is not None:
            line, self._hello = self._hello, None
            self._silent_until = now + READY_SILENCE_SECONDS
            return [line]
        lines, self._lines = self._lines, []
        if lines:
            self._last_line_at = now
        return lines

    @property
    def has_lines(self) -> bool:
        """True while lines wait to be taken."""
        return bool(self._lines) or self._hello is not None

    def status(self, now: float) -> reports.Status:
        """A snapshot for reports."""
        scheduler = self.scheduler
        oldest = scheduler.oldest
        received = self._tickets[oldest.number].received_at if oldest else now
        first = next((engine.info for engine in self.fleet.engines if engine.info), {})
        return reports.Status(
            config=self.config,
            counters=self.counters,
            ready_body=self.ready_body,
            model_path=str(first.get("model_path", "")),
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
            tokens_per_ms=scheduler.tokens_per_ms,
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
                self._answer_error(message, self._place(message.id))
            case Batch():
                self._batch(message, now)
            case Cancel():
                self._cancel(message)
            case Configure():
                self.log_level = message.log_level or self.log_level
                self._emit(reports.tagged("configure", message.id, {"log_level": self.log_level}))

    def _rerank(self, request: Rerank, now: float) -> None:
        place = self._place(request.id)
        if request.id is not None and request.id in self._by_id:
            self._answer_error(Refusal(request.id, Code.INVALID_REQUEST, "A request with this id is still in flight; use another id."), place)
            return
        ticket = _Ticket(request, now, place)
        self._admit(ticket, now)
        if ticket.job is not None and request.id is not None:
            self._by_id[request.id] = ticket

    def _batch(self, message: Batch, now: float) -> None:
        place = self._place(message.id)
        if message.id is not None and message.id in self._by_id:
            self._answer_error(Refusal(message.id, Code.INVALID_REQUEST, "A request with this id is still in flight; use another id."), place)
            return
        many = _Many(message.id, place, [None] * len(message.requests), missing=len(message.requests))
        if not message.requests:
            self._many_done(many)
            return
        for part, request in enumerate(message.requests):
            if isinstance(request, Refusal):
                self._count_error(request.code)
                self._part_done(many, part, error_answer(request, self._wall_clock()))
                continue
            ticket = _Ticket(request, now, None, many, part)
            many.tickets.append(ticket)
            self._admit(ticket, now)
        if many.missing and message.id is not None:
            self._by_id[message.id] = many

    def _admit(self, ticket: _Ticket, now: float) -> None:
        """Put a request into the queue, or answer why not."""
        request = ticket.request
        timeout_ms = request.options.timeout_ms or self.config.request_timeout_ms
        job = Job(
            number=self._next_number(),
            groups=[(group.query, group.documents) for group in request.groups],
            deadline=ticket.received_at + timeout_ms / 1e3,
            priority=request.options.priority,
            max_length=request.options.max_length,
            max_document_tokens=request.options.max_document_tokens,
            instruction=request.options.instruction,
        )
        refusal, retry_after_ms = self._why_not(request, job, now)
        if refusal is not None:
            self._refuse(ticket, refusal, retry_after_ms)
        elif not job.num_pairs:
            ticket.job = job
            self._answer_scores(ticket, now)
            ticket.job = None
        else:
            ticket.job = job
            self._tickets[job.number] = ticket
            self.scheduler.add(job)

    def _why_not(self, request: Rerank, job: Job, now: float) -> tuple[Refusal | None, int | None]:
        """Why a request is not admitted, and when to try again: the one admission rule for every shape of request."""
        config, scheduler = self.config, self.scheduler
        if self.draining:
            return Refusal(request.id, Code.SHUTTING_DOWN, "The worker is shutting down."), None
        if job.num_pairs > config.max_waiting_pairs or job.num_bytes > config.max_waiting_bytes:
            text = "The request alone is larger than max_waiting_pairs or max_waiting_bytes; send fewer documents at a time."
            return Refusal(request.id, Code.REQUEST_TOO_LARGE, text), None
        away = self.fleet.unavailable(now)
        if away is not None:
            text = "The engine keeps failing and is restarted later." if away < math.inf else "The engine cannot be started again; see the log."
            return Refusal(request.id, Code.ENGINE_UNAVAILABLE, text), None if away == math.inf else max(1, round(away * 1e3))
        if self._quarantine.holds(job.groups, now):
            return Refusal(request.id, Code.POISONED, _POISONED), None
        excess = max(
            (scheduler.waiting_pairs + job.num_pairs) / config.max_waiting_pairs,
            (scheduler.waiting_bytes + job.num_bytes) / config.max_waiting_bytes,
            (scheduler.waiting_jobs + 1) / config.max_waiting_requests,
        )
        if excess > 1 and scheduler.waiting_jobs:
            # The time until so much of the queue is done that this request fits.
            wait_ms = scheduler.estimate_ms(len(self.fleet.ready)) * min(1.0, 2 * (1 - 1 / excess) + 0.05)
            text = "Too much work is waiting (max_waiting_pairs, max_waiting_bytes or max_waiting_requests); try again later."
            return Refusal(request.id, Code.OVERLOADED, text), max(1, min(_MOST_RETRY_MS, round(wait_ms)))
        return None, None

    def _cancel(self, message: Cancel) -> None:
        target = self._by_id.pop(message.target, None)
        status = "not_found" if target is None else "cancelled"
        refusal = Refusal(message.target, Code.CANCELLED, "The request was cancelled.")
        if isinstance(target, _Ticket):
            self._drop(target)
            self._refuse(target, refusal)
        elif target is not None:
            target.done = True
            for ticket in target.tickets:
                self._drop(ticket)
            self._answer_error(refusal, target.place)
        self._emit(reports.tagged("cancel", message.id, {"target": message.target, "status": status}))

    def _control(self, message: Control, now: float) -> None:
        """Answered at once, whatever is queued; never part of the order of answers without ids."""
        self._emit(reports.control(message, self.status(now)))
        if message.type == "shutdown":
            self.drain(now)

    # --- engines -------------------------------------------------------------------------------------------------------------

    def _dispatch(self, now: float) -> None:
        """Keep every engine supplied with two batches: each gets its first before any gets its second."""
        self._expire(now)
        supplied = True
        while supplied and self.scheduler.has_unsent:
            supplied = False
            ready = self.fleet.ready
            share = max(_LEAST_SHARE_PAIRS, -(-self.scheduler.waiting_pairs // len(ready))) if len(ready) > 1 else None
            for engine in ready:
                batch = self.scheduler.next_batch(now, idle=not engine.in_flight, max_pairs=share) if engine.has_room else None
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
        self.scheduler.longest_tokens = int(event.info["max_length"])
        if self.ready_body is not None:
            self._note("INFO", "an engine is back" if self.counters.engine_deaths else "another engine is ready")
            return
        self.scheduler.assume_speed(float(event.info.get("tokens_per_ms", 1.0)))
        self.ready_body = reports.ready(self.config, event.info, round((now - self.started_at) * 1e3), self.pid)
        self._hello = serialize(self.ready_body)
        self._silent_until = self._last_line_at + READY_SILENCE_SECONDS
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
            self._finish(job, now)

    def _on_lost(self, event: Lost, now: float) -> None:
        self.counters.engine_deaths += 1
        self.last_batch_good = False
        self._note("WARNING", f"an engine ended: {event.reason}; {len(event.batches)} batches are sent again")
        poisoned = self.scheduler.requeue(*event.batches)
        for job in poisoned:
            self._quarantine.add(job.groups, now)
            self._finish(job, now)
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
        self._emit(error_answer(Refusal(None, Code.MODEL_LOAD_ERROR, event.error), self._wall_clock()))
        self._refuse_all(Code.NOT_READY, "The model could not be loaded.")
        self._note("ERROR", event.error)
        self.exit_code = event.exit_code

    # --- answers -------------------------------------------------------------------------------------------------------------

    def _finish(self, job: Job, now: float) -> None:
        ticket = self._tickets.pop(job.number)
        if job.failure is not None:
            code, text = job.failure
            self._refuse(ticket, Refusal(ticket.request.id, Code(code), text))
        elif job.deadline <= now:
            self._deadline(ticket, now)
        else:
            self._answer_scores(ticket, now)

    def _expire(self, now: float) -> None:
        for job in self.scheduler.expire(now):
            self._deadline(self._tickets.pop(job.number), now)

    def _deadline(self, ticket: _Ticket, now: float) -> None:
        if ticket.request.options.partial:
            self._answer_scores(ticket, now)
        else:
            limit = ticket.request.options.timeout_ms or self.config.request_timeout_ms
            self._refuse(ticket, Refusal(ticket.request.id, Code.DEADLINE_EXCEEDED, f"The request was not scored within {limit} ms."))

    def _answer_scores(self, ticket: _Ticket, now: float) -> None:
        request, job = ticket.request, ticket.job
        assert job is not None
        latency_ms = (now - ticket.received_at) * 1e3
        self.counters.answered(latency_ms)
        self.counters.shared += job.shared
        self.counters.truncated += len(job.truncated)
        scale = request.options.scale or self.config.scores
        columns = {"logit": job.logits, "probability": job.probabilities, "model": job.model_scores or [None] * job.num_pairs}
        info = self.ready_body or {}
        scores = Scores(
            values=columns[scale],
            latency_ms=latency_ms,
            truncated=job.truncated,
            total_tokens=job.total_tokens,
            timings=(max(0.0, ((now if job.dispatched_at is None else job.dispatched_at) - ticket.received_at) * 1e3), job.tokenize_ms, job.inference_ms),
            model=str(info.get("model", self.config.model)),
            score_kind=reports.score_kind(scale, info),
            shared=job.shared,
        )
        body = v1_answer(request, scores, f"rerank-{job.number}") if request.shape == "v1/rerank" else rerank_answer(request, scores)
        self._deliver(ticket, body)

    def _refuse(self, ticket: _Ticket, refusal: Refusal, retry_after_ms: int | None = None) -> None:
        self._count_error(refusal.code)
        self._deliver(ticket, error_answer(refusal, self._wall_clock(), retry_after_ms))

    def _deliver(self, ticket: _Ticket, body: dict[str, Any]) -> None:
        if ticket.parent is not None:
            self._part_done(ticket.parent, ticket.part, body)
            return
        if ticket.job is not None and self._by_id.get(ticket.request.id) is ticket:
            del self._by_id[ticket.request.id]
        self._emit(body, ticket.place)

    def _part_done(self, many: _Many, part: int, body: dict[str, Any]) -> None:
        if many.done:
            return
        many.parts[part] = body
        many.missing -= 1
        if not many.missing:
            self._many_done(many)

    def _many_done(self, many: _Many) -> None:
        many.done = True
        if self._by_id.get(many.id) is many:
            del self._by_id[many.id]
        self._emit(({} if many.id is None else {"id": many.id}) | {"responses": many.parts}, many.place)

    def _drop(self, ticket: _Ticket) -> None:
        if ticket.job is not None:
            self.scheduler.drop(ticket.job)
            self._tickets.pop(ticket.job.number, None)

    def _refuse_all(self, code: Code, text: str) -> None:
        for job in self.scheduler.jobs():
            ticket = self._tickets[job.number]
            self._drop(ticket)
            self._refuse(ticket, Refusal(ticket.request.id, code, text))

    def _refuse_quarantined(self, now: float) -> None:
        """Refuse the copies that wait of what was just quarantined: each would cost two more engines."""
        for job in self.scheduler.jobs():
            if self._quarantine.holds(job.groups, now):
                ticket = self._tickets[job.number]
                self._drop(ticket)
                self._refuse(ticket, Refusal(ticket.request.id, Code.POISONED, _POISONED))

    def _answer_error(self, refusal: Refusal, place: Place | None) -> None:
        self._count_error(refusal.code)
        self._emit(error_answer(refusal, self._wall_clock()), place)

    def _count_error(self, code: Code) -> None:
        self.counters.errors[code.value] += 1

    def _place(self, request_id: Id) -> Place | None:
        return self._order.reserve() if request_id is None else None

    def _emit(self, body: dict[str, Any], place: Place | None = None) -> None:
        line = serialize(body)
        self._lines += [line] if place is None else self._order.fill(place, line)

    # --- beginning and end ---------------------------------------------------------------------------------------------------

    def _finish_drain(self, now: float) -> None:
        if self._tickets and now >= self._drain_until:
            self._left_something = True
            self._refuse_all(Code.SHUTTING_DOWN, "The worker is shutting down and had no time left for this request.")
        if not self._tickets:
            self.exit_code = _DRAINED_INCOMPLETELY if self._left_something else _DRAINED

    def _next_number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _note(self, level: str, text: str) -> None:
        self.notes.append((level, text))
