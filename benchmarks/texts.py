"""English-like queries and passages of realistic length, the same for the same seed, without any data from outside.

Words are drawn with Zipf-like frequencies from a list of common function words and from content words that are composed of
stems and endings, so that a WordPiece vocabulary splits some of them, as it does with real prose. Passage lengths are
log-normal: about 75 tokens on average, 150 at the 95th percentile (what passages of web search collections have), 8 to 400.
"""

from __future__ import annotations

import math
import random
from itertools import accumulate

_FUNCTION_WORDS = (
    "the of and to in a is that for it was on are as with be by at this from have or an but not which one you were all their has been more "
    "when there can who will if no out so up said what about than into them only other time new some could these two may then do first any "
    "my now such like our over me even most made after also did many before must through back where much your way down should because each"
).split()
_STEMS = (
    "form act port light water build press state count law work mark field time ground point line power stand hand house light land move "
    "serve turn cover plan order trade claim price market school river store train paper sound stone ship court test report control record "
    "govern develop manage produce measure connect protect transport publish perform contain describe engine pattern season village music "
    "medic nation region victor histor electr chemi bio therm magnet hydro photo micro crystal polymer protein glucose enzyme quantum"
).split()
_ENDINGS = ("", "", "", "s", "ed", "ing", "er", "ation", "ment", "able", "ness", "al", "ization")
_ENDING_WEIGHTS = (14, 14, 14, 9, 8, 8, 4, 3, 3, 2, 1, 3, 1)
_CONTENT_SHARE = 0.55
_WORDS_A_SENTENCE = (7, 24)
# Of the number of words; a word with its share of punctuation and of split words makes about 1.31 tokens of a WordPiece vocabulary.
_MEAN_TOKENS, _P95_TOKENS, _TOKENS_A_WORD = 75.0, 150.0, 1.31
_LEAST_TOKENS, _MOST_TOKENS = 8, 400
_LONG_TOKENS = (370, 430)
_SIGMA = 1.645 - math.sqrt(1.645**2 - 2 * math.log(_P95_TOKENS / _MEAN_TOKENS))
_MU = math.log(_MEAN_TOKENS) - _SIGMA**2 / 2


class Texts:
    """A stream of texts; two streams with one seed are equal."""

    def __init__(self, seed: int = 1) -> None:
        self._random = random.Random(seed)
        self._function_weights = list(accumulate(1.0 / (rank + 2) for rank in range(len(_FUNCTION_WORDS))))

    def query(self) -> str:
        """Three to nine words, as people type them."""
        return " ".join(self._word() for _ in range(self._random.randint(3, 9)))

    def passage(self) -> str:
        """Sentences of a log-normal total length."""
        tokens = min(_MOST_TOKENS, max(_LEAST_TOKENS, self._random.lognormvariate(_MU, _SIGMA)))
        return self._sentences(max(3, round(tokens / _TOKENS_A_WORD)))

    def passages(self, count: int) -> list[str]:
        """So many passages."""
        return [self.passage() for _ in range(count)]

    def long_passages(self, count: int) -> list[str]:
        """So many passages of about 400 tokens each."""
        return [self._sentences(round(self._random.uniform(*_LONG_TOKENS) / _TOKENS_A_WORD)) for _ in range(count)]

    def _sentences(self, words: int) -> str:
        parts: list[str] = []
        while words > 0:
            size = min(words, self._random.randint(*_WORDS_A_SENTENCE))
            words -= size
            sentence = [self._word() for _ in range(size)]
            if size > 12:
                sentence[size // 2] += ","
            parts.append(" ".join(sentence).capitalize() + ".")
        return " ".join(parts)

    def _word(self) -> str:
        if self._random.random() < _CONTENT_SHARE:
            return self._random.choice(_STEMS) + self._random.choices(_ENDINGS, _ENDING_WEIGHTS)[0]
        return self._random.choices(_FUNCTION_WORDS, cum_weights=self._function_weights)[0]
