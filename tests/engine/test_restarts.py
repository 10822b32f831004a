"""A dead engine is started again soon, then later, then every 30 seconds."""

from __future__ import annotations

import pytest

from reranker_worker.engine.restarts import DELAYS_SECONDS, PERMANENT_EXIT_CODES, SLOW_SECONDS, WINDOW_SECONDS, Restarts


def test_deaths_at_once_back_off_and_then_storm() -> None:
    restarts = Restarts()
    delays = []
    for death in range(8):
        assert restarts.storming(0.0) is (death >= 5)
        delays.append(restarts.delay(0.0))
    assert delays == [0.0, 0.1, 0.5, 2.0, 5.0, 30.0, 30.0, 30.0]


def test_deaths_more_than_a_minute_apart_cost_nothing() -> None:
    restarts = Restarts()
    assert [restarts.delay(61.0 * number) for number in range(20)] == [0.0] * 20
    assert not restarts.storming(61.0 * 20)


def test_a_death_counts_for_a_minute() -> None:
    restarts = Restarts()
    restarts.delay(0.0)
    assert restarts.delay(60.0) == DELAYS_SECONDS[1]
    assert restarts.delay(60.1) == DELAYS_SECONDS[1]


def test_an_engine_that_dies_at_every_start_is_tried_every_30_seconds_for_ever() -> None:
    restarts = Restarts()
    now, delays = 0.0, []
    for _ in range(40):
        delays.append(restarts.delay(now))
        now += delays[-1]
        assert len(delays) < len(DELAYS_SECONDS) or restarts.storming(now)
        now += 1.0  # it dies a second after its start
    assert delays == [*DELAYS_SECONDS, *[SLOW_SECONDS] * 35]


def test_a_storm_is_over_when_an_engine_has_lived_for_a_minute() -> None:
    restarts = Restarts()
    for _ in range(9):
        restarts.delay(0.0)
    after = SLOW_SECONDS + WINDOW_SECONDS + 0.1
    assert restarts.storming(WINDOW_SECONDS)
    assert not restarts.storming(after)
    assert restarts.delay(after) == 0.0


@pytest.mark.parametrize("code", [64, 65, 66, 76, 77, 78])
def test_a_cause_that_a_restart_cannot_help_is_permanent(code: int) -> None:
    assert code in PERMANENT_EXIT_CODES


@pytest.mark.parametrize("code", [0, 1, 69, 70, 71, 74, 75, -9, -11])
def test_other_causes_are_not_permanent(code: int) -> None:
    assert code not in PERMANENT_EXIT_CODES
