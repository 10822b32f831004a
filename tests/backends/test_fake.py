"""The fake backend: scores that show a mix-up, and faults on demand that hurt nobody else."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reranker_worker.backends import BackendError, OutOfMemoryError, Pair
from reranker_worker.backends.fake import FakeBackend, fake_logit, fake_probability

BACKEND = FakeBackend("bundled")


def logits(*documents: str) -> list[float]:
    return BACKEND.score(BACKEND.tokenize([Pair("q", document, 512) for document in documents]))


@given(st.text(), st.text())
def test_a_logit_is_finite_bounded_and_always_the_same(query: str, document: str) -> None:
    assert -8 <= fake_logit(query, document) < 8
    assert fake_logit(query, document) == fake_logit(query, document)
    assert fake_probability(query, document) == pytest.approx(1 / (1 + math.exp(-fake_logit(query, document))))


def test_query_and_document_both_matter() -> None:
    scores = {fake_logit(query, document) for query in ("a", "b", "") for document in ("c", "d", "")}
    assert len(scores) == 9


def test_scores_do_not_depend_on_the_mates() -> None:
    assert logits("a", "b", "c") == [logits("a")[0], logits("b")[0], logits("c")[0]]


def test_long_documents_are_cut_and_a_long_query_leaves_no_room() -> None:
    short, cut, full = BACKEND.tokenize([Pair("q", "a" * 40, 512), Pair("q", "a" * 4000, 512), Pair("q" * 4000, "a", 512)])
    assert (short.length, short.truncated, short.fits) == (13, False, True)
    assert (cut.length, cut.truncated, cut.fits) == (512, True, True)
    assert not full.fits
    assert BACKEND.tokenize([Pair("q", "a" * 40, 8)])[0].truncated


def test_faults_that_can_be_caught() -> None:
    assert math.isnan(logits("fake:nan")[0])
    with pytest.raises(ValueError):
        logits("fake:raise")
    with pytest.raises(OutOfMemoryError):
        logits("fake:oom1")
    with pytest.raises(OutOfMemoryError):
        logits("fake:oom", "a")
    assert math.isfinite(logits("fake:oom")[0])
    assert math.isfinite(logits("fake:unknown")[0])


def test_the_activation_is_the_sigmoid() -> None:
    assert BACKEND.activate([0.0, 2.0]) == [0.5, pytest.approx(0.880797)]


def test_a_wrong_pace_is_a_sentence_and_a_wanted_failure_has_its_code() -> None:
    with pytest.raises(BackendError, match="load_ms") as wrong:
        FakeBackend("load_ms=soon")
    assert wrong.value.exit_code == 78
    with pytest.raises(BackendError) as wanted:
        FakeBackend("fail=66")
    assert wanted.value.exit_code == 66
    assert FakeBackend("pair_us=1&load_ms=0").score([]) == []


def test_a_directory_name_is_not_taken_for_options() -> None:
    assert FakeBackend("org/name").info.max_length == 512
