import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hqlt_orchestration.driving.importances import LEAST_TRIALS, importances
from hqlt_orchestration.records.tables import TrialRow
from hqlt_search_space.axes import AxisValue, Choices, RealRange
from hqlt_search_space.cost import costs
from hqlt_search_space.study import Study
from hqlt_search_space.trial import Importances, TrialRecord

MakeStudy = Callable[..., Study]
Value = Callable[[Mapping[str, AxisValue], float], float]
"""An objective's value by what was suggested and a number drawn by lot."""


def found(study: Study, value: Value, n_trials: int = 40, seed: int = 0) -> Importances:
    """What is said of the study's only objective after `n_trials` drawn at random."""
    draw = random.Random(seed)
    rows: list[TrialRow] = []
    records: list[TrialRecord] = []
    (objective,) = study.objectives
    for number in range(n_trials):
        params: dict[str, Any] = {
            name: draw.choice(domain.values) if isinstance(domain, Choices) else draw.uniform(domain.low, domain.high)
            for name, domain in study.domains().items()
            if isinstance(domain, Choices | RealRange)
        }
        config, choices = study.resolve(params)
        proposal = {"params": params, "attributes": {}}
        rows.append(TrialRow(number, "search", config, choices, None, costs(config), proposal, "complete"))
        records.append(
            TrialRecord(
                number=number,
                phase="search",
                state="complete",
                config=config,
                choices=choices,
                objectives={objective: value(params, draw.random())},
            )
        )
    (of_objective,) = importances(study, rows, records)
    return of_objective


@pytest.fixture
def study(make_study: MakeStudy) -> Study:
    return make_study(objectives={"validation_loss_nats": "minimize"})


def standing_out(of_objective: Importances) -> list[str]:
    return [axis.axis for axis in of_objective.axes if axis.share > axis.chance]


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_the_axis_that_makes_the_best_trials_stands_out_whichever_way_is_best(
    direction: str, make_study: MakeStudy
) -> None:
    study = make_study(objectives={"validation_loss_nats": direction})
    sign = 1 if direction == "minimize" else -1

    def value(params: Mapping[str, AxisValue], luck: float) -> float:
        # Who is best is decided by `rule`, and by it alone among a quarter; who is worst is decided by lot.
        return sign * (luck - 10 * (params["rule"] == "delta" and params["learning_rate"] < 5e-3))

    said = found(study, value, n_trials=80)
    assert "rule" in standing_out(said)
    assert {"mixing", "second", "ratio"}.isdisjoint(standing_out(said))
    assert sum(axis.share for axis in said.axes) == pytest.approx(1)


def test_of_values_drawn_by_lot_one_axis_in_twenty_stands_out(study: Study) -> None:
    said = [found(study, lambda _, luck: luck, n_trials=20, seed=seed) for seed in range(5)]
    n_axes = len(study.domains())
    assert n_axes == 7
    assert sum(len(standing_out(one)) for one in said) <= 6  # of 35; more would come three times in a thousand
    assert all(one.silent or standing_out(one) for one in said)


def test_an_axis_speaks_only_through_the_trials_that_it_has_a_meaning_for(make_study: MakeStudy) -> None:
    """`mixing` is suggested for every trial; here it decides all those where nothing reads it, and no other."""
    space = {"first": ["hybrid", "attention"], "mixing": ["sum", "concat"], "window": [4, 8]}
    study = make_study("random", space, objectives={"validation_loss_nats": "minimize"})

    def value(params: Mapping[str, AxisValue], luck: float) -> float:
        return luck + (params["first"] == "attention" and params["mixing"] == "concat")

    assert "mixing" not in standing_out(found(study, value, n_trials=60))


def test_where_nothing_can_be_said_there_is_a_sentence(study: Study) -> None:
    few = found(study, lambda _, luck: luck, n_trials=LEAST_TRIALS - 1)
    assert few.silent == f"{LEAST_TRIALS - 1} complete trials are too few: it takes {LEAST_TRIALS}"
    same = found(study, lambda *_: 0.5)
    assert same.silent == "all 40 complete trials have the same value"
    assert (same.axes, few.axes) == ((), ())


def test_an_ablation_has_no_importances(make_study: MakeStudy) -> None:
    ablation = {"baseline": {"first": "hybrid", "window": 4}, "vary": {"mixing": ["sum"]}}
    assert importances(make_study(search=None, ablation=ablation, budget={}), [], []) == ()
