"""The ledger's tables, and a row of each as a value."""

import json
import time
from dataclasses import dataclass, fields
from typing import Any, Literal, NewType, Self, TypeVar

import sqlalchemy as sa
from hqlt_search_space.study import Study
from hqlt_search_space.trial import Config, ReplicaResult, TrialResult

SCHEMA_VERSION = 1

Phase = Literal["search", "replicate", "ablate"]
State = Literal["waiting", "running", "complete", "stopped", "failed", "paused", "quarantined"]
FINISHED: tuple[State, ...] = ("complete", "stopped", "failed", "quarantined")
DriverId = NewType("DriverId", str)

METADATA = sa.MetaData()
SCHEMA = sa.Table("hqlt_schema", METADATA, sa.Column("version", sa.Integer, primary_key=True))
STUDIES = sa.Table(
    "hqlt_studies",
    METADATA,
    sa.Column("name", sa.String(128), primary_key=True),
    sa.Column("study", sa.Text, nullable=False),  # the resolved study, as JSON
    sa.Column("file_text", sa.Text, nullable=False),  # the YAML as the user wrote it
    sa.Column("space_hash", sa.String(64), nullable=False),
    sa.Column("budget", sa.Integer, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),  # open, paused, complete
    sa.Column("note", sa.Text),  # why it ended early, for status
    sa.Column("created_at", sa.Float, nullable=False),
)
TRIALS = sa.Table(
    "hqlt_trials",
    METADATA,
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
REPLICAS = sa.Table(
    "hqlt_replicas",
    METADATA,
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
ATTEMPTS = sa.Table(
    "hqlt_attempts",
    METADATA,
    sa.Column("study", sa.String(128), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("seed", sa.Integer, primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True),
    sa.Column("driver", sa.String(36), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),  # running, complete, paused, crashed, hung, out_of_memory, lost
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
DRIVERS = sa.Table(
    "hqlt_drivers",
    METADATA,
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
RUNGS = sa.Table(
    "hqlt_rungs",
    METADATA,
    sa.Column("study", sa.String(128), primary_key=True),
    sa.Column("step", sa.Integer, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("seed", sa.Integer, primary_key=True),
    sa.Column("objectives", sa.Text, nullable=False),
    sa.ForeignKeyConstraint(["study", "number"], ["hqlt_trials.study", "hqlt_trials.number"], ondelete="CASCADE"),
)
RERUNS = sa.Table(
    "hqlt_reruns",
    METADATA,
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
    created_at: float

    @classmethod
    def of(cls, study: Study, file_text: str = "") -> Self:
        """A study that nobody has run yet."""
        return cls(
            name=study.name,
            study=study.model_dump_json(),  # in the order of the file: samplers draw the axes in that order
            file_text=file_text,
            space_hash=study.space_hash,
            budget=study.n_trials,
            state="open",
            note=None,
            created_at=time.time(),
        )


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


_Plain = TypeVar("_Plain", StudyRow, AttemptRow, DriverRow)


def row_as(kind: type[_Plain], row: sa.Row[Any]) -> _Plain:
    """A row whose columns are the fields of a `kind`."""
    return kind(**{each.name: getattr(row, each.name) for each in fields(kind)})


def trial_row(row: sa.Row[Any]) -> TrialRow:
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


def replica_row(row: sa.Row[Any]) -> ReplicaRow:
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
