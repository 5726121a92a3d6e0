"""The SQL tables that say which attempt runs where, and which result counts.

Optuna's tables hold what was proposed; these hold what is true. They share one database, so one file is a whole study.
Writers take the write lock before they read (`BEGIN IMMEDIATE` on SQLite, a transaction-wide advisory lock on
PostgreSQL), so a check and the write that follows it cannot be separated by another driver. A result is committed once,
by compare-and-set on its attempt.

States of a replica, and of a trial as the sum of its replicas:

    waiting -> running -> complete | stopped | failed         a result, kept for ever
                       -> paused                              asked to stop; continues from its checkpoint
                       -> waiting                             the attempt crashed or its driver died: tried again
                       -> quarantined                         MAX_ATTEMPTS crashes: not tried again
"""

import contextlib
import fcntl
import json
import os
import socket
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NewType, TypeVar
from uuid import uuid4

import psutil
import sqlalchemy as sa
from hqlt_search_space.errors import StoreError, UnknownNameError
from hqlt_search_space.trial import Config, ReplicaResult, TrialResult
from sqlalchemy.exc import DBAPIError

from hqlt_orchestration.executor import AttemptKey

SCHEMA_VERSION = 1
MAX_ATTEMPTS = 2  # a config that kills its worker twice will do so again; the rest of the study need not wait for it
BUSY_TIMEOUT_S = 30.0
STALE_DRIVER_S = 60.0  # twelve missed beats: what a driver on another host may miss before its trials are given away

Phase = Literal["search", "replicate", "ablate"]
State = Literal["waiting", "running", "complete", "stopped", "failed", "paused", "quarantined"]
FINISHED: tuple[State, ...] = ("complete", "stopped", "failed", "quarantined")
DriverId = NewType("DriverId", str)
T = TypeVar("T")

_metadata = sa.MetaData()
_schema = sa.Table("hqlt_schema", _metadata, sa.Column("version", sa.Integer, primary_key=True))
_studies = sa.Table(
    "hqlt_studies",
    _metadata,
    sa.Column("name", sa.String(128), primary_key=True),
    sa.Column("study", sa.Text, nullable=False),  # the resolved study, as JSON
    sa.Column("file_text", sa.Text, nullable=False),  # the YAML as the user wrote it
    sa.Column("space_hash", sa.String(64), nullable=False),
    sa.Column("budget", sa.Integer, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),  # open, paused, complete
    sa.Column("note", sa.Text),  # why it ended early, for status
    sa.Column("source_version", sa.String(64)),
    sa.Column("created_at", sa.Float, nullable=False),
)
_trials = sa.Table(
    "hqlt_trials",
    _metadata,
    sa.Column("study", sa.ForeignKey("hqlt_studies.name", ondelete="CASCADE"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("phase", sa.String(16), nullable=False),
    sa.Column("config_id", sa.String(16), nullable=False),
    sa.Column("config", sa.Text, nullable=False),
    sa.Column("choices", sa.Text, nullable=False),
    sa.Column("cell", sa.String(256)),
    sa.Column("costs", sa.Text, nullable=False),
    sa.Column("proposal", sa.Text, nullable=False),  # what Optuna needs to know of the trial; see sampler.py
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("finished_at", sa.Float),
    sa.UniqueConstraint("study", "config_id", "cell"),
)
_replicas = sa.Table(
    "hqlt_replicas",
    _metadata,
    sa.Column("study", sa.String(128), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("seed", sa.Integer, primary_key=True),
    sa.Column("phase", sa.String(16), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("crashes", sa.Integer, nullable=False),
    sa.Column("cancelled", sa.Boolean, nullable=False),
    sa.Column("result", sa.Text),
    sa.ForeignKeyConstraint(["study", "number"], ["hqlt_trials.study", "hqlt_trials.number"], ondelete="CASCADE"),
    sa.Index("hqlt_replicas_by_state", "study", "state"),
)
_attempts = sa.Table(
    "hqlt_attempts",
    _metadata,
    sa.Column("study", sa.String(128), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("seed", sa.Integer, primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True),
    sa.Column("driver", sa.String(36), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),  # running, complete, paused, crashed, hung, lost
    sa.Column("step", sa.Integer, nullable=False),  # the progress counter: optimiser steps seen by the driver
    sa.Column("started_at", sa.Float, nullable=False),
    sa.Column("ended_at", sa.Float),
    sa.Column("message", sa.Text),
    sa.ForeignKeyConstraint(
        ["study", "number", "seed"],
        ["hqlt_replicas.study", "hqlt_replicas.number", "hqlt_replicas.seed"],
        ondelete="CASCADE",
    ),
    sa.Index("hqlt_attempts_by_state", "study", "state"),
)
_drivers = sa.Table(
    "hqlt_drivers",
    _metadata,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("study", sa.ForeignKey("hqlt_studies.name", ondelete="CASCADE"), nullable=False),
    sa.Column("host", sa.String(256), nullable=False),
    sa.Column("boot_id", sa.String(64), nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("process_start", sa.Float, nullable=False),
    sa.Column("executor", sa.String(16), nullable=False),
    sa.Column("beats", sa.Integer, nullable=False),  # a counter: two readings of it are compared, never two clocks
    sa.Column("beat_at", sa.Float, nullable=False),  # for people to read
    sa.Column("ended", sa.Boolean, nullable=False),
)
_rungs = sa.Table(
    "hqlt_rungs",
    _metadata,
    sa.Column("study", sa.String(128), primary_key=True),
    sa.Column("step", sa.Integer, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("seed", sa.Integer, primary_key=True),
    sa.Column("objectives", sa.Text, nullable=False),
    sa.ForeignKeyConstraint(["study", "number"], ["hqlt_trials.study", "hqlt_trials.number"], ondelete="CASCADE"),
)
_reruns = sa.Table(
    "hqlt_reruns",
    _metadata,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("study", sa.ForeignKey("hqlt_studies.name", ondelete="CASCADE"), nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("changes", sa.Text, nullable=False),  # axis -> value; {} for an exact rerun
    sa.Column("identical", sa.Boolean, nullable=False),
    sa.Column("result", sa.Text, nullable=False),
    sa.Column("folder", sa.Text, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
)


@dataclass(frozen=True)
class StudyRow:
    """A study as the ledger has it."""

    name: str
    study: str
    file_text: str
    space_hash: str
    budget: int
    state: Literal["open", "paused", "complete"]
    note: str | None
    source_version: str | None
    created_at: float


@dataclass(frozen=True)
class TrialRow:
    """A trial without its results."""

    number: int
    phase: Phase
    config: Config
    choices: dict[str, Any]
    cell: str | None
    costs: dict[str, float]
    proposal: dict[str, Any]
    state: State


@dataclass(frozen=True)
class ReplicaRow:
    """One seed of a trial, and its result once there is one."""

    number: int
    seed: int
    phase: Phase
    state: State
    attempts: int
    crashes: int
    cancelled: bool
    outcome: TrialResult | None

    @property
    def result(self) -> ReplicaResult | None:
        return self.outcome.replicas[0] if self.outcome else None


@dataclass(frozen=True)
class AttemptRow:
    """One try at a replica."""

    number: int
    seed: int
    attempt: int
    state: str
    step: int
    started_at: float
    ended_at: float | None
    message: str | None


@dataclass(frozen=True)
class DriverRow:
    """A process that runs (or ran) trials of a study."""

    id: DriverId
    host: str
    boot_id: str
    pid: int
    process_start: float
    executor: str
    beats: int
    beat_at: float


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
            with _schema_lock(url, self.engine):
                if not sa.inspect(self.engine).has_table(_schema.name):
                    _create_schema(url, self.engine)
                with self.read() as tx:
                    version = tx.scalar(sa.select(_schema.c.version))
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
        with store_errors(self.url), self.engine.connect() as connection, connection.begin():
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction that holds the write lock from its first statement."""
        with store_errors(self.url), self.engine.connect() as raw:
            connection = raw.execution_options(hqlt_write=True)
            with connection.begin():
                if self.engine.dialect.name == "postgresql":
                    connection.execute(sa.text("SELECT pg_advisory_xact_lock(4714801)"))
                yield connection

    # Studies

    def add_study(self, row: StudyRow) -> StudyRow:
        """Store a new study; if one of that name is there, return that one unchanged."""
        with self.write() as tx:
            stored = tx.execute(sa.select(_studies).where(_studies.c.name == row.name)).one_or_none()
            if stored is not None:
                return _study_row(stored)
            tx.execute(_studies.insert().values(**row.__dict__))
        return row

    def studies(self) -> list[StudyRow]:
        with self.read() as tx:
            return [_study_row(row) for row in tx.execute(sa.select(_studies).order_by(_studies.c.created_at))]

    def study(self, name: str) -> StudyRow:
        """The study called `name`.

        Raises:
            UnknownNameError: there is none; the message has the nearest name.
        """
        with self.read() as tx:
            row = tx.execute(sa.select(_studies).where(_studies.c.name == name)).one_or_none()
            if row is None:
                known: tuple[str, ...] = tuple(tx.scalars(sa.select(_studies.c.name).order_by(_studies.c.name)))
                raise UnknownNameError("study", name, known)
            return _study_row(row)

    def update_study(self, name: str, **values: Any) -> None:
        """Change `state`, `note`, `budget` or `study` of a study."""
        with self.write() as tx:
            tx.execute(_studies.update().where(_studies.c.name == name).values(**values))

    def delete_study(self, name: str) -> None:
        """Remove a study and everything below it, in the ledger only."""
        with self.write() as tx:
            tx.execute(_studies.delete().where(_studies.c.name == name))

    # Drivers and their leases

    def enter(self, study: str, executor: str) -> DriverId:
        """Register this process as a driver of `study`."""
        me = psutil.Process()
        driver = DriverId(str(uuid4()))
        with self.write() as tx:
            tx.execute(
                _drivers.insert().values(
                    id=driver,
                    study=study,
                    host=socket.gethostname(),
                    boot_id=_boot_id(),
                    pid=me.pid,
                    process_start=me.create_time(),
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
            tx.execute(_drivers.update().where(_drivers.c.id == driver).values(executor=executor))

    def leave(self, driver: DriverId) -> None:
        """Say that this driver is gone in good order: what it still holds may be taken at once."""
        with self.write() as tx:
            tx.execute(_drivers.update().where(_drivers.c.id == driver).values(ended=True))

    def beat(self, study: str, driver: DriverId, steps: Mapping[AttemptKey, int]) -> list[AttemptKey]:
        """Show that the driver lives and how far its attempts are. Returns those a user has asked to cancel."""
        with self.write() as tx:
            tx.execute(
                _drivers.update().where(_drivers.c.id == driver).values(beats=_drivers.c.beats + 1, beat_at=time.time())
            )
            for lease, step in steps.items():
                tx.execute(_attempts.update().where(_is(_attempts, study, lease)).values(step=step))
            asked = sa.select(_replicas.c.number, _replicas.c.seed).where(
                _replicas.c.study == study, _replicas.c.cancelled, _replicas.c.state == "running"
            )
            cancelled = {(row.number, row.seed) for row in tx.execute(asked)}
        return [lease for lease in steps if (lease.number, lease.seed) in cancelled]

    def drivers(self, study: str) -> list[DriverRow]:
        """Drivers that have not left, living or dead."""
        with self.read() as tx:
            rows = tx.execute(sa.select(_drivers).where(_drivers.c.study == study, ~_drivers.c.ended))
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
                    _drivers.update()
                    .where(_drivers.c.id == driver.id, _drivers.c.beats == driver.beats)
                    .values(ended=True)
                )
                if changed.rowcount:
                    back += self._take_back(tx, study, driver)
            gone = sa.select(_drivers.c.id).where(_drivers.c.study == study, _drivers.c.ended)
            left = sa.select(_attempts).where(
                _attempts.c.study == study, _attempts.c.state == "running", _attempts.c.driver.in_(gone)
            )
            for row in tx.execute(left).all():
                lease = AttemptKey(row.number, row.seed, row.attempt)
                back.append((lease, _end_attempt(tx, study, lease, "lost", "its driver left", crash=False)))
        return back

    def _take_back(self, tx: sa.Connection, study: str, driver: DriverRow) -> list[tuple[AttemptKey, State]]:
        crash = driver.executor == "inline"
        held = sa.select(_attempts).where(_attempts.c.driver == driver.id, _attempts.c.state == "running")
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
        is leased. An ablation's cells may share a config, never a label.
        """
        now = time.time()
        with self.write() as tx:
            budget: int = tx.execute(sa.select(_studies.c.budget).where(_studies.c.name == study)).scalar_one()
            number: int = tx.execute(sa.select(sa.func.count()).where(_trials.c.study == study)).scalar_one()
            same = sa.select(_trials.c.number).where(
                _trials.c.study == study,
                _trials.c.cell == new.cell if new.cell is not None else _trials.c.config_id == new.config.config_id,
            )
            if tx.execute(same).first() is not None:
                return Refused("duplicate")
            if number >= budget:  # trials are numbered from 0 and never removed
                return Refused("budget")
            tx.execute(
                _trials.insert().values(
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
                tx.scalars(sa.select(_replicas.c.seed).where(_replicas.c.study == study, _replicas.c.number == number))
            )
            _add_replicas(tx, study, number, phase, [seed for seed in seeds if seed not in have])

    def lease_next(self, study: str, driver: DriverId, phase: Phase) -> AttemptKey | None:
        """Lease the first replica of a phase that waits or was paused, or None."""
        waiting = (
            sa.select(_replicas.c.number, _replicas.c.seed)
            .where(
                _replicas.c.study == study,
                _replicas.c.phase == phase,
                _replicas.c.state.in_(("waiting", "paused")),
                ~_replicas.c.cancelled,
            )
            .order_by(_replicas.c.number, _replicas.c.seed)
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
            sa.select(_replicas.c.seed)
            .where(
                _replicas.c.study == study,
                _replicas.c.number == lease.number,
                _replicas.c.seed.in_(seeds),
                _replicas.c.state.in_(("waiting", "paused")),
                ~_replicas.c.cancelled,
            )
            .order_by(_replicas.c.seed)
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
                _attempts.update()
                .where(_is(_attempts, study, lease), _attempts.c.state == "running")
                .values(state="complete", ended_at=time.time(), step=result.step)
            )
            if not won.rowcount:
                return None
            tx.execute(
                _replicas.update()
                .where(_is_replica(study, lease.number, lease.seed))
                .values(state=result.status, result=outcome.model_dump_json())
            )
            return _sum_up(tx, study, lease.number)

    def release(
        self, study: str, lease: AttemptKey, how: Literal["paused", "crashed", "hung"], message: str | None = None
    ) -> State | None:
        """End an attempt without a result. Returns the state of its replica, or None if the attempt had ended."""
        with self.write() as tx:
            row = tx.execute(sa.select(_attempts.c.state).where(_is(_attempts, study, lease))).one_or_none()
            if row is None or row.state != "running":
                return None
            return _end_attempt(tx, study, lease, how, message, crash=how != "paused")

    def cancel(self, study: str, number: int) -> int:
        """Ask for the end of a trial's unfinished replicas. Returns how many there were.

        Those nobody runs end at once; a running one ends when its driver next beats.
        """
        unfinished = sa.and_(
            _replicas.c.study == study, _replicas.c.number == number, _replicas.c.state.not_in(FINISHED)
        )
        with self.write() as tx:
            asked = tx.execute(_replicas.update().where(unfinished).values(cancelled=True)).rowcount
            tx.execute(_replicas.update().where(unfinished, _replicas.c.state != "running").values(state="stopped"))
            _sum_up(tx, study, number)
        return asked

    def end_cancelled(self, study: str, lease: AttemptKey) -> None:
        """End an attempt that its user has cancelled: the replica is stopped, without a result."""
        with self.write() as tx:
            tx.execute(
                _attempts.update()
                .where(_is(_attempts, study, lease), _attempts.c.state == "running")
                .values(state="paused", ended_at=time.time(), message="cancelled")
            )
            tx.execute(
                _replicas.update()
                .where(_is_replica(study, lease.number, lease.seed), _replicas.c.result.is_(None))
                .values(state="stopped")
            )
            _sum_up(tx, study, lease.number)

    def trials(self, study: str) -> list[TrialRow]:
        """Every trial in order of number."""
        with self.read() as tx:
            rows = tx.execute(sa.select(_trials).where(_trials.c.study == study).order_by(_trials.c.number))
            return [_trial_row(row) for row in rows]

    def trial(self, study: str, number: int) -> TrialRow:
        """One trial.

        Raises:
            UnknownNameError: the study has no trial of that number.
        """
        with self.read() as tx:
            row = tx.execute(
                sa.select(_trials).where(_trials.c.study == study, _trials.c.number == number)
            ).one_or_none()
            if row is None:
                count = tx.scalar(sa.select(sa.func.count()).where(_trials.c.study == study))
                known = tuple(f"{study}/{n}" for n in range(count or 0))
                raise UnknownNameError("trial", f"{study}/{number}", known)
            return _trial_row(row)

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
                sa.select(_trials.c.study, _trials.c.number, _trials.c.config_id, _trials.c.created_at)
                .where(_trials.c.config_id.startswith(text, autoescape=True))
                .order_by(_trials.c.created_at.desc(), _trials.c.number)
            ).all()
            found = sorted({row.config_id for row in rows})
            if not text or not rows:
                raise UnknownNameError("trial", text, tuple(tx.scalars(sa.select(_trials.c.config_id).distinct())))
            if len(found) > 1:
                raise UnknownNameError("single trial", text, tuple(found))
        newest = rows[0].study
        return newest, min(row.number for row in rows if row.study == newest)

    def replicas(self, study: str, number: int | None = None) -> list[ReplicaRow]:
        """The replicas of one trial, or of all, with their results."""
        query = sa.select(_replicas).where(_replicas.c.study == study)
        if number is not None:
            query = query.where(_replicas.c.number == number)
        with self.read() as tx:
            rows = tx.execute(query.order_by(_replicas.c.number, _replicas.c.seed))
            return [_replica_row(row) for row in rows]

    def attempts(self, study: str, number: int | None = None) -> list[AttemptRow]:
        query = sa.select(_attempts).where(_attempts.c.study == study)
        if number is not None:
            query = query.where(_attempts.c.number == number)
        names = tuple(AttemptRow.__dataclass_fields__)
        with self.read() as tx:
            rows = tx.execute(query.order_by(_attempts.c.number, _attempts.c.seed, _attempts.c.attempt))
            return [AttemptRow(**{name: getattr(row, name) for name in names}) for row in rows]

    def n_unfinished(self, study: str, phase: Phase) -> int:
        """Replicas of a phase that have neither a result nor been given up, whoever runs them."""
        with self.read() as tx:
            return tx.execute(
                sa.select(sa.func.count()).where(
                    _replicas.c.study == study, _replicas.c.phase == phase, _replicas.c.state.not_in(FINISHED)
                )
            ).scalar_one()

    def counts(self, study: str) -> dict[State, int]:
        """Trials by state; every state is a key."""
        states: tuple[State, ...] = ("complete", "stopped", "failed", "running", "waiting", "paused", "quarantined")
        with self.read() as tx:
            rows = tx.execute(
                sa.select(_trials.c.state, sa.func.count().label("n"))
                .where(_trials.c.study == study)
                .group_by(_trials.c.state)
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
                _reruns.insert().values(
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
            tx.execute(_rungs.delete().where(*(_rungs.c[name] == value for name, value in key.items())))
            tx.execute(_rungs.insert().values(**key, objectives=json.dumps(dict(objectives))))
            rows = tx.execute(sa.select(_rungs).where(_rungs.c.study == study, _rungs.c.step == step))
            return {(row.number, row.seed): json.loads(row.objectives) for row in rows}


def driver_is_dead(driver: DriverRow) -> bool | None:
    """Whether a driver's process is gone; None if it is on another machine and only its beats can tell.

    A process id alone may have been given to another process, hence the start time; after a reboot nobody is left.
    """
    if driver.host != socket.gethostname():
        return None
    if driver.boot_id != _boot_id():
        return True
    try:
        return bool(abs(psutil.Process(driver.pid).create_time() - driver.process_start) > 1.0)
    except psutil.NoSuchProcess:
        return True


class DriverWatch:
    """Tells which drivers are dead, those on other machines by beats that stay away.

    Only differences of this process's monotonic clock are used: neither a stepped clock nor two hosts that disagree
    about the time can make a living driver look dead.
    """

    def __init__(self, stale_after_s: float = STALE_DRIVER_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._stale_after_s = stale_after_s
        self._clock = clock
        self._seen: dict[DriverId, tuple[int, float]] = {}

    def dead(self, drivers: Iterable[DriverRow]) -> list[DriverRow]:
        now = self._clock()
        dead: list[DriverRow] = []
        for driver in drivers:
            verdict = driver_is_dead(driver)
            beats, since = self._seen.get(driver.id, (-1, now))
            if beats != driver.beats:
                self._seen[driver.id] = (driver.beats, now)
                since = now
            if verdict is True or (verdict is None and now - since > self._stale_after_s):
                dead.append(driver)
        return dead


def make_engine(url: str) -> sa.Engine:
    """An engine whose SQLite connections use WAL, full durability and a patient lock.

    Raises:
        StoreError: `url` is no URL of a database that can be used, or its driver is not installed.
    """
    try:
        backend = sa.make_url(url).get_backend_name()
        if backend == "postgresql":
            return sa.create_engine(url, pool_pre_ping=True)
    except sa.exc.ArgumentError:
        backend = None
    except ImportError as error:
        raise StoreError(f"PostgreSQL needs a driver: pip install 'hqlt[postgres]' ({error})") from error
    if backend != "sqlite":
        raise StoreError(f"--store {url}: write sqlite:///PATH or postgresql+psycopg://USER@HOST/DATABASE")
    engine = sa.create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S})

    @sa.event.listens_for(engine, "connect")
    def _configure(connection: sqlite3.Connection, _record: object) -> None:
        configure_sqlite(connection)
        connection.isolation_level = None  # we say BEGIN ourselves, so that it can be IMMEDIATE

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        writes = connection.get_execution_options().get("hqlt_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def configure_sqlite(connection: sqlite3.Connection) -> None:
    """WAL: readers never wait, a commit is one write. FULL: what was committed survives a power cut."""
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def shown(url: str) -> str:
    """`url` as a user should see it: a path for SQLite, and never a password."""
    parsed = sa.make_url(url)
    return str(parsed.database) if parsed.get_backend_name() == "sqlite" else parsed.render_as_string()


@contextlib.contextmanager
def store_errors(url: str) -> Iterator[None]:
    """Turn what a database says about its disk and locks into a `StoreError` with a sentence."""
    try:
        yield
    except StoreError:
        raise
    except (DBAPIError, sqlite3.Error) as error:
        original = error.orig if isinstance(error, DBAPIError) else error
        sentence = _sentence(url, str(original))
        if sentence is None:
            raise
        raise StoreError(sentence) from error
    except Exception as error:
        # Optuna wraps database errors in its own; the cause says what happened.
        cause = error.__cause__
        sentence = _sentence(url, str(cause.orig)) if isinstance(cause, DBAPIError) else None
        if sentence is None:
            raise
        raise StoreError(sentence) from error


_SENTENCES = {
    "readonly database": "{where} is read-only; give a folder you may write to with --data",
    "unable to open database file": "cannot open {where}: the folder is missing or may not be written to",
    "disk is full": "the disk that holds {where} is full; free some space, then `hqlt study resume`",
    "disk I/O error": "the disk that holds {where} fails to write (full, or a network file system); nothing was lost",
    "database is locked": f"{{where}} was locked by another program for {BUSY_TIMEOUT_S:.0f} s; close it and resume",
    "not a database": "{where} is not a database; move it away or give another --data folder",
    "malformed": "{where} is damaged; restore it from a backup or give another --data folder",
    "connection": "cannot reach the database {where}: is it running, and may this user log in?",
    "password": "cannot reach the database {where}: is it running, and may this user log in?",
    "does not exist": "cannot use the database {where}: it, or a table of it, does not exist",
}


def _sentence(url: str, message: str) -> str | None:
    for part, sentence in _SENTENCES.items():
        if part in message:
            return sentence.format(where=shown(url))
    return None


@contextlib.contextmanager
def _schema_lock(url: str, engine: sa.Engine) -> Iterator[None]:
    """One process at a time; six that create tables in a fresh file at once would kill some of each other."""
    if engine.dialect.name == "postgresql":
        with engine.connect() as connection:
            connection.execute(sa.text("SELECT pg_advisory_lock(4714802)"))
            yield
            connection.execute(sa.text("SELECT pg_advisory_unlock(4714802)"))
        return
    database = sa.make_url(url).database
    if database is None or database == ":memory:":
        raise StoreError("a study needs a database file; sqlite:///:memory: would forget it")
    path = Path(database)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StoreError(f"cannot write to {path.parent}: {error.strerror}; give another folder with --data") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _create_schema(url: str, engine: sa.Engine) -> None:
    from hqlt_orchestration.sampler import create_optuna_tables

    create_optuna_tables(url)  # first, because our version row says that all tables are there
    _metadata.create_all(engine)
    with engine.connect() as connection, connection.begin():
        connection.execute(_schema.insert().values(version=SCHEMA_VERSION))


@lru_cache
def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _is(table: sa.Table, study: str, lease: AttemptKey) -> sa.ColumnElement[bool]:
    return sa.and_(
        table.c.study == study,
        table.c.number == lease.number,
        table.c.seed == lease.seed,
        table.c.attempt == lease.attempt,
    )


def _is_replica(study: str, number: int, seed: int) -> sa.ColumnElement[bool]:
    return sa.and_(_replicas.c.study == study, _replicas.c.number == number, _replicas.c.seed == seed)


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
        tx.execute(_replicas.insert(), rows)


def _lease(tx: sa.Connection, study: str, number: int, seed: int, driver: DriverId) -> AttemptKey:
    attempt: int = tx.execute(
        _replicas.update()
        .where(_is_replica(study, number, seed))
        .values(state="running", attempts=_replicas.c.attempts + 1)
        .returning(_replicas.c.attempts)
    ).scalar_one()
    tx.execute(
        _attempts.insert().values(
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
    _sum_up(tx, study, number)
    return AttemptKey(number, seed, attempt)


def _end_attempt(
    tx: sa.Connection, study: str, lease: AttemptKey, how: str, message: str | None, *, crash: bool
) -> State:
    tx.execute(
        _attempts.update().where(_is(_attempts, study, lease)).values(state=how, ended_at=time.time(), message=message)
    )
    where = _is_replica(study, lease.number, lease.seed)
    crashes: int = tx.execute(
        _replicas.update().where(where).values(crashes=_replicas.c.crashes + int(crash)).returning(_replicas.c.crashes)
    ).scalar_one()
    state: State = "paused" if how == "paused" else "quarantined" if crashes >= MAX_ATTEMPTS else "waiting"
    tx.execute(_replicas.update().where(where).values(state=state))
    _sum_up(tx, study, lease.number)
    return state


def _sum_up(tx: sa.Connection, study: str, number: int) -> State:
    """Set a trial's state from the replicas it was made with; fresh seeds of a replication do not change it."""
    mine = sa.and_(_replicas.c.study == study, _replicas.c.number == number, _replicas.c.phase != "replicate")
    states: set[State] = set(tx.scalars(sa.select(_replicas.c.state).where(mine).distinct()))
    # An unfinished replica outweighs a finished one, and a failure outweighs a success.
    order: tuple[State, ...] = ("running", "paused", "waiting", "quarantined", "failed", "stopped", "complete")
    state = next(state for state in order if state in states)
    tx.execute(
        _trials.update()
        .where(_trials.c.study == study, _trials.c.number == number)
        .values(state=state, finished_at=time.time() if state in FINISHED else None)
    )
    return state


def _study_row(row: sa.Row[Any]) -> StudyRow:
    return StudyRow(**{name: getattr(row, name) for name in StudyRow.__dataclass_fields__})


def _trial_row(row: sa.Row[Any]) -> TrialRow:
    return TrialRow(
        number=row.number,
        phase=row.phase,
        config=Config.from_json(row.config),
        choices=json.loads(row.choices),
        cell=row.cell,
        costs=json.loads(row.costs),
        proposal=json.loads(row.proposal),
        state=row.state,
    )


def _replica_row(row: sa.Row[Any]) -> ReplicaRow:
    return ReplicaRow(
        number=row.number,
        seed=row.seed,
        phase=row.phase,
        state=row.state,
        attempts=row.attempts,
        crashes=row.crashes,
        cancelled=row.cancelled,
        outcome=TrialResult.from_json(row.result) if row.result else None,
    )
