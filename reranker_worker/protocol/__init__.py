"""The wire without I/O: bytes become messages (`Decoder.feed`), answers become bytes (`serialize`). Version 1.

Nothing here raises for what a host sends: each bad line becomes one `Refusal` that names its error code.
"""

from reranker_worker.protocol.answers import Scores, error_answer, json_text, rerank_answer, serialize, v1_answer
from reranker_worker.protocol.framing import LineReader, Oversize
from reranker_worker.protocol.messages import (
    RETRYABLE,
    Batch,
    Cancel,
    Code,
    Configure,
    Control,
    Group,
    Id,
    Limits,
    Message,
    Options,
    Refusal,
    Rerank,
)
from reranker_worker.protocol.parsing import Decoder

PROTOCOL_VERSION = 1

__all__ = [
    "PROTOCOL_VERSION",
    "RETRYABLE",
    "Batch",
    "Cancel",
    "Code",
    "Configure",
    "Control",
    "Decoder",
    "Group",
    "Id",
    "Limits",
    "LineReader",
    "Message",
    "Options",
    "Oversize",
    "Refusal",
    "Rerank",
    "Scores",
    "error_answer",
    "json_text",
    "rerank_answer",
    "serialize",
    "v1_answer",
]
