"""What any database under the ledger must do."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from hqlt_orchestration.records.attempts import AttemptKey
from hqlt_orchestration.records.drivers import DriverWatch, driver_is_dead
from hqlt_orchestration.records.leases import Leases, take_back
from hqlt_orchestration.records.ledger import Ledger, NewTrial, Refused
from hqlt_orchestration.records.states import AttemptEnd
from hqlt_orchestration.records.tables import StudyRow
from hqlt_search_space.arch import Arch
from hqlt_search_space.errors import UnknownNameError
from hqlt_search_space.mixers import Attention
from hqlt_search_space.recipe import Recipe
from hqlt_search_space.tasks import Nothing
from hqlt_search_space.trial import Config, TrialResult

BUDGET = 6
MakeOutcome = Callable[..., TrialResult]


def config(width: int = 8) -> Config:
    return Config(
        arch=Arch(d_model=width, mlp_inner=8, layers=(Attention(n_heads=2),)), recipe=Recipe(steps=1), task=Nothing()
    )


def new_trial(width: int = 8, seeds: tuple[int, ...] = (0,), cell: str | None = None) -> NewTrial:
    return NewTrial(
        "search" if cell is None else "ablate", config(width), {"d_model": width}, {"parameters": 1.0}, seeds, cell
    )


@pytest.fixture
def ledger(url: str) -> Iterator[Ledger]:
    ledger = Ledger(url)
    ledger.add_study(StudyRow("s", "{}", "", "h", BUDGET, "open", None, 0.0))
    yield ledger
    ledger.close()


def claimed(ledger: Ledger, width: int = 8, seeds: tuple[int, ...] = (0,)) -> tuple[Leases, AttemptKey]:
    """A new driver, and the trial that it runs."""
    leases = Leases(ledger, "s", "ray")
    key = leases.claim(new_trial(width, seeds))
    assert not isinstance(key, Refused)
    return leases, key


def test_a_result_is_committed_once(ledger: Ledger, make_outcome: MakeOutcome) -> None:
    leases, key = claimed(ledger)
    assert leases.commit(key, make_outcome(config(), loss=1.0)) == "complete"
    assert leases.commit(key, make_outcome(config(), loss=2.0)) is None
    (replica,) = ledger.replicas("s")
    assert replica.result is not None
    assert replica.result.metrics == {"validation_loss_nats": 1.0}


def test_an_attempt_that_was_taken_back_cannot_commit(ledger: Ledger, make_outcome: MakeOutcome) -> None:
    leases, first = claimed(ledger)
    assert leases.release(first, "crashed") == "waiting"
    other = Leases(ledger, "s", "ray")
    second = other.take_next("search")
    assert second == AttemptKey(0, 0, 2)
    assert leases.commit(first, make_outcome(config(), loss=1.0)) is None
    assert other.commit(second, make_outcome(config(), loss=2.0)) == "complete"


def test_the_second_crash_quarantines_and_a_pause_does_not_count(ledger: Ledger) -> None:
    leases, key = claimed(ledger)
    states = []
    for how in ("paused", "crashed", "paused", "crashed"):
        assert key is not None
        states.append(leases.release(key, how))
        key = leases.take_next("search")
    assert states == ["paused", "waiting", "paused", "quarantined"]
    assert key is None
    assert ledger.counts("s")["quarantined"] == 1


def test_many_drivers_neither_overshoot_the_budget_nor_share_a_trial(url: str, ledger: Ledger) -> None:
    barrier = threading.Barrier(4)

    def drive(_: int) -> list[AttemptKey]:
        mine = Ledger(url)
        leases = Leases(mine, "s", "ray")
        barrier.wait()
        found = [leases.claim(new_trial(8 * width)) for width in range(1, 10)]
        mine.close()
        return [key for key in found if not isinstance(key, Refused)]

    with ThreadPoolExecutor(4) as pool:
        keys = [key for keys in pool.map(drive, range(4)) for key in keys]
    assert sorted(key.number for key in keys) == list(range(BUDGET))
    trials = ledger.trials("s")
    assert len({trial.config.config_id for trial in trials}) == BUDGET


def test_many_drivers_never_lease_the_same_replica(url: str, ledger: Ledger) -> None:
    ledger.add_trial("s", new_trial(seeds=tuple(range(24))))
    barrier = threading.Barrier(4)

    def drive(_: int) -> list[AttemptKey]:
        mine = Ledger(url)
        leases = Leases(mine, "s", "ray")
        barrier.wait()
        found = []
        while (key := leases.take_next("search")) is not None:
            found.append(key)
        mine.close()
        return found

    with ThreadPoolExecutor(4) as pool:
        keys = [key for keys in pool.map(drive, range(4)) for key in keys]
    assert sorted(key.seed for key in keys) == list(range(24))


def test_seeds_that_wait_are_leased_with_another(ledger: Ledger) -> None:
    ledger.add_trial("s", new_trial(seeds=(0, 1, 2, 3, 4)))
    mine, other = Leases(ledger, "s", "ray"), Leases(ledger, "s", "ray")
    assert (mine.take_next("search"), other.take_next("search")) == (AttemptKey(0, 0, 1), AttemptKey(0, 1, 1))
    assert mine.take_others(0, (0, 1, 2, 4)) == [AttemptKey(0, 2, 1), AttemptKey(0, 4, 1)]
    assert mine.take_others(0, (0, 1, 2, 4)) == []
    assert other.take_next("search") == AttemptKey(0, 3, 1)


def test_six_processes_may_open_a_new_database_at_once(url: str) -> None:
    with ThreadPoolExecutor(6) as pool:
        for opened in list(pool.map(Ledger, [url] * 6)):
            assert opened.studies() == []
            opened.close()


def test_a_dead_drivers_trials_are_taken_over_and_a_living_ones_are_not(ledger: Ledger) -> None:
    claimed(ledger, 8)
    (driver,) = ledger.drivers("s")
    assert driver_is_dead(driver) is False
    assert driver_is_dead(replace(driver, process_start=driver.process_start - 9)) is True
    assert driver_is_dead(replace(driver, boot_id="another")) is True
    assert take_back(ledger, "s", []) == []
    assert take_back(ledger, "s", [driver]) == [(AttemptKey(0, 0, 1), "waiting")]
    assert ledger.attempts("s")[0].state == "lost"


def test_a_driver_that_has_beaten_since_keeps_its_trials(ledger: Ledger) -> None:
    leases, key = claimed(ledger)
    (driver,) = ledger.drivers("s")
    leases.beat({key: 3})
    assert take_back(ledger, "s", [driver]) == []
    assert ledger.attempts("s")[0].step == 3


def test_a_driver_elsewhere_is_judged_by_its_beats_and_not_by_any_clock(ledger: Ledger) -> None:
    claimed(ledger)
    (driver,) = ledger.drivers("s")
    elsewhere = replace(driver, host="another-host", beat_at=0.0)
    now = 0.0
    watch = DriverWatch(stale_after_s=60, clock=lambda: now)
    for now in map(float, range(130)):
        found = watch.dead([replace(elsewhere, beats=1 if now < 60 else 2)])
        assert bool(found) is (now > 120), f"at {now} s"


def test_a_driver_is_not_dead_because_nobody_could_look_for_hours(ledger: Ledger) -> None:
    claimed(ledger)
    (driver,) = ledger.drivers("s")
    times = iter((0.0, 3600.0, 7200.0))
    watch = DriverWatch(stale_after_s=60, clock=lambda: next(times))
    assert watch.dead([driver]) == []
    assert watch.dead([driver]) == []


def test_no_lease_is_lost_when_the_wall_clock_jumps(
    ledger: Ledger, make_outcome: MakeOutcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = itertools.cycle([1.7e9, 1.7e9 + 3600, 1.7e9 - 3600, 0.0])
    monkeypatch.setattr(time, "time", lambda: next(times))
    drivers = [claimed(ledger, 8 * width) for width in (1, 2, 3)]
    watch = DriverWatch()
    for leases, key in drivers:
        assert watch.dead(ledger.drivers("s")) == []
        assert leases.beat({key: 7}) == []
        assert take_back(ledger, "s", watch.dead(ledger.drivers("s"))) == []
    assert [leases.commit(key, make_outcome(config())) for leases, key in drivers] == ["complete"] * 3


def test_a_driver_that_stands_still_on_this_machine_loses_its_trials_and_is_told(ledger: Ledger) -> None:
    leases, key = claimed(ledger)
    (driver,) = ledger.drivers("s")
    times = itertools.count(step=5.0)
    watch = DriverWatch(stale_after_s=60, clock=lambda: next(times))
    looks = [watch.dead([driver]) for _ in range(14)]
    assert looks == [[]] * 13 + [[driver]]
    assert take_back(ledger, "s", [driver]) == [(key, "waiting")]
    assert leases.beat({key: 9}) is None
    assert ledger.attempts("s")[0].step == 0


def test_a_trial_is_the_sum_of_its_replicas_but_not_of_its_replication(
    ledger: Ledger, make_outcome: MakeOutcome
) -> None:
    leases, key = claimed(ledger, seeds=(0, 1))
    assert leases.commit(key, make_outcome(config())) == "waiting"
    second = leases.take_next("search")
    assert second is not None
    assert leases.commit(second, make_outcome(config(), 1, status="failed")) == "failed"
    ledger.add_replicas("s", 0, "replicate", (5, 1, 6))
    assert [(r.seed, r.phase) for r in ledger.replicas("s")] == [
        *((0, "search"), (1, "search"), (5, "replicate"), (6, "replicate"))
    ]
    assert ledger.trial("s", 0).state == "failed"
    assert (ledger.n_unfinished("s", "search"), ledger.n_unfinished("s", "replicate")) == (0, 2)


def test_a_cancelled_trial_ends_at_once_unless_it_runs(ledger: Ledger) -> None:
    leases, key = claimed(ledger, seeds=(0, 1))
    assert ledger.cancel("s", 0) == 2
    assert [replica.state for replica in ledger.replicas("s")] == ["running", "stopped"]
    assert leases.beat({key: 1}) == [key]
    assert leases.release(key, "paused") == "stopped"
    assert ledger.trial("s", 0).state == "stopped"
    assert ledger.cancel("s", 0) == 0


@pytest.mark.parametrize("how", ["crashed", "hung", "paused"])
def test_what_is_cancelled_is_stopped_however_its_attempt_ends(ledger: Ledger, how: AttemptEnd) -> None:
    leases, key = claimed(ledger)
    ledger.cancel("s", 0)
    assert leases.release(key, how) == "stopped"
    assert ledger.n_unfinished("s", "search") == 0


def test_a_trial_is_found_by_its_id_a_prefix_or_its_number(ledger: Ledger) -> None:
    claimed(ledger, 8)
    claimed(ledger, 16)
    ids = [trial.config.config_id for trial in ledger.trials("s")]
    assert ledger.find_trial(ids[1]) == ledger.find_trial(ids[1][:6]) == ledger.find_trial("s/1") == ("s", 1)
    for wrong in ("", "zzzz", "s/9", "s/x", "t/0", "../0"):
        with pytest.raises(UnknownNameError):
            ledger.find_trial(wrong)


def test_rungs_keep_one_reading_of_each_replica(ledger: Ledger) -> None:
    claimed(ledger, 8)
    claimed(ledger, 16)
    ledger.record_rung("s", 0, 0, 10, {"loss": 3.0})
    ledger.record_rung("s", 0, 0, 10, {"loss": 3.0})
    table = ledger.record_rung("s", 1, 0, 10, {"loss": 2.0})
    assert table == {(0, 0): {"loss": 3.0}, (1, 0): {"loss": 2.0}}


def test_a_deleted_study_leaves_nothing(ledger: Ledger) -> None:
    claimed(ledger)
    ledger.record_rung("s", 0, 0, 10, {"loss": 3.0})
    ledger.delete_study("s")
    assert (ledger.studies(), ledger.trials("s"), ledger.replicas("s"), ledger.attempts("s")) == ([], [], [], [])
    assert ledger.drivers("s") == []
