"""From pairs to scores, whatever the runtime: tokenize once, sort by length, passes by token budget, halve when memory runs out."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from functools import cache, partial
from heapq import heapreplace
from itertools import accumulate, pairwise, starmap
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from reranker_worker.backends import Backend, OutOfMemoryError, Pair, Tokens
from reranker_worker.engine.crew import Crew

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from reranker_worker.config import Config

_MOST_BROKEN_PAIRS = 3
# A batch is cut into as many passes as may run side by side, but not into crumbs.
_LEAST_PASS_TOKENS = 128
# Of more passes than so many for each thread the cuts matter little.
_FEW_PASSES = 4
# A pass may have so many times its tokens if all ends sooner.
_MOST_OVER = 1.5
# What a pass costs beside its tokens, in tokens, of MiniLM-L6 in float32: passes of 128 tokens take 3 % longer than of 256, and of the time with
# passages of 86 tokens 3 % goes to the spreading for attention and 5 % to attention itself.
_PASS_START_TOKENS, _TABLE_SHARE, _ATTENTION_SHARE = 9.0, 0.03, 0.0006
NO_ROOM = ("INVALID_REQUEST", "The query alone fills the model's max_length; shorten it.")
_NO_INSTRUCTION = ("INVALID_REQUEST", "This model takes no instruction; leave the field out.")
NO_MEMORY = ("INFERENCE_ERROR", "There is not enough memory to score one of the documents even alone.")
_NOT_FINITE = ("INFERENCE_ERROR", "The model gave no finite score for one of the documents.")
_RAISED = ("INFERENCE_ERROR", "The model failed on one of the documents; the worker's log names the kind of error.")


class EngineSickError(Exception):
    """The device's state is lost; only a new process helps."""


@dataclass(slots=True)
class Prepared:
    """A tokenized batch on its way to the model."""

    batch: int
    order: int  # of batches that wait, the one with the lowest is scored first
    tokens: list[Tokens]
    refused: set[int]  # pairs with an instruction that the model cannot take
    tokenize_ms: float


@dataclass(slots=True)
class _Outcome:
    logits: list[float | None]
    failures: dict[int, tuple[str, str]] = field(default_factory=dict)
    passes: int = 0


@dataclass(slots=True)
class Started:
    """A batch whose passes are under way, a future for each thread's share. `begin` in seconds of time.perf_counter."""

    prepared: Prepared
    outcome: _Outcome
    begin: float
    futures: list[Future[None]]
    unfinished: int = field(init=False)  # shares whose end was not yet told

    def __post_init__(self) -> None:
        self.unfinished = len(self.futures)


def plan_passes(lengths: Sequence[int], max_pass_tokens: int, max_pass_pairs: int) -> list[list[int]]:
    """Cut pairs, sorted by length, into forward passes: each holds at most `max_pass_pairs` pairs and, padded to its longest,
    at most `max_pass_tokens` tokens (a single longer pair makes a pass of its own). The longest come first: if memory is short,
    it shows at once."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    passes: list[list[int]] = []
    start = 0
    while start < len(order):
        longest = max(1, lengths[order[start]])
        size = max(1, min(max_pass_pairs, max_pass_tokens // longest))
        passes.append(order[start : start + size])
        start += size
    return passes


def plan_packed(lengths: Sequence[int], max_pass_tokens: int, max_pass_pairs: int, parallel: int) -> list[list[int]]:
    """Cut pairs, sorted by length from the longest, into passes of about equal sums of tokens, for a backend that pads nothing.

    Each pass holds at most `max_pass_pairs` pairs and about `max_pass_tokens` tokens (a single longer pair makes a pass of its own); there are as
    many as keep `parallel` threads busy to the end, unless that would make crumbs. Of few passes the cuts are moved until the threads end
    together, and the dearest comes first.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    total = sum(lengths)
    count = max(1, -(-total // max_pass_tokens))
    count = min(-(-count // parallel) * parallel, max(count, total // _LEAST_PASS_TOKENS))
    target = total / count
    passes: list[list[int]] = []
    used = done = 0
    for index in order:
        # The cut that is nearest to a whole number of targets.
        if not passes or len(passes[-1]) >= max_pass_pairs or (done + lengths[index] / 2 > target * len(passes) and used > 0):
            passes.append([])
            used = 0
        passes[-1].append(index)
        used += lengths[index]
        done += lengths[index]
    if parallel > 1 and 1 < len(passes) <= _FEW_PASSES * parallel:
        cuts = _even_out([lengths[index] for index in order], [len(part) for part in passes], parallel, max_pass_tokens, max_pass_pairs)
        passes = [order[begin:end] for begin, end in cuts]
    return passes


def _even_out(lengths: Sequence[int], sizes: Sequence[int], parallel: int, max_pass_tokens: int, max_pass_pairs: int) -> list[tuple[int, int]]:
    """Begin and end of each pass over `lengths` (sorted), the dearest first, when no cut can be moved by one or two pairs so that all ends sooner.

    `sizes` is how many pairs each has at first.
    """

    before = [0, *accumulate(lengths)]

    @cache  # each trial below differs from the last in two passes
    def cost(begin: int, end: int) -> float:
        """What a pass takes, in tokens: its start, its tokens, and attention's table (pairs, longest)."""
        table = (end - begin) * lengths[begin]
        return _PASS_START_TOKENS + before[end] - before[begin] + table * (_TABLE_SHARE + _ATTENTION_SHARE * lengths[begin])

    def end_of_all(ends: Sequence[int]) -> float:
        threads = [0.0] * parallel
        for dearest in sorted(starmap(cost, pairwise([0, *ends])), reverse=True):
            heapreplace(threads, threads[0] + dearest)  # the thread that is free first
        return max(threads)

    @cache
    def is_able(begin: int, end: int) -> bool:
        if not begin < end <= min(begin + max_pass_pairs, len(lengths)):
            return False
        return end - begin == 1 or before[end] - before[begin] <= _MOST_OVER * max_pass_tokens

    ends = list(accumulate(sizes))
    best = end_of_all(ends)
    while True:
        moved = ([*ends[:cut], ends[cut] + step, *ends[cut + 1 :]] for cut in range(len(ends) - 1) for step in (-2, -1, 1, 2))
        able = [trial for trial in moved if all(starmap(is_able, pairwise([0, *trial])))]
        soonest, trial = min(((end_of_all(trial), trial) for trial in able), key=itemgetter(0), default=(best, ends))
        if soonest >= best:
            return sorted(pairwise([0, *ends]), key=lambda span: -cost(*span))
        ends, best = trial, soonest


class Scorer:
    """Scores batches on one backend. `prepare` and `start` belong to one thread, `finish` to another."""

    def __init__(self, backend: Backend, config: Config, log: Callable[[str], None], abandon: Callable[[], None] | None = None) -> None:
        """`abandon` is called when a scoring thread has no memory left to go on; its batch would never end."""
        self._backend = backend
        self._abandon = abandon
        self._log = log
        self._max_length = backend.info.max_length
        self._batch_size = config.batch_size
        self._want_model_scores = config.scores == "model"
        self._parallel = backend.info.parallel_passes
        self._crew = Crew(self._parallel)
        self._last_finish = 0.0
        self.max_pass_tokens = config.max_pass_tokens or backend.info.max_pass_tokens

    def prepare(self, frame: dict[str, Any]) -> Prepared:
        """Tokenize a `score` frame."""
        begin = time.perf_counter()
        pairs = [
            Pair(query, document, min(max_length or self._max_length, self._max_length), instruction, document_tokens)
            for query, max_length, document_tokens, instruction, documents in frame["groups"]
            for document in documents
        ]
        tokens = self._backend.tokenize(pairs)
        refused = {index for index, pair in enumerate(pairs) if pair.instruction} if not self._backend.info.instruction else set()
        return Prepared(frame["batch"], frame.get("order", frame["batch"]), tokens, refused, (time.perf_counter() - begin) * 1e3)

    def start(self, prepared: Prepared, progress: Callable[[int], None]) -> Started:
        """Hand a batch's passes to the scoring threads, behind those of lower order, so that none of them is ever idle.

        `progress` is called with the batch's number after each pass, from the thread that scored it.
        """
        tokens = prepared.tokens
        failures = {index: NO_ROOM for index, item in enumerate(tokens) if not item.fits} | dict.fromkeys(prepared.refused, _NO_INSTRUCTION)
        outcome = _Outcome([None] * len(tokens), failures)
        able = [index for index in range(len(tokens)) if index not in failures]
        lengths = [tokens[index].length for index in able]
        plans = [[able[position] for position in plan] for plan in self._plan(lengths)]
        # One thread takes all passes at once: a hand-over for each would cost more than a small pass.
        shares = [[plan] for plan in plans] if self._parallel > 1 else [plans]

        def run(share: list[list[int]]) -> None:
            try:
                for indices in share:
                    self._pass(tokens, indices, outcome)
                    progress(prepared.batch)
            except MemoryError:
                if self._abandon is not None:
                    self._abandon()
                raise

        return Started(prepared, outcome, time.perf_counter(), [self._crew.submit(prepared.order, partial(run, share)) for share in shares])

    def _plan(self, lengths: Sequence[int]) -> list[list[int]]:
        most = self.max_pass_tokens
        if self._backend.info.packed:
            return plan_packed(lengths, most, self._batch_size, self._parallel)
        if self._parallel > 1:
            most = min(most, max(_LEAST_PASS_TOKENS, -(-sum(lengths) // self._parallel)))
        return plan_passes(lengths, most, self._batch_size)

    def finish(self, started: Started) -> dict[str, Any]:
        """Wait for a batch; its `scored` frame. Raises EngineSickError when the device is lost."""
        for future in started.futures:
            future.result()
        started.futures.clear()  # their callbacks may hold the batch, and it would stay until the collector comes
        now = time.perf_counter()
        # Batches overlap: each is charged the time since the one before it was done.
        inference_ms = (now - max(started.begin, self._last_finish)) * 1e3
        self._last_finish = now
        return self._frame(started.prepared, started.outcome, inference_ms)

    def score(self, prepared: Prepared, progress: Callable[[int], None]) -> dict[str, Any]:
        """`start` and `finish` in one."""
        return self.finish(self.start(prepared, progress))

    def _pass(self, tokens: Sequence[Tokens], indices: list[int], outcome: _Outcome) -> None:
        outcome.passes += 1
        try:
            logits = self._backend.score([tokens[index] for index in indices])
        except (OutOfMemoryError, MemoryError):
            self._halve(tokens, indices, outcome)
        except Exception as error:  # the batch boundary: one bad pair must not fail its mates
            self._isolate(tokens, indices, outcome, error)
        else:
            for index, logit in zip(indices, logits, strict=True):
                if math.isfinite(logit):
                    outcome.logits[index] = logit
                else:
                    outcome.failures[index] = _NOT_FINITE

    def _halve(self, tokens: Sequence[Tokens], indices: list[int], outcome: _Outcome) -> None:
        if len(indices) == 1:
            outcome.failures[indices[0]] = NO_MEMORY
            return
        middle = (len(indices) + 1) // 2
        # Remember the ceiling, so that the next batch does not run into it again.
        self.max_pass_tokens = min(self.max_pass_tokens, max(tokens[index].length for index in indices) * middle)
        self._log(f"out of memory with {len(indices)} pairs in a pass; a pass now holds {self.max_pass_tokens} tokens")
        self._pass(tokens, indices[:middle], outcome)
        self._pass(tokens, indices[middle:], outcome)

    def _isolate(self, tokens: Sequence[Tokens], indices: list[int], outcome: _Outcome, error: Exception) -> None:
        # Only the error's type is logged: its text may quote a document.
        self._log(f"{type(error).__name__} in a pass of {len(indices)} pairs")
        if "CUDA error" in str(error) or "device-side assert" in str(error):
            raise EngineSickError(type(error).__name__) from None
        if len(indices) == 1:
            outcome.failures[indices[0]] = _RAISED
            return
        broken = sum(failure is _RAISED for failure in outcome.failures.values())
        for position, index in enumerate(indices):
            if sum(failure is _RAISED for failure in outcome.failures.values()) - broken >= _MOST_BROKEN_PAIRS:
                outcome.failures.update(dict.fromkeys(indices[position:], _RAISED))
                return
            self._pass(tokens, [index], outcome)

    def _frame(self, prepared: Prepared, outcome: _Outcome, inference_ms: float) -> dict[str, Any]:
        logits = outcome.logits
        column = self._model_scores(outcome) if self._want_model_scores else None
        frame: dict[str, Any] = {
            "event": "scored",
            "batch": prepared.batch,
            "logits": logits,
            "probabilities": [None if logit is None else _sigmoid(logit) for logit in logits],
            "tokens": [item.length for item in prepared.tokens],
            "truncated": [index for index, item in enumerate(prepared.tokens) if item.truncated],
            "failures": [[index, *failure] for index, failure in sorted(outcome.failures.items())],
            "tokenize_ms": round(prepared.tokenize_ms, 3),
            "inference_ms": round(inference_ms, 3),
            "passes": outcome.passes,
        }
        if column is not None:
            frame["model_scores"] = column
        return frame

    def _model_scores(self, outcome: _Outcome) -> list[float | None]:
        """What the model's own activation makes of the logits; a pair for which that is not finite fails."""
        scored = [(index, logit) for index, logit in enumerate(outcome.logits) if logit is not None]
        column: list[float | None] = [None] * len(outcome.logits)
        for (index, _), value in zip(scored, self._backend.activate([logit for _, logit in scored]), strict=True):
            if math.isfinite(value):
                column[index] = value
            else:
                outcome.failures[index] = _NOT_FINITE
        return column


def _sigmoid(logit: float) -> float:
    """1 / (1 + e^-x) without overflow at either end."""
    if logit >= 0:
        return 1.0 / (1.0 + math.exp(-logit))
    power = math.exp(logit)
    return power / (1.0 + power)
