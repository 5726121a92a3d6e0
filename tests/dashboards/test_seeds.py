import math

import numpy as np
import pytest
from hqlt_dashboards.seeds import estimate, interquartile_mean, reading, readings
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap

VALUES = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=12)


@given(VALUES)
def test_an_interval_holds_the_mean_and_stays_within_the_seeds(values):
    found = estimate(values)
    if found.low is None:
        assert len(values) == 1
    else:
        slack = 1e-12 * max(map(abs, values))
        assert min(values) <= found.low <= found.mean + slack
        assert found.mean - slack <= found.high <= max(values)


@given(VALUES, st.randoms())
def test_the_order_of_the_seeds_does_not_matter(values, random):
    shuffled = list(values)
    random.shuffle(shuffled)
    assert estimate(shuffled) == estimate(values)


@pytest.mark.parametrize(("n", "expected"), [(3, 0.75), (5, 0.92), (10, 0.94)], ids=["3 seeds", "5 seeds", "10 seeds"])
def test_intervals_hold_the_true_mean_as_often_as_the_documentation_says(n, expected):
    rng = np.random.default_rng(n)
    found = [estimate(rng.normal(size=n).tolist()) for _ in range(600)]
    assert sum(e.low <= 0 <= e.high for e in found) / len(found) == pytest.approx(expected, abs=0.035)


def test_with_many_seeds_the_interval_is_the_usual_bootstrap_interval():
    values = np.random.default_rng(0).normal(size=200)
    usual = bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(1)).confidence_interval
    found = estimate(values.tolist())
    assert (found.low, found.high) == pytest.approx((usual.low, usual.high), abs=0.01)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=9))
def test_the_interquartile_mean_is_the_mean_of_the_middle_half_of_fourfold_values(values):
    fourfold = sorted(values * 4)  # every value four times: now n / 4 is whole and the middle half can be cut out
    n = len(values)
    assert interquartile_mean(values) == pytest.approx(math.fsum(fourfold[n : 3 * n]) / (2 * n), abs=1e-9)


@pytest.mark.parametrize("values", [[], [1.0, math.nan]], ids=["no value", "nan"])
def test_an_estimate_of_nothing_or_of_nan_is_refused(values):
    with pytest.raises(ValueError, match="at least one value, all finite"):
        estimate(values)


def test_a_failed_seed_has_no_reading(make_replica):
    assert readings([make_replica(0, 0.5), make_replica(1, None)], "normalised_validation_accuracy") == {0: 0.5}


def test_times_can_be_read_like_metrics(make_replica):
    assert reading(make_replica(0, 0.5), "train_seconds") == 2.0
    assert reading(make_replica(0, 0.5), "peak_memory_bytes") is None
    assert reading(make_replica(0, 0.5), "message") is None
