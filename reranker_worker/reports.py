"""What the worker says of itself: `ready`, `info`, `live`, `ready` (readiness), `health`, `stats`, `metrics`. Pure, from one `Status`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from reranker_worker import __version__
from reranker_worker.metrics import CONTENT_TYPE, Counters, exposition
from reranker_worker.protocol import PROTOCOL_VERSION, Control, Id

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reranker_worker.config import Config

CAPABILITIES = (
    "rerank score batch v1/rerank heartbeat stats live ready health metrics info cancel configure shutdown "
    "top_k return_documents raw_scores normalize max_length timeout_ms priority partial details"
).split()
_LIMITS = (
    "max_line_bytes max_documents max_waiting_pairs max_waiting_bytes max_waiting_requests max_batch_pairs max_unsent_bytes "
    "request_timeout_ms drain_timeout_ms"
).split()
_OF_THE_ENGINE = ("model", "model_revision", "backend", "device", "dtype", "max_length")


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """One engine, as reported. `progress_ms` is the time since its last sign of life, None while it has nothing to do."""

    state: str
    stage: str
    in_flight_batches: int
    progress_ms: float | None
    starts: int


@dataclass(frozen=True, slots=True)
class Status:
    """A snapshot of the worker."""

    config: Config
    counters: Counters
    ready_body: dict[str, Any] | None
    model_path: str
    model_source: str
    engine_versions: dict[str, str]
    draining: bool
    last_batch_good: bool
    log_level: str
    uptime_ms: float
    waiting_requests: int
    waiting_pairs: int
    waiting_bytes: int
    oldest_in_flight_ms: float
    engines: Sequence[EngineStatus]
    tokens_per_ms: float
    lost_log_lines: int

    @property
    def not_ready_because(self) -> str | None:
        """None when requests are being scored."""
        if self.draining:
            return "draining"
        if not any(engine.state == "ready" for engine in self.engines):
            return "loading" if self.ready_body is None else "restarting the engine"
        return None if self.last_batch_good else "the last batch failed"


def ready(config: Config, info: dict[str, Any], load_time_ms: int, pid: int) -> dict[str, Any]:
    """The line that says that scoring can begin."""
    return {
        "type": "ready",
        "protocol": PROTOCOL_VERSION,
        "version": __version__,
        **{name: info.get(name) for name in _OF_THE_ENGINE},
        "score_kind": score_kind(config.scores, info),
        "threads": info.get("threads"),
        "engines": config.engines,
        "load_time_ms": load_time_ms,
        "pid": pid,
        "limits": {name: getattr(config, name) for name in _LIMITS} | {"max_length": info.get("max_length")},
        "capabilities": CAPABILITIES + (["instruction"] if info.get("instruction") else []),
    }


def score_kind(scale: str, info: dict[str, Any]) -> str:
    """The scale in words: "probability", "logit", or what the model's own predict gives."""
    return f"model:{info.get('activation', 'unknown')}" if scale == "model" else scale


def tagged(kind: str, request_id: Id, body: dict[str, Any]) -> dict[str, Any]:
    """A control answer: its type, the request's id if it had one, its fields."""
    return {"type": kind} | ({} if request_id is None else {"id": request_id}) | body


def control(message: Control, status: Status) -> dict[str, Any]:
    """The answer to a control request."""
    match message.type:
        case "heartbeat":
            return tagged("heartbeat", message.id, {"status": "alive", "requests_processed": status.counters.scored})
        case "live":
            return tagged("live", message.id, {"live": True, "uptime_ms": status.uptime_ms})
        case "ready":
            # Not "ready": a host that waits for the hello line must not take a poll's answer for it.
            why = status.not_ready_because
            return tagged("readiness", message.id, {"ready": why is None} | ({} if why is None else {"reason": why}))
        case "health":
            return tagged("health", message.id, _health(status))
        case "stats":
            return tagged("stats", message.id, _stats(status))
        case "metrics":
            return tagged("metrics", message.id, {"content_type": CONTENT_TYPE, "body": _metrics(status)})
        case "info":
            return tagged("info", message.id, _info(status))
        case _:
            return tagged("shutdown", message.id, {"status": "acknowledged"})


def _health(status: Status) -> dict[str, Any]:
    why = status.not_ready_because
    return {
        "live": True,
        "ready": why is None,
        "status": why or "serving",
        "uptime_ms": status.uptime_ms,
        "oldest_in_flight_ms": status.oldest_in_flight_ms,
        "waiting_requests": status.waiting_requests,
        "waiting_pairs": status.waiting_pairs,
        "engines": [asdict(engine) for engine in status.engines],
    }


def _stats(status: Status) -> dict[str, Any]:
    counters = status.counters
    return {
        "requests_processed": counters.scored,
        **counters.latency(),
        "requests_received": counters.received,
        "errors": dict(counters.errors),
        "pairs_scored": counters.pairs,
        "tokens_scored": counters.tokens,
        "pairs_shared": counters.shared,
        "documents_truncated": counters.truncated,
        "batches": counters.batches,
        "engine_deaths": counters.engine_deaths,
        "engine_tokens_per_ms": round(status.tokens_per_ms, 3),
        "waiting_requests": status.waiting_requests,
        "waiting_pairs": status.waiting_pairs,
        "waiting_bytes": status.waiting_bytes,
        "log_lines_lost": status.lost_log_lines,
        "uptime_ms": status.uptime_ms,
    }


def _metrics(status: Status) -> str:
    gauges = {
        "ready": float(status.not_ready_because is None),
        "waiting_requests": float(status.waiting_requests),
        "waiting_pairs": float(status.waiting_pairs),
        "waiting_bytes": float(status.waiting_bytes),
        "oldest_in_flight_ms": status.oldest_in_flight_ms,
        "uptime_ms": status.uptime_ms,
        "log_lines_lost": float(status.lost_log_lines),
    }
    body = status.ready_body or {}
    labels = {"version": __version__, **{name: body.get(name) or "" for name in _OF_THE_ENGINE}}
    return exposition(status.counters, gauges, labels)


def _info(status: Status) -> dict[str, Any]:
    body = {**status.ready_body} if status.ready_body else {"protocol": PROTOCOL_VERSION, "version": __version__}
    body.pop("type", None)
    settings = asdict(status.config) | {"log_level": status.log_level}
    return body | {"model_path": status.model_path, "model_source": status.model_source, "versions": status.engine_versions, "settings": settings}
