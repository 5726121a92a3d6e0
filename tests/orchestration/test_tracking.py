"""The spool, the process that ships it, and what MLflow has in the end."""

import contextlib
import fcntl
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from hqlt_orchestration.commands.invariants import mirror_violations
from hqlt_orchestration.commands.look import status_text
from hqlt_orchestration.commands.studies import Machine, run
from hqlt_orchestration.driving.sampler import Proposer
from hqlt_orchestration.records.attempts import AttemptKey
from hqlt_orchestration.records.leases import Leases
from hqlt_orchestration.records.store import Store
from hqlt_orchestration.records.tables import StudyRow
from hqlt_orchestration.tracking import told
from hqlt_orchestration.tracking.mirror import Mirror
from hqlt_orchestration.tracking.spool import Spool, read_position, unshipped_bytes, write_position
from hqlt_orchestration.tracking.writer import catch_up, ship
from hqlt_search_space.study import Study
from hqlt_search_space.trial import TrialResult
from hypothesis import given, settings
from hypothesis import strategies as st


class Recorder:
    """Stands where MLflow's mirror stands; dies on a record that says so."""

    def __init__(self) -> None:
        self.applied: list[list[int]] = []

    def apply(self, records: list[dict[str, Any]]) -> None:
        if any(record["step"] < 0 for record in records):
            raise ConnectionError("down")
        self.applied.append([record["step"] for record in records])


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[IO[str]]:
    """A spool as a driver holds it open."""
    with (tmp_path / "a.jsonl").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        write(file, 0)
        yield file


def write(file: IO[str], *steps: int) -> None:
    file.write("".join(json.dumps({"kind": "metrics", "step": step, "unix_ms": 1}) + "\n" for step in steps))
    file.flush()


def test_what_was_shipped_is_not_shipped_again(tmp_path: Path, spool: IO[str]) -> None:
    write(spool, 1)
    mirror: Any = Recorder()
    assert ship(tmp_path, mirror)
    assert not ship(tmp_path, mirror)
    write(spool, 2)
    ship(tmp_path, mirror)
    assert mirror.applied == [[0, 1], [2]]
    assert unshipped_bytes(tmp_path) == 0


def test_a_line_that_is_being_written_waits_and_one_that_never_will_be_does_not(tmp_path: Path, spool: IO[str]) -> None:
    spool.write('{"kind": "ha')
    spool.flush()
    mirror: Any = Recorder()
    ship(tmp_path, mirror)
    assert mirror.applied == [[0]]
    assert unshipped_bytes(tmp_path) == len('{"kind": "ha')
    spool.close()
    ship(tmp_path, mirror)
    assert list(tmp_path.iterdir()) == []


def test_what_an_outage_kept_from_arriving_is_sent_again(tmp_path: Path, spool: IO[str]) -> None:
    mirror: Any = Recorder()
    ship(tmp_path, mirror)
    write(spool, -1)
    with pytest.raises(ConnectionError):
        ship(tmp_path, mirror)
    path = tmp_path / "a.jsonl"
    path.write_text(path.read_text().replace("-1", " 1"))
    ship(tmp_path, mirror)
    assert mirror.applied == [[0], [1]]
    assert read_position(path) == path.stat().st_size


def test_lines_that_are_no_records_cost_only_themselves(tmp_path: Path, spool: IO[str]) -> None:
    spool.write('\x00\x00\n[1]\n{"kind": "__init__", "step": 1}\n{"kind": "of a later version"}\n"text"\n\n')
    write(spool, 1)
    mirror: Any = Recorder()
    ship(tmp_path, mirror)
    assert mirror.applied == [[0, 1]]


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 400), min_size=1, max_size=8), room=st.integers(0, 2000))
def test_a_full_disk_tears_no_record_and_loses_none_that_fits_afterwards(
    sizes: list[int], room: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The file takes `room` bytes, then nothing for a while: the kernel says so in the middle of a record."""
    file = _Small(tmp_path_factory.mktemp("spool") / "a.jsonl", room)
    spool = Spool.__new__(Spool)
    spool._file, spool._late, spool.broken, spool._next_look = file, bytearray(), False, float("inf")
    for step, size in enumerate(sizes):
        spool.put({"kind": "metrics", "step": step, "text": "x" * size})
    file.room = 10**6
    spool.put({"kind": "metrics", "step": len(sizes)})
    lines = file.path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(len(sizes) + 1))


class _Small:
    def __init__(self, path: Path, room: int) -> None:
        self.path, self.room = path, room

    def write(self, content: bytearray) -> int:
        n = min(len(content), self.room)
        if n == 0:
            raise OSError(28, "No space left on device")
        with self.path.open("ab") as file:
            file.write(content[:n])
        self.room -= n
        return n


def trial(number: int, **extra: Any) -> told.Record:
    record = {"kind": "trial", "phase": "search", "number": number, "name": f"{number} model", "trial_json": "{}"}
    return record | {"params": {"rule": "delta"}, "tags": {"a": "b"}} | extra


def point(step: int, number: int = 0, value: float | None = None) -> told.Record:
    metrics = {"loss": 1.0 / step if value is None else value}
    return {"kind": "metrics", "phase": "search", "number": number, "step": step, "metrics": metrics}


def end(number: int, artifacts: list[str] | None = None) -> told.Record:
    record = {"kind": "trial_end", "phase": "search", "number": number, "state": "complete", "step": 4}
    return record | {"metrics": {"accuracy": 0.5}, "tags": {}, "artifacts": artifacts or []}


def test_mlflow_has_every_point_once_even_if_all_is_sent_twice_or_its_database_is_lost(tmp_path: Path) -> None:
    store = Store(tmp_path)
    checkpoint = tmp_path / "step-4"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    spool = Spool(store, "small")
    spool.put({"kind": "phase", "phase": "search", "file_text": "name: small", "study_json": "{}"})
    spool.put(trial(0))
    for step in range(1, 5):
        spool.put(point(step))
    spool.put(trial(0))  # its worker died and it repeats steps
    for step, value in ((3, None), (4, 7.0), (5, float("inf")), (6, float("nan"))):
        spool.put(point(step, value=value))
    spool.put({"kind": "front", "phase": "search", "step": 1, "hypervolume": 2.5, "ranks": {0: 0}})
    spool.put(end(0, [str(checkpoint)]))
    spool.put(told.phase_ends("search"))
    (path,) = store.spool_folder("small").glob("*.jsonl")
    everything = path.read_bytes()
    assert spool.close(60) == 0
    assert not path.exists()
    assert_all_is_there_once(store)
    path.write_bytes(everything)  # as if the writer had died before it could say that all has arrived
    assert Spool(store, "small").close(60) == 0
    assert_all_is_there_once(store)
    path.write_bytes(everything)
    write_position(path, len(everything))
    for file in tmp_path.glob("mlflow.db*"):
        file.unlink()
    assert Spool(store, "small").close(60) == 0
    assert_all_is_there_once(store)


def assert_all_is_there_once(store: Store) -> None:
    with sqlite3.connect(store.data / "mlflow.db") as connection:
        runs = connection.execute("SELECT name, status FROM runs ORDER BY name").fetchall()
        metrics = dict(connection.execute("SELECT key, count(*) FROM metrics GROUP BY key"))
        tags = dict(connection.execute("SELECT key, value FROM tags"))
        (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
    connection.close()
    assert runs == [("0 model", "FINISHED"), ("search", "FINISHED")]
    assert metrics == {"loss": 7, "accuracy": 1, "hypervolume": 1, "front_rank": 1}  # step 4 was measured anew
    assert tags["hqlt.on_front"] == "true"
    assert tags["mlflow.parentRunId"]
    assert mode == "wal"
    assert {path.name for path in store.artifacts.rglob("*") if path.is_file()} == {
        *("study.yaml", "study.json", "trial.json", "model.safetensors")
    }


@pytest.fixture(scope="module")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An empty MLflow, which takes seconds to make."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


TELLINGS = st.lists(
    st.tuples(
        st.sampled_from(["on", "a new mirror", "another attempt", "the end"]),
        st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0.5, 2.0, float("inf"), float("nan")])), max_size=6),
    ),
    max_size=5,
)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's own
@settings(max_examples=15, deadline=None)
@given(tellings=TELLINGS)
def test_whatever_is_told_again_and_whenever_mlflow_has_each_point_once(
    mlflow_uri: str, tellings: list[tuple[str, list[tuple[int, float]]]]
) -> None:
    study, folder = f"study-{time.time_ns()}", Path(mlflow_uri.removeprefix("sqlite:///")).parent
    mirror = Mirror(mlflow_uri, folder, study)
    mirror.apply([trial(0) | {"unix_ms": 0}])
    for unix_ms, (what, points) in enumerate(tellings):  # or MLflow would drop a second one itself
        if what == "a new mirror":
            mirror = Mirror(mlflow_uri, folder, study)
        before = {"another attempt": [trial(0)], "the end": [end(0)]}.get(what, [])
        told_now = before + [point(step, value=value) for step, value in points]
        mirror.apply({**record, "unix_ms": unix_ms} for record in told_now)
    largest = 1.7976931348623157e308  # what MLflow makes of infinity; NaN stays
    with sqlite3.connect(mlflow_uri.removeprefix("sqlite:///")) as database:
        found = database.execute(
            "SELECT step, CASE WHEN is_nan THEN 'nan' ELSE value END FROM metrics JOIN runs USING (run_uuid)"
            " JOIN experiments USING (experiment_id) WHERE key = 'loss' AND experiments.name = ?",
            (study,),
        ).fetchall()
    database.close()
    expected = {(step, str(min(value, largest))) for _, points in tellings for step, value in points}
    assert sorted((step, str(value)) for step, value in found) == sorted(expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's own
def test_a_curve_is_not_read_for_what_comes_after_its_end(mlflow_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(mlflow_uri.removeprefix("sqlite:///")).parent
    Mirror(mlflow_uri, folder, "long").apply([point(step) | {"unix_ms": 0} for step in range(1, 10)])
    again = Mirror(mlflow_uri, folder, "long")
    read: list[str] = []
    monkeypatch.setattr(again._client, "get_metric_history", lambda _run, key: read.append(key) or [])
    again.apply([point(step) | {"unix_ms": 0} for step in range(10, 20)])
    assert read == []
    again.apply([point(19, value=7.0) | {"unix_ms": 0}, point(9) | {"unix_ms": 0}])
    assert read == ["loss"]


def test_a_record_that_mlflow_refuses_holds_up_no_other(tmp_path: Path) -> None:
    store = Store(tmp_path)
    spool = Spool(store, "small")
    spool.put(trial(0))
    spool.put(point(1) | {"metrics": {"a\nname": 1.0}})
    spool.put(trial(0, params={"rule": "additive"}))  # parameters cannot change
    spool.put(point(2))
    assert spool.close(60) == 0
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        assert connection.execute("SELECT key, step FROM metrics").fetchall() == [("loss", 2)]
    connection.close()
    assert (store.spool_folder("small") / "writer.log").read_text().count("MLflow refuses this record") == 2


def test_no_mlflow_costs_the_driver_nothing_but_the_spool(tmp_path: Path) -> None:
    store = Store(tmp_path, mlflow="http://anna:secret@127.0.0.1:9")
    spool = Spool(store, "small")
    for step in range(1, 101):
        spool.put(point(step))
    left = spool.close(30)
    (path,) = store.spool_folder("small").glob("*.jsonl")
    assert left == path.stat().st_size > 0
    log = (store.spool_folder("small") / "writer.log").read_text()
    assert "could not ship to MLflow" in log
    assert "secret" not in log


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_mlflow_lost_is_told_again_from_the_ledger(
    tmp_path: Path, make_training: Callable[..., Study], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "small.json"
    file.write_text(make_training(trials=2, replication={"seeds": [7, 8]}).model_dump_json())
    store = Store(tmp_path / "data")
    assert run(file, store, Machine("inline")) == 0
    was = told_by_mlflow(store)
    assert len(was["runs"]) >= 5  # two phases, two trials, and one of them replicated
    for database in tmp_path.glob("data/mlflow.db*"):
        database.unlink()
    catch_up(store, "small")
    assert told_by_mlflow(store) == was
    catch_up(store, "small")
    assert told_by_mlflow(store) == was
    assert mirror_violations(store, "small") == []


def told_by_mlflow(store: Store) -> dict[str, list[Any]]:
    """What MLflow shows of runs, parameters, points and ends; times apart."""
    queries = {
        "runs": "SELECT name, status FROM runs ORDER BY 1",
        "params": "SELECT name, key, value FROM params JOIN runs USING (run_uuid) ORDER BY 1, 2",
        "metrics": "SELECT name, key, step, value FROM metrics JOIN runs USING (run_uuid)"
        " WHERE key NOT IN ('front_rank', 'hypervolume') ORDER BY 1, 2, 3",
        "states": "SELECT name, key, value FROM tags JOIN runs USING (run_uuid)"
        " WHERE key IN ('hqlt.state', 'hqlt.trial_id', 'hqlt.on_front') ORDER BY 1, 2",
    }
    with sqlite3.connect(store.data / "mlflow.db") as connection:
        found = {name: connection.execute(query).fetchall() for name, query in queries.items()}
    connection.close()
    return found


WAYS_TO_FAIL = {
    "diverged": "diverged: 11 steps in a row were not finite, the last at step 17",
    "out_of_memory": "out of memory at step 0, with 1 row at a time too",
    "bad_data": "corpus.txt is not UTF-8 at byte 3",
    "error": "Traceback (most recent call last):\nValueError: a mistake of ours",
    "hung": "hung: no step for 121 s, after step 40 (allowed 120 s); its process was ended",
    "crashed": "its worker process died (killed or faulted)",
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's own
def test_every_way_to_fail_has_its_reason_in_the_ledger_in_status_and_in_mlflow(
    tmp_path: Path, mlflow_uri: str, make_study: Callable[..., Study], make_outcome: Callable[..., TrialResult]
) -> None:
    study = make_study(trials=len(WAYS_TO_FAIL), sampler="random")
    store = Store(tmp_path, mlflow=mlflow_uri)
    ledger = store.open()
    ledger.add_study(StudyRow.of(study))
    proposer, leases = Proposer(study, ledger), Leases(ledger, "small", "ray")
    for reason, sentence in WAYS_TO_FAIL.items():
        proposal = proposer.propose(set(ledger.config_ids("small")))
        key = leases.claim(proposal.new_trial((0,)))
        assert isinstance(key, AttemptKey)
        if reason in ("hung", "crashed"):  # the second time it is quarantined
            assert leases.release(key, reason, "the first time") == "waiting"
            again = leases.take_next("search")
            assert again is not None
            assert leases.release(again, reason, sentence) == "quarantined"
        else:
            outcome = make_outcome(proposal.config, status="failed")
            failed = outcome.replicas[0].model_copy(update={"reason": reason, "message": sentence})
            assert leases.commit(key, outcome.model_copy(update={"replicas": (failed,)})) == "failed"
    leases.leave()
    results = [replica.result for replica in ledger.replicas("small")]
    kept = {result.reason: result.message for result in results if result is not None}
    kept |= {one.state: one.message for one in ledger.attempts("small") if one.state in ("hung", "crashed")}
    assert kept == WAYS_TO_FAIL
    shown = status_text(ledger, "small", as_json=False).splitlines()
    for number, sentence in enumerate(WAYS_TO_FAIL.values()):
        state = "failed" if number < 4 else "quarantined"
        assert f"trial {number} {state}: {sentence.splitlines()[-1]}" in shown
    ledger.close()
    catch_up(store, "small")
    with sqlite3.connect(mlflow_uri.removeprefix("sqlite:///")) as database:
        tags = "SELECT run_uuid, value FROM tags WHERE key = "
        told_by_mlflow = database.execute(
            f"SELECT a.value, b.value FROM ({tags}'error.type') a JOIN ({tags}'error.message') b USING (run_uuid)"
        ).fetchall()
        ends = database.execute(
            "SELECT DISTINCT status FROM runs JOIN experiments USING (experiment_id)"
            " WHERE experiments.name = 'small' AND runs.name <> 'search'"
        ).fetchall()
    database.close()
    assert dict(told_by_mlflow) == WAYS_TO_FAIL
    assert len(told_by_mlflow) == len(WAYS_TO_FAIL)
    assert ends == [("FAILED",)]


class Server:
    """A real `mlflow server` on loopback, that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
                *("--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}"),
                *("--artifacts-destination", str(self.folder / "server-artifacts")),
            ],
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def wait(self) -> None:
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=1):
                return
            time.sleep(0.1)
        raise AssertionError("the server does not start")

    def signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self._process.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.kill()


def test_no_point_is_lost_or_doubled_while_a_server_hangs_fails_and_dies(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    store = Store(tmp_path, mlflow=server.url)
    spool = Spool(store, "small")  # before the server is up
    steps = iter(range(1, 10**6))
    spool.put(trial(0))
    put: list[int] = []

    def goes_on(seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            put.append(next(steps))
            spool.put(point(put[-1]))
            time.sleep(0.01)

    def catches_up() -> None:
        until = time.monotonic() + 60
        while unshipped_bytes(store.spool_folder("small")) > 2000:
            assert time.monotonic() < until, (store.spool_folder("small") / "writer.log").read_text()
            goes_on(0.1)

    server.wait()
    catches_up()
    server.signal(signal.SIGSTOP)  # accepts connections, and never answers
    goes_on(5)
    server.signal(signal.SIGCONT)
    catches_up()
    with sqlite3.connect(tmp_path / "server.db", timeout=30) as database:
        database.execute("ALTER TABLE metrics RENAME TO hidden")  # answers 500
        database.commit()
        goes_on(3)
        database.execute("ALTER TABLE hidden RENAME TO metrics")
        database.commit()
    database.close()
    catches_up()
    os.kill(spool._writer.pid, signal.SIGKILL)
    server.kill()
    goes_on(6)
    server.start()
    server.wait()
    catches_up()
    spool.put(end(0))
    assert spool.close(60) == 0
    with sqlite3.connect(tmp_path / "server.db") as database:
        found = database.execute("SELECT step, count(*) FROM metrics WHERE key = 'loss' GROUP BY step").fetchall()
        runs = database.execute("SELECT name, status FROM runs ORDER BY name").fetchall()
    database.close()
    assert found == [(step, 1) for step in put]
    assert runs == [("0 model", "FINISHED"), ("search", "RUNNING")]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of MLflow's own queries
def test_a_process_killed_while_mlflow_makes_its_tables_leaves_no_half_database(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    make = f"""
from pathlib import Path
from hqlt_orchestration.tracking.mirror import Mirror
Mirror("sqlite:///{database}", Path("artifacts"), "study")
"""
    maker = subprocess.Popen([sys.executable, "-c", make], stderr=subprocess.DEVNULL)
    while not any(path.stat().st_size for path in tmp_path.rglob("mlflow.db")):
        assert maker.poll() is None
        time.sleep(0.005)
    maker.kill()
    maker.wait()
    assert not database.exists()
    assert Mirror(f"sqlite:///{database}", tmp_path, "study").is_new
    with contextlib.closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
