"""A backend without a model: the logit is a hash of the pair, so that a mixed-up answer shows. For tests and for hosts.

Its `--model` may set its pace as `load_ms=500&pair_us=20`, how many passes run side by side as `parallel=2`, or `fail=66` to fail the start
with an exit code. A document that begins with `fake:` asks for a fault:
`fake:kill N` (signal N), `fake:exit N`, `fake:hang`, `fake:sleep MS`, `fake:nan`, `fake:oom` (more than one pair in a pass),
`fake:oom1` (always), `fake:raise`, `fake:tokenize` (raised before it is scored), `fake:print` (noise on every stream a library could use).
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
import warnings
import zlib
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from reranker_worker.backends import BackendError, BackendInfo, OutOfMemoryError, Pair, Tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

_MAX_LENGTH = 512
_CHARS_PER_TOKEN = 4
_SPECIAL_TOKENS = 3


def fake_logit(query: str, document: str) -> float:
    """The logit of a pair: in [-8, 8), the same in every process."""
    return zlib.crc32(document.encode(), zlib.crc32(query.encode())) / 2**28 - 8.0


def fake_probability(query: str, document: str) -> float:
    """The default score of a pair."""
    return 1.0 / (1.0 + math.exp(-fake_logit(query, document)))


class FakeBackend:
    """See the module. `name` is the model's name: "bundled" or options."""

    def __init__(self, name: str) -> None:
        options = parse_qs(name) if "=" in name else {}
        try:
            self._pair_seconds = float(options.get("pair_us", ["0"])[0]) / 1e6
            load_seconds = float(options.get("load_ms", ["0"])[0]) / 1e3
            parallel = int(options.get("parallel", ["1"])[0])
        except ValueError:
            raise BackendError("The fake backend takes --model 'load_ms=NUMBER&pair_us=NUMBER&parallel=NUMBER'.", 78) from None
        if "fail" in options:
            raise BackendError("The fake backend was told to fail to load.", int(options["fail"][0]))
        if load_seconds:
            time.sleep(load_seconds)
        self.info = BackendInfo(
            backend="fake",
            device="cpu",
            dtype="float32",
            max_length=_MAX_LENGTH,
            activation="sigmoid",
            max_pass_tokens=512,
            parallel_passes=parallel,
            least_batch_tokens=512,
        )

    def tokenize(self, pairs: Sequence[Pair]) -> list[Tokens]:
        """Four characters are one token; the query alone must fit."""
        tokens: list[Tokens] = []
        for pair in pairs:
            if pair.document.startswith("fake:tokenize"):
                raise ValueError(pair.document)
            query_tokens = len(pair.query) // _CHARS_PER_TOKEN + _SPECIAL_TOKENS
            length = query_tokens + len(pair.document) // _CHARS_PER_TOKEN
            cut = length > pair.max_length
            fits = query_tokens < pair.max_length
            tokens.append(Tokens((pair.query, pair.document), min(length, pair.max_length), cut, fits))
        return tokens

    def score(self, batch: Sequence[Tokens]) -> list[float]:
        """A hash for each pair; faults as asked."""
        if self._pair_seconds:
            time.sleep(self._pair_seconds * len(batch))
        logits: list[float] = []
        for tokens in batch:
            query, document = tokens.inputs
            logits.append(_fault(document, len(batch)) if document.startswith("fake:") else fake_logit(query, document))
        return logits

    def activate(self, logits: list[float]) -> list[float]:
        """The sigmoid."""
        return [1.0 / (1.0 + math.exp(-logit)) for logit in logits]


def _fault(document: str, pass_size: int) -> float:
    command, _, argument = document.removeprefix("fake:").partition(" ")
    number = int(argument.split()[0]) if argument[:1].isdigit() else 0
    if command == "kill":
        os.kill(os.getpid(), number)
        threading.Event().wait()  # the signal may take a moment; no score may leave meanwhile
    elif command == "exit":
        os._exit(number)
    elif command == "hang":
        threading.Event().wait()
    elif command == "sleep":
        time.sleep(number / 1e3)
    elif command == "nan":
        return math.nan
    elif command == "oom1" or (command == "oom" and pass_size > 1):
        raise OutOfMemoryError
    elif command == "raise":
        raise ValueError(document)
    elif command == "print":
        _noise()
    return fake_logit("", document)


def _noise() -> None:
    print("noise from print")
    os.write(1, b"noise from write(1)\n")
    os.system("echo noise from a child")  # noqa: S605, S607  # a fault on purpose
    warnings.warn("noise from a warning", stacklevel=1)
    sys.stderr.write("noise on stderr\n")
