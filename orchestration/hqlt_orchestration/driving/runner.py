"""The study loop: propose, run, decide, commit, tell, until the budget is spent; then replicate the front."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, assert_never

from hqlt_search_space.cost import costs
from hqlt_search_space.errors import TrialFailedError
from hqlt_search_space.study import Study
from hqlt_search_space.trial import ReplicaResult, TrialResult

from hqlt_orchestration.driving import early_stopping
from hqlt_orchestration.driving.executor import (
    Crashed,
    Event,
    Executor,
    Finished,
    Job,
    Measured,
    Moved,
    Paused,
    RungReached,
)
from hqlt_orchestration.driving.interrupts import Interrupts
from hqlt_orchestration.driving.jobs import trial_of
from hqlt_orchestration.driving.progress import ProgressView
from hqlt_orchestration.driving.scoreboard import Scoreboard
from hqlt_orchestration.driving.watchdog import Watchdog
from hqlt_orchestration.records.attempts import AttemptKey
from hqlt_orchestration.records.drivers import DriverWatch
from hqlt_orchestration.records.leases import Leases, spared_memory, take_back
from hqlt_orchestration.records.ledger import Ledger, NewTrial, Refused
from hqlt_orchestration.records.results import minimised, objectives_of
from hqlt_orchestration.records.states import AttemptEnd
from hqlt_orchestration.records.store import Store
from hqlt_orchestration.records.tables import FINISHED, Phase, State
from hqlt_orchestration.tracking.teller import Teller

if TYPE_CHECKING:
    from hqlt_orchestration.driving.sampler import Proposer
    from hqlt_orchestration.tracking.spool import Spool

BEAT_S = 5.0  # between two signs of life; a driver elsewhere is given up after drivers.STALE_DRIVER_S
POLL_S = 0.5  # the longest that Ctrl-C waits to be noticed
IDLE_S = 0.2  # between two looks when only other drivers have work
MIRROR_S = 2.0  # between two updates of front ranks and hypervolume in MLflow
SHOW_S = 0.25  # between two pictures of the front for the user
PAUSE_GRACE_S = 20.0  # a paused trial writes its checkpoint within this time, or loses what came after the last one

Ending = Literal["complete", "paused"]


@dataclass
class _Running:
    """An attempt that this driver runs."""

    step: int = 0
    measured: set[int] = field(default_factory=set)
    """The steps whose metrics have been told."""
    cancelled: bool = False
    hung: str | None = None
    """What is wrong with it, if its process has been ended because it stood still."""


class Driver:
    """Runs one study with one executor. Any number of drivers, on any machines, may run the same study."""

    def __init__(
        self,
        study: Study,
        *,
        store: Store,
        ledger: Ledger,
        executor: Callable[[], Executor],
        proposer: "Proposer | None",
        spool: "Spool | None",
        view: ProgressView,
        interrupts: Interrupts,
    ) -> None:
        """`executor` is called when the first trial is to run: what can be done while Ray starts is done before."""
        self._study = study
        self._name = study.name
        self._store = store
        self._ledger = ledger
        self._start_executor = executor
        self._proposer = proposer
        self._view = view
        self._interrupts = interrupts
        self._board = Scoreboard(study, ledger)
        self._teller = Teller(study, store, ledger, spool)
        self._watch = DriverWatch()
        self._watchdog = Watchdog(study.resources.hang_after_s)
        self._running: dict[AttemptKey, _Running] = {}
        self._phase: Phase = "ablate" if study.ablation else "search"
        self._some_wait = True  # a replica may wait in the ledger
        self._next_beat = 0.0
        self._next_show = 0.0
        self._next_mirror = 0.0

    def run(self) -> Ending:
        """Run the study to its end, or until an interrupt.

        Raises:
            KeyboardInterrupt: the second interrupt. What ran is lost since its last checkpoint, and given back.
        """
        with self._interrupts.watched():
            return self._run()

    def _run(self) -> Ending:
        self._leases = Leases(self._ledger, self._name, "starting")
        try:
            self._adopt()
            self._executor = self._start_executor()
            self._interrupts.listen()
            if self._executor.placement.why:
                self._view.say(self._executor.placement.why)
            self._leases.set_executor(self._executor.name)
            try:
                return self._run_phases()
            finally:
                self._executor.close()
        finally:
            self._leases.leave()

    def _run_phases(self) -> Ending:
        phases: list[Phase] = [self._phase]
        if self._study.search is not None and self._study.replication is not None:
            phases.append("replicate")
        for phase in phases:
            self._begin(phase)
            while not self._is_done(phase):
                if self._interrupts.asked:
                    self._pause()
                    return "paused"
                self._fill()
                self._wait()
                self._keep_house()
            self._end()
        return "complete"

    # Start and end

    def _adopt(self) -> None:
        """Take over from drivers that are dead, and bring Optuna to where the ledger is."""
        self._take_back()
        if self._proposer is None:
            return
        known = self._proposer.known()
        for number, row in self._board.rows.items():
            if number not in known:
                self._proposer.accept(number, row.proposal)
            if row.state in FINISHED and not known.get(number, False):
                self._tell_optuna(number)

    def _begin(self, phase: Phase) -> None:
        self._phase = phase
        self._some_wait = True
        if phase == "ablate":
            for cell in self._study.cells():
                new = NewTrial(phase, cell.config, cell.choices, costs(cell.config), self._study.seeds, cell=cell.label)
                self._ledger.add_trial(self._name, new)
        if phase == "replicate":
            assert self._study.replication is not None
            self._board.read()
            for record in self._board.front():
                self._ledger.add_replicas(self._name, record.number, phase, self._study.replication.seeds)
        self._board.begin(phase)
        self._teller.phase_begins(phase)
        self._show()

    def _end(self) -> None:
        self._board.read()  # what others have ended last
        self._show()
        self._teller.front_moves(self._board.results(), last=True)
        self._teller.phase_ends()

    def _is_done(self, phase: Phase) -> bool:
        if self._running or not self._board.all_proposed:
            return False
        return self._ledger.n_unfinished(self._name, phase) == 0

    def _pause(self) -> None:
        """Let every running trial write its checkpoint and stop."""
        self._view.say("stopping: trials write their checkpoints")
        for key in self._running:
            self._executor.cancel(key)
        deadline = time.monotonic() + PAUSE_GRACE_S
        while self._running and time.monotonic() < deadline:
            self._handle_all(self._executor.poll(POLL_S))
        for key in list(self._running):
            self._leases.release(key, "paused", "no checkpoint in time")
            del self._running[key]

    # The loop's three steps

    def _fill(self) -> None:
        while self._executor.free() and not self._interrupts.asked:
            key = self._next_lease()
            if key is None:
                return
            self._submit(key)

    def _wait(self) -> None:
        if self._running or not self._executor.free():
            self._handle_all(self._executor.poll(POLL_S))
        else:
            time.sleep(IDLE_S)
            self._some_wait = True

    def _keep_house(self) -> None:
        self._end_hung(self._watchdog.look())
        now = time.monotonic()
        if now >= self._next_beat:
            self._next_beat = now + BEAT_S
            self._beat()
            self._take_back()
            self._board.budget = self._ledger.study(self._name).budget
            self._some_wait = True
            self._show()
        if now >= self._next_mirror:
            self._next_mirror = now + MIRROR_S
            self._teller.front_moves(self._board.results())

    def _beat(self) -> None:
        cancelled = self._leases.beat({key: running.step for key, running in self._running.items()})
        if cancelled is None:
            self._start_over()
        for key in cancelled or ():
            self._running[key].cancelled = True
            self._executor.cancel(key)

    def _end_hung(self, hung: dict[AttemptKey, str]) -> None:
        """End the processes of trials that stand still; they end as Crashed.

        Raises:
            TrialFailedError: it runs in a thread of this process, which nothing but the end of the process ends.
        """
        for key, sentence in hung.items():
            self._running[key].hung = sentence
            self._watchdog.end(key)
            self._executor.kill(key)
        if hung and self._executor.name == "inline":
            for key, sentence in hung.items():
                self._leases.release(key, "hung", sentence)
            key, sentence = next(iter(hung.items()))
            sentence += f"; continue with: hqlt study resume {self._name}"
            raise TrialFailedError("hung", f"trial {key.number}, seed {key.seed}: {sentence}")

    def _start_over(self) -> None:
        """Become a new driver: others have waited in vain for this one's beats, and have taken over what it held."""
        self._view.say("this driver stood still, and others have taken over its trials; it goes on with new ones")
        for key in self._running:
            self._executor.kill(key)
            self._watchdog.end(key)
        self._running.clear()
        self._leases = Leases(self._ledger, self._name, self._executor.name)

    def _take_back(self) -> None:
        others = [driver for driver in self._ledger.drivers(self._name) if driver.id != self._leases.driver]
        dead = self._watch.dead(others)
        if self._proposer is not None:
            self._proposer.alone = not others
        if others:  # whose trials count for the front too
            self._board.read()
        for key, state in take_back(self._ledger, self._name, dead):
            self._say_of(key, f"its driver is gone; {_now(state)}")
            self._some_wait = True

    # New work

    def _next_lease(self) -> AttemptKey | None:
        if self._some_wait:
            key = self._leases.take_next(self._phase)
            if key is not None:
                return key
            self._some_wait = False
        if self._phase != "search" or self._proposer is None:
            return None
        return self._propose(self._proposer)

    def _propose(self, proposer: "Proposer") -> AttemptKey | None:
        from hqlt_orchestration.driving.sampler import Exhausted

        taken = self._board.taken
        while len(taken) < self._board.budget:
            try:
                proposal = proposer.propose(taken)
            except Exhausted as reason:
                self._note_the_end(str(reason))
                return None
            new = proposal.new_trial(self._study.seeds)
            key = self._leases.claim(new)
            if isinstance(key, Refused):  # another driver was faster
                taken.update(self._ledger.config_ids(self._name))
                continue
            proposer.accept(key.number, new.proposal)
            self._board.add(new.row(key.number))
            self._some_wait = len(self._study.seeds) > 1
            return key
        self._board.all_proposed = True
        return None

    def _note_the_end(self, reason: str) -> None:
        self._board.all_proposed = True
        if self._running or self._ledger.n_unfinished(self._name, "search"):
            reason += "; the search ends with the trials that run"
        self._view.say(reason)
        self._ledger.update_study(self._name, note=reason)

    def _submit(self, key: AttemptKey) -> None:
        row = self._board.rows.get(key.number)
        if row is None:  # another driver's, which has left it
            row = self._ledger.trial(self._name, key.number)
            self._board.add(row)
        trial = trial_of(self._study, self._ledger, self._phase, row, key, self._executor.device)
        keys = [key]
        if len(trial.seeds) > 1:
            keys += self._leases.take_others(key.number, trial.seeds)
        self._teller.trial_begins(row, trial)
        for each in keys:
            self._running[each] = _Running()
            self._watchdog.begin(each)
        self._executor.submit(Job(tuple(keys), trial, self._store.trial_folder(self._name, row.number)))
        self._show()

    # What happens to running trials

    def _handle_all(self, events: list[Event]) -> None:
        for event in events:
            if event.key in self._running:
                self._watchdog.alive(event.key)
                self._handle(event)
            if event.key not in self._running:
                self._watchdog.end(event.key)
        if events and time.monotonic() >= self._next_show:
            self._show()

    def _handle(self, event: Event) -> None:
        match event:
            case Measured(key, step, metrics, unix_ms):
                self._running[key].step = step
                self._running[key].measured.add(step)
                self._teller.measured(key, step, metrics, unix_ms=unix_ms)
            case Moved(key, step, n_signs, slowest_s):
                self._running[key].step = step
                self._watchdog.moved(key, step, n_signs, slowest_s)
            case RungReached(key, step, metrics):
                self._executor.answer(key, step, go_on=self._goes_on(key, step, metrics))
            case Finished(key, outcome):
                self._commit(key, outcome)
            case Paused(key):
                running = self._running.pop(key)
                state = self._leases.release(key, "paused", "cancelled" if running.cancelled else None)
                if state == "stopped":
                    self._say_of(key, f"cancelled at step {running.step}")
                    self._replica_ended(key, state)
            case Crashed(key, message, out_of_memory):
                running = self._running.pop(key)
                how: AttemptEnd = "hung" if running.hung else "out_of_memory" if out_of_memory else "crashed"
                message = running.hung or message
                state = self._leases.release(key, how, message)
                if state is not None:
                    self._say_of(key, f"{message.strip().splitlines()[-1]}; {_now(state)}")
                self._some_wait = True
                if state in ("quarantined", "stopped"):
                    self._replica_ended(key, state)
            case _:
                assert_never(event)

    def _goes_on(self, key: AttemptKey, step: int, metrics: dict[str, float]) -> bool:
        stopping = self._study.early_stopping
        reading = ReplicaResult(seed=key.seed, status="complete", step=step, metrics=metrics)
        values = objectives_of(self._study, self._board.rows[key.number].costs, [reading])
        if stopping is None or values is None or self._phase != "search":
            return True
        everyone = self._ledger.record_rung(self._name, key.number, key.seed, step, values)
        points = {other: minimised(self._study, reached) for other, reached in everyone.items()}
        return early_stopping.goes_on(
            points, (key.number, key.seed), eta=stopping.eta, min_competitors=stopping.min_competitors
        )

    def _commit(self, key: AttemptKey, outcome: TrialResult) -> None:
        running = self._running.pop(key)
        (result,) = outcome.replicas
        if result.reason == "disk_full":
            # Not the trial's fault, and the next ones would fail the same way.
            self._leases.release(key, "paused", result.message)
            self._say_of(key, f"{result.message}; free some space and resume")
            self._interrupts.asked = True
            return
        state = self._leases.commit(key, outcome)
        if state is None:
            self._say_of(key, "finished, but another driver had taken it over")
            return
        if result.status == "failed":
            left = self._board.n_total - self._board.n_done - 1
            goes_on = "1 trial goes on" if left == 1 else f"{left} trials go on"
            self._view.say(f"trial {key.number}: {result.message or result.reason}: marked failed, {goes_on}")
        if spared := spared_memory(result):
            self._say_of(key, spared)
        self._teller.ended(key, result, running.measured)
        if self._phase == "replicate" or state in FINISHED:
            self._replica_ended(key, state, outcome)

    def _replica_ended(self, key: AttemptKey, state: State, last: TrialResult | None = None) -> None:
        """The last of those that the trial was made with, `last` its result if it has one; or any fresh seed."""
        if self._phase == "replicate":
            fresh = self._board.end_fresh_seed(key.number)
            if fresh is not None:
                self._teller.trial_ends(self._board.rows[key.number], "complete", fresh.replication, {})
            return
        record = self._board.end(key.number, state, last)
        self._tell_optuna(key.number)
        self._teller.trial_ends(self._board.rows[key.number], state, record.replicas, record.objectives)

    def _tell_optuna(self, number: int) -> None:
        if self._proposer is not None:
            self._proposer.accept(number, self._board.rows[number].proposal)  # whose driver may have died before it did
            self._proposer.tell_of(self._board.records[number])

    # What is shown

    def _show(self) -> None:
        self._next_show = time.monotonic() + SHOW_S
        self._view.show(self._board.standing(len(self._running)))

    def _say_of(self, key: AttemptKey, what: str) -> None:
        self._view.say(f"trial {key.number}, seed {key.seed}: {what}")


def _now(state: State) -> str:
    """What becomes of a replica whose attempt ended without a result."""
    return {
        "waiting": "it is tried again",
        "quarantined": "that was its last try: quarantined",
        "stopped": "cancelled",
    }.get(state, state)
