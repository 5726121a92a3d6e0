"""run_trial: what it promises about rungs, resuming, failures and reruns."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hqlt_search_space.arch import Arch
from hqlt_search_space.errors import BackendError, CheckpointError, ResourceError, TrialPausedError
from hqlt_search_space.trial import Config, ReplicaResult, Trial, TrialResult
from hqlt_trainer.environment import source_version
from hqlt_trainer.run import run_trial

PARITY = {
    "kind": "parity",
    "train_length": {"low": 3, "high": 8},
    "test_length": {"low": 8, "high": 12},
    "n_validation": 64,
    "n_test": 64,
}
HYBRID = {"kind": "hybrid", "n_heads": 2, "window": 4, "short_conv": 4, "output_gate": True}
NAMES_OF_TIME = {"tokens_per_second", "train_seconds", "wall_seconds", "peak_memory_bytes", "checkpoint"}


def _trial(*, layers: list[dict[str, Any]] | None = None, **changes: Any) -> Trial:
    recipe = {"steps": 12, "batch": 8, "learning_rate": 0.01, **changes.pop("recipe", {})}
    arch = {"d_model": 8, "mlp_inner": 8, "layers": layers or [HYBRID, {"kind": "attention", "n_heads": 2}]}
    config = {"arch": arch, "recipe": recipe, "task": changes.pop("task", PARITY)}
    return Trial.model_validate({"config": config, **changes})


def _what_a_rerun_repeats(replica: ReplicaResult) -> dict[str, Any]:
    return replica.model_dump(exclude=NAMES_OF_TIME)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> TrialResult:
    return run_trial(_trial(rungs=(5, 9)), tmp_path_factory.mktemp("unbroken"))


def test_a_result_says_all_that_happened(unbroken: TrialResult) -> None:
    (replica,) = unbroken.replicas
    assert (replica.status, replica.step, replica.skipped_steps) == ("complete", 12, 0)
    assert {
        "train_loss_nats",
        "validation_loss_nats",
        "validation_accuracy",
        "normalised_validation_accuracy",
        "test_loss_nats",
        "normalised_test_accuracy",
    } <= replica.metrics.keys()
    assert [point.step for point in replica.curve] == list(range(1, 13))
    assert [point.step for point in replica.curve if "validation_accuracy" in point.metrics] == [5, 9, 12]
    assert [knock_out.silenced for knock_out in replica.knock_outs] == ["kv", "fw"]
    assert [gate.layer for gate in replica.gates] == [0]
    assert replica.checkpoint == "seed-0/checkpoints/step-12"
    assert replica.tokens_per_second
    assert replica.peak_memory_bytes
    assert {backend.operator for backend in unbroken.backends} == {"blend", "window_attention", "delta"}
    assert TrialResult.from_json(unbroken.canonical_json()) == unbroken


def test_a_rerun_repeats_everything_but_times(unbroken: TrialResult, tmp_path: Path) -> None:
    again = run_trial(_trial(rungs=(5, 9)), tmp_path)
    assert _what_a_rerun_repeats(again.replicas[0]) == _what_a_rerun_repeats(unbroken.replicas[0])
    other_seed = run_trial(_trial(rungs=(5, 9), seeds=(1,)), tmp_path)
    assert other_seed.replicas[0].weights_sha256 != unbroken.replicas[0].weights_sha256


@pytest.mark.parametrize("step", range(12))
def test_a_trial_stopped_at_any_step_ends_as_the_unbroken_one(step: int, unbroken: TrialResult, tmp_path: Path) -> None:
    trial, polls = _trial(rungs=(5, 9)), iter(range(100))
    with pytest.raises(TrialPausedError, match=f"paused at step {step} "):
        run_trial(trial, tmp_path, cancelled=lambda: next(polls) == step)
    torch.manual_seed(99)  # whatever ran in between
    resumed = run_trial(trial, tmp_path)
    assert _what_a_rerun_repeats(resumed.replicas[0]) == _what_a_rerun_repeats(unbroken.replicas[0])


@pytest.mark.parametrize("lost_at", [5, 12])
def test_a_trial_interrupted_at_a_rung_asks_it_again_and_goes_on(
    lost_at: int, unbroken: TrialResult, tmp_path: Path
) -> None:
    class WorkerLostError(Exception):
        """What a rung raises when the driver has gone."""

    def lose(seed: int, step: int, metrics: dict[str, float]) -> bool:
        if step == lost_at:
            raise WorkerLostError
        return True

    trial = _trial(rungs=(5, 9, 12))
    with pytest.raises(WorkerLostError):
        run_trial(trial, tmp_path, lose)
    asked = []
    resumed = run_trial(trial, tmp_path, lambda seed, step, metrics: asked.append((step, metrics)) is None)
    assert [step for step, _ in asked] == [step for step in (5, 9, 12) if step >= lost_at]
    assert asked[0][1] == unbroken.replicas[0].curve[lost_at - 1].metrics
    assert _what_a_rerun_repeats(resumed.replicas[0]) == _what_a_rerun_repeats(unbroken.replicas[0])


def test_a_damaged_last_checkpoint_costs_steps_but_changes_nothing(unbroken: TrialResult, tmp_path: Path) -> None:
    trial, polls = _trial(rungs=(5, 9)), iter(range(100))
    with pytest.raises(TrialPausedError):
        run_trial(trial, tmp_path, cancelled=lambda: next(polls) == 10)
    (tmp_path / "seed-0/checkpoints/step-10/model.safetensors").write_bytes(b"x")
    resumed = run_trial(trial, tmp_path)
    assert _what_a_rerun_repeats(resumed.replicas[0]) == _what_a_rerun_repeats(unbroken.replicas[0])
    assert "damaged checkpoint" in resumed.notes[0]


def test_a_rung_stops_its_replica_only_and_the_verdict_is_kept(tmp_path: Path) -> None:
    trial = _trial(rungs=(4, 8, 12), seeds=(0, 1))
    asked = []

    def on_rung(seed: int, step: int, metrics: dict[str, float]) -> bool:
        asked.append((seed, step, "validation_accuracy" in metrics))
        return seed == 1 and step < 12

    result = run_trial(trial, tmp_path, on_rung)
    assert asked == [(0, 4, True), (1, 4, True), (1, 8, True), (1, 12, True)]
    assert [(replica.status, replica.step) for replica in result.replicas] == [("stopped", 4), ("complete", 12)]
    assert "test_accuracy" not in result.replicas[0].metrics
    again = run_trial(trial, tmp_path, on_rung)
    assert again.replicas == result.replicas
    assert len(asked) == 4


def test_metrics_are_told_at_the_same_steps_in_every_run(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    trial = _trial(recipe={"steps": 110, "batch": 2}, rungs=(50,), layers=[{"kind": "attention", "n_heads": 2}])
    run_trial(trial, tmp_path, on_metrics=lambda seed, step, metrics: told.append((seed, step)))
    assert told == [(0, step) for step in sorted({*range(3, 110, 3), 50, 110})]


def test_bad_steps_are_skipped_and_the_eleventh_in_a_row_fails_the_replica(tmp_path: Path) -> None:
    result = run_trial(_trial(recipe={"steps": 40, "learning_rate": 1e30}, seeds=(0, 1)), tmp_path)
    for replica in result.replicas:
        assert (replica.status, replica.reason) == ("failed", "diverged")
        assert replica.skipped_steps >= 11
        assert replica.message is not None
        assert f"11 steps in a row, the last one step {replica.step} of 40 (learning_rate 1e+30)" in replica.message
        assert replica.metrics == {}


def test_a_model_too_large_for_memory_is_a_failed_replica_with_a_sentence(tmp_path: Path) -> None:
    layer = {"kind": "attention", "n_heads": 1, "positions": "none"}
    arch = Arch.model_validate({"d_model": 2**22, "mlp_inner": 1, "layers": [layer]})
    trial = _trial()
    config = Config(arch=arch, recipe=trial.config.recipe, task=trial.config.task)
    (replica,) = run_trial(trial.model_copy(update={"config": config}), tmp_path).replicas
    assert (replica.status, replica.reason) == ("failed", "out_of_memory")
    assert replica.message is not None
    assert replica.message.startswith("out of memory at step 0 (batch 8, context 12)")


def test_unusable_data_is_a_failed_replica_with_a_sentence(tmp_path: Path) -> None:
    task = {"kind": "language_modelling", "corpus": str(tmp_path / "nowhere.txt"), "context": 8}
    (replica,) = run_trial(_trial(task=task), tmp_path).replicas
    assert (replica.status, replica.reason) == ("failed", "bad_data")
    assert "nowhere.txt" in str(replica.message)


def test_a_full_disk_is_a_failed_replica_that_continues_when_there_is_room(
    unbroken: TrialResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = _trial(rungs=(5, 9))
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", _no_space)
        (replica,) = run_trial(trial, tmp_path).replicas
    assert (replica.status, replica.reason, replica.step) == ("failed", "disk_full", 5)
    resumed = run_trial(trial, tmp_path)
    assert _what_a_rerun_repeats(resumed.replicas[0]) == _what_a_rerun_repeats(unbroken.replicas[0])


def test_a_trial_that_is_to_pause_on_a_full_disk_fails_for_that_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", _no_space)
    (replica,) = run_trial(_trial(), tmp_path, cancelled=lambda: True).replicas
    assert (replica.status, replica.reason, replica.step) == ("failed", "disk_full", 0)


def _no_space(_descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_folder_of_another_trial_is_refused(tmp_path: Path) -> None:
    run_trial(_trial(), tmp_path)
    with pytest.raises(CheckpointError, match="give each trial a folder of its own"):
        run_trial(_trial(recipe={"steps": 13}), tmp_path)


def test_a_forced_backend_or_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for backend in ("triton", "flash_attn_4"):
        with pytest.raises(BackendError, match=backend):
            run_trial(_trial(runtime={"backend": backend}), tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(ResourceError, match="finds no GPU"):
            run_trial(_trial(runtime={"device": "cuda"}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_process_is_left_as_it_was(tmp_path: Path) -> None:
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    run_trial(_trial(runtime={"n_threads": before[0] + 1}), tmp_path)
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


def test_the_task_nothing_returns_at_once_without_files(tmp_path: Path) -> None:
    (replica,) = run_trial(_trial(task={"kind": "nothing"}), tmp_path).replicas
    assert (replica.status, replica.metrics) == ("complete", {"validation_loss_nats": 0.0})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_model_that_can_count_learns_parity(precision: str, tmp_path: Path) -> None:
    layers = [{"kind": "fast_weight", "n_heads": 2, "rule": {"kind": "delta"}}]
    recipe = {"steps": 30, "batch": 32, "learning_rate": 0.01, "precision": precision}
    (replica,) = run_trial(_trial(layers=layers, recipe=recipe), tmp_path).replicas
    assert replica.status == "complete"
    assert replica.curve[-1].metrics["train_loss_nats"] < replica.curve[0].metrics["train_loss_nats"]


def test_the_environment_names_the_sources(unbroken: TrialResult) -> None:
    assert unbroken.environment.source_version == source_version()
    assert len(source_version()) == 16
    assert unbroken.environment.instruction_set == torch.backends.cpu.get_cpu_capability()


def _main(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hqlt_trainer", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_writes_a_result_and_prints_a_summary(tmp_path: Path) -> None:
    (tmp_path / "trial.json").write_text(_trial().model_dump_json())
    done = _main(str(tmp_path / "trial.json"), "--out", str(tmp_path / "out"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "seed 0: complete at step 12" in done.stdout
    result = TrialResult.from_json((tmp_path / "out/result.json").read_text())
    assert result.trial == _trial()


def test_a_wrong_trial_file_gets_a_sentence_and_exit_code_2(tmp_path: Path) -> None:
    wrong = json.loads(_trial().model_dump_json())
    wrong["config"]["recipe"]["steps"] = 0
    (tmp_path / "trial.json").write_text(json.dumps(wrong))
    done = _main(str(tmp_path / "trial.json"), "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "config.recipe.steps: Input should be greater than or equal to 1" in done.stderr
    missing = _main(str(tmp_path / "nowhere.json"), "--out", str(tmp_path / "out"))
    assert missing.returncode == 2
    assert "Traceback" not in done.stderr + missing.stderr
