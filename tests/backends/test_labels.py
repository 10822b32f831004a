"""Which of several labels means relevant: what the operator says, else what the names declare, else a refusal."""

from __future__ import annotations

import pytest

from reranker_worker.backends import BackendError
from reranker_worker.backends.labels import relevance_index


@pytest.mark.parametrize(
    ("labels", "wanted", "index"),
    [
        (["LABEL_0"], "", 0),
        (["anything"], "anything", 0),
        (["not_relevant", "relevant"], "", 1),
        (["contradiction", "entailment", "neutral"], "", 1),
        (["Is Relevant", "no"], "", 0),
        (["no", "YES"], "", 1),
        (["LABEL_0", "LABEL_1"], "LABEL_1", 1),
        (["LABEL_0", "LABEL_1"], "label_1", 1),
        (["LABEL_0", "LABEL_1"], "1", 1),
        (["yes", "relevant"], "yes", 0),
        (["1", "0"], "0", 1),
    ],
)
def test_a_label_is_found(labels: list[str], wanted: str, index: int) -> None:
    assert relevance_index(labels, wanted) == index


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        (["LABEL_0", "LABEL_1"], ""),
        (["relevant", "entailment"], ""),
        (["good", "bad"], ""),
        (["LABEL_0", "LABEL_1"], "2"),
        (["LABEL_0", "LABEL_1"], "-1"),
        (["LABEL_0", "LABEL_1"], "relevant"),
        (["LABEL_0"], "relevant"),
        (["same", "same"], "same"),
    ],
)
def test_what_is_not_declared_is_refused_with_the_labels_named(labels: list[str], wanted: str) -> None:
    with pytest.raises(BackendError) as caught:
        relevance_index(labels, wanted)
    assert caught.value.exit_code == 78
    assert "RERANKING_RELEVANCE_LABEL" in str(caught.value)
    assert all(label in str(caught.value) for label in labels)
