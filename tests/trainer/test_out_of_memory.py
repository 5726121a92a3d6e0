"""Memory that is too small: real, by the system's limit on a process's address space."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hqlt_search_space.trial import ReplicaResult, Runtime, Trial, TrialResult
from hqlt_trainer.run import run_trial

# A step needs about 460 MiB beyond what the process has by then, or 340 in two parts.
TRIAL: dict[str, Any] = {
    "config": {
        "arch": {"d_model": 16, "mlp_inner": 512, "layers": [{"kind": "attention", "n_heads": 1}] * 2},
        "recipe": {"steps": 2, "batch": 256, "learning_rate": 0.01},
        "task": {
            "kind": "parity",
            "train_length": {"low": 128, "high": 128},
            "test_length": {"low": 8, "high": 12},
            "n_validation": 16,
            "n_test": 16,
        },
    }
}
IN_LITTLE_MEMORY = """
import re, resource, sys
from pathlib import Path
from hqlt_search_space.trial import Trial
from hqlt_trainer.run import run_trial
trial, out, room = Trial.from_json(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
warm = trial.config.recipe.model_copy(update={"batch": 2, "steps": 1})
run_trial(trial.model_copy(update={"config": trial.config.model_copy(update={"recipe": warm})}), out / "warm")
has = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (has + room, has + room))
print(run_trial(trial, out / "trial").model_dump_json())
"""


def run_with(room_mib: int, out: Path) -> TrialResult:
    """The trial in a process of its own that gets so much more memory and no more."""
    ran = subprocess.run(
        [sys.executable, "-c", IN_LITTLE_MEMORY, json.dumps(TRIAL), str(out), str(room_mib * 2**20)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return TrialResult.from_json(ran.stdout)


def curve(replica: ReplicaResult) -> list[float]:
    return [value for point in replica.curve for value in point.metrics.values()]


def test_it_is_tried_once_more_with_half_the_rows_and_comes_to_the_same(tmp_path: Path) -> None:
    plenty = run_trial(Trial.model_validate(TRIAL), tmp_path).replicas[0]
    assert plenty.accumulation is None
    enough = run_with(410, tmp_path / "enough")
    (replica,) = enough.replicas
    assert (replica.status, replica.accumulation) == ("complete", 2)
    assert "out of memory at step 0 (batch 256, context 128)" in enough.notes[0]
    assert "trained with 2 micro-batches a step" in enough.notes[0]
    assert curve(replica) == pytest.approx(curve(plenty), rel=1e-5)
    again = Trial.model_validate(TRIAL).model_copy(update={"runtime": Runtime(accumulation=2)})
    assert run_trial(again, tmp_path / "again").replicas[0].weights_sha256 == replica.weights_sha256


def test_what_does_not_fit_by_halves_is_a_failed_replica(tmp_path: Path) -> None:
    (replica,) = run_with(130, tmp_path).replicas
    assert (replica.status, replica.reason) == ("failed", "out_of_memory")
    assert replica.message is not None
    assert "(batch 256 in 2 parts, context 128)" in replica.message
