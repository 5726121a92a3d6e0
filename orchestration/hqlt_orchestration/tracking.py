"""The MLflow mirror: what happens is written to a spool at once, and one process of its own ships it.

MLflow is a mirror, not the memory. The driver appends lines to `spool/<driver>.jsonl` and never waits; the writer
(`python -m hqlt_orchestration.tracking`) reads them and talks to MLflow in batches, at a low priority. If MLflow is
down, or the machine stops, the lines stay and are shipped by the next writer. MLflow stores a repeated batch twice,
so the position of a spool is written before and after every batch, and a batch that may have arrived is compared with
what MLflow has.

One experiment per study, a parent run per phase, a child run per trial; MLflow's pages show one level of nesting.
"""

import argparse
import contextlib
import fcntl
import json
import logging
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

RETRY_S = 2.0  # between two tries to reach MLflow
IDLE_S = 0.5  # between two looks at the spool: what the pages of a running study lag behind
BATCH_METRICS = 1000  # MLflow's own limits for one request
BATCH_PARAMS = 100
PARAM_CHARACTERS = 6000
NICENESS = 10  # the mirror must not take a processor from a trial
Record = dict[str, Any]


class Spool:
    """The driver's end: appends records and keeps a writer process running.

    A disk that is full costs the mirror some records and the study nothing; `broken` then says so.
    """

    def __init__(self, folder: Path, name: str, uri: str, artifacts: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._file: IO[str] = (folder / f"{name}.jsonl").open("a", encoding="utf-8")
        fcntl.flock(self._file, fcntl.LOCK_SH)  # says that the file is still written to
        self.broken = False
        self._writer = start_writer(folder, uri=uri, artifacts=artifacts)

    def put(self, kind: str, **values: Any) -> None:
        """Append a record, stamped with the time."""
        record = {"kind": kind, "unix_ms": time.time_ns() // 1_000_000, **values}
        with self._noting_failure():
            self._file.write(json.dumps(record) + "\n")

    def flush(self) -> None:
        """Let the writer see what was put. Survives the end of this process, not a power cut: the ledger does."""
        with self._noting_failure():
            self._file.flush()

    def close(self, timeout_s: float) -> int:
        """Wait for the writer to ship what is left. Returns the bytes that are still to be shipped."""
        with self._noting_failure():
            self._file.close()
        assert self._writer.stdin is not None
        self._writer.stdin.close()  # what tells the writer that nothing more will come
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._writer.wait(timeout_s)
        if self._writer.poll() is None:
            self._writer.terminate()
            self._writer.wait()
        return unshipped_bytes(self._folder)

    @contextlib.contextmanager
    def _noting_failure(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self.broken = True


def start_writer(folder: Path, *, uri: str, artifacts: Path) -> "subprocess.Popen[bytes]":
    """Start the process that ships the spools in `folder`. It ends when its input is closed and all is sent."""
    with (folder / "writer.log").open("ab") as log:
        return subprocess.Popen(  # noqa: S603  our own interpreter and module
            [sys.executable, "-m", __name__, str(folder), "--uri", uri, "--artifacts", str(artifacts)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for the driver; the writer goes when the driver has gone
        )


def delete_experiment(uri: str, study: str) -> None:
    """Mark the experiment of a study as deleted, in MLflow's own way: it can be restored there."""
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(study)
    if experiment is not None:
        # A deleted experiment keeps its name, so a new study could not have it.
        client.rename_experiment(experiment.experiment_id, f"{study} (deleted {time.time():.0f})")
        client.delete_experiment(experiment.experiment_id)


def unshipped_bytes(folder: Path) -> int:
    return sum(path.stat().st_size - Position.read(path).done for path in folder.glob("*.jsonl"))


@dataclass(frozen=True)
class Position:
    """How much of a spool MLflow has: `done` bytes surely; those up to `sending` perhaps."""

    done: int = 0
    sending: int = 0

    @staticmethod
    def read(spool: Path) -> "Position":
        with contextlib.suppress(FileNotFoundError):
            return Position(**json.loads(_position_file(spool).read_text()))
        return Position()

    def write(self, spool: Path) -> None:
        beside = _position_file(spool).with_suffix(".tmp")
        beside.write_text(json.dumps(self.__dict__))
        beside.replace(_position_file(spool))


def _position_file(spool: Path) -> Path:
    return spool.with_suffix(".position")


@dataclass
class _Pending:
    """What one run has to be told, until the end of the batch."""

    metrics: list[Any] = field(default_factory=list)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


RunKey = tuple[str, int | None]
"""(phase, trial number); None is the phase's parent run."""


class Mirror:
    """The writer's end: turns records into MLflow's experiments and runs. Applying a record twice is harmless, except
    for metrics, which are compared with what MLflow has if `careful`."""

    def __init__(self, uri: str, artifacts: Path) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)
        self._artifacts = artifacts.resolve() if uri.startswith("sqlite:") else None
        if self._artifacts is not None:
            _use_wal(uri)
        self._experiment = ""
        self._folder: Path | None = None  # of the experiment's artifacts, if it is on this machine
        self.study = ""
        self._runs: dict[RunKey, str] = {}
        self._pending: dict[str, _Pending] = {}
        self.careful = False

    def apply(self, records: Iterable[Record]) -> None:
        """Ship `records`, in order."""
        for record in records:
            getattr(self, "_on_" + record["kind"])(record)
        for run in list(self._pending):
            self._send(run)

    def _on_study(self, record: Record) -> None:
        self.study = record["name"]
        found = self._client.get_experiment_by_name(self.study)
        if found is None:
            where = str(self._artifacts / self.study) if self._artifacts is not None else None
            self._experiment = self._client.create_experiment(self.study, where, tags={"hqlt.study": self.study})
        else:
            where = found.artifact_location
            self._experiment = found.experiment_id
            if found.lifecycle_stage == "deleted":
                self._client.restore_experiment(self._experiment)
        self._folder = Path(where) if where is not None and where.startswith("/") else None
        self._runs = {}
        token: str | None = None
        while True:
            page = self._client.search_runs([self._experiment], max_results=10_000, page_token=token)
            for run in page:
                tags = run.data.tags
                number = tags.get("hqlt.trial")
                if "hqlt.phase" in tags:
                    key = (tags["hqlt.phase"], int(number) if number is not None else None)
                    self._runs.setdefault(key, run.info.run_id)
            token = page.token
            if not token:
                return

    def _on_phase(self, record: Record) -> None:
        run = self._run(record["phase"], None, record, name=record["phase"])
        self._client.update_run(run, status="RUNNING")
        self._keep_text(run, record["file_text"], "study.yaml")
        self._keep_text(run, record["study_json"], "study.json")

    def _on_phase_end(self, record: Record) -> None:
        run = self._run(record["phase"], None, record, name=record["phase"])
        self._send(run)
        self._keep(run, record["artifacts"])
        self._client.set_terminated(run, "FINISHED", record["unix_ms"])

    def _on_trial(self, record: Record) -> None:
        run = self._run(record["phase"], record["number"], record, name=record["name"], tags=record["tags"])
        pending = self._of(run)
        pending.params |= {name: str(value)[:PARAM_CHARACTERS] for name, value in record["params"].items()}
        self._keep_text(run, record["trial_json"], "trial.json")

    def _on_metrics(self, record: Record) -> None:
        from mlflow.entities import Metric

        run = self._run(record["phase"], record["number"], record)
        self._of(run).metrics += [
            Metric(name, value, record["unix_ms"], record["step"]) for name, value in record["metrics"].items()
        ]

    def _on_trial_end(self, record: Record) -> None:
        self._on_metrics(record)
        run = self._run(record["phase"], record["number"], record)
        self._of(run).tags |= {"hqlt.state": record["state"], **record["tags"]}
        self._send(run)
        self._keep(run, record["artifacts"])
        status = {"complete": "FINISHED", "stopped": "FINISHED", "paused": "KILLED"}.get(record["state"], "FAILED")
        self._client.set_terminated(run, status, record["unix_ms"])

    def _on_front(self, record: Record) -> None:
        from mlflow.entities import Metric

        parent = self._run(record["phase"], None, record, name=record["phase"])
        volume = Metric("hypervolume", record["hypervolume"], record["unix_ms"], record["step"])
        self._of(parent).metrics.append(volume)
        for number, rank in record["ranks"].items():
            run = self._runs.get((record["phase"], int(number)))
            if run is not None:
                pending = self._of(run)
                pending.metrics.append(Metric("front_rank", rank, record["unix_ms"], record["step"]))
                pending.tags["hqlt.on_front"] = str(rank == 0).lower()

    def _run(
        self,
        phase: str,
        number: int | None,
        record: Record,
        name: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> str:
        """The id of a run, which is made if MLflow has none for this phase and trial."""
        key = (phase, number)
        if key not in self._runs:
            # Every run carries the study's tags: MLflow's filters drop children that lack what they filter by.
            own = {"hqlt.study": self.study, "hqlt.phase": phase, **(tags or {})}
            if number is not None:
                own["hqlt.trial"] = str(number)
                own["mlflow.parentRunId"] = self._run(phase, None, record, name=phase)
            run = self._client.create_run(self._experiment, record["unix_ms"], own, name or f"trial {number}")
            self._runs[key] = run.info.run_id
        return self._runs[key]

    def _keep(self, run: str, paths: Iterable[str]) -> None:
        """Files and folders as artifacts of a run. On this machine they are linked, so they take no room twice."""
        for path in map(Path, paths):
            if not path.exists():
                continue
            if self._folder is None:
                log = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
                log(run, str(path), *([path.name] if path.is_dir() else []))
                continue
            target = self._folder / run / "artifacts" / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, target, dirs_exist_ok=True, copy_function=_link)
            else:
                shutil.copyfile(path, target)  # a log or a picture that may be written again

    def _keep_text(self, run: str, text: str, name: str) -> None:
        if self._folder is None:
            self._client.log_text(run, text, name)
            return
        target = self._folder / run / "artifacts" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")

    def _of(self, run: str) -> _Pending:
        return self._pending.setdefault(run, _Pending())

    def _send(self, run: str) -> None:
        from mlflow.entities import Param, RunTag

        pending = self._pending.pop(run, _Pending())
        metrics = self._unknown_of(run, pending.metrics) if self.careful else pending.metrics
        params = [Param(name, value) for name, value in pending.params.items()]
        tags = [RunTag(name, value) for name, value in pending.tags.items()]
        while metrics or params or tags:
            self._client.log_batch(run, metrics[: BATCH_METRICS - 200], params[:BATCH_PARAMS], tags[:100])
            metrics, params, tags = metrics[BATCH_METRICS - 200 :], params[BATCH_PARAMS:], tags[100:]

    def _unknown_of(self, run: str, metrics: list[Any]) -> list[Any]:
        """Those of `metrics` that MLflow does not have."""
        known = {
            (name, point.step, point.timestamp)
            for name in {metric.key for metric in metrics}
            for point in self._client.get_metric_history(run, name)
        }
        return [metric for metric in metrics if (metric.key, metric.step, metric.timestamp) not in known]


def ship(folder: Path, mirror: Mirror) -> bool:
    """Ship what the spools in `folder` hold. Returns whether there was anything.

    A spool that nobody writes any more is removed when all of it has been shipped.
    """
    any_sent = False
    for spool in sorted(folder.glob("*.jsonl"), key=lambda path: path.stat().st_mtime):
        is_final = not _is_written(spool)
        for start, end, records in _batches(spool):
            position = Position.read(spool)
            mirror.careful = position.sending > start
            if start > 0:
                _introduce(spool, mirror)
            Position(start, end).write(spool)
            mirror.apply(records)
            Position(end, end).write(spool)
            any_sent = True
        if is_final:  # a last line without its end was cut off by a crash or a full disk
            spool.unlink()
            _position_file(spool).unlink(missing_ok=True)
    return any_sent


def _is_written(spool: Path) -> bool:
    """Whether the driver that writes `spool` still has it open."""
    with spool.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _introduce(spool: Path, mirror: Mirror) -> None:
    """Tell a mirror that starts in the middle of a spool which study it is about: the spool's first record."""
    with spool.open("rb") as file:
        first = json.loads(file.readline())
    if mirror.study != first["name"]:
        mirror.apply([first])


def _batches(spool: Path, size: int = 500) -> Iterator[tuple[int, int, list[Record]]]:
    """(start, end, records) of what is not shipped, in bytes. A last line without its end is left for later."""
    start = Position.read(spool).done
    with spool.open("rb") as file:
        file.seek(start)
        records: list[Record] = []
        end = start
        for line in file:
            if not line.endswith(b"\n"):
                break
            end += len(line)
            records.append(json.loads(line))
            if len(records) == size:
                yield start, end, records
                start, records = end, []
        if records:
            yield start, end, records


def _link(source: str, target: str) -> None:
    """A hard link, or where the file system has none, a copy. Checkpoints are never written again."""
    Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _use_wal(uri: str) -> None:
    """MLflow leaves SQLite in its slowest journal mode; the mode is a property of the file, so it is set once."""
    import sqlite3

    with contextlib.closing(sqlite3.connect(uri.removeprefix("sqlite:///"), timeout=30)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")


def _driver_has_gone() -> bool:
    """Whether standard input, which the driver holds open and never writes to, has been closed."""
    return bool(select.select([sys.stdin], [], [], 0)[0])


def main() -> None:
    """The writer process: ship until the driver has gone and nothing is left, or MLflow cannot be reached any more."""
    parser = argparse.ArgumentParser(description="Ship the spools of a study to MLflow.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--uri", required=True)
    parser.add_argument("--artifacts", type=Path, required=True)
    arguments = parser.parse_args()
    os.nice(NICENESS)
    # An outage is waited for here, where nobody stands still for it; MLflow's own retries would hide it for minutes.
    os.environ |= {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    with (arguments.folder / ".writer.lock").open("w") as lock:
        while True:  # one writer per study: two would each make a run for the same trial
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if _driver_has_gone():
                    return  # the writer of another driver ships our spool too
                time.sleep(IDLE_S)
        _serve(arguments.folder, arguments.uri, arguments.artifacts)


def _serve(folder: Path, uri: str, artifacts: Path) -> None:
    mirror: Mirror | None = None
    while True:
        last_round = _driver_has_gone()
        try:
            if mirror is None:
                mirror = Mirror(uri, artifacts)
            sent = ship(folder, mirror)
        except Exception:  # MLflow raises its own, SQLAlchemy's and requests' errors for an outage
            logging.exception("could not ship to %s", uri)
            mirror = None
            if last_round:
                raise SystemExit(1) from None
            time.sleep(RETRY_S)
            continue
        if last_round and not sent:
            return
        if not sent:
            time.sleep(IDLE_S)


if __name__ == "__main__":
    main()
