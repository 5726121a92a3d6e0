"""What is true of every study: its trials, their replicas and results, and how each attempt came out.

Optuna's tables hold what was proposed; these hold what is true. They share one database, so one file is a whole study.
Writers take the write lock before they read (`BEGIN IMMEDIATE` on SQLite, a transaction-wide advisory lock on
PostgreSQL), so a check and the write that follows it cannot be separated by another driver. What drivers do to attempts
is in `leases.py`, by what rules in `states.py`.
"""

import contextlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import uuid4

import sqlalchemy as sa
from hqlt_search_space.errors import StoreError, UnknownNameError
from hqlt_search_space.trial import Config, TrialResult

from hqlt_orchestration.records.database import (
    make_engine,
    patiently,
    refuse_foreign_code,
    schema_lock,
    shown,
    store_errors,
)
from hqlt_orchestration.records.states import add_replicas, sum_up
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
    DriverRow,
    Phase,
    ReplicaRow,
    State,
    StudyRow,
    TrialRow,
    replica_row,
    row_as,
    trial_row,
)


@dataclass(frozen=True)
class NewTrial:
    """A trial that is not in the ledger yet."""

    phase: Phase
    config: Config
    choices: dict[str, Any]
    costs: dict[str, float]
    seeds: tuple[int, ...]
    cell: str | None = None
    proposal: dict[str, Any] = field(default_factory=dict)

    def row(self, number: int) -> TrialRow:
        """The trial, once a driver runs it as `number`."""
        return TrialRow(number, self.phase, self.config, self.choices, self.cell, self.costs, self.proposal, "running")


@dataclass(frozen=True)
class Refused:
    """Why a trial was not taken into the ledger."""

    why: Literal["duplicate", "budget"]


class Ledger:
    """One database. Methods that write are transactions of their own, safe against any number of drivers."""

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
                return row_as(StudyRow, stored)
            tx.execute(STUDIES.insert().values(**row.__dict__))
        return row

    def studies(self) -> list[StudyRow]:
        with self.read() as tx:
            return [row_as(StudyRow, row) for row in tx.execute(sa.select(STUDIES).order_by(STUDIES.c.created_at))]

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
            return row_as(StudyRow, row)

    def update_study(self, name: str, **values: Any) -> None:
        """Change `state`, `note`, `budget` or `study` of a study."""
        with self.write() as tx:
            tx.execute(STUDIES.update().where(STUDIES.c.name == name).values(**values))

    def delete_study(self, name: str) -> None:
        """Remove a study and everything below it, in the ledger only."""
        with self.write() as tx:
            tx.execute(STUDIES.delete().where(STUDIES.c.name == name))

    def drivers(self, study: str) -> list[DriverRow]:
        """Drivers that have not left, living or dead."""
        with self.read() as tx:
            rows = tx.execute(sa.select(DRIVERS).where(DRIVERS.c.study == study, ~DRIVERS.c.ended))
            return [row_as(DriverRow, row) for row in rows]

    # Trials

    def add_trial(self, study: str, new: NewTrial) -> int | Refused:
        """Take a new trial into the ledger, to wait for a driver; returns its number."""
        with self.write() as tx:
            return take_in(tx, study, new)

    def add_replicas(self, study: str, number: int, phase: Phase, seeds: Iterable[int]) -> None:
        """Queue more seeds of a trial; seeds it already has are left as they are."""
        with self.write() as tx:
            have: set[int] = set(
                tx.scalars(sa.select(REPLICAS.c.seed).where(REPLICAS.c.study == study, REPLICAS.c.number == number))
            )
            add_replicas(tx, study, number, phase, [seed for seed in seeds if seed not in have])

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
                raise UnknownNameError("trial", f"{study}/{number}", self._trial_names(study))
            return trial_row(row)

    def _trial_names(self, study: str | None = None) -> tuple[str, ...]:
        """`STUDY/NUMBER` of the trials of one study, or of all."""
        query = sa.select(TRIALS.c.study, TRIALS.c.number).order_by(TRIALS.c.study, TRIALS.c.number)
        with self.read() as tx:
            rows = tx.execute(query if study is None else query.where(TRIALS.c.study == study))
            return tuple(f"{row.study}/{row.number}" for row in rows)

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
                raise UnknownNameError("trial", text, self._trial_names(study))
            return study, self.trial(study, int(number)).number
        with self.read() as tx:
            rows = tx.execute(
                sa.select(TRIALS.c.study, TRIALS.c.number, TRIALS.c.config_id, TRIALS.c.created_at)
                .where(TRIALS.c.config_id.startswith(text, autoescape=True))
                .order_by(TRIALS.c.created_at.desc(), TRIALS.c.number)
            ).all()
            found = sorted({row.config_id for row in rows})
            if not text or not rows:
                raise UnknownNameError("trial", text, self._trial_names())
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
        with self.read() as tx:
            rows = tx.execute(query.order_by(ATTEMPTS.c.number, ATTEMPTS.c.seed, ATTEMPTS.c.attempt))
            return [row_as(AttemptRow, row) for row in rows]

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


def take_in(tx: sa.Connection, study: str, new: NewTrial) -> int | Refused:
    """Add a trial in the transaction `tx`, if the budget has room and its config is new; returns its number.

    An ablation's cells may share a config, or on different tasks a label, never both.
    """
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
            choices=json.dumps(new.choices),
            cell=new.cell,
            costs=json.dumps(new.costs),
            proposal=json.dumps(new.proposal),
            state="waiting",
            created_at=time.time(),
        )
    )
    add_replicas(tx, study, number, new.phase, new.seeds)
    return number


def _create_schema(url: str, engine: sa.Engine) -> None:
    from hqlt_orchestration.records.history import create_optuna_tables

    create_optuna_tables(url, engine)  # first, because our version row says that all tables are there
    with engine.connect() as connection, connection.begin():  # tables without a version would be taken for another's
        METADATA.create_all(connection)
        connection.execute(SCHEMA.insert().values(version=SCHEMA_VERSION))
