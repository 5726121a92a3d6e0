"""Which driver runs which attempt, and whose result counts.

An attempt is leased to a driver, and only who holds the lease can end it, once: by a result, or without one. Each is a
transaction of its own and compares before it sets, so a driver that stood still while others took over changes nothing.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from uuid import uuid4

import sqlalchemy as sa
from hqlt_search_space.trial import ReplicaResult, TrialResult

from hqlt_orchestration.records.attempts import AttemptKey
from hqlt_orchestration.records.ledger import Ledger, NewTrial, Refused, take_in
from hqlt_orchestration.records.processes import this_process
from hqlt_orchestration.records.states import AttemptEnd, begin_attempt, end_attempt, is_attempt, is_replica, sum_up
from hqlt_orchestration.records.tables import ATTEMPTS, DRIVERS, REPLICAS, DriverId, DriverRow, Phase, State


class Leases:
    """What this process holds of a study, as one of its drivers."""

    def __init__(self, ledger: Ledger, study: str, executor: str) -> None:
        """Become a driver of `study`, whose trials run in `executor`."""
        self._ledger = ledger
        self._study = study
        self.driver = DriverId(str(uuid4()))
        me = this_process()
        with ledger.write() as tx:
            tx.execute(
                DRIVERS.insert().values(
                    id=self.driver,
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

    def set_executor(self, executor: str) -> None:
        """Say where the driver's trials run, once it is known."""
        with self._ledger.write() as tx:
            tx.execute(DRIVERS.update().where(DRIVERS.c.id == self.driver).values(executor=executor))

    def leave(self) -> None:
        """Say that this driver is gone in good order. What it still holds is given back."""
        with self._ledger.write() as tx:
            tx.execute(DRIVERS.update().where(DRIVERS.c.id == self.driver).values(ended=True))
            _end_attempts(tx, self._study, ATTEMPTS.c.driver == self.driver, "lost", "its driver left")

    def beat(self, steps: Mapping[AttemptKey, int]) -> list[AttemptKey] | None:
        """Show that the driver lives and how far its attempts are. Returns those a user has asked to cancel.

        None if another driver has given this one up, because its beats stayed away: what it held is no longer its own.
        """
        with self._ledger.write() as tx:
            beaten = tx.execute(
                DRIVERS.update()
                .where(DRIVERS.c.id == self.driver, ~DRIVERS.c.ended)
                .values(beats=DRIVERS.c.beats + 1, beat_at=time.time())
            )
            if not beaten.rowcount:
                return None
            for key, step in steps.items():
                tx.execute(ATTEMPTS.update().where(is_attempt(self._study, key)).values(step=step))
            asked = sa.select(REPLICAS.c.number, REPLICAS.c.seed).where(
                REPLICAS.c.study == self._study, REPLICAS.c.cancelled, REPLICAS.c.state == "running"
            )
            cancelled = {(row.number, row.seed) for row in tx.execute(asked)}
        return [key for key in steps if (key.number, key.seed) in cancelled]

    def claim(self, new: NewTrial) -> AttemptKey | Refused:
        """Take a new trial into the ledger, and lease its first replica.

        One transaction, so two drivers can neither overshoot the budget nor train a config twice.
        """
        with self._ledger.write() as tx:
            number = take_in(tx, self._study, new)
            if isinstance(number, Refused):
                return number
            return begin_attempt(tx, self._study, number, new.seeds[0], self.driver)

    def take_next(self, phase: Phase) -> AttemptKey | None:
        """Lease the first replica of a phase that waits or was paused, or None."""
        waiting = _waiting(self._study).where(REPLICAS.c.phase == phase).limit(1)
        with self._ledger.read() as tx:  # mostly there is none, and then nobody's lock is needed
            if tx.execute(waiting).first() is None:
                return None
        with self._ledger.write() as tx:
            row = tx.execute(waiting).first()
            return begin_attempt(tx, self._study, row.number, row.seed, self.driver) if row else None

    def take_others(self, number: int, seeds: Sequence[int]) -> list[AttemptKey]:
        """Lease those `seeds` of a trial that wait or were paused, to be run together."""
        waiting = _waiting(self._study).where(REPLICAS.c.number == number, REPLICAS.c.seed.in_(seeds))
        with self._ledger.write() as tx:
            found = tx.execute(waiting).all()
            return [begin_attempt(tx, self._study, row.number, row.seed, self.driver) for row in found]

    def commit(self, key: AttemptKey, outcome: TrialResult) -> State | None:
        """Store the result of an attempt, if that attempt still counts; then the trial's state, else None.

        An attempt that was taken back, or has a result, changes nothing.
        """
        (result,) = outcome.replicas
        with self._ledger.write() as tx:
            won = tx.execute(
                ATTEMPTS.update()
                .where(is_attempt(self._study, key), ATTEMPTS.c.state == "running")
                .values(state="complete", ended_at=time.time(), step=result.step, message=spared_memory(result))
            )
            if not won.rowcount:
                return None
            tx.execute(
                REPLICAS.update()
                .where(is_replica(self._study, key.number, key.seed))
                .values(state=result.status, result=outcome.model_dump_json())
            )
            return sum_up(tx, self._study, key.number)

    def release(self, key: AttemptKey, how: AttemptEnd, message: str | None = None) -> State | None:
        """End an attempt without a result. Returns the state of its replica, or None if the attempt had ended."""
        with self._ledger.write() as tx:
            found = _end_attempts(tx, self._study, is_attempt(self._study, key), how, message)
        return found[0][1] if found else None


def take_back(ledger: Ledger, study: str, dead: Iterable[DriverRow]) -> list[tuple[AttemptKey, State]]:
    """End every lease of `dead` drivers, unless they have beaten since they were read, and of those that have left.

    An attempt that ran inside its driver (inline executor) may be what killed it, so it counts as a crash; under Ray a
    trial cannot kill its driver and the attempt is only lost. Returns each with the state of its replica.
    """
    back: list[tuple[AttemptKey, State]] = []
    with ledger.write() as tx:
        for driver in dead:
            ended = tx.execute(
                DRIVERS.update().where(DRIVERS.c.id == driver.id, DRIVERS.c.beats == driver.beats).values(ended=True)
            )
            if ended.rowcount:
                how: AttemptEnd = "crashed" if driver.executor == "inline" else "lost"
                message = f"its driver (pid {driver.pid} on {driver.host}) died"
                back += _end_attempts(tx, study, ATTEMPTS.c.driver == driver.id, how, message)
        gone = sa.select(DRIVERS.c.id).where(DRIVERS.c.study == study, DRIVERS.c.ended)
        back += _end_attempts(tx, study, ATTEMPTS.c.driver.in_(gone), "lost", "its driver left")
    return back


def spared_memory(result: ReplicaResult) -> str | None:
    """A sentence for a result that took smaller micro-batches than the recipe's."""
    if result.accumulation is None or result.status == "failed":
        return None
    return f"memory was too small; trained with {result.accumulation} micro-batches a step"


def _waiting(study: str) -> sa.Select[tuple[int, int]]:
    """(number, seed) of the replicas that may be leased, in order."""
    return (
        sa.select(REPLICAS.c.number, REPLICAS.c.seed)
        .where(REPLICAS.c.study == study, REPLICAS.c.state.in_(("waiting", "paused")), ~REPLICAS.c.cancelled)
        .order_by(REPLICAS.c.number, REPLICAS.c.seed)
    )


def _end_attempts(
    tx: sa.Connection, study: str, which: sa.ColumnElement[bool], how: AttemptEnd, message: str | None
) -> list[tuple[AttemptKey, State]]:
    """End those attempts of `which` that run; returns each with the state of its replica."""
    running = sa.select(ATTEMPTS).where(ATTEMPTS.c.study == study, ATTEMPTS.c.state == "running", which)
    keys = [AttemptKey(row.number, row.seed, row.attempt) for row in tx.execute(running)]
    return [(key, end_attempt(tx, study, key, how, message)) for key in keys]
