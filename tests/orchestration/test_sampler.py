import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hqlt_orchestration.driving.sampler import Exhausted, Proposal, Proposer, seed_of
from hqlt_orchestration.records.ledger import Ledger
from hqlt_orchestration.records.store import Store
from hqlt_orchestration.records.tables import StudyRow
from hqlt_search_space.study import Study

SAMPLERS = ("random", "tpe", "nsga2", "nsga3", "gp")


@pytest.fixture
def ledger(store: Store) -> Iterator[Ledger]:
    ledger = store.open()
    yield ledger
    ledger.close()


def add(ledger: Ledger, study: Study) -> None:
    ledger.add_study(StudyRow.of(study))


def run(ledger: Ledger, study: Study, proposers: Iterator[Proposer], n_trials: int) -> list[Proposal]:
    """A study in which every trial is told at once; the costs stand for results."""
    done: list[Proposal] = []
    for number in range(n_trials):
        proposer = next(proposers)
        taken = {proposal.config.config_id for proposal in done}
        proposal = proposer.propose(taken)
        new = proposal.new_trial((0,))
        ledger.add_trial(study.name, new)
        proposer.accept(number, new.proposal)
        proposer.tell(number, [proposal.costs[name] for name in study.objectives])
        done.append(proposal)
    return done


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_process_for_every_trial_continues_the_sequence_of_one_process(
    sampler: str, make_study: Callable[..., Study], store: Store, tmp_path: Any
) -> None:
    study = make_study(sampler)
    whole, broken = store.open(), Store(tmp_path / "broken").open()
    add(whole, study)
    add(broken, study)
    one = Proposer(study, whole)
    one.alone = True
    n_trials = 14 if sampler != "gp" else 11  # beyond the ten random trials that TPE and GP start with
    unbroken = run(whole, study, itertools.repeat(one), n_trials)
    fresh = (Proposer(study, broken) for _ in range(n_trials))
    assert [p.params for p in run(broken, study, fresh, n_trials)] == [p.params for p in unbroken]


def test_two_seeds_give_two_sequences(make_study: Callable[..., Study], store: Store, ledger: Ledger) -> None:
    assert len({seed_of(seed, number, ask) for seed in range(3) for number in range(9) for ask in range(9)}) == 243


@pytest.mark.parametrize("sampler", ["random", "nsga2", "grid"])
def test_a_finite_space_is_run_once_and_then_ends(
    sampler: str, make_study: Callable[..., Study], ledger: Ledger
) -> None:
    space = {"first": ["hybrid", "attention"], "window": [4, 8], "mixing": ["sum", "concat"]}
    study = make_study(sampler, space)
    add(ledger, study)
    size = study.size()
    assert size == 6  # attention has no mixing
    proposer = Proposer(study, ledger)
    done = run(ledger, study, itertools.repeat(proposer), size)
    ids = {proposal.config.config_id for proposal in done}
    assert len(ids) == size
    with pytest.raises(Exhausted):
        proposer.propose(ids)


def test_what_breaks_a_constraint_is_neither_proposed_nor_counted(
    make_study: Callable[..., Study], ledger: Ledger
) -> None:
    study = make_study("random", constraints={"state_bytes": {"max": 600}})
    add(ledger, study)
    proposer = Proposer(study, ledger)
    done = run(ledger, study, itertools.repeat(proposer), 6)
    assert all(proposal.costs["state_bytes"] <= 600 for proposal in done)
    assert list(proposer.known()) == list(range(6))


def test_when_nothing_new_is_found_the_reason_names_the_constraint(
    make_study: Callable[..., Study], ledger: Ledger
) -> None:
    study = make_study("random", constraints={"state_bytes": {"max": 1}})
    add(ledger, study)
    with pytest.raises(Exhausted, match="state_bytes is above max 1"):
        Proposer(study, ledger).propose(())


def test_every_axis_is_suggested_every_time(make_study: Callable[..., Study], ledger: Ledger) -> None:
    study = make_study("tpe")
    add(ledger, study)
    done = run(ledger, study, itertools.repeat(Proposer(study, ledger)), 5)
    assert all(set(proposal.params) == set(study.domains()) for proposal in done)
    assert any(set(proposal.choices) < set(study.domains()) for proposal in done)


def test_a_failed_and_a_stopped_trial_have_no_values_and_the_first_tell_stands(
    make_study: Callable[..., Study], ledger: Ledger
) -> None:
    study = make_study("nsga2")
    add(ledger, study)
    proposer = Proposer(study, ledger)
    taken = {done.config.config_id for done in run(ledger, study, itertools.repeat(proposer), 1)}
    for number, ending in ((1, None), (2, "stopped"), (3, [float("inf"), 1.0])):
        proposal = proposer.propose(taken)
        taken.add(proposal.config.config_id)
        proposer.accept(number, proposal.new_trial((0,)).proposal)
        values = ending if isinstance(ending, list) else None
        proposer.tell(number, values, stopped=ending == "stopped")
        proposer.tell(number, [1.0, 1.0])
    states = [trial.state.name for trial in Proposer(study, ledger)._storage.look()]
    assert states == ["COMPLETE", "FAIL", "PRUNED", "FAIL"]
