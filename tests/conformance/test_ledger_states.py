"""The ledger as a state machine: whatever drivers do, in whatever order and however often, what it promises holds."""

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import sqlalchemy as sa
from hqlt_orchestration.records.attempts import AttemptKey
from hqlt_orchestration.records.leases import Leases, take_back
from hqlt_orchestration.records.ledger import Ledger, NewTrial, Refused
from hqlt_orchestration.records.states import MAX_ATTEMPTS, AttemptEnd
from hqlt_orchestration.records.tables import ATTEMPTS, DRIVERS, FINISHED, DriverRow, State, StudyRow
from hqlt_search_space.arch import Arch
from hqlt_search_space.mixers import Attention
from hqlt_search_space.recipe import Recipe
from hqlt_search_space.tasks import Nothing
from hqlt_search_space.trial import Config, TrialResult
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine

BUDGET = 2
SEEDS = (0, 1)
CRASHES = ("crashed", "hung", "out_of_memory")
_study_numbers = itertools.count()


def config(width: int) -> Config:
    layers = (Attention(n_heads=2),)
    return Config(arch=Arch(d_model=8 * width, mlp_inner=8, layers=layers), recipe=Recipe(steps=1), task=Nothing())


@dataclass(frozen=True)
class Held:
    """An attempt as its driver knows it. The driver may have died, the attempt may have ended long ago."""

    driver: Leases
    key: AttemptKey


class Drivers(RuleBasedStateMachine):
    """Several drivers of one study. Rules are all that a driver or a user can ask of the ledger."""

    drivers = Bundle[Leases]("drivers")
    attempts = Bundle[Held]("attempts")

    def __init__(self, ledger: Ledger, make_outcome: Callable[..., TrialResult]) -> None:
        super().__init__()
        self.ledger = ledger
        self.make_outcome = make_outcome
        self.name = f"s{next(_study_numbers)}"
        self.accepted: dict[tuple[int, int], float] = {}
        self.finished: dict[tuple[int, int], State] = {}
        self.losses = itertools.count()
        ledger.add_study(StudyRow(self.name, "{}", "", "h", BUDGET, "open", None, 0.0))

    @initialize(target=drivers)
    def first_driver(self) -> Leases:
        return Leases(self.ledger, self.name, "ray")

    @rule(target=drivers, executor=st.sampled_from(["ray", "inline"]))
    def another_driver(self, executor: str) -> Leases:
        return Leases(self.ledger, self.name, executor)

    @rule(target=attempts, driver=drivers, width=st.integers(1, 4))
    def claim(self, driver: Leases, width: int) -> "Held":
        before = self.ledger.trials(self.name)
        key = driver.claim(NewTrial("search", config(width), {}, {}, SEEDS))
        known = {row.config.config_id for row in before}
        if isinstance(key, Refused):
            assert key.why == ("duplicate" if config(width).config_id in known else "budget")
            assert key.why == "duplicate" or len(before) == BUDGET
            return multiple()
        assert len(before) < BUDGET
        assert key == AttemptKey(len(before), SEEDS[0], 1)
        return Held(driver, key)

    @rule(target=attempts, driver=drivers)
    def lease(self, driver: Leases) -> "Held":
        wait = [r for r in self.ledger.replicas(self.name) if r.state in ("waiting", "paused") and not r.cancelled]
        key = driver.take_next("search")
        if not wait:
            assert key is None
            return multiple()
        first = min(wait, key=lambda replica: (replica.number, replica.seed))
        assert key == AttemptKey(first.number, first.seed, first.attempts + 1)
        return Held(driver, key)

    @rule(target=attempts, held=attempts)
    def lease_the_rest_of_a_stack(self, held: Held) -> "Held":
        found = held.driver.take_others(held.key.number, SEEDS)
        return multiple(*(Held(held.driver, key) for key in found))

    @rule(driver=drivers, held=attempts, step=st.integers(0, 9))
    def beat(self, driver: Leases, held: Held, step: int) -> None:
        gone = driver.driver not in {row.id for row in self.ledger.drivers(self.name)}
        asked = driver.beat({held.key: step})
        assert (asked is None) == gone

    @rule(held=attempts, status=st.sampled_from(["complete", "stopped", "failed"]))
    def commit(self, held: Held, status: str) -> None:
        loss = float(next(self.losses))
        counted = self._runs(held.key)
        state = held.driver.commit(held.key, self.make_outcome(config(1), held.key.seed, loss, status))
        assert (state is not None) == counted
        if counted:
            self.accepted[held.key.number, held.key.seed] = loss

    @rule(held=attempts, how=st.sampled_from(["paused", *CRASHES]))
    def release(self, held: Held, how: AttemptEnd) -> None:
        counted = self._runs(held.key)
        state = held.driver.release(held.key, how, "why")
        assert (state is not None) == counted
        assert state in (None, "paused", "waiting", "quarantined", "stopped")

    @rule(driver=drivers, how=st.sampled_from(CRASHES))
    def try_what_waits_and_crash(self, driver: Leases, how: AttemptEnd) -> None:
        """The common way of a poisoned config: what is tried next is what has just crashed."""
        key = driver.take_next("search")
        if key is not None:
            before = {(r.number, r.seed): r.crashes for r in self.ledger.replicas(self.name)}[key.number, key.seed]
            state = driver.release(key, how, "why")
            assert state == (
                "quarantined" if before + 1 == MAX_ATTEMPTS else "waiting"
            )  # what is cancelled waits never

    @rule(number=st.integers(0, BUDGET - 1))
    def cancel(self, number: int) -> None:
        replicas = self.ledger.replicas(self.name, number)
        if replicas:
            unfinished = [replica for replica in replicas if replica.state not in FINISHED]
            assert self.ledger.cancel(self.name, number) == len(unfinished)

    @rule(driver=drivers)
    def leave(self, driver: Leases) -> None:
        driver.leave()

    @rule(driver=drivers, has_beaten=st.booleans())
    def die_and_be_found(self, driver: Leases, has_beaten: bool) -> None:
        """Another driver saw that this one is dead, unless that one beats between the look and the deed."""
        seen: list[DriverRow] = [row for row in self.ledger.drivers(self.name) if row.id == driver.driver]
        held = {key for key, holder in self._running().items() if holder == driver.driver}
        if has_beaten:
            driver.beat({})
        back = {key for key, _ in take_back(self.ledger, self.name, seen)}
        still = set(self._running())
        assert not back & still
        if seen:
            assert held <= (still if has_beaten else back)
        gone = {row.id for row in self._drivers() if row.ended}
        assert not gone & set(self._running().values())

    @rule()
    def open_again(self) -> None:
        """A new process finds what the old one left."""
        url = self.ledger.url
        before = self.ledger.replicas(self.name)
        again = Ledger(url)
        try:
            assert again.replicas(self.name) == before
        finally:
            again.close()

    @invariant()
    def what_is_finished_stays_so_and_has_the_first_result(self) -> None:
        for replica in self.ledger.replicas(self.name):
            place = (replica.number, replica.seed)
            assert self.finished.get(place, replica.state) == replica.state
            if replica.state in FINISHED:
                self.finished[place] = replica.state
            stored = replica.result and replica.result.metrics["validation_loss_nats"]
            assert stored == self.accepted.get(place)
            if replica.state in ("complete", "failed"):
                assert stored is not None

    @invariant()
    def what_is_cancelled_runs_or_has_ended(self) -> None:
        assert all(r.state in ("running", *FINISHED) for r in self.ledger.replicas(self.name) if r.cancelled)

    @invariant()
    def what_runs_is_held_once_and_what_is_held_runs(self) -> None:
        replicas = self.ledger.replicas(self.name)
        held = Counter((key.number, key.seed) for key in self._running())
        assert all(held[r.number, r.seed] == (r.state == "running") for r in replicas)
        assert set(self._running().values()) <= {row.id for row in self._drivers()}

    @invariant()
    def attempts_are_counted_and_two_crashes_are_the_end(self) -> None:
        ended = [(a.number, a.seed, a.state) for a in self.ledger.attempts(self.name)]
        for replica in self.ledger.replicas(self.name):
            states = [state for number, seed, state in ended if (number, seed) == (replica.number, replica.seed)]
            assert len(states) == replica.attempts
            assert replica.crashes == sum(state in CRASHES for state in states) <= MAX_ATTEMPTS
            assert states.count("complete") == (replica.result is not None)
            if not replica.cancelled:
                assert (replica.state == "quarantined") == (replica.crashes == MAX_ATTEMPTS)

    @invariant()
    def a_trial_is_the_sum_of_its_replicas_and_the_budget_holds(self) -> None:
        trials = self.ledger.trials(self.name)
        assert [row.number for row in trials] == list(range(len(trials)))
        assert len(trials) <= BUDGET
        assert len({row.config.config_id for row in trials}) == len(trials)
        states: dict[int, set[State]] = {row.number: set() for row in trials}
        for replica in self.ledger.replicas(self.name):
            states[replica.number].add(replica.state)
        order: list[State] = ["running", "paused", "waiting", "quarantined", "failed", "stopped", "complete"]
        assert [row.state for row in trials] == [min(states[row.number], key=order.index) for row in trials]

    def _runs(self, key: AttemptKey) -> bool:
        return key in self._running()

    def _running(self) -> dict[AttemptKey, str]:
        """The attempts that count, and who has them."""
        with self.ledger.read() as tx:
            rows = tx.execute(sa.select(ATTEMPTS).where(ATTEMPTS.c.study == self.name, ATTEMPTS.c.state == "running"))
            return {AttemptKey(row.number, row.seed, row.attempt): row.driver for row in rows}

    def _drivers(self) -> list[sa.Row[tuple[str, bool]]]:
        with self.ledger.read() as tx:
            return list(tx.execute(sa.select(DRIVERS.c.id, DRIVERS.c.ended).where(DRIVERS.c.study == self.name)))


def test_whatever_drivers_do_in_whatever_order_the_ledger_keeps_its_promises(
    url: str, make_outcome: Callable[..., TrialResult]
) -> None:
    ledger = Ledger(url)
    examples: dict[Literal[True, False], int] = {True: 50, False: 12}
    try:
        run_machine(
            lambda: Drivers(ledger, make_outcome),
            settings=settings(
                max_examples=examples[url.startswith("sqlite")],
                stateful_step_count=25,
                deadline=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        ledger.close()
