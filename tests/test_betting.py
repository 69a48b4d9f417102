"""The hopeless stop: false stops within alpha, savings where a cell is far beyond, and the traps of its arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qfarm.betting import HopelessStop, shared_order
from qfarm.errors import InvalidInput, NonFinite


@pytest.fixture
def rng():
    return np.random.default_rng(20261121)


def stopped_at(differences, limit, **settings) -> int | None:
    """How many windows were seen when the test stopped; None if it never did."""
    test = HopelessStop(len(differences), limit, **settings)
    for seen, difference in enumerate(differences, 1):
        if test.add(float(difference)):
            return seen
    return None


def test_false_stops_of_cells_exactly_at_the_limit(rng):
    d = rng.normal(size=141) * 0.15
    d += 0.2 - d.mean()
    stops = sum(stopped_at(rng.permutation(d), 0.2, alpha=0.05) is not None for _ in range(1500))
    assert stops / 1500 <= 0.05


def test_false_stops_of_the_worst_two_point_data(rng):
    """Most windows at the floor, the rest far above, the mean exactly at the limit."""
    d = np.full(100, -0.5)
    d[:20] += (0.2 + 0.5) * 100 / 20
    assert d.mean() == pytest.approx(0.2)
    stops = sum(stopped_at(rng.permutation(d), 0.2, alpha=0.05) is not None for _ in range(1500))
    assert 0 < stops / 1500 <= 0.065


def test_far_beyond_the_limit_it_stops_early_and_sooner_than_with_an_exact_floor(rng):
    runs = [rng.normal(0.6, 0.1, size=141) for _ in range(50)]
    assert max(stopped_at(d, 0.2) or 141 for d in runs) <= 25
    assert min(stopped_at(d, 0.2, floor=5.0) or 141 for d in runs) > 25


def test_a_remainder_at_the_floor_is_no_proof():
    """m + floor is zero up to rounding: neither certainty nor a division by it."""
    d = [0.9, *[-0.1] * 9]  # mean 0 = limit once all are seen; after the first the rest must lie at the floor
    assert sum(d) == pytest.approx(0)
    assert stopped_at(d, 0.0, floor=0.1, alpha=0.05) is None
    certain = HopelessStop(10, 0.0, floor=0.1, alpha=0.05)
    certain.add(0.9 + 1e-6)
    assert certain.add(-0.1) and certain.log_wealth == math.inf


def test_one_difference_below_the_floor_makes_it_void():
    test = HopelessStop(100, 0.2)
    assert not test.add(-0.6)
    assert not any(test.add(5.0) for _ in range(99))
    assert test.void


def test_it_never_stops_after_the_last_window():
    assert stopped_at([9.0, 9.0], 0.1, alpha=0.5, floor=0.0) is None
    assert stopped_at([9.0], 0.1) is None


def test_the_first_window_alone_decides_nothing():
    test = HopelessStop(100, 0.1)
    assert not test.add(8.0) and test.log_wealth == 0.0


@pytest.mark.parametrize(
    "settings", [{"n": 0}, {"alpha": 0}, {"alpha": 1}, {"floor": -1}, {"limit": math.nan}, {"floor": math.inf}]
)
def test_settings_that_no_test_has_are_refused(settings):
    with pytest.raises(InvalidInput, match="a hopeless stop needs"):
        HopelessStop(**{"n": 10, "limit": 0.1} | settings)


def test_input_that_says_nothing_is_refused():
    test = HopelessStop(1, 0.1)
    with pytest.raises(NonFinite, match="window 1 of 1"):
        test.add(math.nan)
    test.add(0.0)
    with pytest.raises(ValueError, match="all 1 windows"):
        test.add(0.0)


def test_the_order_is_a_permutation_fixed_by_the_evaluation():
    order = shared_order("abc", 50)
    assert sorted(order) == list(range(50)) and list(order) != list(range(50))
    assert list(order) == list(shared_order("abc", 50))
    assert list(order) != list(shared_order("abd", 50))
