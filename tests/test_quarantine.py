"""What killed an engine twice is refused for ten minutes, and nothing else is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from reranker_worker.quarantine import SECONDS, Quarantine

POISON = [("q", ("a", "b"))]
TEXT = st.text(max_size=4)
GROUPS = st.lists(st.tuples(TEXT, st.lists(TEXT, max_size=3)), min_size=1, max_size=1)


def test_nothing_is_held_at_first() -> None:
    assert not Quarantine().holds(POISON, 0.0)


def test_a_request_is_held_for_ten_minutes_and_then_let_through() -> None:
    quarantine = Quarantine()
    quarantine.add(POISON, 100.0)
    assert SECONDS == 600.0
    assert quarantine.holds(POISON, 100.0)
    assert quarantine.holds([("q", ["a", "b"])], 699.9)
    assert not quarantine.holds(POISON, 700.0)


def test_the_time_starts_again_with_the_next_poisoning() -> None:
    quarantine = Quarantine()
    quarantine.add(POISON, 0.0)
    quarantine.add(POISON, 500.0)
    assert quarantine.holds(POISON, 1000.0)


@given(GROUPS, GROUPS)
def test_two_requests_are_told_apart_by_any_difference(one: list[tuple[str, list[str]]], other: list[tuple[str, list[str]]]) -> None:
    quarantine = Quarantine()
    quarantine.add(one, 0.0)
    assert quarantine.holds(other, 1.0) is (one == other)


def test_the_edges_between_texts_count() -> None:
    quarantine = Quarantine()
    quarantine.add([("ab", ("c",))], 0.0)
    assert not quarantine.holds([("a", ("bc",))], 0.0)


def test_at_most_1024_requests_are_remembered_and_the_oldest_goes_first() -> None:
    quarantine = Quarantine()
    for number in range(1025):
        quarantine.add([("q", (str(number),))], 0.0)
    assert not quarantine.holds([("q", ("0",))], 1.0)
    assert quarantine.holds([("q", ("1",))], 1.0)
    assert quarantine.holds([("q", ("1024",))], 1.0)
