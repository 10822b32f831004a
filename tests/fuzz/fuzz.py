"""Mutated lines through `protocol.Decoder` and a second parser: they must agree on what is served, refused and why, and on the content."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from reranker_worker.protocol import Batch, Cancel, Control, Decoder, Limits, Message, Refusal, Rerank
from tests.fuzz.mutations import mutate
from tests.fuzz.reference import is_id, verdict

MAX_LINE_BYTES = 4096
MAX_DOCUMENTS = 50
_CHUNK_LINES = 40


@dataclass
class Tally:
    """What was seen."""

    lines: int = 0
    verdicts: dict[str, int] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)


def fuzz(lines: int, seed: int) -> Tally:
    """Compare so many mutated lines; stops at ten differences."""
    rng = random.Random(seed)
    tally = Tally()
    limits = Limits(MAX_LINE_BYTES, MAX_DOCUMENTS)
    decoder = Decoder(limits)
    while tally.lines < lines and len(tally.differences) < 10:
        block = [mutate(rng) for _ in range(min(_CHUNK_LINES, lines - tally.lines))]
        alone = [decoder.feed(line + b"\n") for line in block]
        for line, messages in zip(block, alone, strict=True):
            tally.lines += 1
            wanted, body = verdict(line, MAX_LINE_BYTES)
            tally.verdicts[wanted] = tally.verdicts.get(wanted, 0) + 1
            fault = difference(messages, wanted, body)
            if fault:
                tally.differences.append(f"{fault}: {line[:400]!r} ({len(line)} bytes)")
        if _torn(block, limits, rng) != [message for messages in alone for message in messages]:
            tally.differences.append(f"the cuts change the result: {block!r}")
    return tally


def _torn(block: list[bytes], limits: Limits, rng: random.Random) -> list[Message]:
    data = b"".join(line + b"\n" for line in block)
    cuts = sorted(rng.randrange(len(data)) for _ in range(12))
    decoder = Decoder(limits)
    return [message for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True) for message in decoder.feed(data[start:stop])]


def difference(messages: list[Message], wanted: str, body: dict[str, Any] | None) -> str | None:
    """How the decoder's opinion of one line differs from the reference's; None where they agree."""
    if len(messages) != (wanted != "blank"):
        return f"{len(messages)} messages where the line is {wanted}"
    if not messages:
        return None
    (message,) = messages
    if isinstance(message, Refusal):
        if message.code.value != wanted and not _too_many(message, body):
            return f"refused as {message.code.value} where {wanted} is right"
    elif wanted != "served":
        return f"served where {wanted} is right"
    number = body.get("id") if body else None
    if message.id != (number if is_id(number) else None) or type(message.id) is not type(number if is_id(number) else None):
        return f"id {message.id!r} where {number!r} is right"
    return _content_difference(message, body or {})


def _too_many(message: Refusal, body: dict[str, Any] | None) -> bool:
    """Limits of count are the decoder's alone."""
    if message.code.value != "REQUEST_TOO_LARGE":
        return False
    return body is None or any(isinstance(value, list) and len(value) > MAX_DOCUMENTS for value in body.values())


def _content_difference(message: Message, body: dict[str, Any]) -> str | None:
    match message:
        case Rerank(shape="score"):
            same = [[group.query, document] for group in message.groups for document in group.documents] == body["pairs"]
        case Rerank():
            texts = [item if isinstance(item, str) else item["text"] for item in body["documents"]]
            same = [(group.query, list(group.documents)) for group in message.groups] == [(body["query"], texts)]
            same = same and (message.options.timeout_ms, message.options.priority) == (body.get("timeout_ms"), body.get("priority") or 0)
        case Batch():
            same = len(message.requests) == len(body["requests"])
            for part, item in zip(message.requests, body["requests"], strict=False):
                same = same and (not isinstance(part, Rerank) or part.shape == "score" or part.groups[0].query == item["query"])
        case Cancel():
            same = message.target == body["target"]
        case Control():
            same = message.type == body["type"]
        case _:
            same = True
    return None if same else f"{type(message).__name__} with another content"
