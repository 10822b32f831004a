"""Answers without ids leave in the order in which their requests came."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from reranker_worker.ordering import Order


def test_a_finished_line_waits_for_all_before_it() -> None:
    order = Order()
    first, second, third = (order.reserve() for _ in range(3))
    assert order.fill(third, b"3") == []
    assert order.fill(first, b"1") == [b"1"]
    assert order.fill(second, b"2") == [b"2", b"3"]


def test_an_empty_line_counts_as_a_line() -> None:
    order = Order()
    first, second = order.reserve(), order.reserve()
    assert order.fill(second, b"x") == []
    assert order.fill(first, b"") == [b"", b"x"]


@given(st.permutations(range(12)), st.integers(1, 12))
def test_any_order_of_finishing_gives_the_order_of_reserving(finish: list[int], ahead: int) -> None:
    order = Order()
    places = [order.reserve() for _ in range(ahead)]
    left: list[bytes] = []
    for count, number in enumerate(sorted(finish[:ahead], key=finish.index)):
        if number >= len(places):
            continue
        left += order.fill(places[number], b"%d" % number)
        assert left == [b"%d" % index for index in range(len(left))], count
    for number in set(range(ahead)) - set(finish[:ahead]):
        left += order.fill(places[number], b"%d" % number)
    assert left == [b"%d" % index for index in range(ahead)]
