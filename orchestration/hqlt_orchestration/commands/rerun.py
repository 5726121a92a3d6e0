"""Run a stored trial again, and compare to the bit; or run a variation of it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
from hqlt_dashboards.words import describe
from hqlt_search_space.axes import RECIPE_AXES, AxisValue, check_value
from hqlt_search_space.errors import HqltError, InvalidArchError, NoResultError, TrialFailedError
from hqlt_search_space.recipe import Recipe
from hqlt_search_space.study import Study
from hqlt_search_space.trial import Config, Environment, ReplicaResult, Trial, TrialResult

from hqlt_orchestration.records.store import Store
from hqlt_orchestration.records.tables import ReplicaRow, TrialRow

DRAIN_S = 60.0
SHOWN_DIFFERENCES = 12
_DECIDES_BITS = ("python", "torch", "hqlt", "source_version", "cpu", "instruction_set", "n_threads", "device")


@dataclass(frozen=True)
class Rerun:
    """A replica as it was stored and as it came out now."""

    trial_id: str
    changes: dict[str, AxisValue]
    stored: TrialResult
    measured: TrialResult
    differences: tuple[str, ...]

    @property
    def identical(self) -> bool:
        return not self.changes and not self.differences


def rerun(
    name: str, store: Store, *, seed: int | None, steps: int | None, settings: Sequence[str], as_json: bool
) -> int:
    """Run the trial `name` again in a process and folder of its own. Returns the exit code.

    Without changes, what comes out must be what is stored: status, metrics, curve and weights, to the bit. With them
    it is a variation, recorded as such, that nothing is compared with.

    Raises:
        UnknownNameError: there is no such trial or axis.
        NoResultError: the trial has no result to compare with.
    """
    ledger = store.open_existing()
    study_name, number = ledger.find_trial(name)
    study = Study.from_json(ledger.study(study_name).study)
    row = ledger.trial(study_name, number)
    stored = _stored(ledger.replicas(study_name, number), seed, f"{study_name}/{number}")
    assert stored.outcome is not None
    changes = _changes(settings, steps)
    config = _varied(study, row, changes)
    if seed is not None and seed != stored.seed:
        changes = {**changes, "seed": seed}
    trial = stored.outcome.trial
    spared = stored.outcome.replicas[0].accumulation
    if spared is not None:  # memory was too small: it trained alone, in smaller parts, and so it does again
        runtime = trial.runtime.model_copy(update={"accumulation": spared})
        trial = trial.model_copy(update={"seeds": (stored.seed,), "runtime": runtime})
    if changes:
        trial = trial.model_copy(update={"config": config, "seeds": (stored.seed if seed is None else seed,)})
    folder = store.data / "reruns" / f"{study_name}-{number}-{time.time_ns() // 1_000_000}"
    print(f"trial {study_name}/{number}, {describe(config.arch)}: running again in {folder}", file=sys.stderr)
    measured = _run(trial, folder, stored.seed if seed is None else seed)
    again = Rerun(row.config.config_id, changes, stored.outcome, measured, differences(stored.outcome, measured))
    ledger.add_rerun(study_name, number, changes, again.identical, measured, str(folder))
    _mirror(store, study_name, number, again, folder)
    if as_json:
        print(json.dumps(_json(again)))
    else:
        _print(again)
    failed = measured.replicas[0].status == "failed" and again.stored.replicas[0].status != "failed"
    return int(failed if changes else not again.identical)


def differences(stored: TrialResult, measured: TrialResult) -> tuple[str, ...]:
    """What differs between two runs of one trial, as sentences; times, memory and folders may.

    A replica that was stopped early ran only so far: its curve up to there is compared.
    """
    was, now = stored.replicas[0], measured.replicas[0]
    if was.status == "stopped":
        after = {point.step: point.metrics for point in now.curve}
        return tuple(
            line
            for point in was.curve
            for line in _unequal(f"step {point.step} ", point.metrics, after.get(point.step, {}))
        )
    found = [
        f"{name}: stored {getattr(was, name)}, measured {getattr(now, name)}"
        for name in ("status", "reason", "step", "skipped_steps", "weights_sha256")
        if getattr(was, name) != getattr(now, name)
    ]
    found += _unequal("", was.metrics, now.metrics)
    for knock_out, again in zip(was.knock_outs, now.knock_outs, strict=False):
        found += _unequal(f"without {knock_out.silenced} ", knock_out.metrics, again.metrics)
    curves = {point.step: point.metrics for point in now.curve}
    for point in was.curve:
        found += _unequal(f"step {point.step} ", point.metrics, curves.get(point.step, {}))
    return tuple(found)


def _unequal(where: str, was: Mapping[str, float], now: Mapping[str, float]) -> list[str]:
    return [
        f"{where}{name}: stored {was.get(name)!r}, measured {now.get(name)!r}"
        for name in dict.fromkeys([*was, *now])
        if was.get(name) != now.get(name) and not name.endswith(("_per_second", "_seconds"))
    ]


def _stored(replicas: Sequence[ReplicaRow], seed: int | None, name: str) -> ReplicaRow:
    """The replica to compare with: that of `seed`, or the first with a result."""
    done = [replica for replica in replicas if replica.outcome is not None]
    if not done:
        raise NoResultError(f"trial {name} has no result yet; hqlt study status shows why")
    order = ("complete", "stopped", "failed")
    done.sort(key=lambda replica: (replica.seed != seed, order.index(replica.state), replica.phase != "search"))
    return done[0]


def _changes(settings: Sequence[str], steps: int | None) -> dict[str, AxisValue]:
    """Axis -> value from `--set axis=value` and `--steps`.

    Raises:
        HqltError: a setting has no `=`, or no axis of that name or value exists.
    """
    found: dict[str, AxisValue] = {} if steps is None else {"steps": check_value("steps", steps)}
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise HqltError(f"--set {setting}: write axis=value, as in --set d_model=256")
        name = path.removeprefix("model.").removeprefix("recipe.")
        found[name] = check_value(name, _value(text))
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _varied(study: Study, row: TrialRow, changes: Mapping[str, AxisValue]) -> Config:
    """The stored config with `changes`. One that an ablation has matched in size is not matched again."""
    if all(name in RECIPE_AXES for name in changes):
        recipe = {**row.config.recipe.model_dump(), **changes}
        try:
            return row.config.model_copy(update={"recipe": Recipe.model_validate(recipe)})
        except pydantic.ValidationError as error:
            raise InvalidArchError(tuple(problem["msg"] for problem in error.errors())) from None
    config, canonical = study.on(row.config.task).resolve({**row.choices, **changes})
    ignored = [name for name in changes if name not in canonical]
    if ignored:
        raise InvalidArchError((f"{ignored[0]} has no meaning for this model: {describe(config.arch)}",))
    return config


def _run(trial: Trial, folder: Path, seed: int) -> TrialResult:
    """The result of one seed of `trial`, run by `python -m hqlt_trainer` as anybody could run it.

    Seeds that trained in a stack train in it again, since that decides their last bits.
    """
    folder.mkdir(parents=True)
    (folder / "trial.json").write_text(trial.model_dump_json(indent=1), encoding="utf-8")
    threads = str(trial.runtime.n_threads)
    ran = subprocess.run(  # noqa: S603  our own interpreter and module
        [sys.executable, "-m", "hqlt_trainer", str(folder / "trial.json"), "--out", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        stdout=sys.stderr,
        check=False,
    )
    result = folder / "result.json"
    if not result.exists():
        raise TrialFailedError("crashed", f"the trial ended with exit code {ran.returncode} and without a result")
    outcome = TrialResult.from_json(result.read_text(encoding="utf-8"))
    return outcome.model_copy(update={"replicas": tuple(r for r in outcome.replicas if r.seed == seed)})


def _mirror(store: Store, study: str, number: int, again: Rerun, folder: Path) -> None:
    from hqlt_orchestration.tracking import told
    from hqlt_orchestration.tracking.spool import Spool

    number_here = int(folder.name.rpartition("-")[2])  # a rerun has no trial number of its own
    spool = Spool(store, study)
    for record in told.rerun(
        number_here, f"{study}/{number}", again.changes, again.measured, folder, identical=again.identical
    ):
        spool.put(record)
    spool.close(DRAIN_S)


def _json(again: Rerun) -> dict[str, Any]:
    return {
        "trial_id": again.trial_id,
        "identical": again.identical,
        "stored": _summary(again.stored.replicas[0]),
        "measured": _summary(again.measured.replicas[0]),
        "variation": again.changes,
    }


def _summary(replica: ReplicaResult) -> dict[str, Any]:
    return {
        "seed": replica.seed,
        "status": replica.status,
        "step": replica.step,
        "metrics": replica.metrics,
        "weights_sha256": replica.weights_sha256,
    }


def _print(again: Rerun) -> None:
    was, now = again.stored.replicas[0], again.measured.replicas[0]
    if again.changes:
        what = ", ".join(f"{name}={value}" for name, value in again.changes.items())
        print(f"trial {again.trial_id} with {what}: {now.status} at step {now.step}")
        for name in (name for name in now.metrics if "_len_" not in name):
            before = f"{was.metrics[name]:.4f}" if name in was.metrics else "none"
            print(f"  {name:<34} {now.metrics[name]:.4f}   (stored {before})")
        return
    for line in environment_differences(again.stored.environment, again.measured.environment):
        print(f"another environment: {line}")
    if again.identical:
        n_values = len(was.metrics) + sum(len(point.metrics) for point in was.curve)
        weights = " and the weights" if was.weights_sha256 and was.status == "complete" else ""
        print(f"trial {again.trial_id}, seed {was.seed}: identical; {n_values} stored values{weights} agree to the bit")
        return
    print(f"trial {again.trial_id}, seed {was.seed}: differs in {len(again.differences)} values")
    for line in again.differences[:SHOWN_DIFFERENCES]:
        print(f"  {line}")
    if len(again.differences) > SHOWN_DIFFERENCES:
        print(f"  and {len(again.differences) - SHOWN_DIFFERENCES} more")


def environment_differences(was: Environment, now: Environment) -> list[str]:
    """Where the two differ in what decides the last bits of a result."""
    return [
        f"{name} was {getattr(was, name)}, is {getattr(now, name)}"
        for name in _DECIDES_BITS
        if getattr(was, name) != getattr(now, name)
    ]
