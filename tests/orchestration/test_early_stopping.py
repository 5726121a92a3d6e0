import math

from hqlt_orchestration.driving.early_stopping import goes_on, priority
from hypothesis import given
from hypothesis import strategies as st

points = st.tuples(st.floats(-1, 1), st.floats(-1, 1))
rungs = st.dictionaries(st.integers(0, 50), points, min_size=1, max_size=15)


@given(rungs, st.floats(1.5, 5))
def test_at_least_one_in_eta_goes_on_and_ties_more(rung: dict[int, tuple[float, float]], eta: float) -> None:
    kept = [key for key in rung if goes_on(rung, key, eta=eta, min_competitors=1)]
    assert len(kept) >= max(1, math.floor(len(rung) / eta))
    assert len({rung[key] for key in kept}) <= max(1, math.floor(len(rung) / eta))


@given(rungs)
def test_no_trial_stands_before_one_that_dominates_it(rung: dict[int, tuple[float, float]]) -> None:
    order = priority(rung)
    for place, worse in enumerate(order):
        for better in order[place + 1 :]:
            a, b = rung[better], rung[worse]
            assert not (a[0] <= b[0] and a[1] <= b[1] and a != b)


@given(rungs, st.randoms())
def test_the_order_of_arrival_does_not_matter(rung: dict[int, tuple[float, float]], random: object) -> None:
    shuffled = dict(sorted(rung.items(), reverse=True))
    assert priority(shuffled) == priority(rung)


def test_a_rung_with_few_competitors_stops_nobody() -> None:
    assert goes_on({"a": (0.0,), "b": (1.0,)}, "b", eta=2, min_competitors=3)


def test_a_cheap_slow_learner_on_the_front_is_kept_before_a_dominated_fast_one() -> None:
    rung = {"fast, large": (-0.9, 8.0), "slow, small": (-0.1, 1.0), "middling": (-0.5, 8.0), "bad": (-0.1, 9.0)}
    assert goes_on(rung, "slow, small", eta=2, min_competitors=3)
    assert not goes_on(rung, "middling", eta=2, min_competitors=3)


def test_a_front_of_equals_is_spread_out_instead_of_cut_at_one_end() -> None:
    rung = {i: (float(i), float(-i)) for i in range(9)}
    assert set(priority(rung)[:3]) == {0, 8, 4}
