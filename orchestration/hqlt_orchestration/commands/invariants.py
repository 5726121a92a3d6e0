"""What must be true of a store whenever nobody writes to it: after every crash, and beside living drivers.

Everything here only reads. Each violation is a sentence; what can be done about one is `doctor`'s business.
"""

import contextlib
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa
from hqlt_search_space.errors import CheckpointError
from hqlt_search_space.study import Study

from hqlt_orchestration.records.database import shown
from hqlt_orchestration.records.drivers import living
from hqlt_orchestration.records.ledger import Ledger
from hqlt_orchestration.records.states import SUM_ORDER
from hqlt_orchestration.records.store import Store
from hqlt_orchestration.records.tables import ATTEMPTS, DRIVERS, FINISHED, ReplicaRow, State

WITH_RESULT: tuple[State, ...] = ("complete", "stopped", "failed")


def invariants(store: Store, study: str) -> list[str]:
    """What contradicts what hqlt promises about a study; [] if all is well.

    Each trial has one place in the budget and one config; each finished replica one result, from one attempt, and a
    complete one a checkpoint whose every byte is verified; what runs is held by one living driver; Optuna's history
    says what the ledger says; the database is sound; no file is half written. While drivers live, what they are just
    about to do (a tell, a rename) can show for a moment.

    Raises:
        UnknownNameError: there is no such study.
        StoreError: the database cannot be read.
    """
    ledger = store.open_existing()
    try:
        return [
            *budget_violations(ledger, study),
            *result_violations(ledger, store, study),
            *lease_violations(ledger, study),
            *sum_violations(ledger, study),
            *history_violations(ledger, study),
            *database_violations(store.url),
            *file_violations(store, study),
        ]
    finally:
        ledger.close()


def budget_violations(ledger: Ledger, name: str) -> Iterator[str]:
    """Trials are numbered from 0 without a gap, within the budget, and no config is searched twice."""
    row = ledger.study(name)
    trials = ledger.trials(name)
    if [trial.number for trial in trials] != list(range(len(trials))):
        yield f"{name}: its trials are numbered {[trial.number for trial in trials]}, not from 0 without a gap"
    if len(trials) > row.budget:
        yield f"{name}: {len(trials)} trials, and a budget of {row.budget}"
    if Study.from_json(row.study).search is not None:
        yield from (
            f"{name}: config {config_id} is searched by {count} trials"
            for config_id, count in Counter(trial.config.config_id for trial in trials).items()
            if count > 1
        )


def result_violations(ledger: Ledger, store: Store, name: str) -> Iterator[str]:
    """A replica has a result exactly if its state says so, from exactly one attempt; a complete one its checkpoint."""
    configs = {trial.number: trial.config.config_id for trial in ledger.trials(name)}
    won = Counter((a.number, a.seed) for a in ledger.attempts(name) if a.state == "complete")
    for replica in ledger.replicas(name):
        where = _where(replica)
        if (replica.state in WITH_RESULT) != (replica.result is not None) and not replica.cancelled:
            yield f"{where}: state {replica.state} {'with' if replica.result else 'without'} a result"
        n_won = won[replica.number, replica.seed]
        if n_won != (replica.result is not None):
            yield f"{where}: {n_won} attempts ended with a result, {int(replica.result is not None)} is stored"
        yield from _checkpoint_violations(replica, store, name, configs[replica.number])


def _checkpoint_violations(replica: ReplicaRow, store: Store, name: str, config_id: str) -> Iterator[str]:
    from hqlt_trainer.checkpoint import load_checkpoint

    result = replica.result
    if result is None or result.status != "complete" or result.checkpoint is None:
        return
    path = store.trial_folder(name, replica.number) / result.checkpoint
    if not path.parent.exists():  # freed: a trial is removed from disk as a whole
        return
    try:
        load_checkpoint(path, config_id)
    except CheckpointError as error:
        yield f"{_where(replica)}: {error}"


def lease_violations(ledger: Ledger, name: str) -> Iterator[str]:
    """A replica runs exactly if one attempt does, held by a living driver; what is cancelled runs or has ended."""
    alive = {driver.id for driver in living(ledger.drivers(name))}
    with ledger.read() as tx:
        columns = (ATTEMPTS.c.number, ATTEMPTS.c.seed, ATTEMPTS.c.attempt, ATTEMPTS.c.driver)
        running = tx.execute(sa.select(*columns).where(ATTEMPTS.c.study == name, ATTEMPTS.c.state == "running")).all()
        known: set[str] = set(tx.scalars(sa.select(DRIVERS.c.id).where(DRIVERS.c.study == name)))
    held = Counter((row.number, row.seed) for row in running)
    for row in running:
        if row.driver not in alive:
            where = f"trial {row.number}, seed {row.seed}: attempt {row.attempt}"
            yield f"{where} runs, but its driver is {'dead' if row.driver in known else 'unknown'}; resume the study"
    for replica in ledger.replicas(name):
        n_held = held[replica.number, replica.seed]
        if n_held != (replica.state == "running"):
            yield f"{_where(replica)}: state {replica.state}, and {n_held} attempts run"
        if replica.cancelled and replica.state not in ("running", *FINISHED):
            yield f"{_where(replica)}: cancelled, and {replica.state}"


def sum_violations(ledger: Ledger, name: str) -> Iterator[str]:
    """A trial's state is that of its seeds: of one that has not ended, or else of the worst."""
    states: dict[int, set[State]] = {}
    for replica in ledger.replicas(name):
        if replica.phase != "replicate":
            states.setdefault(replica.number, set()).add(replica.state)
    for trial in ledger.trials(name):
        expected = min(states[trial.number], key=SUM_ORDER.index)
        if trial.state != expected:
            yield f"trial {trial.number}: state {trial.state}, and its seeds say {expected}"


def history_violations(ledger: Ledger, name: str) -> Iterator[str]:
    """Optuna has each trial of a search once, ended exactly if it has ended here, with the objectives it has here."""
    from optuna.trial import TrialState

    from hqlt_orchestration.records.history import stored_history
    from hqlt_orchestration.records.results import study_results

    study = Study.from_json(ledger.study(name).study)
    if study.search is None:
        return
    history = stored_history(ledger.url, name)
    for record in study_results(ledger, name).trials:
        found = history.get(record.number, [])
        if len(found) != 1:
            yield f"trial {record.number}: it is {len(found)} times in Optuna's history"
            continue
        told = found[0]
        if told.state.is_finished() != (record.state in FINISHED):
            yield f"trial {record.number}: {record.state}, and {told.state.name} in Optuna's history"
        elif told.state == TrialState.COMPLETE:
            expected = [record.objectives.get(objective) for objective in study.objectives]
            if told.values != expected:
                yield f"trial {record.number}: objectives {expected}, and {told.values} in Optuna's history"


def database_violations(url: str) -> Iterator[str]:
    """SQLite's own check of the file at `url`; PostgreSQL checks its pages itself."""
    if not url.startswith("sqlite"):
        return
    with contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"), timeout=30)) as connection:
        try:
            said: Sequence[str] = [str(row[0]) for row in connection.execute("PRAGMA quick_check")]
        except sqlite3.DatabaseError as error:
            said = [str(error)]
    yield from (f"{shown(url)}: {line}" for line in said if line != "ok")


def file_violations(store: Store, name: str) -> Iterator[str]:
    """No file is half written."""
    for path in sorted(store.study_folder(name).rglob("*.tmp")):
        yield f"{path}: half written, left by a crash; it can be removed"


def mirror_violations(store: Store, name: str) -> list[str]:
    """What MLflow lacks of a study, or has twice: trials, their ends, and the points of their curves.

    Not part of `invariants`: MLflow is a mirror that may lag behind, and takes seconds to load.
    """
    ledger = store.open_existing()
    try:
        return list(_mirror_violations(ledger, store.mlflow_uri, name))
    finally:
        ledger.close()


def _mirror_violations(ledger: Ledger, uri: str, name: str) -> Iterator[str]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(name)
    runs: dict[tuple[str | None, str | None], list[Any]] = {}
    if experiment is not None:
        for run in client.search_runs([experiment.experiment_id], max_results=10_000):
            runs.setdefault((run.data.tags.get("hqlt.phase"), run.data.tags.get("hqlt.trial")), []).append(run)
    for trial in ledger.trials(name):
        found = runs.get((trial.phase, str(trial.number)), [])
        if len(found) != 1:
            yield f"trial {trial.number}: MLflow has {len(found)} runs of it"
            continue
        info = found[0].info
        if trial.state in FINISHED and info.status not in ("FINISHED", "FAILED"):
            yield f"trial {trial.number}: {trial.state}, and {info.status} in MLflow"
        replicas = [replica for replica in ledger.replicas(name, trial.number) if replica.phase == trial.phase]
        for replica in replicas:
            suffix = f"/seed-{replica.seed}" if len(replicas) > 1 else ""
            yield from _curve_violations(client, info.run_id, replica, suffix)


def _curve_violations(client: Any, run_id: str, replica: ReplicaRow, suffix: str) -> Iterator[str]:
    """A step that was taken again after a crash is measured again, at another time: that is no double."""
    curve = replica.result.curve if replica.result is not None else ()
    for metric in sorted({metric for point in curve for metric in point.metrics}):
        points = client.get_metric_history(run_id, metric + suffix)
        has = {(point.step, point.value) for point in points}
        lacks = [p.step for p in curve if metric in p.metrics and (p.step, p.metrics[metric]) not in has]
        if lacks:
            yield f"{_where(replica)}: MLflow lacks {metric} at steps {lacks}"
        doubled = Counter((point.step, point.timestamp) for point in points)
        twice = sorted({step for (step, _), count in doubled.items() if count > 1})
        if twice:
            yield f"{_where(replica)}: MLflow has {metric} twice at steps {twice}"


def _where(replica: ReplicaRow) -> str:
    return f"trial {replica.number}, seed {replica.seed}"
