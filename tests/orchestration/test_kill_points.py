"""A driver killed before any SQL statement, or after any commit: what follows is as if it had never been killed."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hqlt_orchestration.commands.invariants import invariants
from hqlt_orchestration.driving.sampler import Proposer
from hqlt_orchestration.records.store import Store
from hqlt_search_space.study import Study

MakeStudy = Callable[..., Study]
Drive = Callable[[Study, Store], str]
MOMENTS = ("before_cursor_execute", "commit")


def drive_until(moment: int, drive: Drive, study: Study, store: Store) -> None:
    """`drive` in this process, which is killed at that moment; what ends before leaves with exit code 0.

    A moment is a statement that is about to be sent, or a transaction that is about to be committed: on any database
    connection of the process, Optuna's too.
    """
    seen = 0

    def count(*_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen > moment:
            os.kill(os.getpid(), signal.SIGKILL)

    for name in MOMENTS:
        sa.event.listen(sa.Engine, name, count)
    drive(study, store)
    os._exit(0)


def killed(moment: int, drive: Drive, study: Study, store: Store) -> bool:
    """Whether a driver that was to die at that moment came so far."""
    process = multiprocessing.get_context("fork").Process(target=drive_until, args=(moment, drive, study, store))
    process.start()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL), f"killed at moment {moment}: exit code {process.exitcode}"
    return process.exitcode != 0


def all_that_counts(store: Store) -> list[Any]:
    """Trials, results and sampling history, without times and numbers of attempts."""
    ledger = store.open()
    try:
        history = Proposer(Study.from_json(ledger.study("small").study), ledger)._optuna.get_trials(deepcopy=False)
        return [
            [(row.number, row.config.config_id, row.choices, row.state) for row in ledger.trials("small")],
            [(r.number, r.seed, r.state, r.result and r.result.metrics) for r in ledger.replicas("small")],
            [(trial.number, trial.params, trial.state, trial.values) for trial in history],
        ]
    finally:
        ledger.close()


@pytest.mark.parametrize(
    "every", [pytest.param(1, marks=pytest.mark.slow), 29], ids=["every moment", "every 29th moment"]
)
def test_a_driver_killed_between_any_two_statements_loses_and_doubles_nothing(
    every: int, make_study: MakeStudy, drive: Drive, tmp_path: Path
) -> None:
    study = make_study(trials=2, sampler="random")
    unbroken = Store(tmp_path / "unbroken")
    drive(study, unbroken)
    expected = all_that_counts(unbroken)
    for moment in range(every // 2, 10_000, every):
        store = Store(tmp_path / str(moment))
        if not killed(moment, drive, study, store):
            assert moment > 100, "a moment is counted for nothing that happens"
            break
        drive(study, store)
        assert all_that_counts(store) == expected, f"killed at moment {moment}"
        assert invariants(store, "small") == [], f"killed at moment {moment}"
