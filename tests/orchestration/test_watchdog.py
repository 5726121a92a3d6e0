"""What stands still is ended and tried again: judged with a clock of the test's own, and with real processes."""

import ctypes
import fcntl
import os
import signal
from collections.abc import Callable
from contextlib import closing
from io import StringIO
from typing import Any

import psutil
import pytest
from hqlt_orchestration.driving.executor import Event, Measured, Moved
from hqlt_orchestration.driving.interrupts import Interrupts
from hqlt_orchestration.driving.progress import ProgressView
from hqlt_orchestration.driving.ray_pool import RayExecutor
from hqlt_orchestration.driving.runner import Driver, Ending
from hqlt_orchestration.driving.sampler import Proposer
from hqlt_orchestration.driving.watchdog import Watchdog
from hqlt_orchestration.records.attempts import AttemptKey, replica_folder
from hqlt_orchestration.records.ledger import Ledger
from hqlt_orchestration.records.store import Store
from hqlt_orchestration.records.tables import AttemptRow, StudyRow
from hqlt_search_space.errors import TrialFailedError
from hqlt_search_space.study import Study
from rich.console import Console

MakeStudy = Callable[..., Study]
Drive = Callable[[Study, Store], str]
KEY = AttemptKey(0, 0, 1)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def hung_after(watchdog: Watchdog, clock: Clock, seconds: int) -> dict[AttemptKey, str]:
    """What stands still after so many looks, a second apart."""
    for _ in range(seconds):
        clock.now += 1
        found = watchdog.look()
    return found


@pytest.mark.parametrize(
    ("slowest_s", "limit_s"), [(0.01, 120), (30.0, 300)], ids=["fast steps: the floor", "slow steps: ten times those"]
)
def test_a_trial_may_stand_still_for_ten_of_its_slowest_steps_and_at_least_two_minutes(
    slowest_s: float, limit_s: int
) -> None:
    clock = Clock()
    watchdog = Watchdog(None, clock)
    watchdog.begin(KEY)
    watchdog.moved(KEY, 700, 9, slowest_s)
    assert hung_after(watchdog, clock, limit_s) == {}
    (sentence,) = hung_after(watchdog, clock, 1).values()
    assert sentence.startswith(f"hung: no step for {limit_s + 1} s, after step 700 (allowed {limit_s} s)")


def test_its_first_steps_may_take_five_times_as_long() -> None:
    clock = Clock()
    watchdog = Watchdog(10, clock)
    watchdog.begin(KEY)
    assert hung_after(watchdog, clock, 49) == {}
    watchdog.moved(KEY, 1, 1, 0.0)
    assert hung_after(watchdog, clock, 50) == {}
    watchdog.moved(KEY, 5, 5, 0.1)
    assert list(hung_after(watchdog, clock, 11)) == [KEY]


def test_whoever_shows_life_is_not_hung() -> None:
    clock = Clock()
    watchdog = Watchdog(10, clock)
    watchdog.begin(KEY)
    watchdog.moved(KEY, 5, 5, 0.1)
    for n_signs in range(6, 20):
        assert hung_after(watchdog, clock, 9) == {}
        watchdog.moved(KEY, 5, n_signs, 9.0)  # an evaluation: at the same step, batch after batch


def test_a_driver_that_stood_still_itself_finds_nobody_hung() -> None:
    clock = Clock()
    watchdog = Watchdog(10, clock)
    watchdog.begin(KEY)
    watchdog.moved(KEY, 5, 5, 0.1)
    clock.now += 3600
    assert watchdog.look() == {}


See = Callable[[Event, Any], None]
"""Is given every event, and the one actor."""


class Shown(RayExecutor):
    """Processes of Ray, whose every event the test sees."""

    def __init__(self, see: See) -> None:
        super().__init__(slots=1, cpus=1, gpus=0)
        self._see = see

    def poll(self, timeout_s: float) -> list[Event]:
        events = super().poll(timeout_s)
        for event in events:
            self._see(event, self._slots[0].actor)
        return events


def drive_processes(study: Study, store: Store, see: See, output: StringIO) -> tuple[Ending, list[AttemptRow]]:
    """The study run to its end, and its attempts."""
    ledger: Ledger = store.open()
    ledger.add_study(StudyRow.of(study))
    with ProgressView(study.name, Console(file=output, width=300)) as view:
        driver = Driver(
            study,
            store=store,
            ledger=ledger,
            executor=lambda: Shown(see),
            proposer=Proposer(study, ledger),
            spool=None,
            view=view,
            interrupts=Interrupts(),
        )
        ending = driver.run()
    attempts = ledger.attempts(study.name)
    ledger.close()
    return ending, attempts


def workers() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "ray::Worker" in " ".join(p.cmdline())]


def test_a_process_that_is_stopped_or_holds_the_interpreter_in_a_call_is_ended_and_the_second_time_quarantined(
    ray: None, make_training: MakeStudy, store: Store
) -> None:
    stuck: list[AttemptKey] = []
    processes: list[psutil.Process] = []

    def see(event: Event, actor: Any) -> None:
        if not isinstance(event, Measured | Moved) or event.key.number != 0 or event.key in stuck:
            return
        stuck.append(event.key)
        processes.extend(workers())
        if event.key.attempt == 1:
            for worker in workers():
                os.kill(worker.pid, signal.SIGSTOP)
        else:  # PyDLL keeps the interpreter's lock, so no thread of the process goes on
            actor.__ray_call__.remote(lambda _worker: ctypes.PyDLL(None).sleep(10_000))

    output = StringIO()
    study = make_training(steps=300, trials=2, resources={"gpu": 0, "hang_after_s": 3})
    ending, attempts = drive_processes(study, store, see, output)
    assert ending == "complete"
    assert [(a.number, a.attempt, a.state) for a in attempts] == [
        *((0, 1, "hung"), (0, 2, "hung")),
        (1, 1, "complete"),
    ]
    assert all((a.message or "").startswith("hung: no step for") for a in attempts[:2])
    assert psutil.wait_procs(processes, timeout=30)[1] == []
    assert "it is tried again" in output.getvalue()
    assert "that was its last try: quarantined" in output.getvalue()


def test_a_process_that_answers_but_makes_no_step_is_ended_too(
    ray: None, make_training: MakeStudy, store: Store
) -> None:
    folder = replica_folder(store.trial_folder("small", 0), 0)
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # what the worker waits for; it does not say who has it

        def see(event: Event, actor: Any) -> None:
            lock.close()  # the first event is the end of the first attempt

        study = make_training(steps=20, trials=1, sampler="random", resources={"gpu": 0, "hang_after_s": 1})

        ending, attempts = drive_processes(study, store, see, StringIO())
    assert ending == "complete"
    assert [(a.attempt, a.state) for a in attempts] == [(1, "hung"), (2, "complete")]


def test_a_thread_that_stands_still_ends_the_command_and_is_quarantined_after_the_second_time(
    make_training: MakeStudy, drive: Drive, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hqlt_orchestration.driving.executor.PAUSE_GRACE_S", 0.1)  # nobody waits for the thread
    folder = replica_folder(store.trial_folder("small", 0), 0)
    folder.mkdir(parents=True)
    study = make_training(steps=20, trials=2, sampler="random", resources={"gpu": 0, "hang_after_s": 1})
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for _ in range(2):
            with pytest.raises(
                TrialFailedError, match=r"^trial 0, seed 0: hung.*continue with: hqlt study resume small$"
            ):
                drive(study, store)
    assert drive(study, store) == "complete"
    with closing(store.open()) as ledger:
        counts = ledger.counts("small")
        states = [(one.number, one.state) for one in ledger.attempts("small")]
    assert (counts["quarantined"], counts["complete"]) == (1, 1)
    assert states == [(0, "hung"), (0, "hung"), (1, "complete")]
