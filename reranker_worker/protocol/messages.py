"""What can arrive on the wire, as frozen types; the error codes; the limits."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

Id = str | int | None


class Code(StrEnum):
    """The closed list of error codes (README, "The wire")."""

    INVALID_JSON = "INVALID_JSON"
    INVALID_REQUEST = "INVALID_REQUEST"
    REQUEST_TOO_LARGE = "REQUEST_TOO_LARGE"
    OVERLOADED = "OVERLOADED"
    RATE_LIMITED = "RATE_LIMITED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    CANCELLED = "CANCELLED"
    SHUTTING_DOWN = "SHUTTING_DOWN"
    NOT_READY = "NOT_READY"
    ENGINE_UNAVAILABLE = "ENGINE_UNAVAILABLE"
    INFERENCE_ERROR = "INFERENCE_ERROR"
    POISONED = "POISONED"
    PROCESSING_ERROR = "PROCESSING_ERROR"
    SERVER_ERROR = "SERVER_ERROR"
    MODEL_LOAD_ERROR = "MODEL_LOAD_ERROR"


# The same line sent again may succeed.
RETRYABLE = frozenset(
    {Code.OVERLOADED, Code.RATE_LIMITED, Code.DEADLINE_EXCEEDED, Code.SHUTTING_DOWN, Code.NOT_READY, Code.ENGINE_UNAVAILABLE, Code.SERVER_ERROR}
)


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits that hold before a request is admitted; reported in `ready` and `info`."""

    max_line_bytes: int
    max_documents: int


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a request, validated. `scale` is None (the worker's default), "logit" or "probability"."""

    top_k: int | None = None
    return_documents: bool = False
    scale: str | None = None
    max_length: int = 0
    max_document_tokens: int = 0
    timeout_ms: int | None = None
    priority: int = 0
    partial: bool = False
    details: bool = False
    instruction: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """One query with its documents: the unit in which pairs travel."""

    query: str
    documents: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rerank:
    """A request for scores. `shape` is the dialect of the answer: "rerank", "score" or "v1/rerank"."""

    id: Id
    shape: str
    groups: tuple[Group, ...]
    document_ids: tuple[Id, ...] | None
    options: Options
    model: str = ""

    @property
    def num_pairs(self) -> int:
        return sum(len(group.documents) for group in self.groups)


@dataclass(frozen=True, slots=True)
class Batch:
    """Several requests on one line, answered on one line in the same order."""

    id: Id
    requests: tuple[Rerank | Refusal, ...]


@dataclass(frozen=True, slots=True)
class Control:
    """heartbeat, stats, live, ready, health, metrics, info or shutdown."""

    id: Id
    type: str


@dataclass(frozen=True, slots=True)
class Cancel:
    """Cancel the request `target`."""

    id: Id
    target: Id


@dataclass(frozen=True, slots=True)
class Configure:
    """Change settings that may change at run time; None leaves one as it is."""

    id: Id
    log_level: str | None


@dataclass(frozen=True, slots=True)
class Refusal:
    """A line that cannot be served, and why. `error` is a sentence without request text."""

    id: Id
    code: Code
    error: str
    final: bool = False  # not retryable here, although its code usually is


Message = Rerank | Batch | Control | Cancel | Configure | Refusal
