"""What `hqlt doctor --study` mends: everything that follows from the ledger, and what the ledger itself says twice.

Results are never made up and never thrown away: what contradicts itself is decided for the result that is there, and
what has none is tried again. Each function returns a sentence for everything it did, and nothing where all is well.
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import sqlalchemy as sa
from hqlt_search_space.study import Study

from hqlt_orchestration.driving.orphans import end_dead_sessions
from hqlt_orchestration.records.drivers import driver_is_dead
from hqlt_orchestration.records.leases import take_back
from hqlt_orchestration.records.ledger import Ledger
from hqlt_orchestration.records.results import study_results
from hqlt_orchestration.records.states import sum_up
from hqlt_orchestration.records.store import Store
from hqlt_orchestration.records.tables import ATTEMPTS, FINISHED, REPLICAS, TRIALS, DriverRow
from hqlt_orchestration.tracking.spool import Spool, unshipped_bytes

DRAIN_S = 60.0  # what MLflow may take for what it still has to be told
ASIDE = "unknown"  # in the study's folder: what is of no trial of the ledger


def repair(store: Store, name: str) -> list[str]:
    """Mend the study `name`, as far as that can be done beside those who run it.

    Raises:
        UnknownNameError: there is no such study.
        StoreError: the database cannot be read or written.
    """
    said = end_dead_sessions()
    ledger = store.open_existing()
    try:
        study = Study.from_json(ledger.study(name).study)
        drivers = ledger.drivers(name)
        dead = [driver for driver in drivers if driver_is_dead(driver)]
        said += end_dead_leases(ledger, name, dead)
        if len(dead) < len(drivers):
            return said  # who runs the study is in the middle of all that follows
        said += mend_states(ledger, name)
        if study.search is not None:
            said += tell_optuna(ledger, study)
        said += tell_mlflow(store, name)
        said += clear_folder(ledger, store, name)
    finally:
        ledger.close()
    return said


def end_dead_leases(ledger: Ledger, name: str, dead: Sequence[DriverRow]) -> list[str]:
    """What drivers hold that are dead is given back."""
    return [
        f"trial {key.number}, seed {key.seed}: attempt {key.attempt} was held by a driver that is gone; now {state}"
        for key, state in take_back(ledger, name, dead)
    ]


def mend_states(ledger: Ledger, name: str) -> list[str]:
    """Attempts, replicas and trials say the same: a replica with a result has ended, one without has not."""
    said: list[str] = []
    with ledger.write() as tx:
        for replica in tx.execute(sa.select(REPLICAS).where(REPLICAS.c.study == name)).all():
            where = f"trial {replica.number}, seed {replica.seed}"
            said += [f"{where}: {what}" for what in _mend_replica(tx, name, replica)]
        for trial in tx.execute(sa.select(TRIALS.c.number, TRIALS.c.state).where(TRIALS.c.study == name)).all():
            state = sum_up(tx, name, trial.number)
            if state != trial.state:
                said.append(f"trial {trial.number}: state {trial.state}, its seeds say {state}; now {state}")
    return said


def _mend_replica(tx: sa.Connection, name: str, replica: "sa.Row[object]") -> Iterator[str]:
    from hqlt_search_space.trial import TrialResult

    mine = sa.and_(ATTEMPTS.c.study == name, ATTEMPTS.c.number == replica.number, ATTEMPTS.c.seed == replica.seed)
    attempts = tx.execute(sa.select(ATTEMPTS).where(mine).order_by(ATTEMPTS.c.attempt)).all()
    running = [attempt.attempt for attempt in attempts if attempt.state == "running"]
    won = [attempt.attempt for attempt in attempts if attempt.state == "complete"]
    state = replica.state
    if replica.result is not None:
        (stored,) = TrialResult.from_json(replica.result).replicas
        state, wrong = stored.status, running
        if not won and attempts:
            tx.execute(
                ATTEMPTS.update().where(mine, ATTEMPTS.c.attempt == attempts[-1].attempt).values(state="complete")
            )
            yield f"it has a result of no attempt; attempt {attempts[-1].attempt} gets it"
            wrong = [attempt for attempt in running if attempt != attempts[-1].attempt]
    else:
        wrong = won
        if replica.cancelled:
            state = "running" if running and state == "running" else "stopped"
        elif state in ("complete", "failed", "stopped") or (state == "running" and not running):
            state = "waiting"
        if running and state != "running":
            wrong = won + running
    if wrong:
        tx.execute(ATTEMPTS.update().where(mine, ATTEMPTS.c.attempt.in_(wrong)).values(state="lost", message="mended"))
        yield f"attempts {', '.join(map(str, wrong))} contradict state {replica.state}; now lost"
    if state != replica.state:
        tx.execute(
            REPLICAS.update()
            .where(REPLICAS.c.study == name, REPLICAS.c.number == replica.number, REPLICAS.c.seed == replica.seed)
            .values(state=state)
        )
        yield f"state {replica.state} {'with' if replica.result else 'without'} a result; now {state}"


def tell_optuna(ledger: Ledger, study: Study) -> list[str]:
    """The sampling history has every trial, and is told of those that have ended."""
    from hqlt_orchestration.driving.sampler import Proposer

    proposer, said = Proposer(study, ledger), []
    known = proposer.known()
    proposals = {row.number: row.proposal for row in ledger.trials(study.name)}
    for record in study_results(ledger, study.name).trials:
        if record.number not in known:
            proposer.accept(record.number, proposals[record.number])
            said.append(f"trial {record.number}: Optuna did not know it; now it does")
        if record.state in FINISHED and not known.get(record.number, False):
            proposer.tell_of(record)
            said.append(f"trial {record.number}: Optuna was not told that it is {record.state}; now it is")
    return said


def tell_mlflow(store: Store, name: str) -> list[str]:
    """What waits for MLflow is sent."""
    waiting = unshipped_bytes(store.spool_folder(name))
    if not waiting:
        return []
    left = Spool(store, name).close(DRAIN_S)
    return [f"{waiting - left:,} bytes that waited for MLflow are sent" + (f", {left:,} wait on" if left else "")]


def clear_folder(ledger: Ledger, store: Store, name: str) -> list[str]:
    """What was half written goes; what belongs to no trial is put aside."""
    said: list[str] = []
    folder = store.study_folder(name)
    for path in sorted(folder.rglob("*.tmp")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
        said.append(f"{path}: half written, left by a crash; removed")
    known = {store.trial_folder(name, row.number) for row in ledger.trials(name)}
    strangers = [path for path in sorted((folder / "trials").glob("*")) if path not in known]
    said += [f"{path}: of no trial in the ledger; now {_put_aside(path, folder / ASIDE)}" for path in strangers]
    return said


def _put_aside(path: Path, aside: Path) -> Path:
    aside.mkdir(exist_ok=True)
    target = aside / path.name
    while target.exists():
        target = target.with_name(target.name + "-again")
    return path.rename(target)
