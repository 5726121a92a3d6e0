"""Several drivers of one study, each a process: no suggestion is run twice, and the budget is met."""

import multiprocessing
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hqlt_orchestration.commands.invariants import invariants
from hqlt_orchestration.driving.sampler import Proposer
from hqlt_orchestration.records.attempts import AttemptKey
from hqlt_orchestration.records.leases import Leases
from hqlt_orchestration.records.ledger import Refused
from hqlt_orchestration.records.store import Store
from hqlt_orchestration.records.tables import StudyRow
from hqlt_search_space.study import Study
from hqlt_search_space.trial import TrialResult

MakeStudy = Callable[..., Study]
MakeOutcome = Callable[..., TrialResult]
Drive = Callable[[Study, Store], str]
Run = Callable[[Study, Store], object]


def run_in_processes(n: int, run: Run, study: Study, store: Store) -> None:
    fork = multiprocessing.get_context("fork")  # of this process, which has loaded torch already
    drivers = [fork.Process(target=run, args=(study, store)) for _ in range(n)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join(3000)
    assert [driver.exitcode for driver in drivers] == [0] * n


def assert_issued_once(n_asks: int, store: Store) -> None:
    ledger = store.open()
    try:
        trials = ledger.trials("small")
        assert [trial.number for trial in trials] == list(range(n_asks))
        assert len({trial.config.config_id for trial in trials}) == n_asks
        attempts = Counter((attempt.number, attempt.seed) for attempt in ledger.attempts("small"))
        assert attempts == {(number, 0): 1 for number in range(n_asks)}
    finally:
        ledger.close()
    assert invariants(store, "small") == []


def test_two_drivers_share_a_study(url: str, make_study: MakeStudy, drive: Drive, tmp_path: Path) -> None:
    store = Store(tmp_path / "data", database=url)
    run_in_processes(2, drive, make_study(trials=16, sampler="random"), store)
    assert_issued_once(16, store)


def ask_and_tell(make_outcome: MakeOutcome, study: Study, store: Store) -> None:
    """A driver without its executor: what it asks for is over at once."""
    ledger = store.open()
    proposer, leases = Proposer(study, ledger), Leases(ledger, "small", "ray")
    taken: set[str] = set()
    while True:
        proposal = proposer.propose(taken)
        new = proposal.new_trial((0,))
        key = leases.claim(new)
        if key == Refused("budget"):
            break
        if isinstance(key, Refused):
            taken.update(ledger.config_ids("small"))
            continue
        assert key == AttemptKey(key.number, 0, 1)
        taken.add(proposal.config.config_id)
        proposer.accept(key.number, new.proposal)
        leases.commit(key, make_outcome(proposal.config))
        costs = [proposal.costs[name] for name in study.objectives]
        proposer.tell(key.number, costs)
    leases.leave()
    ledger.close()


@pytest.mark.slow
def test_of_two_thousand_asks_none_is_issued_twice(
    url: str, make_study: MakeStudy, make_outcome: MakeOutcome, tmp_path: Path
) -> None:
    study, store = make_study(trials=2000, sampler="random"), Store(tmp_path / "data", database=url)
    ledger = store.open()
    ledger.add_study(StudyRow.of(study))
    ledger.close()
    run_in_processes(4, partial(ask_and_tell, make_outcome), study, store)
    assert_issued_once(2000, store)
