"""What a pair costs and how fast an engine is: first guessed, then learned from what the engines report. Pure."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reranker_worker.jobs import Batch, Job, Result

_CHARS_PER_TOKEN = 4.0  # English prose under a WordPiece vocabulary
_TOKENS_PER_MS = 4.0  # a slow CPU
_TOKENS_PER_PAIR = 80.0  # passages
_SPECIAL_TOKENS = 3
_LONG_TOKENS = 512  # a longer pair is cut to the model's limit, so that it costs no more than this; `ready` corrects it
_BLEND = 0.3  # weight of the newest report
_FIRST_MS = 50.0  # a first estimate weighs as much as a batch of this length
_MOST_TIMES = 8.0  # what a batch is believed to have taken at most, in times of what was expected
_MOST_GROWTH = 1.9  # in times, from one report to the next: a first one may be far off
_MOST_TOKENS_PER_CHAR = 2.0
_STR_OVERHEAD_BYTES = sys.getsizeof("")


class Pace:
    """Estimates in tokens and milliseconds. `longest_tokens` is the model's max_length; a batch of less than `pass_tokens` tokens would not
    keep the engine busy; `packed`: it pads nothing, so that pairs of any lengths may meet in a batch; `parallel`: so many passes run side by side,
    and where there are several, each of a batch's waits for itself and may be overtaken."""

    def __init__(self) -> None:
        self.assume(_TOKENS_PER_MS)
        self.tokens_per_pair = _TOKENS_PER_PAIR
        self.longest_tokens = _LONG_TOKENS
        self.pass_tokens = 0
        self.parallel = 1
        self.packed = False
        self._tokens_per_char = 1.0 / _CHARS_PER_TOKEN

    def assume(self, tokens_per_ms: float) -> None:
        """Start from a speed that an engine measured, before any batch was scored."""
        self.tokens_per_ms = max(0.1, tokens_per_ms)
        self._tokens, self._ms = self.tokens_per_ms * _FIRST_MS, _FIRST_MS

    def budget_tokens(self, target_ms: float, share: int = 1) -> float:
        """Tokens of a batch that takes about `target_ms`, but at least what keeps one of `share` parts of the engine busy: on a slow machine less
        would only cost more."""
        return max(1.0, self.tokens_per_ms * target_ms, self.pass_tokens / share)

    def next_tokens(self, job: Job) -> float:
        """Estimated tokens of a job's next pair; it must have one."""
        group, _, run = job.next_run(1)
        return self.affordable(job, group, run, 0.0, force=True)[0]

    def affordable(self, job: Job, group: int, run: Sequence[str], budget: float, *, force: bool) -> tuple[float, int]:
        """(estimated tokens, number) of the leading documents that fit the budget; at least one with `force`."""
        longest = job.max_length or self.longest_tokens
        fixed = len(job.groups[group][0]) * self._tokens_per_char + _SPECIAL_TOKENS
        total = 0.0
        for size, document in enumerate(run):
            cost = min(longest, fixed + len(document) * self._tokens_per_char)
            if total + cost > budget and (size or not force):
                return total, size
            total += cost
        return total, len(run)

    def wait_ms(self, num_bytes: int, num_pairs: int, engines: int) -> float:
        """About how long so much text takes."""
        chars = max(0, num_bytes - num_pairs * _STR_OVERHEAD_BYTES)
        tokens = chars * self._tokens_per_char + num_pairs * _SPECIAL_TOKENS
        return tokens / self.tokens_per_ms / max(1, engines)

    def learn(self, batch: Batch, result: Result) -> None:
        """Correct the estimates by what a batch really took."""
        tokens = sum(result.tokens)
        elapsed = result.tokenize_ms + result.inference_ms
        if tokens <= 0:
            return
        chars = sum(len(s.job.groups[s.group][0]) * len(s.documents) + sum(map(len, s.documents)) for s in batch.slices)
        # Cut documents would make characters look cheap.
        if chars and not result.truncated:
            text_tokens = max(1, tokens - _SPECIAL_TOKENS * batch.num_pairs)
            self._tokens_per_char += _BLEND * (min(_MOST_TOKENS_PER_CHAR, text_tokens / chars) - self._tokens_per_char)
        self.tokens_per_pair += _BLEND * (tokens / batch.num_pairs - self.tokens_per_pair)
        # The speed of the last batches together: of two that end at once, one is charged the time and the other next to nothing.
        # A machine that stood still says nothing; more than a few batches never end together.
        elapsed = min(max(elapsed, 0.01), _MOST_TIMES * tokens / self.tokens_per_ms)
        self._tokens += tokens - _BLEND * self._tokens
        self._ms += elapsed - _BLEND * self._ms
        self.tokens_per_ms = min(self._tokens / self._ms, _MOST_GROWTH * self.tokens_per_ms)
