"""The SQL tables that say which attempt runs where, and which result counts.

Optuna's tables hold what was proposed; these hold what is true. They share one database, so one file is a whole study.
Writers take the write lock before they read (`BEGIN IMMEDIATE` on SQLite, a transaction-wide advisory lock on
PostgreSQL), so a check and the write that follows it cannot be separated by another driver. A result is committed once,
by compare-and-set on its attempt.

States of a replica, and of a trial as the sum of its replicas:

    waiting -> running -> complete | stopped | failed         a result, kept for ever
                       -> paused                              asked to stop; continues from its checkpoint
                       -> waiting                             the attempt crashed, hung or lost its driver: tried again
                       -> quarantined                         MAX_ATTEMPTS crashes: not tried again
"""

import contextlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from uuid import uuid4

import sqlalchemy as sa
from hqlt_search_space.errors import StoreError, UnknownNameError
from hqlt_search_space.trial import Config, ReplicaResult, TrialResult

from hqlt_orchestration.records.attempts import AttemptKey
from hqlt_orchestration.records.database import (
    make_engine,
    patiently,
    refuse_foreign_code,
    schema_lock,
    shown,
    store_errors,
)
from hqlt_orchestration.records.processes import this_process
from hqlt_orchestration.records.tables import (
    ATTEMPTS,
    DRIVERS,
    FINISHED,
    METADATA,
    REPLICAS,
    RERUNS,
    RUNGS,
    SCHEMA,
    SCHEMA_VERSION,
    STUDIES,
    TRIALS,
    AttemptRow,
    DriverId,
    DriverRow,
    Phase,
    ReplicaRow,
    State,
    StudyRow,
    TrialRow,
    replica_row,
    study_row,
    trial_row,
)

MAX_ATTEMPTS = 2  # a config that kills its worker twice will do so again; the rest of the study need not wait for it
SUM_ORDER: tuple[State, ...] = ("running", "paused", "waiting", "quarantined", "failed", "stopped", "complete")
"""The state of a trial is the first of these that one of its replicas has: an unfinished one outweighs a finished one,
and a failure a success."""
AttemptEnd = Literal["paused", "crashed", "hung", "out_of_memory"]
"""How an attempt may end without a result. All but the first count towards quarantine."""


@dataclass(frozen=True)
class NewTrial:
    """A trial that is not in the ledger yet."""

    phase: Phase
    config: Config
    choices: Mapping[str, Any]
    costs: Mapping[str, float]
    seeds: Sequence[int]
    cell: str | None = None
    proposal: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Refused:
    """Why a trial was not taken into the ledger."""

    why: Literal["duplicate", "budget"]


class Ledger:
    """One database. Methods that write are transactions of their own; each is safe against any number of drivers."""

    def __init__(self, url: str) -> None:
        """Open the database at `url`, making its tables if it is new.

        Raises:
            StoreError: the folder is read-only, the file is no database, or another version made it.
        """
        self.url = url
        with store_errors(url):
            self.engine = make_engine(url)
            with schema_lock(url, self.engine):
                refuse_foreign_code(url, self.engine)
                if not sa.inspect(self.engine).has_table(SCHEMA.name):
                    _create_schema(url, self.engine)
                with self.read() as tx:
                    version = tx.scalar(sa.select(SCHEMA.c.version))
        if version != SCHEMA_VERSION:
            raise StoreError(
                f"{shown(url)} has ledger version {version}, this hqlt reads version {SCHEMA_VERSION}; "
                "use the hqlt that made it, or another --data folder"
            )

    def close(self) -> None:
        self.engine.dispose()

    @contextlib.contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A consistent snapshot. Never waits for a writer."""
        with store_errors(self.url), self._connected() as connection, connection.begin():
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction that holds the write lock from its first statement."""
        with store_errors(self.url), self._connected() as raw:
            connection = raw.execution_options(hqlt_write=True)
            with connection.begin():
                if self.engine.dialect.name == "postgresql":
                    connection.execute(sa.text("SELECT pg_advisory_xact_lock(4714801)"))
                yield connection

    def _connected(self) -> sa.Connection:
        """A connection that answers. A server that goes away between two transactions is waited for."""
        return patiently(self.url, self.engine.connect)

    # Studies

    def add_study(self, row: StudyRow) -> StudyRow:
        """Store a new study; if one of that name is there, return that one unchanged."""
        with self.write() as tx:
            stored = tx.execute(sa.select(STUDIES).where(STUDIES.c.name == row.name)).one_or_none()
            if stored is not None:
                return study_row(stored)
            tx.execute(STUDIES.insert().values(**row.__dict__))
        return row

    def studies(self) -> list[StudyRow]:
        with self.read() as tx:
            return [study_row(row) for row in tx.execute(sa.select(STUDIES).order_by(STUDIES.c.created_at))]

    def study(self, name: str) -> StudyRow:
        """The study called `name`.

        Raises:
            UnknownNameError: there is none; the message has the nearest name.
        """
        with self.read() as tx:
            row = tx.execute(sa.select(STUDIES).where(STUDIES.c.name == name)).one_or_none()
            if row is None:
                known: tuple[str, ...] = tuple(tx.scalars(sa.select(STUDIES.c.name).order_by(STUDIES.c.name)))
                raise UnknownNameError("study", name, known)
            return study_row(row)

    def update_study(self, name: str, **values: Any) -> None:
        """Change `state`, `note`, `budget` or `study` of a study."""
        with self.write() as tx:
            tx.execute(STUDIES.update().where(STUDIES.c.name == name).values(**values))

    def delete_study(self, name: str) -> None:
        """Remove a study and everything below it, in the ledger only."""
        with self.write() as tx:
            tx.execute(STUDIES.delete().where(STUDIES.c.name == name))

    # Drivers and their leases

    def enter(self, study: str, executor: str) -> DriverId:
        """Register this process as a driver of `study`."""
        me = this_process()
        driver = DriverId(str(uuid4()))
        with self.write() as tx:
            tx.execute(
                DRIVERS.insert().values(
                    id=driver,
                    study=study,
                    host=me.host,
                    boot_id=me.boot_id,
                    pid=me.pid,
                    process_start=me.start_s,
                    executor=executor,
                    beats=0,
                    beat_at=time.time(),
                    ended=False,
                )
            )
        return driver

    def set_executor(self, driver: DriverId, executor: str) -> None:
        """Say where the driver's trials run, once it is known."""
        with self.write() as tx:
            tx.execute(DRIVERS.update().where(DRIVERS.c.id == driver).values(executor=executor))

    def leave(self, driver: DriverId) -> None:
        """Say that this driver is gone in good order. What it still holds is given back."""
        with self.write() as tx:
            tx.execute(DRIVERS.update().where(DRIVERS.c.id == driver).values(ended=True))
            held = sa.select(ATTEMPTS).where(ATTEMPTS.c.driver == driver, ATTEMPTS.c.state == "running")
            for row in tx.execute(held).all():
                lease = AttemptKey(row.number, row.seed, row.attempt)
                _end_attempt(tx, row.study, lease, "lost", "its driver left", crash=False)

    def beat(self, study: str, driver: DriverId, steps: Mapping[AttemptKey, int]) -> list[AttemptKey] | None:
        """Show that the driver lives and how far its attempts are. Returns those a user has asked to cancel.

        None if another driver has given this one up, because its beats stayed away: what it held is no longer its own.
        """
        with self.write() as tx:
            beaten = tx.execute(
                DRIVERS.update()
                .where(DRIVERS.c.id == driver, ~DRIVERS.c.ended)
                .values(beats=DRIVERS.c.beats + 1, beat_at=time.time())
            )
            if not beaten.rowcount:
                return None
            for lease, step in steps.items():
                tx.execute(ATTEMPTS.update().where(_is(ATTEMPTS, study, lease)).values(step=step))
            asked = sa.select(REPLICAS.c.number, REPLICAS.c.seed).where(
                REPLICAS.c.study == study, REPLICAS.c.cancelled, REPLICAS.c.state == "running"
            )
            cancelled = {(row.number, row.seed) for row in tx.execute(asked)}
        return [lease for lease in steps if (lease.number, lease.seed) in cancelled]

    def drivers(self, study: str) -> list[DriverRow]:
        """Drivers that have not left, living or dead."""
        with self.read() as tx:
            rows = tx.execute(sa.select(DRIVERS).where(DRIVERS.c.study == study, ~DRIVERS.c.ended))
            return [
                DriverRow(
                    **{name: getattr(row, name) for name in DriverRow.__dataclass_fields__},
                )
                for row in rows
            ]

    def forget_drivers(self, study: str, dead: Iterable[DriverRow]) -> list[tuple[AttemptKey, State]]:
        """Take back every lease of `dead` drivers, unless they have beaten since they were read.

        An attempt that ran inside its driver (inline executor) may be what killed it, so it counts as a crash; under
        Ray a trial cannot kill its driver and the attempt is only lost.
        """
        back: list[tuple[AttemptKey, State]] = []
        with self.write() as tx:
            for driver in dead:
                changed = tx.execute(
                    DRIVERS.update()
                    .where(DRIVERS.c.id == driver.id, DRIVERS.c.beats == driver.beats)
                    .values(ended=True)
                )
                if changed.rowcount:
                    back += self._take_back(tx, study, driver)
            gone = sa.select(DRIVERS.c.id).where(DRIVERS.c.study == study, DRIVERS.c.ended)
            left = sa.select(ATTEMPTS).where(
                ATTEMPTS.c.study == study,
                ATTEMPTS.c.state == "running",
                ATTEMPTS.c.driver.in_(gone),
            )
            for row in tx.execute(left).all():
                lease = AttemptKey(row.number, row.seed, row.attempt)
                back.append((lease, _end_attempt(tx, study, lease, "lost", "its driver left", crash=False)))
        return back

    def _take_back(self, tx: sa.Connection, study: str, driver: DriverRow) -> list[tuple[AttemptKey, State]]:
        crash = driver.executor == "inline"
        held = sa.select(ATTEMPTS).where(ATTEMPTS.c.driver == driver.id, ATTEMPTS.c.state == "running")
        back: list[tuple[AttemptKey, State]] = []
        for row in tx.execute(held).all():
            lease = AttemptKey(row.number, row.seed, row.attempt)
            message = f"its driver (pid {driver.pid} on {driver.host}) died"
            back.append((lease, _end_attempt(tx, study, lease, "crashed" if crash else "lost", message, crash=crash)))
        return back

    # Trials

    def claim(self, study: str, new: NewTrial, driver: DriverId | None) -> tuple[int, AttemptKey | None] | Refused:
        """Take a new trial into the ledger if the budget has room and its config is new, and lease its first replica.

        One transaction, so drivers can neither overshoot the budget nor train a config twice. Without a driver nothing
        is leased. An ablation's cells may share a config, or on different tasks a label, never both.
        """
        now = time.time()
        with self.write() as tx:
            budget: int = tx.execute(sa.select(STUDIES.c.budget).where(STUDIES.c.name == study)).scalar_one()
            number: int = tx.execute(sa.select(sa.func.count()).where(TRIALS.c.study == study)).scalar_one()
            same = sa.select(TRIALS.c.number).where(
                TRIALS.c.study == study,
                TRIALS.c.config_id == new.config.config_id,
                *([TRIALS.c.cell == new.cell] if new.cell is not None else []),
            )
            if tx.execute(same).first() is not None:
                return Refused("duplicate")
            if number >= budget:  # trials are numbered from 0 and never removed
                return Refused("budget")
            tx.execute(
                TRIALS.insert().values(
                    study=study,
                    number=number,
                    phase=new.phase,
                    config_id=new.config.config_id,
                    config=new.config.canonical_json(),
                    choices=json.dumps(dict(new.choices)),
                    cell=new.cell,
                    costs=json.dumps(dict(new.costs)),
                    proposal=json.dumps(dict(new.proposal or {})),
                    state="waiting" if driver is None else "running",
                    created_at=now,
                )
            )
            _add_replicas(tx, study, number, new.phase, new.seeds)
            lease = None
            if driver is not None:
                lease = _lease(tx, study, number, new.seeds[0], driver)
        return number, lease

    def add_replicas(self, study: str, number: int, phase: Phase, seeds: Iterable[int]) -> None:
        """Queue more seeds of a trial; seeds it already has are left as they are."""
        with self.write() as tx:
            have: set[int] = set(
                tx.scalars(sa.select(REPLICAS.c.seed).where(REPLICAS.c.study == study, REPLICAS.c.number == number))
            )
            _add_replicas(tx, study, number, phase, [seed for seed in seeds if seed not in have])

    def lease_next(self, study: str, driver: DriverId, phase: Phase) -> AttemptKey | None:
        """Lease the first replica of a phase that waits or was paused, or None."""
        waiting = (
            sa.select(REPLICAS.c.number, REPLICAS.c.seed)
            .where(
                REPLICAS.c.study == study,
                REPLICAS.c.phase == phase,
                REPLICAS.c.state.in_(("waiting", "paused")),
                ~REPLICAS.c.cancelled,
            )
            .order_by(REPLICAS.c.number, REPLICAS.c.seed)
            .limit(1)
        )
        with self.read() as tx:  # mostly there is none, and then nobody's lock is needed
            if tx.execute(waiting).first() is None:
                return None
        with self.write() as tx:
            row = tx.execute(waiting).first()
            return _lease(tx, study, row.number, row.seed, driver) if row else None

    def lease_with(self, study: str, driver: DriverId, lease: AttemptKey, seeds: Sequence[int]) -> list[AttemptKey]:
        """Lease those of the trial's other `seeds` that wait or were paused, to be run together with `lease`."""
        others = (
            sa.select(REPLICAS.c.seed)
            .where(
                REPLICAS.c.study == study,
                REPLICAS.c.number == lease.number,
                REPLICAS.c.seed.in_(seeds),
                REPLICAS.c.state.in_(("waiting", "paused")),
                ~REPLICAS.c.cancelled,
            )
            .order_by(REPLICAS.c.seed)
        )
        with self.write() as tx:
            waiting: Sequence[int] = tx.scalars(others).all()
            return [_lease(tx, study, lease.number, seed, driver) for seed in waiting]

    def commit(self, study: str, lease: AttemptKey, outcome: TrialResult) -> State | None:
        """Store the result of an attempt, if that attempt still counts; then the trial's state, else None.

        Compare-and-set: an attempt that was taken back, or has a result, changes nothing.
        """
        (result,) = outcome.replicas
        with self.write() as tx:
            won = tx.execute(
                ATTEMPTS.update()
                .where(_is(ATTEMPTS, study, lease), ATTEMPTS.c.state == "running")
                .values(state="complete", ended_at=time.time(), step=result.step, message=spared_memory(result))
            )
            if not won.rowcount:
                return None
            tx.execute(
                REPLICAS.update()
                .where(_is_replica(study, lease.number, lease.seed))
                .values(state=result.status, result=outcome.model_dump_json())
            )
            return sum_up(tx, study, lease.number)

    def release(self, study: str, lease: AttemptKey, how: AttemptEnd, message: str | None = None) -> State | None:
        """End an attempt without a result. Returns the state of its replica, or None if the attempt had ended.

        A replica whose end a user has asked for is `stopped`, however its attempt ends.
        """
        with self.write() as tx:
            row = tx.execute(sa.select(ATTEMPTS.c.state).where(_is(ATTEMPTS, study, lease))).one_or_none()
            if row is None or row.state != "running":
                return None
            return _end_attempt(tx, study, lease, how, message, crash=how != "paused")

    def cancel(self, study: str, number: int) -> int:
        """Ask for the end of a trial's unfinished replicas. Returns how many there were.

        Those nobody runs end at once; a running one ends when its driver next beats.
        """
        unfinished = sa.and_(
            REPLICAS.c.study == study,
            REPLICAS.c.number == number,
            REPLICAS.c.state.not_in(FINISHED),
        )
        with self.write() as tx:
            asked = tx.execute(REPLICAS.update().where(unfinished).values(cancelled=True)).rowcount
            tx.execute(REPLICAS.update().where(unfinished, REPLICAS.c.state != "running").values(state="stopped"))
            sum_up(tx, study, number)
        return asked

    def trials(self, study: str) -> list[TrialRow]:
        """Every trial in order of number."""
        with self.read() as tx:
            rows = tx.execute(sa.select(TRIALS).where(TRIALS.c.study == study).order_by(TRIALS.c.number))
            return [trial_row(row) for row in rows]

    def config_ids(self, study: str) -> list[str]:
        """The configs that are taken, in order of their trials' numbers: quickly, also of thousands."""
        with self.read() as tx:
            found = sa.select(TRIALS.c.config_id).where(TRIALS.c.study == study).order_by(TRIALS.c.number)
            return list(tx.scalars(found))

    def trial(self, study: str, number: int) -> TrialRow:
        """One trial.

        Raises:
            UnknownNameError: the study has no trial of that number.
        """
        with self.read() as tx:
            row = tx.execute(sa.select(TRIALS).where(TRIALS.c.study == study, TRIALS.c.number == number)).one_or_none()
            if row is None:
                count = tx.scalar(sa.select(sa.func.count()).where(TRIALS.c.study == study))
                known = tuple(f"{study}/{n}" for n in range(count or 0))
                raise UnknownNameError("trial", f"{study}/{number}", known)
            return trial_row(row)

    def find_trial(self, text: str) -> tuple[str, int]:
        """(study, number) of a trial id, a unique prefix of one, or `STUDY/NUMBER`.

        The same config in several studies is found in the newest one.

        Raises:
            UnknownNameError: nothing, or more than one config, answers to `text`.
        """
        study, slash, number = text.rpartition("/")
        if slash:
            self.study(study)
            if not number.isdigit():
                raise UnknownNameError("trial", text, ())
            return study, self.trial(study, int(number)).number
        with self.read() as tx:
            rows = tx.execute(
                sa.select(TRIALS.c.study, TRIALS.c.number, TRIALS.c.config_id, TRIALS.c.created_at)
                .where(TRIALS.c.config_id.startswith(text, autoescape=True))
                .order_by(TRIALS.c.created_at.desc(), TRIALS.c.number)
            ).all()
            found = sorted({row.config_id for row in rows})
            if not text or not rows:
                raise UnknownNameError("trial", text, tuple(tx.scalars(sa.select(TRIALS.c.config_id).distinct())))
            if len(found) > 1:
                raise UnknownNameError("single trial", text, tuple(found))
        newest = rows[0].study
        return newest, min(row.number for row in rows if row.study == newest)

    def replicas(self, study: str, number: int | None = None) -> list[ReplicaRow]:
        """The replicas of one trial, or of all, with their results."""
        query = sa.select(REPLICAS).where(REPLICAS.c.study == study)
        if number is not None:
            query = query.where(REPLICAS.c.number == number)
        with self.read() as tx:
            rows = tx.execute(query.order_by(REPLICAS.c.number, REPLICAS.c.seed))
            return [replica_row(row) for row in rows]

    def attempts(self, study: str, number: int | None = None) -> list[AttemptRow]:
        query = sa.select(ATTEMPTS).where(ATTEMPTS.c.study == study)
        if number is not None:
            query = query.where(ATTEMPTS.c.number == number)
        names = tuple(AttemptRow.__dataclass_fields__)
        with self.read() as tx:
            rows = tx.execute(query.order_by(ATTEMPTS.c.number, ATTEMPTS.c.seed, ATTEMPTS.c.attempt))
            return [AttemptRow(**{name: getattr(row, name) for name in names}) for row in rows]

    def n_unfinished(self, study: str, phase: Phase) -> int:
        """Replicas of a phase that have neither a result nor been given up, whoever runs them."""
        with self.read() as tx:
            return tx.execute(
                sa.select(sa.func.count()).where(
                    REPLICAS.c.study == study,
                    REPLICAS.c.phase == phase,
                    REPLICAS.c.state.not_in(FINISHED),
                )
            ).scalar_one()

    def counts(self, study: str) -> dict[State, int]:
        """Trials by state; every state is a key."""
        states: tuple[State, ...] = ("complete", "stopped", "failed", "running", "waiting", "paused", "quarantined")
        with self.read() as tx:
            rows = tx.execute(
                sa.select(TRIALS.c.state, sa.func.count().label("n"))
                .where(TRIALS.c.study == study)
                .group_by(TRIALS.c.state)
            )
            by_state = {row.state: row.n for row in rows}
        return {state: by_state.get(state, 0) for state in states}

    def add_rerun(
        self,
        study: str,
        number: int,
        changes: Mapping[str, Any],
        identical: bool,
        outcome: TrialResult,
        folder: str,
    ) -> None:
        """Record a rerun, or a variation of a trial. It changes nothing about the trial."""
        with self.write() as tx:
            tx.execute(
                RERUNS.insert().values(
                    id=str(uuid4()),
                    study=study,
                    number=number,
                    changes=json.dumps(dict(changes)),
                    identical=identical,
                    result=outcome.model_dump_json(),
                    folder=folder,
                    created_at=time.time(),
                )
            )

    # Rungs

    def record_rung(
        self, study: str, number: int, seed: int, step: int, objectives: Mapping[str, float]
    ) -> dict[tuple[int, int], dict[str, float]]:
        """Store what a replica reached at a rung; returns everyone's objectives there, by (number, seed)."""
        key = {"study": study, "step": step, "number": number, "seed": seed}
        with self.write() as tx:
            # A replica that continues from a checkpoint passes its rung again, with the same values.
            tx.execute(RUNGS.delete().where(*(RUNGS.c[name] == value for name, value in key.items())))
            tx.execute(RUNGS.insert().values(**key, objectives=json.dumps(dict(objectives))))
            rows = tx.execute(sa.select(RUNGS).where(RUNGS.c.study == study, RUNGS.c.step == step))
            return {(row.number, row.seed): json.loads(row.objectives) for row in rows}


def spared_memory(result: ReplicaResult) -> str | None:
    """A sentence for a result that took smaller micro-batches than the recipe's."""
    if result.accumulation is None or result.status == "failed":
        return None
    return f"memory was too small; trained with {result.accumulation} micro-batches a step"


def _create_schema(url: str, engine: sa.Engine) -> None:
    from hqlt_orchestration.records.history import create_optuna_tables

    create_optuna_tables(url)  # first, because our version row says that all tables are there
    METADATA.create_all(engine)
    with engine.connect() as connection, connection.begin():
        connection.execute(SCHEMA.insert().values(version=SCHEMA_VERSION))


def _is(table: sa.Table, study: str, lease: AttemptKey) -> sa.ColumnElement[bool]:
    return sa.and_(
        table.c.study == study,
        table.c.number == lease.number,
        table.c.seed == lease.seed,
        table.c.attempt == lease.attempt,
    )


def _is_replica(study: str, number: int, seed: int) -> sa.ColumnElement[bool]:
    return sa.and_(REPLICAS.c.study == study, REPLICAS.c.number == number, REPLICAS.c.seed == seed)


def _add_replicas(tx: sa.Connection, study: str, number: int, phase: Phase, seeds: Sequence[int]) -> None:
    rows = [
        {
            "study": study,
            "number": number,
            "seed": seed,
            "phase": phase,
            "state": "waiting",
            "attempts": 0,
            "crashes": 0,
            "cancelled": False,
        }
        for seed in seeds
    ]
    if rows:
        tx.execute(REPLICAS.insert(), rows)


def _lease(tx: sa.Connection, study: str, number: int, seed: int, driver: DriverId) -> AttemptKey:
    attempt: int = tx.execute(
        REPLICAS.update()
        .where(_is_replica(study, number, seed))
        .values(state="running", attempts=REPLICAS.c.attempts + 1)
        .returning(REPLICAS.c.attempts)
    ).scalar_one()
    tx.execute(
        ATTEMPTS.insert().values(
            study=study,
            number=number,
            seed=seed,
            attempt=attempt,
            driver=driver,
            state="running",
            step=0,
            started_at=time.time(),
        )
    )
    sum_up(tx, study, number)
    return AttemptKey(number, seed, attempt)


def _end_attempt(
    tx: sa.Connection, study: str, lease: AttemptKey, how: str, message: str | None, *, crash: bool
) -> State:
    tx.execute(
        ATTEMPTS.update().where(_is(ATTEMPTS, study, lease)).values(state=how, ended_at=time.time(), message=message)
    )
    where = _is_replica(study, lease.number, lease.seed)
    counted = REPLICAS.update().where(where).values(crashes=REPLICAS.c.crashes + int(crash))
    replica = tx.execute(counted.returning(REPLICAS.c.crashes, REPLICAS.c.cancelled)).one()
    if replica.cancelled:
        state = "stopped"
    elif how == "paused":
        state = "paused"
    else:
        state = "quarantined" if replica.crashes >= MAX_ATTEMPTS else "waiting"
    tx.execute(REPLICAS.update().where(where, REPLICAS.c.result.is_(None)).values(state=state))
    sum_up(tx, study, lease.number)
    return tx.execute(sa.select(REPLICAS.c.state).where(where)).scalar_one()


def sum_up(tx: sa.Connection, study: str, number: int) -> State:
    """Set a trial's state from the replicas it was made with; fresh seeds of a replication do not change it."""
    mine = sa.and_(REPLICAS.c.study == study, REPLICAS.c.number == number, REPLICAS.c.phase != "replicate")
    states: set[State] = set(tx.scalars(sa.select(REPLICAS.c.state).where(mine).distinct()))
    state = min(states, key=SUM_ORDER.index)
    tx.execute(
        TRIALS.update()
        .where(TRIALS.c.study == study, TRIALS.c.number == number)
        .values(state=state, finished_at=time.time() if state in FINISHED else None)
    )
    return state
