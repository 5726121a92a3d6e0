"""The study loop, with real training where it matters, inline so that one process sees it all."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hqlt_orchestration.commands.look import status_text
from hqlt_orchestration.commands.rerun import rerun
from hqlt_orchestration.driving.executor import Crashed, Event, Executor, Finished, Job, Measured
from hqlt_orchestration.driving.inline import InlineExecutor
from hqlt_orchestration.driving.interrupts import Interrupts
from hqlt_orchestration.driving.progress import ProgressView
from hqlt_orchestration.driving.runner import Driver, Ending
from hqlt_orchestration.driving.sampler import Proposer
from hqlt_orchestration.records.attempts import AttemptKey
from hqlt_orchestration.records.leases import take_back
from hqlt_orchestration.records.ledger import Ledger
from hqlt_orchestration.records.results import study_results
from hqlt_orchestration.records.store import Store
from hqlt_orchestration.records.tables import DriverId, StudyRow
from hqlt_search_space.study import Study
from rich.console import Console

MakeStudy = Callable[..., Study]


class Watched(InlineExecutor):
    """An inline executor that shows every event to the test, which may change it."""

    def __init__(self, see: Callable[[Event], Event]) -> None:
        super().__init__(cpus=1, gpus=0)
        self._see = see
        self.submitted: list[Job] = []

    def submit(self, job: Job) -> None:
        self.submitted.append(job)
        super().submit(job)

    def poll(self, timeout_s: float) -> list[Event]:
        return [self._see(event) for event in super().poll(timeout_s)]


def drive(
    study: Study,
    store: Store,
    executor: Executor,
    interrupts: Interrupts | None = None,
    output: StringIO | None = None,
) -> Ending:
    """What `hqlt study run` does, without MLflow."""
    with opened(store) as ledger:
        study = Study.from_json(ledger.add_study(StudyRow.of(study)).study)  # as `hqlt study resume` reads it
        with ProgressView(study.name, Console(file=output or StringIO())) as view:
            return Driver(
                study,
                store=store,
                ledger=ledger,
                executor=lambda: executor,
                proposer=Proposer(study, ledger) if study.search is not None else None,
                spool=None,
                view=view,
                interrupts=interrupts or Interrupts(),
            ).run()


@contextmanager
def opened(store: Store) -> Iterator[Ledger]:
    ledger = store.open()
    try:
        yield ledger
    finally:
        ledger.close()


def unchanged(event: Event) -> Event:
    return event


def summary(store: Store) -> list[tuple[Any, ...]]:
    """What must not depend on interruptions: configs in order, and their results to the bit."""
    with opened(store) as ledger:
        return [
            (
                row.number,
                row.config.config_id,
                row.state,
                [
                    (r.seed, r.phase, r.state, r.result and (r.result.metrics, r.result.weights_sha256, r.result.curve))
                    for r in ledger.replicas("small", row.number)
                ],
            )
            for row in ledger.trials("small")
        ]


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2"])
def test_a_study_interrupted_everywhere_ends_like_an_unbroken_one(
    sampler: str, make_training: MakeStudy, store: Store, tmp_path: Path
) -> None:
    study = make_training(trials=5, sampler=sampler)
    assert drive(study, store, Watched(unchanged)) == "complete"
    broken = Store(tmp_path / "broken")
    finished: list[int] = []
    for seen in range(1, 60, 7):
        interrupts = Interrupts()
        count = 0

        def see(event: Event, interrupts: Interrupts = interrupts, after: int = seen) -> Event:
            nonlocal count
            count += 1
            interrupts.asked |= count >= after
            if isinstance(event, Finished):
                finished.append(event.key.number)
            return event

        if drive(study, broken, Watched(see), interrupts) == "complete":
            break
    assert summary(broken) == summary(store)
    assert sorted(finished) == [0, 1, 2, 3, 4], "a finished trial was repeated"


def test_a_crashed_attempt_is_tried_again_and_a_config_that_always_crashes_is_quarantined(
    make_study: MakeStudy, store: Store
) -> None:
    def see(event: Event) -> Event:
        dies = event.key.number == 1 or (event.key.number == 2 and event.key.attempt == 1)
        return Crashed(event.key, "its worker process died") if isinstance(event, Finished) and dies else event

    output = StringIO()
    executor = Watched(see)
    assert drive(make_study(trials=4), store, executor, output=output) == "complete"
    with opened(store) as ledger:
        assert ledger.counts("small") | {"complete": 3, "quarantined": 1} == ledger.counts("small")
        attempts = [(a.number, a.attempt, a.state) for a in ledger.attempts("small")]
    assert [a for a in attempts if a[0] in (1, 2)] == [
        *((1, 1, "crashed"), (1, 2, "crashed"), (2, 1, "crashed"), (2, 2, "complete"))
    ]
    assert "that was its last try: quarantined" in output.getvalue()


def test_a_failed_trial_is_told_with_its_reason_and_the_study_goes_on(make_study: MakeStudy, store: Store) -> None:
    def see(event: Event) -> Event:
        if isinstance(event, Finished) and event.key.number == 0:
            failed = {"status": "failed", "reason": "out_of_memory", "message": "out of memory at step 0 (batch 32)"}
            replicas = tuple(replica.model_copy(update=failed) for replica in event.result.replicas)
            return replace(event, result=event.result.model_copy(update={"replicas": replicas}))
        return event

    output = StringIO()
    study = make_study(trials=3)
    assert drive(study, store, Watched(see), output=output) == "complete"
    assert "trial 0: out of memory at step 0 (batch 32): marked failed, 2 trials go on" in output.getvalue()
    with opened(store) as ledger:
        history = Proposer(study, ledger)._storage.look()
        assert [trial.state.name for trial in history] == ["FAIL", "COMPLETE", "COMPLETE"]
        assert study_results(ledger, "small").trials[0].objectives == {}


def test_the_front_is_run_again_over_fresh_seeds(make_training: MakeStudy, store: Store) -> None:
    study = make_training(steps=4, trials=3, replication={"seeds": [7, 8]})
    executor = Watched(unchanged)
    assert drive(study, store, executor) == "complete"
    with opened(store) as ledger:
        records = study_results(ledger, "small").trials
    replicated = [record for record in records if record.replication]
    assert replicated
    assert all([replica.seed for replica in record.replication] == [7, 8] for record in replicated)
    assert all(record.replicas[0].seed == 0 for record in records)
    assert len(executor.submitted) == 3 + len(replicated)  # fresh seeds train together
    for replica in (replica for record in replicated for replica in record.replication):
        assert replica.weights_sha256 is not None


def test_rungs_stop_trials_and_a_stopped_trial_has_no_objectives(make_training: MakeStudy, store: Store) -> None:
    stopping = {"rungs": [2, 4], "eta": 4, "min_competitors": 2}
    study = make_training(steps=8, trials=6, early_stopping=stopping, objectives={"validation_loss_nats": "minimize"})
    assert drive(study, store, Watched(unchanged)) == "complete"
    with opened(store) as ledger:
        records = study_results(ledger, "small").trials
    stopped = [record for record in records if record.state == "stopped"]
    assert stopped
    assert all(record.replicas[0].step in (2, 4) and not record.objectives for record in stopped)
    assert any(record.state == "complete" for record in records)


def test_an_ablation_runs_every_cell_with_every_seed(make_study: MakeStudy, store: Store) -> None:
    ablation = {"baseline": {"rule": "delta"}, "vary": {"mixing": ["sum"], "window": [4, 8]}, "seeds": [0, 1]}
    study = make_study(search=None, budget={}, ablation=ablation)
    assert drive(study, store, Watched(unchanged)) == "complete"
    with opened(store) as ledger:
        records = study_results(ledger, "small").trials
    assert [record.cell for record in records] == ["baseline", "mixing=sum", "window=4", "window=8"]
    assert all([replica.seed for replica in record.replicas] == [0, 1] for record in records)


def test_seeds_that_train_together_end_alike_however_they_are_interrupted(
    make_training: MakeStudy, store: Store, tmp_path: Path
) -> None:
    ablation = {"baseline": {"rule": "delta"}, "vary": {"window": [4]}, "seeds": [0, 1, 2]}
    study = make_training(search=None, budget={}, ablation=ablation)
    executor = Watched(unchanged)
    assert drive(study, store, executor) == "complete"
    assert [[key.seed for key in job.keys] for job in executor.submitted] == [[0, 1, 2]] * 2
    broken, died = Store(tmp_path / "broken"), set[int]()
    for seen in (1, 60, 500, 500):
        interrupts = Interrupts()
        events: list[Event] = []

        def see(
            event: Event, events: list[Event] = events, interrupts: Interrupts = interrupts, after: int = seen
        ) -> Event:
            events.append(event)
            interrupts.asked = interrupts.asked or len(events) >= after
            # Once for each trial a process dies between two results of a stack.
            if not isinstance(event, Finished) or event.key.seed != 1 or event.key.number in died:
                return event
            died.add(event.key.number)
            return Crashed(event.key, "its worker process died")

        again = Watched(see)
        if drive(study, broken, again, interrupts) == "complete":
            break
        assert all(job.trial.seeds == (0, 1, 2) for job in again.submitted)
    assert died == {0, 1}
    assert summary(broken) == summary(store)


def test_a_seed_that_trained_in_a_stack_is_rerun_in_it(
    make_training: MakeStudy, store: Store, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hqlt_orchestration.commands.rerun._mirror", lambda *_: None)  # MLflow takes seconds to load
    ablation = {"baseline": {"rule": "delta"}, "vary": {"window": [4]}, "seeds": [0, 1]}
    assert (
        drive(make_training(steps=6, search=None, budget={}, ablation=ablation), store, Watched(unchanged))
        == "complete"
    )
    assert rerun("small/0", store, seed=1, steps=None, settings=[], as_json=True) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["identical"]
    assert report["stored"]["seed"] == report["measured"]["seed"] == 1
    assert report["stored"]["weights_sha256"] == report["measured"]["weights_sha256"]


def test_a_trial_cancelled_while_it_runs_ends_without_a_result(
    make_training: MakeStudy, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hqlt_orchestration.driving.runner.BEAT_S", 0.0)
    study = make_training(steps=5000, trials=2)

    def see(event: Event) -> Event:
        if isinstance(event, Measured):
            with opened(store) as ledger:
                ledger.cancel("small", event.key.number)
        return event

    assert drive(study, store, Watched(see)) == "complete"
    with opened(store) as ledger:
        assert ledger.counts("small")["stopped"] == 2
        assert ledger.replicas("small")[0].result is None


def test_a_full_disk_pauses_the_study(make_study: MakeStudy, store: Store) -> None:
    def see(event: Event) -> Event:
        if isinstance(event, Finished):
            full = {"status": "failed", "reason": "disk_full", "message": "disk full at step 3"}
            replicas = tuple(replica.model_copy(update=full) for replica in event.result.replicas)
            return replace(event, result=event.result.model_copy(update={"replicas": replicas}))
        return event

    study = make_study(trials=2)
    assert drive(study, store, Watched(see)) == "paused"
    assert drive(study, store, Watched(unchanged)) == "complete"
    with opened(store) as ledger:
        assert ledger.counts("small")["complete"] == 2


def test_a_trial_ended_for_want_of_memory_is_tried_again_with_half_the_rows_and_says_so(
    make_training: MakeStudy, store: Store
) -> None:
    """The machine's own out-of-memory killer is played here; run_trial meets the real thing in the trainer's tests."""

    def see(event: Event) -> Event:
        if not isinstance(event, Finished) or event.key != AttemptKey(0, 0, 1):
            return event
        shutil.rmtree(store.trial_folder("small", 0) / "seed-0")  # it did not come so far
        return Crashed(event.key, "ended because the machine ran out of memory", out_of_memory=True)

    output, executor = StringIO(), Watched(see)
    study = make_training(trials=2, search=None, budget={}, ablation={"vary": {"window": [4, 8]}, "seeds": [0, 1]})
    assert drive(study, store, executor, output=output) == "complete"
    again = next(job for job in executor.submitted if job.keys[0] == AttemptKey(0, 0, 2))
    assert (again.trial.runtime.accumulation, again.trial.seeds) == (2, (0,))
    assert "trial 0, seed 0: memory was too small; trained with 2 micro-batches a step" in output.getvalue()
    with opened(store) as ledger:
        result = ledger.replicas("small", 0)[0].result
        assert result is not None
        assert result.accumulation == 2
        said = status_text(ledger, "small", as_json=False)
    assert "attempts that came to no result: 1 out of memory" in said
    assert "trial 0, seed 0: memory was too small; trained with 2 micro-batches a step" in said


def test_a_driver_that_was_given_up_goes_on_as_a_new_one(
    make_training: MakeStudy, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hqlt_orchestration.driving.runner.BEAT_S", 0.0)
    given_up: list[DriverId] = []

    def see(event: Event) -> Event:
        if isinstance(event, Measured) and not given_up:
            with opened(store) as ledger:
                drivers = ledger.drivers("small")
                given_up.extend(driver.id for driver in drivers)
                assert take_back(ledger, "small", drivers) == [(AttemptKey(0, 0, 1), "waiting")]
        return event

    output = StringIO()
    assert drive(make_training(steps=400, trials=2), store, Watched(see), output=output) == "complete"
    assert "this driver stood still" in output.getvalue()
    with opened(store) as ledger:
        attempts = [(a.number, a.attempt, a.state) for a in ledger.attempts("small")]
    assert attempts == [(0, 1, "crashed"), (0, 2, "complete"), (1, 1, "complete")]
