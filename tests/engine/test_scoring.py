"""From pairs to scores: passes within their budget, halving, isolation, and every score at its own pair."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reranker_worker.backends import BackendInfo, OutOfMemoryError, Pair, Tokens
from reranker_worker.config import Config
from reranker_worker.engine.scoring import EngineSickError, Scorer, plan_packed, plan_passes

Rule = Callable[[list[str]], Exception | None]


class Room:
    """A backend that counts: a document is its own length in tokens, its logit is that of `logit`."""

    def __init__(self, rule: Rule = lambda documents: None, max_pass_tokens: int = 10_000) -> None:
        self.info = BackendInfo("room", "cpu", "float32", max_length=64, activation="sigmoid", max_pass_tokens=max_pass_tokens)
        self.passes: list[list[str]] = []
        self.pairs: list[Pair] = []
        self._rule = rule

    def tokenize(self, pairs: Sequence[Pair]) -> list[Tokens]:
        self.pairs += pairs
        sizes = [(len(pair.document), pair.max_length) for pair in pairs]
        return [Tokens(pair.document, min(size, most), size > most, pair.query != "x") for pair, (size, most) in zip(pairs, sizes, strict=True)]

    def score(self, batch: Sequence[Tokens]) -> list[float]:
        documents = [tokens.inputs for tokens in batch]
        self.passes.append(documents)
        if problem := self._rule(documents):
            raise problem
        return [logit(document) for document in documents]

    def activate(self, logits: list[float]) -> list[float]:
        return [value * 2 for value in logits]


def logit(document: str) -> float:
    special = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "high": 1e4, "low": -1e4}
    return special.get(document.strip("."), sum(map(ord, document)) / 1000 - 2)


def score(room: Room, *documents: str, query: str = "q", log: list[str] | None = None, **settings: Any) -> dict[str, Any]:
    lines = log if log is not None else []
    scorer = Scorer(room, Config(**settings), lines.append)
    return run(scorer, *documents, query=query)


def run(scorer: Scorer, *documents: str, query: str = "q") -> dict[str, Any]:
    frame = {"batch": 7, "groups": [[query, 0, 0, "", list(documents)]]}
    return scorer.score(scorer.prepare(frame), lambda batch: None)


def test_a_batch_that_is_answered_leaves_the_memory_though_its_callbacks_hold_it() -> None:
    scorer = Scorer(Room(), Config(), print)
    gc.disable()  # it must not need the collector
    try:
        started = scorer.start(scorer.prepare({"batch": 7, "groups": [["q", 0, 0, "", ["a"]]]}), lambda batch: None)
        future = weakref.ref(started.futures[0])
        started.futures[0].add_done_callback(partial(lambda held, _: None, started))
        scorer.finish(started)
        del started
        run(scorer, "b")  # by now the thread has let go of it too
        assert future() is None
    finally:
        gc.enable()


LENGTHS = st.lists(st.integers(0, 600), max_size=80)


@given(LENGTHS, st.integers(1, 5000), st.integers(1, 40))
def test_passes_hold_every_pair_once_within_both_limits(lengths: list[int], tokens: int, pairs: int) -> None:
    passes = plan_passes(lengths, tokens, pairs)
    assert sorted(index for plan in passes for index in plan) == list(range(len(lengths)))
    for plan in passes:
        assert 1 <= len(plan) <= pairs
        assert len(plan) == 1 or len(plan) * max(lengths[index] for index in plan) <= tokens


@given(LENGTHS, st.integers(1, 5000), st.integers(1, 40))
def test_passes_go_from_long_to_short_and_ties_keep_their_order(lengths: list[int], tokens: int, pairs: int) -> None:
    order = [index for plan in plan_passes(lengths, tokens, pairs) for index in plan]
    assert order == sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))


@given(LENGTHS, st.integers(1, 5000), st.integers(1, 40), st.integers(1, 4))
def test_packed_passes_hold_every_pair_once_and_about_as_many_tokens_as_they_may(lengths: list[int], tokens: int, pairs: int, parallel: int) -> None:
    passes = plan_packed(lengths, tokens, pairs, parallel)
    assert sorted(index for plan in passes for index in plan) == list(range(len(lengths)))
    for plan in passes:
        assert 1 <= len(plan) <= pairs
        assert len(plan) == 1 or sum(lengths[index] for index in plan) <= max(tokens + max(lengths), 1.5 * tokens)


@given(LENGTHS, st.integers(1, 5000), st.integers(1, 4))
def test_packed_passes_are_stretches_of_the_pairs_sorted_by_length(lengths: list[int], tokens: int, parallel: int) -> None:
    passes = plan_packed(lengths, tokens, 32, parallel)
    by_length = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    assert [index for plan in sorted(passes, key=lambda plan: by_length.index(plan[0])) for index in plan] == by_length


@given(st.lists(st.integers(20, 60), min_size=40, max_size=80), st.integers(2, 4))
def test_packed_passes_busy_all_threads_to_the_end(lengths: list[int], parallel: int) -> None:
    passes = plan_packed(lengths, 512, 1000, parallel)
    threads = tokens_of_threads(lengths, passes, parallel)
    assert len(passes) % parallel == 0
    assert max(threads) - min(threads) <= 2 * max(lengths)


def test_the_threads_end_a_small_request_together_though_its_pairs_are_of_many_lengths() -> None:
    lengths = [196, 176, 146, 102, 93, 65, 41, 35, 32, 28]  # cut as evenly as their order allows, and the longest first: 517 and 397 tokens
    threads = tokens_of_threads(lengths, plan_packed(lengths, 256, 32, 2), 2)
    assert max(threads) <= 1.03 * sum(lengths) / 2


def tokens_of_threads(lengths: list[int], passes: list[list[int]], parallel: int) -> list[int]:
    """When each thread takes the next pass as soon as it has none."""
    threads = [0] * parallel
    for plan in passes:
        threads[threads.index(min(threads))] += sum(lengths[index] for index in plan)
    return threads


def test_a_few_short_pairs_are_not_cut_into_crumbs() -> None:
    assert plan_packed([30, 20, 40], 512, 32, 4) == [[2, 0, 1]]


def test_a_backend_that_pads_nothing_is_given_even_passes() -> None:
    room = Room(max_pass_tokens=512)
    room.info = replace(room.info, packed=True, parallel_passes=2, max_length=600)
    score(room, "a" * 300, *["b" * 30] * 10)
    assert sorted(map(len, room.passes)) == [1, 10]


def test_pairs_of_like_length_share_a_pass() -> None:
    assert plan_passes([5, 500, 5, 500], 1000, 32) == [[1, 3], [0, 2]]


@given(st.lists(st.text("abc", max_size=12), max_size=30), st.integers(1, 8), st.integers(1, 40))
def test_every_score_is_at_its_own_pair_however_the_passes_fall(documents: list[str], pairs: int, tokens: int) -> None:
    room = Room()
    frame = score(room, *documents, batch_size=pairs, max_pass_tokens=tokens)
    assert frame["logits"] == [logit(document) for document in documents]
    assert frame["probabilities"] == [pytest.approx(1 / (1 + math.exp(-logit(document)))) for document in documents]
    assert frame["tokens"] == [len(document) for document in documents]
    assert frame["failures"] == []
    assert frame["passes"] == len(room.passes)
    assert (frame["event"], frame["batch"]) == ("scored", 7)
    assert "model_scores" not in frame


def test_the_models_own_scores_come_when_asked_for_and_stay_in_place() -> None:
    frame = score(Room(), "a", "nan", "b", scores="model")
    assert frame["model_scores"] == [logit("a") * 2, None, logit("b") * 2]


def test_pairs_carry_their_options_and_the_models_limit() -> None:
    room = Room()
    scorer = Scorer(room, Config(), lambda line: None)
    groups = [["q", 0, 0, "", ["a"]], ["r", 10, 5, "judge", ["b"]], ["s", 9999, 0, "", ["c"]]]
    prepared = scorer.prepare({"batch": 1, "groups": groups})
    assert room.pairs == [Pair("q", "a", 64), Pair("r", "b", 10, "judge", 5), Pair("s", "c", 64)]
    assert prepared.batch == 1


def test_progress_is_told_after_each_pass() -> None:
    told: list[int] = []
    scorer = Scorer(Room(), Config(batch_size=2), lambda line: None)
    scorer.score(scorer.prepare({"batch": 3, "groups": [["q", 0, 0, "", list("abcde")]]}), told.append)
    assert told == [3, 3, 3]


def test_truncated_pairs_are_named() -> None:
    assert score(Room(), "a", "b" * 65, "c", "d" * 99)["truncated"] == [1, 3]


def test_a_query_without_room_fails_its_pairs_and_never_meets_the_model() -> None:
    room = Room()
    frame = score(room, "a", "b", query="x")
    assert [(index, code) for index, code, _ in frame["failures"]] == [(0, "INVALID_REQUEST"), (1, "INVALID_REQUEST")]
    assert frame["logits"] == [None, None]
    assert room.passes == []


def test_scores_stay_in_place_beside_pairs_without_room() -> None:
    scorer = Scorer(Room(), Config(), lambda line: None)
    groups = [["x", 0, 0, "", ["a", "bb"]], ["q", 0, 0, "", ["c", "dddd"]], ["x", 0, 0, "", ["e"]], ["q", 0, 0, "", ["ff"]]]
    frame = scorer.score(scorer.prepare({"batch": 1, "groups": groups}), lambda batch: None)
    assert frame["logits"] == [None, None, logit("c"), logit("dddd"), None, logit("ff")]
    assert [index for index, *_ in frame["failures"]] == [0, 1, 4]


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_a_score_that_is_not_finite_fails_its_pair_alone(bad: str) -> None:
    frame = score(Room(), "a", bad, "b")
    assert frame["logits"] == [logit("a"), None, logit("b")]
    assert frame["probabilities"][1] is None
    assert [(index, code) for index, code, _ in frame["failures"]] == [(1, "INFERENCE_ERROR")]


def test_extreme_logits_have_probabilities_within_zero_and_one() -> None:
    assert score(Room(), "high", "low")["probabilities"] == [1.0, 0.0]


def short_of_memory(most: int, error: type[Exception] = OutOfMemoryError) -> Rule:
    return lambda documents: error() if len(documents) > most else None


@pytest.mark.parametrize("error", [OutOfMemoryError, MemoryError])
@pytest.mark.parametrize("most", [1, 2, 3, 5, 8])
def test_out_of_memory_halves_the_pass_until_it_fits_and_loses_no_score(most: int, error: type[Exception]) -> None:
    room = Room(short_of_memory(most, error))
    documents = [chr(97 + index) * 3 for index in range(13)]
    frame = score(room, *documents)
    assert frame["logits"] == [logit(document) for document in documents]
    assert frame["failures"] == []
    assert [len(documents) for documents in room.passes][:2] == [13, 7]


def test_the_ceiling_is_remembered_for_the_next_batch() -> None:
    room = Room(short_of_memory(4))
    log: list[str] = []
    scorer = Scorer(room, Config(), log.append)
    documents = [f"{index:02}" for index in range(16)]
    run(scorer, *documents)
    assert log
    room.passes.clear()
    log.clear()
    assert run(scorer, *documents)["logits"] == [logit(document) for document in documents]
    assert [len(one) for one in room.passes] == [4, 4, 4, 4]
    assert log == []


def test_a_document_that_fits_in_no_memory_fails_and_its_mates_are_scored() -> None:
    room = Room(lambda documents: OutOfMemoryError() if "bad" in documents else None)
    frame = score(room, "aaa", "bad", "ccc")
    assert frame["logits"] == [logit("aaa"), None, logit("ccc")]
    ((index, code, text),) = frame["failures"]
    assert (index, code) == (1, "INFERENCE_ERROR")
    assert "memory" in text


@pytest.mark.parametrize("error", [ValueError("secret bad"), RuntimeError("secret"), ZeroDivisionError(), KeyError("secret")])
def test_a_model_that_raises_fails_the_pair_alone_and_tells_nothing_of_it(error: Exception) -> None:
    log: list[str] = []
    frame = score(Room(lambda documents: error if "bad" in documents else None), "a", "bad", "c", log=log)
    assert frame["logits"] == [logit("a"), None, logit("c")]
    assert [(index, code) for index, code, _ in frame["failures"]] == [(1, "INFERENCE_ERROR")]
    assert type(error).__name__ in log[0]
    assert not any("secret" in text for text in [*log, *(text for *_, text in frame["failures"])])


def test_a_model_that_fails_on_everything_is_not_asked_for_each_pair() -> None:
    room = Room(lambda documents: ValueError())
    frame = score(room, *(str(index) for index in range(32)))
    assert len(frame["failures"]) == 32
    assert len(room.passes) <= 8


@pytest.mark.parametrize("text", ["CUDA error: an illegal memory access", "device-side assert triggered"])
def test_a_lost_device_ends_the_engine(text: str) -> None:
    with pytest.raises(EngineSickError):
        score(Room(lambda documents: RuntimeError(text)), "a")


def test_an_empty_batch_is_answered() -> None:
    frame = score(Room())
    assert frame["logits"] == frame["probabilities"] == frame["tokens"] == []


class Crew(Room):
    """A backend whose passes wait for each other: they end only if two are under way at the same time."""

    def __init__(self) -> None:
        super().__init__(max_pass_tokens=100)
        self.info = BackendInfo("crew", "cpu", "float32", 64, "sigmoid", max_pass_tokens=100, parallel_passes=2)
        self._meet = threading.Barrier(2)

    def score(self, batch: Sequence[Tokens]) -> list[float]:
        self._meet.wait(30)
        return super().score(batch)


class Gate(Room):
    """A backend whose passes end when the gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.open = threading.Event(), threading.Event()

    def score(self, batch: Sequence[Tokens]) -> list[float]:
        self.entered.set()
        assert self.open.wait(30)
        return super().score(batch)


def test_of_the_batches_that_wait_the_one_with_the_lowest_order_is_scored_first() -> None:
    gate = Gate()
    scorer = Scorer(gate, Config(), lambda line: None)
    frames = [{"batch": number, "order": order, "groups": [["q", 0, 0, "", [str(number)]]]} for number, order in ((1, 5), (2, 6), (3, 3), (4, 6))]
    started = [scorer.start(scorer.prepare(frames[0]), lambda batch: None)]
    assert gate.entered.wait(30)  # the first is under way: nobody overtakes it
    started += [scorer.start(scorer.prepare(frame), lambda batch: None) for frame in frames[1:]]
    gate.open.set()
    assert [scorer.finish(batch)["logits"] for batch in started] == [[logit(str(number))] for number in (1, 2, 3, 4)]
    assert gate.passes == [["1"], ["3"], ["2"], ["4"]]


def test_passes_run_side_by_side_when_the_backend_allows_it() -> None:
    documents = ["d" * 40 + str(number) for number in range(8)]
    frame = score(Crew(), *documents)
    assert frame["logits"] == [logit(document) for document in documents]
    assert frame["failures"] == []


def test_the_next_batch_is_started_before_the_last_is_finished() -> None:
    # Each batch is a single pass that waits for a second one, which only the other batch can bring.
    scorer = Scorer(Crew(), Config(), lambda line: None)
    seen: list[int] = []
    frames = [{"batch": number, "groups": [["q", 0, 0, "", [f"document {number}"]]]} for number in (1, 2)]
    started = [scorer.start(scorer.prepare(frame), seen.append) for frame in frames]
    finished = [scorer.finish(batch) for batch in started]
    assert [frame["batch"] for frame in finished] == [1, 2]
    assert [frame["logits"] for frame in finished] == [[logit("document 1")], [logit("document 2")]]
    assert sorted(seen) == [1, 2]
