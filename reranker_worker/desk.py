"""Who asked what, and where each answer goes: open requests by id and by job, parts of a `batch`, scores and errors made into lines. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reranker_worker.protocol import Code, Id, Refusal, Rerank, Scores, error_answer, rerank_answer, serialize, v1_answer
from reranker_worker.reports import score_kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from reranker_worker.config import Config
    from reranker_worker.metrics import Counters
    from reranker_worker.ordering import Place
    from reranker_worker.outbox import Outbox
    from reranker_worker.scheduler import Job


@dataclass(slots=True, eq=False)
class Many:
    """A `batch` request that collects its parts' answers."""

    id: Id
    place: Place | None
    parts: list[dict[str, Any] | None]
    missing: int
    jobs: list[Job] = field(default_factory=list)
    done: bool = False


@dataclass(slots=True, eq=False)
class Ticket:
    """A request and where its answer goes: a line of its own, or part `part` of a batch. `received_at` in seconds."""

    request: Rerank
    received_at: float
    place: Place | None
    parent: Many | None = None
    part: int = 0


class Desk:
    """Answers go to the outbox; each ticket is answered exactly once."""

    def __init__(self, config: Config, counters: Counters, outbox: Outbox, wall_clock: Callable[[], float]) -> None:
        self._config = config
        self._counters = counters
        self._outbox = outbox
        self._wall_clock = wall_clock
        self._tickets: dict[int, Ticket] = {}  # by job number
        self._by_id: dict[Id, Job | Many] = {}
        self.info: dict[str, Any] = {}  # of the model, once it is known

    def __len__(self) -> int:
        return len(self._tickets)

    def place(self, request_id: Id) -> Place | None:
        """A place in the order for a request without an id; call it when the request is read."""
        return self._outbox.reserve() if request_id is None else None

    def is_open(self, request_id: Id) -> bool:
        """True while a request with this id is in flight."""
        return request_id is not None and request_id in self._by_id

    def open(self, ticket: Ticket, job: Job) -> None:
        """An admitted request."""
        self._tickets[job.number] = ticket
        if ticket.parent is not None:
            ticket.parent.jobs.append(job)
        elif ticket.request.id is not None:
            self._by_id[ticket.request.id] = job

    def open_many(self, many: Many) -> None:
        """A batch with parts in flight."""
        if many.id is not None and not many.done:
            self._by_id[many.id] = many

    def received_at(self, job: Job) -> float:
        """When the line of an open job was read."""
        return self._tickets[job.number].received_at

    def take_back(self, target: Id) -> list[Job] | None:
        """Cancel: answer the target with CANCELLED; its jobs, or None when nothing with this id is open."""
        found = self._by_id.pop(target, None)
        if found is None:
            return None
        refusal = Refusal(target, Code.CANCELLED, "The request was cancelled.")
        if isinstance(found, Many):
            found.done = True
            jobs = [job for job in found.jobs if self._tickets.pop(job.number, None)]
            self.error(refusal, found.place)
            return jobs
        self.refuse(found, refusal.code, refusal.error)
        return [found]

    def finish(self, job: Job, now: float) -> None:
        """A job that the scheduler gave back, whole or failed."""
        if job.failure is not None:
            self.refuse(job, Code(job.failure[0]), job.failure[1])
        elif job.deadline <= now:
            self.expire(job, now)
        else:
            self.scores(self._close(job), job, now)

    def expire(self, job: Job, now: float) -> None:
        """A job whose deadline has passed."""
        ticket = self._close(job)
        if ticket.request.options.partial:
            self.scores(ticket, job, now)
            return
        limit = ticket.request.options.timeout_ms or self._config.request_timeout_ms
        self.refuse_ticket(ticket, Refusal(ticket.request.id, Code.DEADLINE_EXCEEDED, f"The request was not scored within {limit} ms."))

    def refuse(self, job: Job, code: Code, error: str, *, final: bool = False) -> None:
        """An open job that will not be scored."""
        ticket = self._close(job)
        self.refuse_ticket(ticket, Refusal(ticket.request.id, code, error, final))

    def refuse_ticket(self, ticket: Ticket, refusal: Refusal, retry_after_ms: int | None = None) -> None:
        """A request that was not admitted, or is closed already."""
        self._counters.errors[refusal.code.value] += 1
        self._deliver(ticket, error_answer(refusal, self._wall_clock(), retry_after_ms))

    def error(self, refusal: Refusal, place: Place | None = None) -> None:
        """An error line that belongs to no ticket."""
        self._counters.errors[refusal.code.value] += 1
        self.say(error_answer(refusal, self._wall_clock()), place)

    def scores(self, ticket: Ticket, job: Job, now: float) -> None:
        """What is known of a closed job's scores."""
        request = ticket.request
        latency_ms = (now - ticket.received_at) * 1e3
        self._counters.answered(latency_ms)
        self._counters.shared += job.shared
        self._counters.truncated += len(job.truncated)
        scale = request.options.scale or self._config.scores
        columns = {"logit": job.logits, "probability": job.probabilities, "model": job.model_scores or [None] * job.num_pairs}
        dispatched_at = now if job.dispatched_at is None else job.dispatched_at
        scores = Scores(
            values=job.in_input_order(columns[scale]),
            latency_ms=latency_ms,
            truncated=job.truncated if job.order is None else sorted(job.order[pair] for pair in job.truncated),
            total_tokens=job.total_tokens,
            timings=(max(0.0, (dispatched_at - ticket.received_at) * 1e3), job.tokenize_ms, job.inference_ms),
            model=str(self.info.get("model", self._config.model)),
            score_kind=score_kind(scale, self.info),
            shared=job.shared,
        )
        make = v1_answer if request.shape == "v1/rerank" else rerank_answer
        self._deliver(ticket, make(request, scores, f"rerank-{job.number}"))

    def say(self, body: dict[str, Any], place: Place | None = None) -> None:
        """Any answer, as a line."""
        self._outbox.put(serialize(body), place)

    def part(self, many: Many, part: int, body: dict[str, Any]) -> None:
        """The answer to one part of a batch; the last one makes the line."""
        if many.done:
            return
        many.parts[part] = body
        many.missing -= 1
        if not many.missing:
            self.close_many(many)

    def close_many(self, many: Many) -> None:
        """A batch whose parts are all answered."""
        many.done = True
        if self._by_id.get(many.id) is many:
            del self._by_id[many.id]
        self.say(({} if many.id is None else {"id": many.id}) | {"responses": many.parts}, many.place)

    def _close(self, job: Job) -> Ticket:
        ticket = self._tickets.pop(job.number)
        if self._by_id.get(ticket.request.id) is job:
            del self._by_id[ticket.request.id]
        return ticket

    def _deliver(self, ticket: Ticket, body: dict[str, Any]) -> None:
        if ticket.parent is None:
            self.say(body, ticket.place)
        else:
            self.part(ticket.parent, ticket.part, body)
