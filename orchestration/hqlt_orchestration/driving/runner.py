"""The study loop: propose, run, decide, commit, tell, until the budget is spent; then replicate the front."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import TYPE_CHECKING, Literal, assert_never

from hqlt_dashboards.front import front, front_hypervolume
from hqlt_dashboards.words import format_value, spoken
from hqlt_search_space.cost import costs
from hqlt_search_space.errors import TrialFailedError
from hqlt_search_space.study import Study
from hqlt_search_space.trial import ReplicaResult, Runtime, StudyResults, Trial, TrialRecord, TrialResult
from hqlt_trainer.stacking import stacking

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
from hqlt_orchestration.driving.progress import Estimate, ProgressView, Standing
from hqlt_orchestration.driving.watchdog import Watchdog
from hqlt_orchestration.records.attempts import AttemptKey
from hqlt_orchestration.records.drivers import DriverWatch
from hqlt_orchestration.records.leases import Leases, spared_memory, take_back
from hqlt_orchestration.records.ledger import Ledger, NewTrial, Refused
from hqlt_orchestration.records.results import minimised, objectives_of, trial_record
from hqlt_orchestration.records.states import AttemptEnd
from hqlt_orchestration.records.store import Store
from hqlt_orchestration.records.tables import FINISHED, Phase, ReplicaRow, State, TrialRow
from hqlt_orchestration.tracking import told

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


class Interrupts:
    """Ctrl-C, SIGTERM and a terminal that is closed: the first asks the loop to end in good order, the second ends the
    process. What somebody has chosen to ignore (`nohup`) stays ignored.
    """

    def __init__(self) -> None:
        self.asked = False
        self._heard: list[signal.Signals] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Handle the signals meanwhile. Only the main thread can; elsewhere nothing is handled."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        asking = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.getsignal(number) for number in asking}
        self._heard = [number for number in asking if before[number] != signal.SIG_IGN]
        self.listen()
        try:
            yield
        finally:
            for number in self._heard:
                signal.signal(number, before[number])
            self._heard = []

    def listen(self) -> None:
        """Handle the signals that are watched, whoever has taken them meanwhile: Ray does when it starts."""
        for number in self._heard:
            signal.signal(number, self._ask)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@dataclass
class _Running:
    """An attempt that this driver runs."""

    trial: TrialRow
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
        self._spool = spool
        self._view = view
        self._interrupts = interrupts
        self._budget = ledger.study(study.name).budget
        self._watch = DriverWatch()
        self._watchdog = Watchdog(study.resources.hang_after_s)
        self._estimate = Estimate()
        self._records: dict[int, TrialRecord] = {}
        self._rows: dict[int, TrialRow] = {}
        self._taken: set[str] = set()
        self._running: dict[AttemptKey, _Running] = {}
        self._phase: Phase = "ablate" if study.ablation else "search"
        self._mirrored_front: set[int] = set()  # the trials that MLflow shows on the front
        self._some_wait = True  # a replica may wait in the ledger
        self._all_proposed = study.search is None
        self._n_fresh = 0  # replicas of the replication, and those of them that have ended
        self._n_fresh_done = 0
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
        self._read_ledger()
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
            self._end(phase)
        return "complete"

    # Start and end

    def _read_ledger(self) -> None:
        replicas = self._ledger.replicas(self._name)
        for row in self._ledger.trials(self._name):
            self._rows[row.number] = row
            self._taken.add(row.config.config_id)
            if row.state in FINISHED:
                own = [replica for replica in replicas if replica.number == row.number]
                self._records[row.number] = trial_record(self._study, row, own)

    def _adopt(self) -> None:
        """Take over from drivers that are dead, and bring Optuna to where the ledger is."""
        self._take_back()
        if self._proposer is None:
            return
        known = self._proposer.known()
        for number, row in self._rows.items():
            if number not in known:
                self._proposer.accept(number, row.proposal)
            if row.state in FINISHED and not known.get(number, False):
                self._tell(number)

    def _begin(self, phase: Phase) -> None:
        self._phase = phase
        self._some_wait = True
        self._read_ledger()
        if phase == "ablate":
            for cell in self._study.cells():
                new = NewTrial(phase, cell.config, cell.choices, costs(cell.config), self._study.seeds, cell=cell.label)
                self._ledger.add_trial(self._name, new)
            self._read_ledger()
        if phase == "replicate":
            assert self._study.replication is not None
            for record in self._front():
                self._ledger.add_replicas(self._name, record.number, phase, self._study.replication.seeds)
            fresh = [replica for replica in self._ledger.replicas(self._name) if replica.phase == phase]
            self._n_fresh = len(fresh)
            self._n_fresh_done = sum(replica.state in FINISHED for replica in fresh)
        self._put(told.phase_begins(phase, self._ledger.study(self._name)))
        self._estimate.start(self._n_done())
        self._show()

    def _end(self, phase: Phase) -> None:
        self._show()
        self._mirror_front(last=True)
        self._put(told.phase_ends(phase))

    def _is_done(self, phase: Phase) -> bool:
        if self._running or not self._all_proposed:
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

    # The loop's four steps

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
            steps = {key: running.step for key, running in self._running.items()}
            cancelled = self._leases.beat(steps)
            if cancelled is None:
                self._start_over()
            for key in cancelled or ():
                self._running[key].cancelled = True
                self._executor.cancel(key)
            self._take_back()
            self._budget = self._ledger.study(self._name).budget
            self._some_wait = True
            self._show()
        if now >= self._next_mirror:
            self._next_mirror = now + MIRROR_S
            self._mirror_front()

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
            self._read_ledger()
        for key, state in take_back(self._ledger, self._name, dead):
            self._view.say(f"trial {key.number}, seed {key.seed}: its driver is gone; {_now(state)}")
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

        while len(self._taken) < self._budget:
            try:
                proposal = proposer.propose(len(self._taken), self._taken.__contains__, len(self._taken))
            except Exhausted as reason:
                self._note_the_end(str(reason))
                return None
            new = NewTrial(
                "search", proposal.config, proposal.choices, proposal.costs, self._study.seeds, None, proposal.stored()
            )
            key = self._leases.claim(new)
            if isinstance(key, Refused):  # another driver was faster
                self._taken.update(self._ledger.config_ids(self._name))
                continue
            number = key.number
            proposer.accept(number, proposal.stored())
            self._taken.add(proposal.config.config_id)
            self._rows[number] = TrialRow(
                number, "search", proposal.config, proposal.choices, None, proposal.costs, {}, "running"
            )
            self._some_wait = len(self._study.seeds) > 1
            return key
        self._all_proposed = True
        return None

    def _note_the_end(self, reason: str) -> None:
        self._all_proposed = True
        if self._running or self._ledger.n_unfinished(self._name, "search"):
            reason += "; the search ends with the trials that run"
        self._view.say(reason)
        self._ledger.update_study(self._name, note=reason)

    def _submit(self, key: AttemptKey) -> None:
        row = self._rows.get(key.number) or self._ledger.trial(self._name, key.number)
        self._rows[key.number] = row
        accumulation = self._spared(row, key)
        stack = self._stack(row, key.seed) if accumulation is None else (key.seed,)
        keys = [key]
        if len(stack) > 1:
            keys += self._leases.take_others(key.number, stack)
        trial = self._trial(row, stack, accumulation)
        self._put(told.trial_begins(self._phase, row, trial))
        self._running |= {each: _Running(row) for each in keys}
        for each in keys:
            self._watchdog.begin(each)
        self._executor.submit(Job(tuple(keys), trial, self._store.trial_folder(self._name, row.number)))

    def _spared(self, row: TrialRow, key: AttemptKey) -> int | None:
        """Micro-batches a step for a replica whose process was ended because the machine had no more memory."""
        if key.attempt == 1:
            return None
        earlier = [attempt for attempt in self._ledger.attempts(self._name, row.number) if attempt.seed == key.seed]
        recipe = row.config.recipe
        ran_out = any(attempt.state == "out_of_memory" for attempt in earlier)
        return min(recipe.batch, 2 * recipe.accumulation) if ran_out else None

    def _stack(self, row: TrialRow, seed: int) -> tuple[int, ...]:
        """The seeds that train together with `seed`, itself included; the same after every kind of stop."""
        seeds = self._study.seeds
        if self._phase == "replicate":
            replicas = self._ledger.replicas(self._name, row.number)
            seeds = tuple(replica.seed for replica in replicas if replica.phase == self._phase)
        stacks = stacking(row.config, seeds, self._executor.device).stacks
        return next(stack for stack in stacks if seed in stack)

    def _trial(self, row: TrialRow, seeds: tuple[int, ...], accumulation: int | None) -> Trial:
        stopping = self._study.early_stopping
        rungs = stopping.rungs if stopping is not None and self._phase == "search" else ()
        return Trial(
            config=row.config,
            seeds=seeds,
            rungs=tuple(rung for rung in rungs if rung < row.config.recipe.steps),
            runtime=Runtime(
                device=self._executor.device,
                n_threads=max(1, int(self._study.resources.cpu)),
                accumulation=accumulation,
            ),
            study=self._name,
            number=row.number,
        )

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
                self._put_metrics(key, step, metrics, unix_ms=unix_ms)
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
                    self._view.say(f"trial {key.number}, seed {key.seed}: cancelled at step {running.step}")
                    self._trial_ended(running.trial, state)
            case Crashed(key, message, out_of_memory):
                running = self._running.pop(key)
                how: AttemptEnd = "hung" if running.hung else "out_of_memory" if out_of_memory else "crashed"
                message = running.hung or message
                state = self._leases.release(key, how, message)
                last = message.strip().splitlines()[-1]
                if state is not None:
                    self._view.say(f"trial {key.number}, seed {key.seed}: {last}; {_now(state)}")
                self._some_wait = True
                if state in ("quarantined", "stopped"):
                    self._trial_ended(running.trial, state)
            case _:
                assert_never(event)

    def _goes_on(self, key: AttemptKey, step: int, metrics: dict[str, float]) -> bool:
        stopping = self._study.early_stopping
        values = self._objectives_at(key.number, metrics)
        if stopping is None or values is None or self._phase != "search":
            return True
        everyone = self._ledger.record_rung(self._name, key.number, key.seed, step, values)
        points = {other: minimised(self._study, reached) for other, reached in everyone.items()}
        return early_stopping.goes_on(
            points, (key.number, key.seed), eta=stopping.eta, min_competitors=stopping.min_competitors
        )

    def _objectives_at(self, number: int, metrics: dict[str, float]) -> dict[str, float] | None:
        reading = ReplicaResult(seed=0, status="complete", step=0, metrics=metrics)
        return objectives_of(self._study, self._rows[number].costs, [reading])

    def _commit(self, key: AttemptKey, outcome: TrialResult) -> None:
        running = self._running.pop(key)
        (result,) = outcome.replicas
        if result.reason == "disk_full":
            # Not the trial's fault, and the next ones would fail the same way.
            self._leases.release(key, "paused", result.message)
            self._view.say(f"trial {key.number}, seed {key.seed}: {result.message}; free some space and resume")
            self._interrupts.asked = True
            return
        state = self._leases.commit(key, outcome)
        if state is None:
            self._view.say(f"trial {key.number}, seed {key.seed}: finished, but another driver had taken it over")
            return
        if result.status == "failed":
            left = self._n_total() - self._n_done() - 1
            goes_on = "1 trial goes on" if left == 1 else f"{left} trials go on"
            self._view.say(f"trial {key.number}: {result.message or result.reason}: marked failed, {goes_on}")
        if spared := spared_memory(result):
            self._view.say(f"trial {key.number}, seed {key.seed}: {spared}")
        for point in result.curve:  # a worker goes on for a while after its driver was killed, and nobody hears of it
            if point.step not in running.measured:
                self._put_metrics(key, point.step, point.metrics)
        self._put_metrics(key, result.step, told.final_metrics(result))
        if self._phase == "replicate" or state in FINISHED:
            self._trial_ended(running.trial, state, outcome)

    def _trial_ended(self, row: TrialRow, state: State, last: TrialResult | None = None) -> None:
        """Every replica the trial was made with has ended, `last` the last: score it, tell Optuna and MLflow."""
        if self._phase == "replicate":
            self._replica_ended(row)
            return
        row = replace(row, state=state)
        self._rows[row.number] = row
        if last is not None and len(self._study.seeds) == 1:  # then it is the only one
            replicas = [ReplicaRow(row.number, self._study.seeds[0], row.phase, state, 1, 0, False, last)]
        else:
            replicas = self._ledger.replicas(self._name, row.number)
        record = trial_record(self._study, row, replicas)
        self._records[row.number] = record
        self._tell(row.number)
        self._put_trial_end(row.number, state, record.replicas, record.objectives)

    def _replica_ended(self, row: TrialRow) -> None:
        """One fresh seed of a trial of the front has ended."""
        self._n_fresh_done += 1
        replicas = self._ledger.replicas(self._name, row.number)
        record = trial_record(self._study, self._rows[row.number], replicas)
        self._records[row.number] = record
        fresh = [replica for replica in replicas if replica.phase == "replicate"]
        if all(replica.state in FINISHED for replica in fresh):
            self._put_trial_end(row.number, "complete", record.replication, {})

    def _tell(self, number: int) -> None:
        if self._proposer is not None:
            self._proposer.accept(number, self._rows[number].proposal)  # whose driver may have died before it did
            self._proposer.tell_of(self._records[number])

    # What is shown

    def _front(self) -> tuple[TrialRecord, ...]:
        results = self._results()
        return front(results.trials, results.objectives, results.constraints)

    def _results(self) -> StudyResults:
        """The ended trials as they are in memory, without reading the ledger again."""
        return StudyResults.model_construct(
            name=self._name,
            objectives=self._study.objective_list,
            trials=tuple(self._records[number] for number in sorted(self._records)),
            budget=self._budget,
            constraints={cost: (bounds.min, bounds.max) for cost, bounds in self._study.constraints.items()},
        )

    def _n_total(self) -> int:
        """Of what the phase counts: trials, or in the replication replicas."""
        if self._phase == "replicate":
            return self._n_fresh
        return len(self._rows) if self._all_proposed else self._budget

    def _n_done(self) -> int:
        return self._n_fresh_done if self._phase == "replicate" else len(self._records)

    def _show(self) -> None:
        self._next_show = time.monotonic() + SHOW_S
        done, total = self._n_done(), self._n_total()
        members = self._front()
        name = next(iter(self._study.objectives))
        self._view.show(
            Standing(
                phase=self._phase,
                done=done,
                total=total,
                running=len(self._running),
                failed=sum(record.state in ("failed", "quarantined") for record in self._records.values()),
                objective=spoken(name),
                best=format_value(name, members[0].objectives[name]) if members else None,
                on_front=len(members),
                seconds_left=self._estimate.seconds_left(done, total),
            )
        )

    # The mirror: nothing here waits for MLflow

    def _put(self, record: told.Record) -> None:
        if self._spool is not None:
            self._spool.put(record)

    def _put_metrics(self, key: AttemptKey, step: int, metrics: dict[str, float], **stamp: int) -> None:
        n_seeds = len(self._study.seeds)
        if self._phase == "replicate":
            assert self._study.replication is not None
            n_seeds = len(self._study.replication.seeds)
        self._put(told.measured(self._phase, key.number, key.seed, step, metrics, n_seeds=n_seeds) | stamp)

    def _put_trial_end(
        self, number: int, state: State, replicas: tuple[ReplicaResult, ...], objectives: dict[str, float]
    ) -> None:
        obituary = told.died_of(state, self._ledger.attempts(self._name, number)) if state == "quarantined" else None
        row = self._rows[number]
        self._put(told.trial_ends(self._phase, row, state, replicas, objectives, self._store, self._name, obituary))

    def _mirror_front(self, *, last: bool = False) -> None:
        """Hypervolume, and the rank of the trials that came to or left the front; at the last of every trial."""
        if self._spool is None:
            return
        now = told.front_ranks(self._study, self._records.values())
        front_now = {number for number, rank in now.items() if rank == 0}
        changed = set(now) if last else front_now ^ self._mirrored_front
        if changed:
            self._mirrored_front = front_now
            ranks = {number: now[number] for number in sorted(changed)}
            self._put(told.front_moves(self._phase, len(now), front_hypervolume(self._results()), ranks))


def _now(state: State) -> str:
    """What becomes of a replica whose attempt ended without a result."""
    return {
        "waiting": "it is tried again",
        "quarantined": "that was its last try: quarantined",
        "stopped": "cancelled",
    }.get(state, state)
