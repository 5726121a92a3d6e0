"""From the ledger's rows to the values that the dashboards draw."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import TypeVar

from hqlt_search_space.study import Study
from hqlt_search_space.trial import ReplicaResult, StudyResults, TrialRecord

from hqlt_orchestration.records.ledger import Ledger
from hqlt_orchestration.records.tables import AttemptRow, ReplicaRow, TrialRow

_OfTrial = TypeVar("_OfTrial", ReplicaRow, AttemptRow)


def study_results(ledger: Ledger, name: str) -> StudyResults:
    """The study `name` as it stands, without importances: `driving.importances` computes them.

    Raises:
        UnknownNameError: there is no such study.
    """
    row = ledger.study(name)
    study = Study.from_json(row.study)
    replicas = by_trial(ledger.replicas(name))
    records = [trial_record(study, trial, replicas[trial.number]) for trial in ledger.trials(name)]
    return results_of(study, row.budget, records)


def results_of(study: Study, budget: int, records: Iterable[TrialRecord]) -> StudyResults:
    """`records` as results of `study`."""
    return StudyResults(
        name=study.name,
        objectives=study.objective_list,
        trials=tuple(sorted(records, key=lambda record: record.number)),
        budget=budget,
        seeds=study.seeds,
        constraints={cost: (bounds.min, bounds.max) for cost, bounds in study.constraints.items()},
    )


def by_trial(rows: Iterable[_OfTrial]) -> defaultdict[int, list[_OfTrial]]:
    """`rows` by the number of their trial, in their order."""
    found: defaultdict[int, list[_OfTrial]] = defaultdict(list)
    for row in rows:
        found[row.number].append(row)
    return found


def trial_record(study: Study, trial: TrialRow, replicas: Sequence[ReplicaRow]) -> TrialRecord:
    """A trial with its results. Only complete replicas count, and an objective needs all of the search's seeds."""
    own = tuple(r.result for r in replicas if r.phase != "replicate" and r.result is not None)
    fresh = tuple(r.result for r in replicas if r.phase == "replicate" and r.result is not None)
    return TrialRecord(
        number=trial.number,
        phase=trial.phase,
        state=trial.state,
        config=trial.config,
        choices=trial.choices,
        cell=trial.cell,
        costs=trial.costs,
        objectives=(objectives_of(study, trial.costs, own) or {}) if trial.state == "complete" else {},
        replicas=own,
        replication=fresh,
    )


def objectives_of(
    study: Study, costs: Mapping[str, float], replicas: Sequence[ReplicaResult]
) -> dict[str, float] | None:
    """Objective -> value: a cost as it is, a metric as its mean over `replicas`.

    None if a replica did not complete, or lacks the metric, or has it as infinite or NaN.
    """
    if any(replica.status != "complete" for replica in replicas):
        return None
    values: dict[str, float] = {}
    for name in study.objectives:
        if name in costs:
            values[name] = costs[name]
            continue
        found = [replica.metrics.get(name, math.nan) for replica in replicas]
        if not found or not all(math.isfinite(value) for value in found):
            return None
        values[name] = fmean(found)
    return values


def minimised(study: Study, values: Mapping[str, float]) -> tuple[float, ...]:
    """`values` in the order of the objectives, those to be maximised with their sign turned."""
    return tuple(
        values[name] if direction == "minimize" else -values[name] for name, direction in study.objectives.items()
    )
