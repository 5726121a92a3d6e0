import itertools
import math

import numpy as np
import pytest
from hqlt_dashboards.front import front, front_hypervolume, front_members, hypervolume, ranks, reference_point
from hqlt_search_space.trial import Objective
from hypothesis import given, settings
from hypothesis import strategies as st

COORDINATE = st.integers(0, 5).map(float)  # few values, so that ties and equal points are common


def points_of(n_objectives, most):
    return st.lists(st.tuples(*[COORDINATE] * n_objectives), max_size=most)


SOME_POINTS = st.integers(1, 5).flatmap(lambda m: points_of(m, 12))


def dominates(a, b):
    return all(x <= y for x, y in zip(a, b, strict=True)) and a != b


def volume_by_inclusion_and_exclusion(points, reference):
    """The volume of a union of boxes, from its definition: 2^n terms."""
    total = 0.0
    for size in range(1, len(points) + 1):
        for chosen in itertools.combinations(points, size):
            corner = [max(column) for column in zip(*chosen, strict=True)]
            box = math.prod(max(0.0, r - c) for r, c in zip(reference, corner, strict=True))
            total += box if size % 2 else -box
    return total


@given(SOME_POINTS)
def test_a_rank_is_one_above_the_worst_rank_that_dominates_it(points):
    found = ranks(points)
    for p, rank in zip(points, found, strict=True):
        above = [r for q, r in zip(points, found, strict=True) if dominates(q, p)]
        assert rank == (max(above) + 1 if above else 0)


@settings(deadline=None)
@given(st.integers(1, 5).flatmap(lambda m: points_of(m, 7)))
def test_hypervolume_equals_inclusion_and_exclusion(points):
    reference = [4.0] * (len(points[0]) if points else 2)  # some points lie on its faces and some outside
    assert hypervolume(points, reference) == volume_by_inclusion_and_exclusion(points, reference)


@pytest.mark.parametrize("n_objectives", [2, 3, 4, 5], ids=lambda m: f"{m} objectives")
def test_hypervolume_of_many_points_does_not_depend_on_the_order_of_points_or_objectives(n_objectives):
    rng = np.random.default_rng(0)
    points = rng.exponential(size=(60, n_objectives))
    volumes = [
        hypervolume(points[np.ix_(rng.permutation(60), rng.permutation(n_objectives))].tolist(), [4.0] * n_objectives)
        for _ in range(4)
    ]
    assert volumes == pytest.approx([volumes[0]] * 4, rel=1e-12)


def test_hypervolume_of_two_thousand_points_on_a_plane_approaches_the_volume_under_it():
    # In the unit box, the part above the plane x + y + z = 1 is 5/6 of it.
    rng = np.random.default_rng(0)
    points = rng.dirichlet([1.0, 1.0, 1.0], size=2000)
    assert hypervolume(points.tolist(), (1.0, 1.0, 1.0)) == pytest.approx(5 / 6, abs=0.03)


@pytest.mark.parametrize(
    "refuse", [ranks, lambda points: hypervolume(points, (1.0, 1.0))], ids=["ranks", "hypervolume"]
)
def test_a_point_with_nan_is_refused(refuse):
    with pytest.raises(ValueError, match="a trial without a result has no point"):
        refuse([(0.0, math.nan)])


def test_points_and_reference_must_have_the_same_number_of_objectives():
    with pytest.raises(ValueError, match="points have 2 objectives, the reference point has 3"):
        hypervolume([(0.0, 0.0)], (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="different numbers of objectives"):
        ranks([(0.0, 0.0), (1.0,)])


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=10))
def test_the_front_is_what_no_other_trial_dominates(make_record, make_study, values):
    records = [make_record(i, accuracy / 4, 64.0 * size) for i, (accuracy, size) in enumerate(values)]
    points = {r.number: (-r.objectives["normalised_validation_accuracy"], r.costs["state_bytes"]) for r in records}
    expected = {n for n, p in points.items() if not any(dominates(q, p) for q in points.values())}
    assert {r.number for r in front(records, make_study().objectives)} == expected


def test_the_front_begins_with_the_best_in_the_first_objective(make_record, make_study):
    members = front(
        [make_record(0, 0.2, 100), make_record(1, 0.9, 300), make_record(2, 0.5, 200)], make_study().objectives
    )
    assert [r.number for r in members] == [1, 2, 0]


def test_only_complete_trials_with_every_objective_compete(make_record, make_study):
    records = [
        make_record(0, 0.1, 500),
        make_record(1, 0.9, 100, state="stopped"),
        make_record(2, None),
        make_record(3, 0.9, 100, objectives={"normalised_validation_accuracy": 0.9}),
        make_record(4, 0.9, 100, state="running"),
    ]
    assert [r.number for r in front(records, make_study().objectives)] == [0]


def test_a_config_that_ran_twice_stands_once_with_its_lowest_number(make_record, make_study):
    first = make_record(3, 0.5)
    again = first.model_copy(update={"number": 8})
    assert front([again, first], make_study().objectives) == (first,)


def test_a_trial_that_breaks_a_constraint_is_not_on_the_front(make_record, make_study):
    records = make_record(0, 0.9, 4096), make_record(1, 0.5, 1024)
    results = make_study(*records, constraints={"state_bytes": (None, 2048.0)})
    assert [m.record.number for m in front_members(results)] == [1]


def test_the_front_is_redrawn_on_the_means_over_fresh_seeds(make_record, make_study):
    lucky = make_record(0, 0.9, 100, replication={1: 0.3, 2: 0.4, 3: 0.5})
    small = make_record(1, 0.8, 50, replication={1: 0.7, 2: 0.8, 3: 0.9})
    (member,) = front_members(make_study(lucky, small))
    assert (member.record.number, member.replicated, member.n_seeds) == (1, True, 3)
    assert member.values["normalised_validation_accuracy"] == pytest.approx(0.8)
    assert member.estimates["normalised_validation_accuracy"].low == 0.7
    assert "state_bytes" not in member.estimates


def test_a_trial_that_was_not_replicated_cannot_enter_a_redrawn_front(make_record, make_study):
    replicated = make_record(0, 0.9, 100, replication={1: 0.3, 2: 0.4})
    one_seed = make_record(1, 0.85, 100)
    assert [m.record.number for m in front_members(make_study(replicated, one_seed))] == [0]


def test_until_every_member_is_replicated_the_front_is_that_of_the_search(make_record, make_study):
    done = make_record(0, 0.9, 100, replication={1: 0.1})
    waiting = make_record(1, 0.8, 50)
    members = front_members(make_study(done, waiting))
    assert [(m.record.number, m.values["normalised_validation_accuracy"]) for m in members] == [(0, 0.9), (1, 0.8)]
    assert not any(m.replicated for m in members)


def test_the_seed_of_the_search_does_not_enter_the_replication_mean(make_record, make_study):
    (member,) = front_members(make_study(make_record(0, 0.9, replication={0: 0.9, 1: 0.5, 2: 0.7})))
    assert member.values["normalised_validation_accuracy"] == pytest.approx(0.6)


def test_a_fresh_seed_that_failed_is_counted_and_not_averaged(make_record, make_study):
    (member,) = front_members(make_study(make_record(0, 0.9, replication={1: 0.5, 2: None})))
    assert (member.values["normalised_validation_accuracy"], member.n_seeds, member.n_failed) == (0.5, 1, 1)


def test_a_front_whose_fresh_seeds_all_failed_keeps_the_values_of_the_search(make_record, make_study):
    (member,) = front_members(make_study(make_record(0, 0.9, replication={1: None, 2: None})))
    assert (member.values["normalised_validation_accuracy"], member.replicated) == (0.9, False)


def test_the_reference_is_zero_accuracy_a_constraint_or_the_worst_seen_with_a_margin(make_record, make_study):
    objectives = (
        Objective(name="validation_accuracy", direction="maximize"),
        Objective(name="parameters", direction="minimize"),
        Objective(name="validation_loss_nats", direction="minimize"),
    )
    values = [{"validation_accuracy": 0.5, "parameters": 10.0, "validation_loss_nats": x} for x in (1.0, 2.0)]
    results = make_study(
        *[make_record(i, objectives=v) for i, v in enumerate(values)],
        objectives=objectives,
        constraints={"parameters": (None, 50_000.0)},
    )
    assert reference_point(results) == pytest.approx((0.0, 50_000.0, 2.1))


def test_a_single_complete_trial_has_a_positive_hypervolume(make_record, make_study):
    assert front_hypervolume(make_study(make_record(0, 0.5))) > 0
    assert front_hypervolume(make_study()) == 0.0
