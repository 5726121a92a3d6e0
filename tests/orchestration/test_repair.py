"""`hqlt doctor --study`: each thing that can be broken is broken, on purpose; it is mended, said, and mended once."""

import json
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hqlt_orchestration.commands.doctor import doctor
from hqlt_orchestration.records.leases import Leases
from hqlt_orchestration.records.ledger import NewTrial
from hqlt_orchestration.records.store import Store
from hqlt_orchestration.tracking.spool import Spool, unshipped_bytes
from hqlt_search_space.study import Study

MakeStudy = Callable[..., Study]
Drive = Callable[[Study, Store], str]


@pytest.fixture
def study(make_training: MakeStudy) -> Study:
    return make_training(steps=4, trials=3, sampler="random")


@pytest.fixture
def broken_study(study: Study, drive: Drive, store: Store) -> Study:
    """Complete and sound, until a test breaks it."""
    assert drive(study, store) == "complete"
    return study


@pytest.fixture
def examine(
    store: Store, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[], tuple[int, list[str], list[str]]]:
    """Exit code, what was mended, and what is still wrong."""

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # whose Rays died elsewhere is not this test's business

    def examine() -> tuple[int, list[str], list[str]]:
        capfd.readouterr()
        code = doctor(store, "small", as_json=True)
        found: dict[str, Any] = json.loads(capfd.readouterr().out)["study"]
        return code, found["mended"], found["problems"]

    return examine


Examine = Callable[[], tuple[int, list[str], list[str]]]


def sql(store: Store, *statements: str) -> None:
    with closing(sqlite3.connect(store.data / "hqlt.db")) as connection:
        for statement in statements:
            assert connection.execute(statement).rowcount, f"{statement}: nothing was broken"
        connection.commit()


BROKEN_ROWS: dict[str, tuple[str, str]] = {
    "a state without its result": (
        "UPDATE hqlt_replicas SET result = NULL WHERE number = 1",
        "trial 1, seed 0: state complete without a result; now waiting",
    ),
    "a result without its state": (
        "UPDATE hqlt_replicas SET state = 'waiting' WHERE number = 1",
        "trial 1, seed 0: state waiting with a result; now complete",
    ),
    "a result of no attempt": (
        "UPDATE hqlt_attempts SET state = 'crashed' WHERE number = 1",
        "trial 1, seed 0: it has a result of no attempt; attempt 1 gets it",
    ),
    "an attempt that runs beside a result": (
        "INSERT INTO hqlt_attempts SELECT study, number, seed, 2, driver, 'running', 0, started_at, NULL, NULL "
        "FROM hqlt_attempts WHERE number = 1",
        "trial 1, seed 0: attempt 2 was held by a driver that is gone; now complete",
    ),
    "a replica that nobody runs": (
        "UPDATE hqlt_replicas SET state = 'running', result = NULL WHERE number = 1",
        "trial 1, seed 0: state running without a result; now waiting",
    ),
    "a trial that is not what its seeds are": (
        "UPDATE hqlt_trials SET state = 'paused' WHERE number = 1",
        "trial 1: state paused, its seeds say complete; now complete",
    ),
    "a trial that Optuna was not told of": (
        "UPDATE trials SET state = 'RUNNING' WHERE number = 1; DELETE FROM trial_values WHERE trial_id = 2",
        "trial 1: Optuna was not told that it is complete; now it is",
    ),
}


@pytest.mark.parametrize(("statement", "said"), BROKEN_ROWS.values(), ids=BROKEN_ROWS.keys())
def test_rows_that_contradict_each_other_are_mended_and_the_study_goes_on(
    statement: str, said: str, broken_study: Study, store: Store, drive: Drive, examine: Examine
) -> None:
    before = results(store)
    sql(store, *statement.split("; "))
    _, mended, problems = examine()
    assert said in mended
    if "now waiting" in said:  # its result is gone, and Optuna cannot unlearn it: the trial has to run again
        assert problems == ["trial 1: waiting, and COMPLETE in Optuna's history"]
    else:
        assert problems == []
        assert examine() == (0, [], [])
    assert drive(broken_study, store) == "complete"
    assert results(store) == before
    assert examine() == (0, [], [])


@pytest.mark.parametrize("state", ["waiting", "paused", "running"])
def test_what_was_cancelled_is_stopped_and_not_tried_again(
    state: str, broken_study: Study, store: Store, examine: Examine
) -> None:
    sql(
        store,
        f"UPDATE hqlt_replicas SET state = '{state}', cancelled = TRUE, result = NULL WHERE number = 1",
        "UPDATE hqlt_attempts SET state = 'lost' WHERE number = 1",
    )
    _, mended, problems = examine()
    assert f"trial 1, seed 0: state {state} without a result; now stopped" in mended
    assert not [problem for problem in problems if "cancelled" in problem]
    assert [replica[2] for replica in results(store)] == ["complete", "stopped", "complete"]


def results(store: Store) -> list[Any]:
    ledger = store.open()
    try:
        return [(r.number, r.seed, r.state, r.result and r.result.metrics) for r in ledger.replicas("small")]
    finally:
        ledger.close()


def test_a_trial_that_optuna_does_not_know_is_written_into_its_history(
    broken_study: Study, store: Store, examine: Examine
) -> None:
    tables = ("trial_params", "trial_user_attributes", "trial_values")
    sql(
        store, *(f"DELETE FROM {table} WHERE trial_id = 3" for table in tables), "DELETE FROM trials WHERE trial_id = 3"
    )
    code, mended, problems = examine()
    assert mended == [
        "trial 2: Optuna did not know it; now it does",
        "trial 2: Optuna was not told that it is complete; now it is",
    ]
    assert (code, problems) == (0, [])
    assert examine() == (0, [], [])


def test_the_lease_of_a_driver_that_died_is_given_back(broken_study: Study, store: Store, examine: Examine) -> None:
    ledger = store.open()
    ledger.update_study("small", budget=4)
    config = ledger.trial("small", 0).config
    other = config.model_copy(update={"recipe": config.recipe.model_copy(update={"learning_rate": 0.5})})
    proposal = ledger.trial("small", 0).proposal
    Leases(ledger, "small", "ray").claim(NewTrial("search", other, {}, {}, (0,), None, proposal))
    ledger.close()
    sql(store, "UPDATE hqlt_drivers SET boot_id = 'before the machine was started' WHERE NOT ended")
    code, mended, problems = examine()
    assert mended[0] == "trial 3, seed 0: attempt 1 was held by a driver that is gone; now waiting"
    assert (code, problems) == (0, [])
    assert examine() == (0, [], [])


def test_beside_a_living_driver_nothing_is_touched(broken_study: Study, store: Store, examine: Examine) -> None:
    ledger = store.open()
    Leases(ledger, "small", "ray")
    ledger.close()
    half = store.study_folder("small") / "trials" / "0000" / "seed-0" / "result.json.tmp"
    half.touch()
    assert examine() == (1, [], [f"{half}: half written, left by a crash; it can be removed"])


def test_what_is_half_written_goes_and_what_is_of_no_trial_is_put_aside(
    broken_study: Study, store: Store, examine: Examine
) -> None:
    folder = store.study_folder("small")
    half = folder / "trials" / "0001" / "seed-0" / "checkpoints" / "step-9.tmp"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"hal")
    stranger = folder / "trials" / "0099"
    stranger.mkdir()
    (stranger / "notes.txt").write_text("somebody's")
    code, mended, problems = examine()
    assert mended == [
        f"{half}: half written, left by a crash; removed",
        f"{stranger}: of no trial in the ledger; now {folder / 'unknown' / '0099'}",
    ]
    assert (code, problems) == (0, [])
    assert (folder / "unknown" / "0099" / "notes.txt").read_text() == "somebody's"
    assert examine() == (0, [], [])


def test_a_damaged_checkpoint_is_told_every_time_and_not_hidden(
    broken_study: Study, store: Store, examine: Examine
) -> None:
    checkpoint: Path = next(store.trial_folder("small", 1).glob("seed-0/checkpoints/step-4"))
    weights = checkpoint / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for _ in range(2):
        code, mended, (problem,) = examine()
        assert (code, mended) == (1, [])
        assert problem == f"trial 1, seed 0: {weights} does not match the manifest's SHA-256"


@pytest.mark.slow
def test_what_a_killed_driver_left_for_mlflow_is_sent(broken_study: Study, store: Store, examine: Examine) -> None:
    spool = Spool(store, "small")
    spool._writer.kill()  # before it has loaded MLflow
    spool._writer.communicate()
    spool.put({"kind": "metrics", "phase": "search", "number": 0, "step": 4, "metrics": {"validation_loss_nats": 0.5}})
    spool._file.close()
    waiting = unshipped_bytes(store.spool_folder("small"))
    code, mended, problems = examine()
    assert mended == [f"{waiting} bytes that waited for MLflow are sent"]
    assert (code, problems) == (0, [])
    assert examine() == (0, [], [])
