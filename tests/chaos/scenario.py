"""A random scenario from a seed: the steps of one run, and for each line the answers that it permits. The same seed, the same scenario."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.driver import PROFILES
from tests.chaos.expected import Expected

WORDS = "alpha beta gamma delta épsilon zeta 字 ключ naïve \U0001f600 \u2028 \x7f tab\t quote\" back\\slash".split(" ")
CONTROLS = {name: name for name in "heartbeat live health stats info metrics".split()} | {"ready": "readiness"}
MAX_LINE_BYTES = 16384
MAX_DOCUMENTS = 64
# Codes of requests that hold a document which asks for this fault; an empty set: it must be scored.
DOCUMENT_FAULTS = {
    "nan": ("fake:nan", {"INFERENCE_ERROR"}),
    "oom_once": ("fake:oom", set()),
    "oom_always": ("fake:oom1", {"INFERENCE_ERROR"}),
    "raise": ("fake:raise", {"INFERENCE_ERROR"}),
    "print": ("fake:print", set()),
    "slow_pass": ("fake:sleep 30", set()),
    "exit": ("fake:exit 3", {"POISONED"}),
    "segv": ("fake:kill 11", {"POISONED"}),
    "hang": ("fake:hang", {"DEADLINE_EXCEEDED", "POISONED"}),
}
ENGINE_FAULTS = ("engine_kill", "engine_segv", "engine_stop", "engine_stop_cont")
DEADLY = {"exit", "segv", "hang", "engine_kill", "engine_segv", "engine_stop"}
LINE_FAULTS = (
    "garbage invalid_utf8 bom nul oversize deep blank crlf duplicate_id bad_shape unknown_type too_many_documents long_query not_an_object surrogate "
    "duplicate_texts tiny_timeout partial cancel cancel_unknown burst controls batch score v1 options priority empty_documents"
).split()
FLOW_FAULTS = ("pause_reading", "slow_reading", "front_stop_cont", "settle")
ENDS = ("eof", "eof_mid_line", "eof_whole_last_line", "shutdown", "sigterm", "sighup", "sigterm_twice", "host_stops_reading", "front_killed")


@dataclass(slots=True)
class Line:
    """Bytes to write (with their line end) and what must come back; None for lines that get no answer."""

    data: bytes
    expected: Expected | None


@dataclass(slots=True)
class Step:
    """`send` lines (cut at the given offsets), or `act` on reading, the engine or the front."""

    name: str
    lines: list[Line] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)
    number: int = 0
    gap_seconds: float = 0.0


@dataclass(slots=True)
class Scenario:
    seed: int
    profile: str
    steps: list[Step]
    end: str
    faults: set[str]

    @property
    def may_be_incomplete(self) -> bool:
        """True when a drain may run out of time: something hangs for longer than it lasts."""
        return bool(self.faults & {"hang", "engine_stop"})


class Generator:
    """Builds one scenario. `number` makes every id and query unique, so that a late answer shows."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.seed = seed
        self.number = 0
        self.faults: set[str] = set()
        self.permitted: set[str] = set()
        self.requests: list[Expected] = []
        self.repeats: list[tuple[str, str]] = []

    def scenario(self) -> Scenario:
        """The whole run."""
        rng = self.random
        profile = rng.choice(sorted(PROFILES))
        if profile == "tight":
            self.permitted.add("OVERLOADED")
        document_fault = rng.choice(sorted(DOCUMENT_FAULTS)) if rng.random() < 0.35 else ""
        if document_fault == "hang" and rng.random() < 0.6:  # each costs more than a second
            document_fault = "nan"
        engine_fault = rng.choice(ENGINE_FAULTS) if rng.random() < 0.16 else ""
        if engine_fault and document_fault in DEADLY:
            self.permitted.add("POISONED")  # two deaths can meet any request twice
        steps = [self._lines_step(rng.sample(LINE_FAULTS, rng.randint(0, 4))) for _ in range(rng.randint(2, 7))]
        steps += [Step(name, number=rng.randint(1, 300), gap_seconds=rng.random() * 0.02) for name in rng.sample(FLOW_FAULTS, rng.randint(0, 2))]
        rng.shuffle(steps)
        if document_fault:
            steps.insert(rng.randint(0, len(steps)), self._document_fault(document_fault))
        if engine_fault:
            busy = [self.request() for _ in range(rng.randint(0, 8))]  # written right before, so that it is in flight
            steps.insert(rng.randint(1, len(steps)), Step(engine_fault, busy, number=rng.randint(0, 9), gap_seconds=rng.random() * 0.03))
        self.faults |= {step.name for step in steps} - {"send"}
        end = rng.choice(ENDS) if rng.random() < 0.22 else "none"
        if end != "none":
            steps.append(self._last_words(end))
            self.faults.add(end)
        for expected in self.requests:
            expected.codes |= self.permitted
        return Scenario(self.seed, profile, steps, end, self.faults)

    # --- lines ---------------------------------------------------------------------------------------------------------------

    def _lines_step(self, kinds: list[str]) -> Step:
        """Plain requests mixed with special lines, written in one piece, torn in a few places, or byte by byte."""
        rng = self.random
        lines = [self.request() for _ in range(rng.randint(1, 4))]
        for kind in kinds:
            self.faults.add(kind)
            lines += getattr(self, f"_{kind}")()
        # Cancels stay behind their targets; everything else may stand anywhere.
        lines.sort(key=lambda line: rng.random() if line.expected is None or line.expected.kind != "cancel" else 2)
        step = Step("send", lines, gap_seconds=rng.random() * 0.01)
        size = sum(len(line.data) for line in lines)
        if rng.random() < 0.5:
            self.faults.add("torn")
            step.cuts = sorted(rng.randrange(1, size) for _ in range(rng.randint(1, 12)))
        return step

    def _id(self) -> str | int:
        self.number += 1
        return f"r{self.seed}.{self.number}" if self.random.random() < 0.8 else self.seed * 1000 + self.number

    def _text(self) -> str:
        return " ".join(self.random.choices(WORDS, k=self.random.randint(0, 12)))

    def request(self, *, kind: str = "rerank", named: bool | None = None, **options: Any) -> Line:
        """A valid request with random texts, with an id three times out of four."""
        rng = self.random
        with_id = rng.random() < 0.75 if named is None else named
        self.number += 1
        expected = Expected(kind, self._id() if with_id else None)
        query = f"q{self.seed}.{self.number} {self._text()}"
        documents = [f"{index} {self._text()}" for index in range(rng.choice((1, 2, 3, 5, 10, 40)))]
        return self.line(expected, query, documents, options)

    def line(self, expected: Expected, query: str, documents: list[str], options: dict[str, Any]) -> Line:
        """The line of a request; fills in what its answer must hold."""
        expected.pairs = [(query, document) for document in documents]
        body: dict[str, Any] = {"query": query, "documents": documents}
        if expected.kind == "v1":
            body["type"] = "v1/rerank"
        elif self.random.random() < 0.2:
            body["documents"] = [{"text": document, "id": f"d{index}"} for index, document in enumerate(documents)]
        if expected.id is not None:
            body = {"id": expected.id} | body
        self.requests.append(expected)
        return Line(self._dump(body | options), expected)

    def _dump(self, body: dict[str, Any]) -> bytes:
        return json.dumps(body, ensure_ascii=self.random.random() < 0.5).encode() + b"\n"

    def _bad(self, data: bytes, *codes: str) -> list[Line]:
        return [Line(data + b"\n", Expected("error", None, codes=set(codes)))]

    def _garbage(self) -> list[Line]:
        return self._bad(self.random.choice((b"hello", b'{"query": "x"', b"{]", b"'", b'{"a":NaN}', b'{"a":1}}', b"\xff\xfe{\x00")), "INVALID_JSON")

    def _invalid_utf8(self) -> list[Line]:
        bad = self.random.choice((b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80"))
        return self._bad(b'{"query":"' + bad + b'","documents":["a"]}', "INVALID_JSON")

    def _bom(self) -> list[Line]:
        return self._bad(b'\xef\xbb\xbf{"query":"q","documents":["a"]}', "INVALID_JSON")

    def _nul(self) -> list[Line]:
        return self._bad(b'{"query":"a\x00b","documents":["a"]}', "INVALID_JSON")

    def _surrogate(self) -> list[Line]:
        return self._bad(b'{"query":"\\ud800","documents":["a"]}', "INVALID_JSON")

    def _oversize(self) -> list[Line]:
        size = self.random.choice((MAX_LINE_BYTES + 1, MAX_LINE_BYTES + 2, 3 * MAX_LINE_BYTES, 300_000))
        return self._bad(b'{"query":"q","documents":["' + b"x" * (size - 30) + b'"]}'.ljust(30), "REQUEST_TOO_LARGE")

    def _deep(self) -> list[Line]:
        depth = self.random.choice((17, 100, 2000))
        return self._bad(b'{"a":' + b"[" * depth + b"]" * depth + b"}", "INVALID_JSON", "REQUEST_TOO_LARGE")

    def _not_an_object(self) -> list[Line]:
        return self._bad(self.random.choice((b"[]", b"1", b"null", b'"text"', b"true")), "INVALID_REQUEST")

    def _blank(self) -> list[Line]:
        return [Line(self.random.choice((b"\n", b"\r\n", b"  \t \n", b"\n\n\n")), None)]

    def _crlf(self) -> list[Line]:
        line = self.request()
        return [Line(line.data[:-1] + b"\r\n", line.expected)]

    def _bad_shape(self) -> list[Line]:
        number = self._id()
        fields = self.random.choice(
            ({"query": 1, "documents": []}, {"query": "q"}, {"query": "q", "documents": [1]}, {"documents": ["a"]}, {"query": "q", "documents": "a"},
             {"query": "q", "documents": ["a"], "top_k": 0}, {"query": "q", "documents": ["a"], "timeout_ms": -1},
             {"type": "score", "pairs": [["a"]]})
        )  # fmt: skip
        return [Line(self._dump({"id": number} | fields), Expected("error", number, codes={"INVALID_REQUEST"}))]

    def _unknown_type(self) -> list[Line]:
        number = self._id()
        return [Line(self._dump({"id": number, "type": "nonsense"}), Expected("error", number, codes={"INVALID_REQUEST"}))]

    def _too_many_documents(self) -> list[Line]:
        number = self._id()
        data = self._dump({"id": number, "query": "q", "documents": ["a"] * (MAX_DOCUMENTS + 1)})
        return [Line(data, Expected("error", number, codes={"REQUEST_TOO_LARGE"}))]

    def _long_query(self) -> list[Line]:
        expected = Expected("rerank", self._id(), codes={"INVALID_REQUEST"}, must_fail=True)
        return [self.line(expected, "long " * 600, ["a", "b"], {})]

    def _empty_documents(self) -> list[Line]:
        return [self.line(Expected("rerank", self._id()), f"q{self.seed}", [], {})]

    def _duplicate_id(self) -> list[Line]:
        first, second = self.request(named=True), self.request(named=True)
        assert first.expected
        assert second.expected
        old, new = json.dumps(second.expected.id), json.dumps(first.expected.id)
        second.expected.id = first.expected.id
        second.expected.codes.add("INVALID_REQUEST")
        first.expected.codes.add("INVALID_REQUEST")  # whichever comes second
        return [first, Line(second.data.replace(f'"id": {old}'.encode(), f'"id": {new}'.encode(), 1), second.expected)]

    def _duplicate_texts(self) -> list[Line]:
        """The same pairs in several requests at once: they are scored once and answered everywhere."""
        query, documents = f"same{self.seed}.{self.number}", [f"doc {index % 4}" for index in range(12)]
        return [self.line(Expected("rerank", self._id()), query, documents[: self.random.randint(1, 12)], {}) for _ in range(4)]

    def _tiny_timeout(self) -> list[Line]:
        line = self.request(timeout_ms=self.random.choice((1, 2, 5, 20)))
        assert line.expected
        line.expected.codes.add("DEADLINE_EXCEEDED")
        return [line]

    def _partial(self) -> list[Line]:
        line = self.request(timeout_ms=self.random.choice((2, 10)), partial=True)
        assert line.expected
        line.expected.partial = True
        return [line]

    def _cancel(self) -> list[Line]:
        named = [expected for expected in self.requests if isinstance(expected.id, str)]
        known = [expected for expected in named if expected.kind != "v1" and not expected.codes & {"INVALID_REQUEST"}]
        if not known:
            return []
        target = self.random.choice(known)
        target.codes.add("CANCELLED")
        assert isinstance(target.id, str)
        return self._cancel_line(target.id)

    def _cancel_unknown(self) -> list[Line]:
        return self._cancel_line(f"never{self.seed}.{self.number}")

    def _cancel_line(self, target: str) -> list[Line]:
        number = self._id()
        return [Line(self._dump({"type": "cancel", "id": number, "target": target}), Expected("cancel", number, target=target))]

    def _burst(self) -> list[Line]:
        return [self.request() for _ in range(self.random.randint(10, 30))]

    def _controls(self) -> list[Line]:
        kinds = self.random.choices(sorted(CONTROLS), k=3)
        lines = []
        for kind in kinds:
            number = self._id() if self.random.random() < 0.5 else None
            lines.append(Line(self._dump({"type": kind} | ({} if number is None else {"id": number})), Expected(CONTROLS[kind], number)))
        return lines

    def _batch(self) -> list[Line]:
        parts = [self.request() for _ in range(self.random.randint(0, 4))]
        expected = Expected("batch", self._id() if self.random.random() < 0.7 else None, parts=[part.expected for part in parts if part.expected])
        self.requests.append(expected)
        bodies = [json.loads(part.data) for part in parts]
        if self.random.random() < 0.3:
            bodies.append({"query": 7})
            expected.parts.append(Expected("error", None, codes={"INVALID_REQUEST"}))
        head = {"type": "batch"} | ({} if expected.id is None else {"id": expected.id})
        return [Line(self._dump(head | {"requests": bodies}), expected)]

    def _score(self) -> list[Line]:
        expected = Expected("rerank", self._id() if self.random.random() < 0.7 else None)
        expected.pairs = [(f"q{self.seed}.{self.number}.{index // 2}", f"{index} {self._text()}") for index in range(self.random.randint(1, 9))]
        self.requests.append(expected)
        head = {"type": "score"} | ({} if expected.id is None else {"id": expected.id})
        return [Line(self._dump(head | {"pairs": [list(pair) for pair in expected.pairs]}), expected)]

    def _v1(self) -> list[Line]:
        top = self.random.choice((None, 1, 3, 100))
        line = self.request(kind="v1", return_documents=self.random.random() < 0.5, **({} if top is None else {"top_n": top}))
        assert line.expected
        line.expected.results, line.expected.top_k = True, top
        return [line]

    def _options(self) -> list[Line]:
        top, raw = self.random.choice((1, 2, 50)), self.random.random() < 0.5
        line = self.request(top_k=top, raw_scores=raw, details=True, return_documents=self.random.random() < 0.5)
        assert line.expected
        line.expected.results, line.expected.top_k, line.expected.raw = True, top, raw
        return [line]

    def _priority(self) -> list[Line]:
        return [self.request(priority=self.random.choice((0, 1, 999))) for _ in range(3)]

    # --- faults of the engine, and ends --------------------------------------------------------------------------------------

    def _document_fault(self, name: str) -> Step:
        """Innocent requests around one with a document that asks for a fault."""
        document, codes = DOCUMENT_FAULTS[name]
        rng = self.random
        self.faults.add(name)
        options = {"timeout_ms": rng.randint(30, 150)} if name == "hang" else {}
        expected = Expected("rerank", self._id(), codes=set(codes), must_fail=bool(codes))
        documents = [f"{index} {self._text()}" for index in range(rng.randint(0, 6))]
        documents.insert(rng.randint(0, len(documents)), f"{document} x{self.seed}.{self.number}")
        guilty = self.line(expected, f"guilty{self.seed}.{self.number}", documents, options)
        lines = [*(self.request() for _ in range(rng.randint(0, 3))), guilty, *(self.request() for _ in range(rng.randint(0, 3)))]
        return Step("send", lines, gap_seconds=rng.random() * 0.02)

    def _last_words(self, end: str) -> Step:
        """What is written right before, or as part of, the end."""
        rng = self.random
        lines = [self.request() for _ in range(rng.randint(0, 6))]
        if end == "eof_mid_line":
            cut = self.request(named=True).data
            self.requests.pop()
            lines.append(Line(cut[: rng.randint(1, len(cut.rstrip()) - 1)].rstrip() or b"{", Expected("error", None, codes={"INVALID_JSON"})))
        elif end == "eof_whole_last_line":
            line = self.request()
            lines.append(Line(line.data[:-1], line.expected))
        elif end == "shutdown":
            lines.append(Line(self._dump({"type": "shutdown"}), Expected("shutdown")))
            for late in (self.request(named=True), self.request(named=False)):
                assert late.expected
                late.expected.codes, late.expected.must_fail = {"SHUTTING_DOWN"}, True
                lines.append(late)
        return Step("send", lines)
