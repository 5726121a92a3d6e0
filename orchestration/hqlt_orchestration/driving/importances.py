"""Which axes of a search decide who is among its best, objective by objective.

PED-ANOVA (Watanabe et al. 2023, arXiv:2304.10255; with axes that not every trial has: arXiv:2601.20800): how much the
values of an axis among the best trials differ from its values among all. An axis counts for a trial only if it has a
meaning for its config, so a window says nothing through the models that have none.

Shares add up to 1 even where nothing matters, for many trials as for few: of seven axes, noise gives one of them a
third. So the same is computed for shuffled values, and what an axis is worth is seen beside what chance gives it.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import optuna
from hqlt_search_space.axes import AxisValue
from hqlt_search_space.study import Study
from hqlt_search_space.trial import AxisImportance, Importances, TrialRecord
from numpy.typing import NDArray
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import FrozenTrial, create_trial

from hqlt_orchestration.driving.sampler import distribution
from hqlt_orchestration.records.tables import TrialRow

LEAST_TRIALS = 15  # three times the best: there must be something to differ from
LEAST_BEST = 5  # what PED-ANOVA needs above its threshold to be steady, says Optuna
BEST_SHARE = 0.1
N_SHUFFLES = 100
CONFIDENCE = 0.95


def importances(study: Study, rows: Sequence[TrialRow], records: Sequence[TrialRecord]) -> tuple[Importances, ...]:
    """For each objective of a search: its axes, the most important first, or why nothing can be said.

    `rows` and `records` are the same trials, as proposed and as they ended; complete ones count. An axis that had one
    value only is left out. Deterministic. Empty for an ablation, which answers the same question better.
    """
    if study.search is None:
        return ()
    proposed = {row.number: row.proposal for row in rows}
    complete = [record for record in records if record.objectives]
    trials = [_seen(study, record.choices, proposed[record.number]["params"]) for record in complete]
    return tuple(
        _importances(objective, [sign * record.objectives[objective] for record in complete], trials)
        for objective, sign in ((o.name, 1.0 if o.direction == "minimize" else -1.0) for o in study.objective_list)
    )


def _seen(study: Study, choices: Mapping[str, AxisValue], params: Mapping[str, AxisValue]) -> FrozenTrial:
    """A trial with the axes that have a meaning for it, at the values that were suggested."""
    domains = {name: domain for name, domain in study.domains().items() if name in choices}
    distributions = {name: distribution(domain) for name, domain in domains.items()}
    return create_trial(value=0.0, params={name: params[name] for name in domains}, distributions=distributions)


def _importances(objective: str, losses: Sequence[float], trials: Sequence[FrozenTrial]) -> Importances:
    n = len(trials)
    quantile = max(BEST_SHARE, LEAST_BEST / n) if n >= LEAST_TRIALS else 1.0
    n_best = int(np.ceil(quantile * n))

    def silent(why: str) -> Importances:
        return Importances(objective=objective, n_trials=n, n_best=n_best, silent=why)

    if n < LEAST_TRIALS:
        return silent(f"{n} complete trials are too few: it takes {LEAST_TRIALS}")
    if min(losses) == max(losses):
        return silent(f"all {n} complete trials have the same value")
    axes = list(dict.fromkeys(name for trial in trials for name in trial.params))
    varied = [axis for axis in axes if len({repr(trial.params[axis]) for trial in trials if axis in trial.params}) > 1]
    if not varied:
        return silent("no axis had more than one value")
    divergences = _evaluator(trials, varied, quantile)
    values = np.asarray(losses, dtype=np.float64)
    found = divergences(values)
    total = float(found.sum())
    if total == 0.0:
        return silent(f"the best {n_best} of {n} complete trials have the same value as all others")
    draw = np.random.default_rng(0)
    shuffled = np.stack([divergences(draw.permutation(values)) for _ in range(N_SHUFFLES)])
    chance = np.quantile(shuffled, CONFIDENCE, axis=0)
    if (found <= chance).all():
        return silent(
            f"none of the {len(varied)} axes stands out: shuffled among the {n} complete trials, "
            f"the values give each of them as much in more than one case in {round(1 / (1 - CONFIDENCE))}"
        )
    ranked = sorted(zip(varied, found, chance, strict=True), key=lambda of_axis: -of_axis[1])
    return Importances(
        objective=objective,
        n_trials=n,
        n_best=n_best,
        axes=tuple(
            AxisImportance(axis=axis, share=float(value) / total, chance=float(limit) / total)
            for axis, value, limit in ranked
        ),
    )


def _evaluator(
    trials: Sequence[FrozenTrial], axes: list[str], quantile: float
) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """PED-ANOVA on `trials` as a function of their values, the lowest being best; a number for each of `axes`."""
    study = optuna.create_study()  # in memory
    study.add_trials(trials)
    evaluator = PedAnovaImportanceEvaluator(target_quantile=quantile)

    def divergences(values: NDArray[np.float64]) -> NDArray[np.float64]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that low values are best, which they are here
            found = evaluator.evaluate(study, params=axes, target=lambda trial: float(values[trial.number]))
        return np.array([found[axis] for axis in axes])

    return divergences
