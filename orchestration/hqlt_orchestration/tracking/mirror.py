"""What MLflow is told of a study, and how: records become experiments, runs, metrics and artifacts.

All of it can be told twice: a run is found by its phase and trial number, and a point of a curve (metric, step, value)
is sent only if MLflow does not have it. So nothing has to be remembered about what has arrived.

One experiment per study, a parent run per phase, a child run per trial; MLflow's pages show one level of nesting.
"""

import contextlib
import logging
import math
import os
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hqlt_search_space.errors import StoreError

from hqlt_orchestration.tracking.told import Ended, Record

BATCH_ALL = 1000  # MLflow's own limits for one request
BATCH_PARAMS = BATCH_TAGS = 100
PARAM_CHARACTERS = 6000
RunKey = tuple[str, int | None]
"""(phase, trial number); None is the phase's parent run."""

Point = tuple[int, float | None]


@dataclass
class _Pending:
    """What one run has to be told, until the end of the batch."""

    metrics: list[Any] = field(default_factory=list)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


class Mirror:
    """One study in MLflow. Telling it something again is harmless."""

    def __init__(self, uri: str, artifacts: Path, study: str) -> None:
        """Find what MLflow has of `study`; `is_new` says that it had nothing."""
        from mlflow import MlflowClient

        local = uri.startswith("sqlite:")
        if local:  # before a client is made, which would make MLflow's tables in place
            _make_database(Path(uri.removeprefix("sqlite:///")), artifacts)
        self._client = MlflowClient(tracking_uri=uri)
        self._study = study
        found = self._client.get_experiment_by_name(study)
        self.is_new = found is None
        if found is None:
            where = str(artifacts.resolve() / study) if local else None
            self._experiment = self._client.create_experiment(study, where, tags={"hqlt.study": study})
        else:
            where = found.artifact_location
            self._experiment = found.experiment_id
            if found.lifecycle_stage == "deleted":
                self._client.restore_experiment(self._experiment)
        # Of the experiment's artifacts, if it is on this machine. What a database says is no reason to write elsewhere.
        self._folder = Path(where).resolve() if where is not None and where.startswith("/") else None
        self._keeps = not local or where == str(artifacts.resolve() / study)
        if not self._keeps:
            logging.warning("MLflow keeps the artifacts of %s in %s, not with the data: none are added", study, where)
        self._runs: dict[RunKey, str] = {}
        self._states: dict[RunKey, str] = {}  # as MLflow has them
        self._pending: dict[str, _Pending] = {}
        # Of a run, by metric: the points that we know of, and the last step of those that we have not looked at.
        self._points: dict[str, dict[str, set[Point]]] = {}
        self._last: dict[str, dict[str, int]] = {}
        for run in self._all_runs():
            tags = run.data.tags
            if "hqlt.phase" not in tags:
                continue
            number = tags.get("hqlt.trial")
            key = (tags["hqlt.phase"], int(number) if number is not None else None)
            self._runs.setdefault(key, run.info.run_id)
            self._last[run.info.run_id] = _last_steps(run)
            finished = "complete" if run.info.status == "FINISHED" else "running"
            self._states.setdefault(key, finished if number is None else tags.get("hqlt.state", "running"))

    def _all_runs(self) -> Iterator[Any]:
        token: str | None = None
        while True:
            page = self._client.search_runs([self._experiment], max_results=10_000, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def apply(self, records: Iterable[Record]) -> None:
        """Ship `records`, in order."""
        for record in records:
            getattr(self, "_on_" + record["kind"])(record)
        for run in list(self._pending):
            self._send(run)

    def forget_pending(self) -> None:
        """Give up what a refused record has left behind."""
        self._pending.clear()

    def tell_missing(self, ended: Iterable[Ended]) -> None:
        """Tell of what has ended and is not in MLflow, or not as ended."""
        now = time.time_ns() // 1_000_000
        for each in ended:
            key = (each.phase, each.number)
            state = self._states.get(key)
            if state == each.state or (each.state == "running" and state is not None):
                continue
            try:
                self.apply({"unix_ms": now, **record} for record in each.records)
            except Exception as error:
                if not is_refusal(error):
                    raise
                logging.warning("MLflow refuses what is to be told of %s %s: %s", *key, error)
                self.forget_pending()

    def _on_phase(self, record: Record) -> None:
        run = self._run(record["phase"], None, record, name=record["phase"])
        self._client.update_run(run, status="RUNNING")
        self._states[record["phase"], None] = "running"
        self._keep_text(run, record["file_text"], "study.yaml")
        self._keep_text(run, record["study_json"], "study.json")

    def _on_phase_end(self, record: Record) -> None:
        run = self._run(record["phase"], None, record, name=record["phase"])
        self._send(run)
        self._keep(run, record["artifacts"])
        self._client.set_terminated(run, "FINISHED", record["unix_ms"])
        self._states[record["phase"], None] = "complete"

    def _on_trial(self, record: Record) -> None:
        key = (record["phase"], record["number"])
        again = key in self._runs
        run = self._run(*key, record, name=record["name"], tags=record["tags"])
        if again:  # another attempt, perhaps after one that somebody else has told of
            self._forget_points(run)
            self._client.update_run(run, status="RUNNING")
        pending = self._of(run)
        pending.params |= {name: str(value)[:PARAM_CHARACTERS] for name, value in record["params"].items()}
        if record["trial_json"] is not None:
            self._keep_text(run, record["trial_json"], "trial.json")

    def _on_metrics(self, record: Record) -> None:
        from mlflow.entities import Metric

        run = self._run(record["phase"], record["number"], record)
        self._of(run).metrics += [
            Metric(name, value, record["unix_ms"], record["step"]) for name, value in record["metrics"].items()
        ]

    def _on_trial_end(self, record: Record) -> None:
        self._on_metrics(record)
        key = (record["phase"], record["number"])
        run = self._run(*key, record)
        self._send(run)
        self._keep(run, record["artifacts"])
        self._of(run).tags |= {"hqlt.state": record["state"], **record["tags"]}
        self._send(run)
        status = {"complete": "FINISHED", "stopped": "FINISHED", "paused": "KILLED"}.get(record["state"], "FAILED")
        self._client.set_terminated(run, status, record["unix_ms"])
        self._states[key] = record["state"]
        self._forget_points(run)

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
            own = {"hqlt.study": self._study, "hqlt.phase": phase, **(tags or {})}
            if number is not None:
                own["hqlt.trial"] = str(number)
                own["mlflow.parentRunId"] = self._run(phase, None, record, name=phase)
            run = self._client.create_run(self._experiment, record["unix_ms"], own, name or f"trial {number}")
            self._runs[key] = run.info.run_id
            self._states[key] = "running"
            self._last[run.info.run_id] = {}
        return self._runs[key]

    def _keep(self, run: str, paths: Iterable[str]) -> None:
        """Files and folders as artifacts of a run. On this machine they are linked, so they take no room twice."""
        for path in map(Path, paths):
            if not path.exists() or not self._keeps:
                continue
            if self._folder is None:
                log = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
                log(run, str(path), *([path.name] if path.is_dir() else []))
                continue
            target = _place(self._folder, run, path.name)
            if path.is_dir():
                shutil.copytree(path, target, dirs_exist_ok=True, copy_function=_link)
            else:
                shutil.copyfile(path, target)  # a log or a picture that may be written again

    def _keep_text(self, run: str, text: str, name: str) -> None:
        if self._folder is not None and self._keeps:
            _place(self._folder, run, name).write_text(text, encoding="utf-8")
        elif self._keeps:
            self._client.log_text(run, text, name)

    def _of(self, run: str) -> _Pending:
        return self._pending.setdefault(run, _Pending())

    def _send(self, run: str) -> None:
        from mlflow.entities import Param, RunTag

        pending = self._pending.pop(run, _Pending())
        metrics = self._unknown_of(run, pending.metrics)
        params = [Param(name, value) for name, value in pending.params.items()]
        tags = [RunTag(name, value) for name, value in pending.tags.items()]
        while metrics or params or tags:
            n_metrics = BATCH_ALL - len(params[:BATCH_PARAMS]) - len(tags[:BATCH_TAGS])
            self._client.log_batch(run, metrics[:n_metrics], params[:BATCH_PARAMS], tags[:BATCH_TAGS])
            metrics, params, tags = metrics[n_metrics:], params[BATCH_PARAMS:], tags[BATCH_TAGS:]

    def _unknown_of(self, run: str, metrics: list[Any]) -> list[Any]:
        """Those of `metrics` that MLflow does not have. Its curves are read only where they go as far as these."""
        if metrics and run not in self._last:
            self._last[run] = _last_steps(self._client.get_run(run))
        known = self._points.setdefault(run, {})
        unknown = []
        for metric in metrics:
            points = known.setdefault(metric.key, set())
            if metric.step <= self._last[run].get(metric.key, -1):
                points.update(map(_point, self._client.get_metric_history(run, metric.key)))
                del self._last[run][metric.key]
            if _point(metric) not in points:
                points.add(_point(metric))
                unknown.append(metric)
        return unknown

    def _forget_points(self, run: str) -> None:
        self._points.pop(run, None)
        self._last.pop(run, None)


def _last_steps(run: Any) -> dict[str, int]:
    """Metric -> the last step at which `run` has it, as MLflow keeps it beside the curves."""
    return {metric.key: metric.step for metric in run.to_proto().data.metrics}


def _point(metric: Any) -> Point:
    """What makes two points the same. MLflow stores infinity as the largest float, and NaN is not equal to itself."""
    value = None if math.isnan(metric.value) else max(-sys.float_info.max, min(sys.float_info.max, metric.value))
    return metric.step, value


KINDS = frozenset(name.removeprefix("_on_") for name in vars(Mirror) if name.startswith("_on_"))
"""The records that are understood."""


def knock(uri: str) -> None:
    """Ask something cheap: raises as long as MLflow does not answer as it should."""
    if _is_missing(uri):
        return
    from mlflow import MlflowClient

    MlflowClient(tracking_uri=uri).search_experiments(max_results=1)


def _is_missing(uri: str) -> bool:
    """Whether MLflow's database is a file that is not there; a client of MLflow's would make it, table by table."""
    return uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists()


def is_refusal(error: Exception) -> bool:
    """Whether MLflow is well and will say the same again, whenever it is asked."""
    from mlflow.exceptions import MlflowException

    if not isinstance(error, MlflowException):
        return False
    status: int = error.get_http_status_code()  # type: ignore[no-untyped-call]  # MLflow's own
    return status in (400, 409, 413, 422)


def delete_experiment(uri: str, study: str) -> None:
    """Mark the experiment of a study as deleted, in MLflow's own way: it can be restored there."""
    if _is_missing(uri):
        return
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(study)
    if experiment is not None:
        # A deleted experiment keeps its name, so a new study could not have it.
        client.rename_experiment(experiment.experiment_id, f"{study} (deleted {time.time():.0f})")
        client.delete_experiment(experiment.experiment_id)


def _place(folder: Path, run: str, name: str) -> Path:
    """Where an artifact goes: inside `folder`, whatever ids and links somebody has put there.

    Raises:
        StoreError: that is not possible.
    """
    target = folder / run / "artifacts" / name
    if target.parent.resolve() != target.parent:  # as it would be without links and dots
        raise StoreError(f"{target} leads out of {folder}; hqlt follows no links there")
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.is_dir():
        target.unlink(missing_ok=True)  # it may be a link
    return target


def _link(source: str, target: str) -> None:
    """A hard link, or where the file system has none, a copy. Checkpoints are never written again."""
    Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _make_database(path: Path, artifacts: Path) -> None:
    """See that MLflow's database is there and whole.

    MLflow makes its tables one by one, and refuses for ever a database in which some are missing, as a process that was
    killed meanwhile leaves it. So a new one is made beside its place and takes it at once. MLflow leaves SQLite in its
    slowest journal mode; the mode is a property of the file.
    """
    if not path.exists():
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        with tempfile.TemporaryDirectory(prefix=".mlflow-", suffix=".tmp", dir=path.parent) as folder:
            beside = Path(folder, path.name)
            made = SqlAlchemyStore(f"sqlite:///{beside}", str(artifacts.resolve()))  # type: ignore[no-untyped-call]  # MLflow's own
            made.engine.dispose()
            with contextlib.suppress(FileExistsError):  # the writer of another study was faster
                os.link(beside, path)
    with contextlib.closing(sqlite3.connect(path, timeout=30)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
