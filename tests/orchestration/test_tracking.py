"""The spool and its writer, against a real MLflow."""

import fcntl
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from hqlt_orchestration.tracking import Position, Spool, ship, unshipped_bytes


class Recorder:
    """Stands where MLflow's mirror stands; dies on a record that says so."""

    def __init__(self) -> None:
        self.study = "small"
        self.careful = False
        self.applied: list[tuple[bool, list[str]]] = []

    def apply(self, records: list[dict[str, Any]]) -> None:
        kinds = [record["kind"] for record in records]
        if "outage" in kinds:
            raise ConnectionError("down")
        self.applied.append((self.careful, kinds))


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[IO[str]]:
    """A spool as a driver holds it open."""
    with (tmp_path / "a.jsonl").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        write(file, "study")
        yield file


def write(file: IO[str], *kinds: str) -> None:
    file.write("".join(json.dumps({"kind": kind, "name": "small", "unix_ms": 1}) + "\n" for kind in kinds))
    file.flush()


def test_what_was_shipped_is_not_shipped_again(tmp_path: Path, spool: IO[str]) -> None:
    write(spool, "one")
    mirror: Any = Recorder()
    assert ship(tmp_path, mirror)
    assert not ship(tmp_path, mirror)
    write(spool, "two")
    ship(tmp_path, mirror)
    assert mirror.applied == [(False, ["study", "one"]), (False, ["two"])]
    assert unshipped_bytes(tmp_path) == 0


def test_a_line_that_is_being_written_waits_and_one_that_never_will_be_does_not(tmp_path: Path, spool: IO[str]) -> None:
    spool.write('{"kind": "ha')
    spool.flush()
    mirror: Any = Recorder()
    ship(tmp_path, mirror)
    assert mirror.applied == [(False, ["study"])]
    assert unshipped_bytes(tmp_path) == len('{"kind": "ha')
    spool.close()
    ship(tmp_path, mirror)
    assert list(tmp_path.iterdir()) == []


def test_a_batch_that_may_have_arrived_is_sent_again_with_care(tmp_path: Path, spool: IO[str]) -> None:
    mirror: Any = Recorder()
    ship(tmp_path, mirror)
    write(spool, "outage")
    with pytest.raises(ConnectionError):
        ship(tmp_path, mirror)
    path = tmp_path / "a.jsonl"
    path.write_text(path.read_text().replace("outage", "repair"))
    ship(tmp_path, mirror)
    assert mirror.applied[-1] == (True, ["repair"])
    assert Position.read(path).done == path.stat().st_size


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_mlflow_has_every_point_once_even_if_a_batch_is_sent_twice(tmp_path: Path) -> None:
    artifacts = tmp_path / "artifacts"
    checkpoint = tmp_path / "step-4"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    database = tmp_path / "mlflow.db"
    spool = Spool(tmp_path / "spool", "driver", f"sqlite:///{database}", artifacts)
    spool.put("study", name="small")
    spool.put("phase", phase="search", file_text="name: small", study_json="{}")
    spool.put(
        "trial",
        phase="search",
        number=0,
        name="0 model",
        params={"rule": "delta"},
        tags={"a": "b"},
        trial_json="{}",
    )
    for step in range(1, 5):
        spool.put("metrics", phase="search", number=0, step=step, metrics={"loss": 1.0 / step})
    spool.put("front", phase="search", step=1, hypervolume=2.5, ranks={0: 0})
    spool.put(
        "trial_end",
        phase="search",
        number=0,
        state="complete",
        step=4,
        metrics={"accuracy": 0.5},
        tags={},
        artifacts=[str(checkpoint)],
    )
    spool.put("phase_end", phase="search", artifacts=[])
    spool.flush()
    path = tmp_path / "spool" / "driver.jsonl"
    everything = path.read_bytes()
    assert spool.close(60) == 0
    assert not path.exists()
    path.write_bytes(everything)
    Position(0, len(everything)).write(path)  # as if the writer had died before it could say that all has arrived
    again = Spool(tmp_path / "spool", "another", f"sqlite:///{database}", artifacts)
    assert again.close(60) == 0
    with sqlite3.connect(database) as connection:
        runs = dict(connection.execute("SELECT name, status FROM runs"))
        metrics = dict(connection.execute("SELECT key, count(*) FROM metrics GROUP BY key"))
        tags = dict(connection.execute("SELECT key, value FROM tags"))
        (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
    connection.close()
    assert runs == {"search": "FINISHED", "0 model": "FINISHED"}
    assert metrics == {"loss": 4, "accuracy": 1, "hypervolume": 1, "front_rank": 1}
    assert tags["hqlt.on_front"] == "true"
    assert tags["mlflow.parentRunId"]
    assert mode == "wal"
    assert {path.name for path in artifacts.rglob("*") if path.is_file()} == {
        *("study.yaml", "study.json", "trial.json", "model.safetensors")
    }


def test_no_mlflow_costs_the_driver_nothing_but_the_spool(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "driver", "http://127.0.0.1:9", tmp_path / "artifacts")
    for step in range(100):
        spool.put("metrics", phase="search", number=0, step=step, metrics={"loss": 1.0})
    spool.flush()
    left = spool.close(0.1)
    assert left == (tmp_path / "driver.jsonl").stat().st_size > 0
