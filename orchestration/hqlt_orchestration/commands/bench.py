"""What the platform costs per trial: `python -m hqlt_orchestration.commands.bench`.

A task that does nothing, 100 trials, 2 workers; and the same space, sampler and number of trials under Ray Tune with
OptunaSearch and `reuse_actors=True`, in the same run on the same Ray. Ours keeps ledger and sampling history on disk
and mirrors everything to MLflow meanwhile; Tune is measured with its Optuna study on disk (SQLite, so that a study
outlives its process as ours does) and in memory (what one gets without asking). Two readings each:

    steady   wall time from the first trial's start to the last one's end, over the trials
    whole    wall time of the whole call on a running Ray (workers, imports, reports included), over the trials
"""

import argparse
import contextlib
import json
import logging
import shutil
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hqlt_search_space.study import Study

N_TRIALS = 100
N_WORKERS = 2
POPULATION = 20
STUDY: dict[str, Any] = {
    "schema_version": 1,
    "name": "nothing",
    "task": {"kind": "nothing"},
    "model": {"d_model": 64, "n_layers": 2, "n_heads": 2},
    "search": {
        "sampler": {"kind": "nsga2", "population": POPULATION},
        "space": {
            "first": ["hybrid", "fast_weight"],
            "second": ["attention"],
            "ratio": ["1:0", "1:1", "0:1"],
            "blend": ["synchronous", "delayed_streaming", "delayed_chunk"],
            "mixing": ["sum", "dynamic_scalar", "dynamic_vector"],
            "window": [4, 8, 16],
            "rule": ["additive", "delta", "gated_delta"],
            "learning_rate": {"low": 1e-3, "high": 1e-2, "scale": "log"},
        },
    },
    "objectives": {"parameters": "minimize", "state_bytes": "minimize"},
    "resources": {"cpu": 1, "gpu": 0},
}


@dataclass(frozen=True)
class Reading:
    """Milliseconds of wall time a trial."""

    name: str
    steady_ms: float
    whole_ms: float


def ours(folder: Path, n_trials: int) -> Reading:
    """A study run as `hqlt study run` does."""
    from hqlt_orchestration.commands.studies import Machine, run
    from hqlt_orchestration.records.store import Store

    file = folder / "nothing.yaml"
    file.write_text(json.dumps(STUDY | {"budget": {"trials": n_trials, "parallel": N_WORKERS}}), encoding="utf-8")
    store = Store(folder / "data")
    began = time.time()
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
        run(file, store, Machine())
    whole_s = time.time() - began
    ledger = store.open()
    attempts = ledger.attempts("nothing")
    ledger.close()
    assert ledger.counts("nothing")["complete"] == n_trials, "a trial is missing"
    steady_s = max(attempt.ended_at or 0.0 for attempt in attempts) - min(attempt.started_at for attempt in attempts)
    return Reading("hqlt", steady_s / n_trials * 1e3, whole_s / n_trials * 1e3)


def ray_tune(folder: Path, n_trials: int, *, on_disk: bool) -> Reading:
    """The same under Ray Tune. A trial's end is when its function returns."""
    import optuna
    from ray import tune
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.optuna import OptunaSearch

    from hqlt_orchestration.driving.sampler import distribution

    study = Study.model_validate(STUDY | {"budget": {"trials": n_trials}})
    space = {name: distribution(domain) for name, domain in study.domains().items()}
    names = list(study.objectives)
    search = OptunaSearch(
        space,
        metric=names,
        mode=["min"] * len(names),
        sampler=optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=0),
        storage=optuna.storages.RDBStorage(f"sqlite:///{folder / 'tune.db'}") if on_disk else None,
    )

    def nothing(choices: dict[str, Any]) -> dict[str, float]:
        return dict.fromkeys(names, choices["learning_rate"]) | {"at": time.time()}

    tuner = tune.Tuner(
        tune.with_resources(nothing, {"cpu": 1}),
        tune_config=tune.TuneConfig(
            search_alg=ConcurrencyLimiter(search, N_WORKERS), num_samples=n_trials, reuse_actors=True
        ),
        run_config=tune.RunConfig(storage_path=str(folder), verbose=0),
    )
    began = time.time()
    found: Any = tuner.fit()  # iterable, though its type does not say so
    whole_s = time.time() - began
    ends = [result.metrics["at"] for result in found]
    assert len(ends) == n_trials, "a trial is missing"
    steady_s = (max(ends) - min(ends)) * n_trials / (n_trials - 1)
    where = "on disk" if on_disk else "in memory"
    return Reading(
        f"Ray Tune + OptunaSearch {where}, reuse_actors", steady_s / n_trials * 1e3, whole_s / n_trials * 1e3
    )


def main() -> None:
    """Print all readings, and ours over Tune's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=N_TRIALS)
    n_trials: int = parser.parse_args().trials
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    from hqlt_orchestration.driving.ray_pool import start_ray

    with tempfile.TemporaryDirectory(prefix="hqlt-bench-") as temporary:
        folder = Path(temporary)
        logs = start_ray(N_WORKERS, None)
        mine = ours(folder, n_trials)
        tunes = [ray_tune(folder, n_trials, on_disk=on_disk) for on_disk in (True, False)]
        shutil.rmtree(logs, ignore_errors=True)
    print(f"{n_trials} trials that do nothing, {N_WORKERS} workers   {'steady':>10} {'whole':>10}   ms a trial")
    for reading in (mine, *tunes):
        print(f"{reading.name:<48} {reading.steady_ms:7.1f} {reading.whole_ms:10.1f}")
    for tune in tunes:
        steady, whole = mine.steady_ms / tune.steady_ms, mine.whole_ms / tune.whole_ms
        print(f"{'hqlt / ' + tune.name:<48} {steady:7.2f} {whole:10.2f}")


if __name__ == "__main__":
    main()
