"""Figures and texts of the benchmarks."""

from __future__ import annotations

import statistics

from benchmarks.figures import cell, quantile, table
from benchmarks.texts import Texts


def test_the_texts_are_the_same_for_the_same_seed_and_all_different() -> None:
    passages = Texts(3).passages(500)
    assert passages == Texts(3).passages(500)
    assert passages != Texts(4).passages(500)
    assert len(set(passages)) == 500


def test_the_passages_have_realistic_lengths() -> None:
    words = [len(passage.split()) for passage in Texts(1).passages(3000)]
    assert 52 <= statistics.mean(words) <= 62  # times about 1.31 tokens a word: 75
    assert 100 <= quantile(words, 0.95) <= 125


def test_long_passages_have_about_400_tokens_each() -> None:
    words = [len(passage.split()) for passage in Texts(1).long_passages(200)]
    assert 300 <= statistics.mean(words) <= 311
    assert 275 <= min(words) < max(words) <= 335


def test_quantiles_are_nearest_ranks() -> None:
    values = [float(value) for value in range(1, 101)]
    assert (quantile(values, 0.5), quantile(values, 0.99), quantile(values, 1.0), quantile([5.0], 0.01)) == (50.0, 99.0, 100.0, 5.0)


def test_a_goal_is_judged_by_the_median() -> None:
    assert cell("a", "x", [1.0, 2.0, 9.0], at_least=2).ok
    assert not cell("a", "x", [1.0, 2.0, 9.0], at_most=1.5).ok
    assert "missed" in table([cell("a", "x", [1.0], at_least=2)])
