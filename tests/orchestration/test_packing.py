"""How many trials share a GPU, by arithmetic, and as Ray places them on a GPU that it only believes in."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hqlt_orchestration.driving.packing import Need, need_of, place, placed
from hqlt_search_space.study_file import load_study
from hqlt_search_space.trial import Config, Environment, ReplicaResult, Runtime, Trial, TrialResult
from hypothesis import given
from hypothesis import strategies as st

STUDY = load_study(Path(__file__).parents[2] / "search_space" / "studies" / "paper_expressivity.yaml")
CONFIGS = {cell.label: cell.config for cell in STUDY.cells()[:9]}
GIB = 2**30


@given(
    parallel=st.integers(1, 64),
    n_gpus=st.integers(1, 8),
    memory_gib=st.integers(1, 200),
    need_mib=st.integers(1, 300_000),
)
def test_those_that_share_a_gpu_fit_in_it_together(parallel: int, n_gpus: int, memory_gib: int, need_mib: int) -> None:
    memory, need = memory_gib * GIB, Need(need_mib * 2**20, "as given")
    found = place(parallel, n_gpus, memory, need)
    together = int(1 / found.share + 1e-9)
    assert found.share * together <= 1
    assert together == 1 or together * need.bytes <= memory
    assert 1 <= found.slots <= min(parallel, together * n_gpus)
    # Nobody waits while there is room for one more on every GPU.
    assert found.slots == parallel or (together + 1) * need.bytes > memory


def test_the_reason_names_the_need_and_what_was_asked_for() -> None:
    found = place(8, 1, 140 * GIB, Need(30 * GIB, "30 GiB (by arithmetic)"))
    assert (found.share, found.slots) == (0.25, 4)
    assert found.why == (
        "4 trials at a time, of 8 that were asked for, 4 on a GPU of 140 GiB: one takes up to 30 GiB (by arithmetic)"
    )
    assert "too much" in place(1, 1, 16 * GIB, Need(30 * GIB, "30 GiB")).why
    assert place(3, 0, None, None) == type(found)(0.0, 3)


def result(config: Config, peak_bytes: int, *, device: str = "cuda", seeds: tuple[int, ...] = (0,)) -> TrialResult:
    return TrialResult(
        trial=Trial(config=config, seeds=seeds, runtime=Runtime(device=device)),
        replicas=(ReplicaResult(seed=0, status="complete", step=1, peak_memory_bytes=peak_bytes),),
        environment=Environment(
            python="", torch="", hqlt="", source_version=None, platform="", cpu="", instruction_set="", n_threads=1,
            device=device,
        ),
    )  # fmt: skip


def test_a_measured_peak_of_the_same_shape_overrules_the_arithmetic() -> None:
    config = CONFIGS["baseline"]
    by_arithmetic = need_of([config], (0,), [])
    assert by_arithmetic is not None
    assert "by arithmetic" in by_arithmetic.why
    same_shape = config.model_copy(update={"recipe": config.recipe.model_copy(update={"learning_rate": 1.0})})
    for outcome, overrules in (
        (result(same_shape, GIB), True),
        (result(CONFIGS["transformer"], GIB), False),
        (result(config, GIB, device="cpu"), False),
        (result(config, GIB, seeds=(0, 1, 2)), False),
    ):
        found = need_of([config], (0,), [outcome])
        assert found is not None
        assert ("measured" in found.why) == overrules
        assert (found.bytes != by_arithmetic.bytes) == overrules


def test_the_largest_trial_of_a_study_decides() -> None:
    small, large = CONFIGS["baseline"], STUDY.cells()[0].config
    large = large.model_copy(update={"recipe": large.recipe.model_copy(update={"batch": 16 * 1024})})
    of_both, of_large = (need_of(configs, (0,), []) for configs in ([small, large], [large]))
    assert of_both == of_large
    assert need_of([], (0,), []) is None


def test_the_share_and_its_reason_are_in_the_trial_and_not_in_its_id() -> None:
    trial = Trial(config=CONFIGS["baseline"])
    with_share = placed(trial, place(4, 1, 100 * GIB, Need(GIB, "1 GiB")))
    assert with_share.runtime.gpu_share == 0.25
    assert "1 GiB" in with_share.runtime.gpu_share_reason
    assert with_share.trial_id == trial.trial_id


ON_A_FAKE_GPU = """
import sys, tempfile, time
import ray
folder = tempfile.mkdtemp(prefix="hqlt-")
ray.init(address="local", num_cpus=4, num_gpus=1, include_dashboard=False, object_store_memory=80 * 2**20,
         _temp_dir=folder, log_to_driver=False, logging_level="ERROR")
from hqlt_orchestration.driving.ray_pool import RayExecutor
from hqlt_orchestration.driving.packing import Need
executor = RayExecutor(slots=4, cpus=1, gpus=None, need=lambda: Need(5 * 2**30, "5 GiB"))
deadline = time.monotonic() + 150
while executor.free() < executor.placement.slots and time.monotonic() < deadline:
    executor.poll(0.5)
placement = executor.placement
print(placement.slots, executor.free(), placement.share, executor.device, ray.available_resources().get("GPU"))
executor.close()
ray.shutdown()
"""


@pytest.mark.slow
def test_ray_gives_a_place_to_as_many_trials_as_fit_on_a_gpu(tmp_path: Path) -> None:
    """Of four that are asked for, three of 5 GiB fit into 16: by Ray's count, on a GPU that only answers questions."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 16384\n")
    tool.chmod(0o755)
    ran = subprocess.run(
        [sys.executable, "-c", ON_A_FAKE_GPU],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    slots, ready, share, device, left = ran.stdout.split() or pytest.fail(ran.stderr)
    assert (slots, ready, share, device) == ("3", "3", "0.3333", "cuda")
    assert float(left) == pytest.approx(1e-4)
