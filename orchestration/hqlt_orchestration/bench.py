"""What the platform costs per trial: `python -m hqlt_orchestration.bench`.

A task that does nothing, 100 trials, 2 workers, after start-up; and the same space, sampler and number of trials under
Ray Tune with OptunaSearch and `reuse_actors=True`, in the same run on the same Ray. Ours keeps a ledger, a sampling
history on disk and an MLflow mirror meanwhile; Tune's Optuna study stays in memory, which is its faster way.
"""

import argparse
import contextlib
import json
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from hqlt_search_space.study import Study

N_TRIALS = 100
N_WORKERS = 2
STUDY: dict[str, Any] = {
    "schema_version": 1,
    "name": "nothing",
    "task": {"kind": "nothing"},
    "model": {"d_model": 64, "n_layers": 2, "n_heads": 2},
    "search": {
        "sampler": {"kind": "nsga2"},
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


def ours(folder: Path, n_trials: int) -> dict[str, float]:
    """Milliseconds a trial from the first lease to the last result, and what came before and after."""
    from hqlt_orchestration.store import Store
    from hqlt_orchestration.studies import Machine, run

    file = folder / "nothing.yaml"
    budget = {"trials": n_trials, "parallel": N_WORKERS}
    file.write_text(json.dumps({**STUDY, "budget": budget}), encoding="utf-8")
    store = Store(folder / "data")
    began = time.time()
    with contextlib.redirect_stdout(None):
        run(file, store, Machine())
    ended = time.time()
    attempts = store.open().attempts("nothing")
    first = min(attempt.started_at for attempt in attempts)
    last = max(attempt.ended_at or 0.0 for attempt in attempts)
    return {
        "trials": len(attempts),
        "ms_per_trial": (last - first) / len(attempts) * 1e3,
        "start_s": first - began,
        "finish_s": ended - last,  # what MLflow has not taken yet, exports, Ray's end
    }


def ray_tune(folder: Path, n_trials: int) -> dict[str, float]:
    """Milliseconds a trial of Ray Tune, from the first trial's start to the last one's end."""
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    from optuna.samplers import TPESampler
    from ray import tune
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.optuna import OptunaSearch

    from hqlt_orchestration.sampler import distribution

    study = Study.model_validate({**STUDY, "budget": {"trials": n_trials}})
    space = {name: distribution(domain) for name, domain in study.domains().items()}
    names = list(study.objectives)
    search = OptunaSearch(space, metric=names, mode=["min"] * len(names), sampler=TPESampler(seed=0))

    def nothing(_choices: dict[str, Any]) -> dict[str, float]:
        return dict.fromkeys(names, 0.0) | {"at": time.time()}

    tuner = tune.Tuner(
        tune.with_resources(nothing, {"cpu": 1}),
        tune_config=tune.TuneConfig(
            search_alg=ConcurrencyLimiter(search, N_WORKERS), num_samples=n_trials, reuse_actors=True
        ),
        run_config=tune.RunConfig(storage_path=str(folder), verbose=0),
    )
    began = time.time()
    found: Any = tuner.fit()  # iterable, though its type does not say so
    ends = [result.metrics["at"] for result in found]
    first, last = min(ends), max(ends)
    return {
        "trials": len(ends),
        "ms_per_trial": (last - first) / (len(ends) - 1) * 1e3,
        "start_s": first - began,
        "finish_s": time.time() - last,
    }


def main() -> None:
    """Print both, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=N_TRIALS)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="hqlt-bench-") as temporary:
        from hqlt_orchestration.executor import start_ray

        start_ray(N_WORKERS, None)
        mine = ours(Path(temporary), arguments.trials)
        theirs = ray_tune(Path(temporary), arguments.trials)
    for name, found in (("hqlt", mine), ("Ray Tune + OptunaSearch, reuse_actors", theirs)):
        print(
            f"{name:<40} {found['ms_per_trial']:7.1f} ms a trial ({found['trials']:.0f} trials; "
            f"{found['start_s']:.1f} s before the first, {found['finish_s']:.1f} s after the last)"
        )
    print(f"ratio {mine['ms_per_trial'] / theirs['ms_per_trial']:.2f}")


if __name__ == "__main__":
    main()
