"""What the beginning and the end of an attempt make of its replica, and the replicas of their trial.

Steps within somebody else's transaction, which must hold the write lock.

    waiting -> running -> complete | stopped | failed         a result, kept for ever
                       -> paused                              asked to stop; continues from its checkpoint
                       -> waiting                             the attempt crashed, hung or lost its driver: tried again
                       -> quarantined                         MAX_ATTEMPTS crashes: not tried again
"""

import time
from collections.abc import Iterable
from typing import Literal

import sqlalchemy as sa

from hqlt_orchestration.records.attempts import AttemptKey
from hqlt_orchestration.records.tables import ATTEMPTS, FINISHED, REPLICAS, TRIALS, DriverId, Phase, State

MAX_ATTEMPTS = 2  # a config that kills its worker twice will do so again; the rest of the study need not wait for it
SUM_ORDER: tuple[State, ...] = ("running", "paused", "waiting", "quarantined", "failed", "stopped", "complete")
"""The state of a trial is the first of these that one of its replicas has: an unfinished one outweighs a finished one,
and a failure a success."""
AttemptEnd = Literal["paused", "crashed", "hung", "out_of_memory", "lost"]
"""How an attempt may end without a result."""
CRASHES: tuple[AttemptEnd, ...] = ("crashed", "hung", "out_of_memory")
"""Those that count towards quarantine."""


def is_attempt(study: str, key: AttemptKey) -> sa.ColumnElement[bool]:
    """Picks the attempt `key` from its table."""
    return sa.and_(
        ATTEMPTS.c.study == study,
        ATTEMPTS.c.number == key.number,
        ATTEMPTS.c.seed == key.seed,
        ATTEMPTS.c.attempt == key.attempt,
    )


def is_replica(study: str, number: int, seed: int) -> sa.ColumnElement[bool]:
    """Picks one seed of a trial from its table."""
    return sa.and_(REPLICAS.c.study == study, REPLICAS.c.number == number, REPLICAS.c.seed == seed)


def add_replicas(tx: sa.Connection, study: str, number: int, phase: Phase, seeds: Iterable[int]) -> None:
    """Seeds that the trial does not have yet, to wait for their turn."""
    replica = {"study": study, "number": number, "phase": phase, "state": "waiting"}
    rows = [replica | {"seed": seed, "attempts": 0, "crashes": 0, "cancelled": False} for seed in seeds]
    if rows:
        tx.execute(REPLICAS.insert(), rows)


def begin_attempt(tx: sa.Connection, study: str, number: int, seed: int, driver: DriverId) -> AttemptKey:
    """Give a replica that nobody runs to `driver`."""
    attempt: int = tx.execute(
        REPLICAS.update()
        .where(is_replica(study, number, seed))
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


def end_attempt(tx: sa.Connection, study: str, key: AttemptKey, how: AttemptEnd, message: str | None) -> State:
    """End a running attempt without a result; returns the state of its replica.

    A replica whose end a user has asked for is `stopped`, however its attempt ends.
    """
    tx.execute(ATTEMPTS.update().where(is_attempt(study, key)).values(state=how, ended_at=time.time(), message=message))
    mine = is_replica(study, key.number, key.seed)
    counted = REPLICAS.update().where(mine).values(crashes=REPLICAS.c.crashes + int(how in CRASHES))
    replica = tx.execute(counted.returning(REPLICAS.c.crashes, REPLICAS.c.cancelled)).one()
    state: State
    if replica.cancelled:
        state = "stopped"
    elif how == "paused":
        state = "paused"
    else:
        state = "quarantined" if replica.crashes >= MAX_ATTEMPTS else "waiting"
    tx.execute(REPLICAS.update().where(mine, REPLICAS.c.result.is_(None)).values(state=state))
    sum_up(tx, study, key.number)
    return tx.execute(sa.select(REPLICAS.c.state).where(mine)).scalar_one()


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
