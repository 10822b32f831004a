"""Whatever a host sends, whatever the engines do and whenever the end comes: every non-blank line gets exactly one answer."""

from __future__ import annotations

import json
import math
from typing import Any

from hall import Hall
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduling import score_of

DOCUMENTS = st.lists(st.sampled_from("abcdefghk"), max_size=6)
GARBAGE = st.sampled_from([b"x", b"{", b"[]", b'{"query":1}', b'\xff', b'{"type":"no"}', b"[" * 20])
REFUSALS = {"DEADLINE_EXCEEDED", "CANCELLED", "SHUTTING_DOWN", "POISONED", "ENGINE_UNAVAILABLE", "OVERLOADED", "INFERENCE_ERROR", "NOT_READY"}


class WorkerMachine(RuleBasedStateMachine):
    """`asked` are the lines that still wait: by id, and those without ids in order."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0
        self.by_id: dict[int, dict[str, Any]] = {}
        self.in_order: list[dict[str, Any]] = []
        self.controls = 0
        self.ready_seen = False

    @initialize(engines=st.integers(1, 2), pairs=st.integers(1, 4), most=st.sampled_from([3, 100]))
    def begin(self, engines: int, pairs: int, most: int) -> None:
        self.hall = Hall(start=False, engines=engines, max_batch_pairs=pairs, max_waiting_requests=most, request_timeout_ms=8000)

    # --- the host ---

    @rule(documents=DOCUMENTS, with_id=st.booleans(), partial=st.booleans(), wait=st.none() | st.integers(1, 4000), priority=st.integers(0, 1))
    def rerank(self, documents: list[str], with_id: bool, partial: bool, wait: int | None, priority: int) -> None:
        self.numbers += 1
        request: dict[str, Any] = {"query": f"q{self.numbers % 2}", "documents": documents, "partial": partial}
        request |= {"timeout_ms": wait, "priority": priority}
        if with_id:
            request["id"] = self.numbers
            self.by_id[self.numbers] = request
        else:
            self.in_order.append(request)
        self.hall.ask(**request)

    @rule(parts=st.lists(DOCUMENTS, max_size=3), with_id=st.booleans(), bad=st.booleans())
    def batch(self, parts: list[list[str]], with_id: bool, bad: bool) -> None:
        self.numbers += 1
        requests: list[dict[str, Any]] = [{"query": "q", "documents": documents} for documents in parts] + ([{}] if bad else [])
        request: dict[str, Any] = {"type": "batch", "requests": requests}
        if with_id:
            request["id"] = self.numbers
            self.by_id[self.numbers] = request
        else:
            self.in_order.append(request)
        self.hall.ask(**request)

    @rule(line=GARBAGE)
    def garbage(self, line: bytes) -> None:
        self.in_order.append({"garbage": True})
        self.hall.send(b"\n \r\n" + line + b"\r\n")

    @rule(kind=st.sampled_from(["heartbeat", "stats", "health", "metrics"]))
    def control(self, kind: str) -> None:
        self.controls += 1
        self.hall.ask(type=kind)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.controls += 1
        self.hall.ask(type="cancel", target=data.draw(st.sampled_from([*sorted(self.by_id), 10**6])))

    # --- the engines ---

    def engines(self, state: str) -> list[int]:
        return [number for number in range(len(self.hall.links)) if self.hall.engine(number).state == state and self.hall.links[number].alive]

    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        if loading := self.engines("loading"):
            self.hall.ready(data.draw(st.sampled_from(loading)))

    @rule(data=st.data(), fail=st.booleans(), last=st.booleans())
    def score(self, data: st.DataObject, fail: bool, last: bool) -> None:
        busy = [number for number in self.engines("ready") if self.hall.links[number].frames]
        if not busy:
            return
        number = data.draw(st.sampled_from(busy))
        frame = self.hall.links[number].frames[-1 if last else 0]
        if any("k" in group[4] for group in frame["groups"]):
            self.hall.die(-11, number)
            return
        if last:
            self.hall.links[number].frames.insert(0, self.hall.links[number].frames.pop())
        count = sum(len(group[4]) for group in frame["groups"])
        if fail:
            nothing = [None] * count
            self.hall.score(number, logits=nothing, probabilities=nothing, failures=[[i, "INFERENCE_ERROR", "No."] for i in range(count)])
        else:
            self.hall.score(number)

    @rule(data=st.data(), code=st.sampled_from([-11, -9, 0, 70]))
    def die(self, data: st.DataObject, code: int) -> None:
        running = [*self.engines("ready"), *(self.engines("loading") if self.ready_seen else [])]
        if running:
            self.hall.die(code, data.draw(st.sampled_from(running)))

    # --- time ---

    @rule(seconds=st.sampled_from([0.0, 0.001, 0.02, 0.5, 2.0, 9.0, 40.0]))
    def wait(self, seconds: float) -> None:
        self.hall.now += seconds
        if not seconds:
            return
        self.tick()

    def tick(self) -> None:
        self.hall.later(0)
        for number, link in enumerate(self.hall.links):  # the worker killed it
            if not link.alive and self.hall.engine(number).state in ("loading", "ready"):
                self.hall.die(-9, number)

    @precondition(lambda self: self.numbers > 8)
    @rule(how=st.sampled_from(["signal", "end"]))
    def stop(self, how: str) -> None:
        if how == "end":
            self.hall.worker.end_of_input(self.hall.now)
        else:
            self.hall.worker.drain(self.hall.now)

    # --- what comes out ---

    @invariant()
    def read(self) -> None:
        if hasattr(self, "hall"):
            for line in self.hall.take():
                self.check(line)

    def check(self, line: dict[str, Any]) -> None:
        if line.get("type") == "ready":
            assert not self.ready_seen
            self.ready_seen = True
        elif line.get("code") == "MODEL_LOAD_ERROR":
            assert self.hall.worker.exit_code
        elif "type" in line:
            self.controls -= 1
            assert self.controls >= 0
        elif "id" in line:
            self.matches(self.by_id.pop(line["id"]), line)
        else:
            self.matches(self.in_order.pop(0), line)

    def matches(self, request: dict[str, Any], line: dict[str, Any]) -> None:
        if request.get("garbage"):
            assert line["code"] in ("INVALID_JSON", "INVALID_REQUEST")
        elif "requests" in request and "code" not in line:
            assert len(line["responses"]) == len(request["requests"])
            for part, answer in zip(request["requests"], line["responses"], strict=True):
                if part:
                    self.matches(part, answer)
                else:
                    assert answer["code"] == "INVALID_REQUEST"
        elif "code" in line:
            assert line["code"] in REFUSALS
        else:
            wanted = [score_of(request["query"], document) for document in request["documents"]]
            assert len(line["scores"]) == len(wanted)
            assert all(score in (value, None) for score, value in zip(line["scores"], wanted, strict=True))
            assert ("complete" in line) == (None in line["scores"])
            assert "complete" not in line or request.get("partial")

    def teardown(self) -> None:
        """Stop, let time run out, and count."""
        if not hasattr(self, "hall"):
            return
        worker = self.hall.worker
        worker.drain(self.hall.now)
        for _ in range(1000):
            self.tick()
            self.read()
            if worker.exit_code is not None:
                break
            moment = worker.next_wakeup()
            assert moment < math.inf, "it waits for nothing and does not leave"
            self.hall.now = max(moment, self.hall.now + 0.001)
        for line in self.hall.lines():
            self.check(line)
        assert worker.exit_code in (0, 75, 70)
        assert not self.by_id, json.dumps(self.by_id)
        assert not self.in_order
        assert self.controls == 0
        assert worker.scheduler.waiting_jobs == worker.scheduler.waiting_pairs == worker.scheduler.waiting_bytes == 0


TestOneAnswerForEachLine = WorkerMachine.TestCase
TestOneAnswerForEachLine.settings = settings(max_examples=150, stateful_step_count=40)
