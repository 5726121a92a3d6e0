"""The estimate of training memory against what is kept on a CPU."""

from pathlib import Path

import pytest
import torch
from hqlt_search_space.cost import parameters, saved_bytes_per_token, training_bytes
from hqlt_search_space.study_file import load_study
from hqlt_search_space.trial import Config
from hqlt_trainer.memory import CUDA_BYTES, gpu_bytes, gpu_bytes_measured
from hqlt_trainer.model import build_model
from hqlt_trainer.precision import autocast
from torch.autograd.graph import saved_tensors_hooks

STUDIES = Path(__file__).parents[2] / "search_space" / "studies"
CELLS = {cell.label: cell.config for cell in load_study(STUDIES / "paper_expressivity.yaml").cells()[:9]}
LENGTH, ROWS = 40, 8


def kept(config: Config, precision: str) -> int:
    """Bytes of all tensors that a forward pass keeps for its backward, parameters aside, each storage once."""
    model = build_model(config.arch, 3, seed=0)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, tuple[int, torch.Tensor]] = {}

    def see(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes(), x  # held, so that no address is used twice
        return x

    with saved_tensors_hooks(see, lambda x: x), autocast(torch.device("cpu"), precision):
        model(torch.ones(ROWS, LENGTH, dtype=torch.long)).sum()
    return sum(size for size, _ in found.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("label", CELLS)
def test_what_a_token_keeps_is_estimated_within_a_factor_of_1_6(label: str, precision: str) -> None:
    config = CELLS[label]
    estimate = ROWS * LENGTH * saved_bytes_per_token(config.arch, 3, precision)
    assert 0.6 * kept(config, precision) < estimate < 1.6 * kept(config, precision)


def test_micro_batches_halve_what_is_saved_and_no_more() -> None:
    config = CELLS["baseline"]
    states = 16 * parameters(config.arch, 3)
    whole = training_bytes(config.arch, 3, LENGTH, config.recipe)
    halved = training_bytes(config.arch, 3, LENGTH, config.recipe.model_copy(update={"accumulation": 2}))
    assert whole - states == pytest.approx(2 * (halved - states))


@pytest.mark.parametrize(
    ("label", "peak_mib"), [("baseline", 1498), ("transformer", 1292), ("deltanet", 1293), ("linear_attention", 1826)]
)
def test_the_estimate_for_a_gpu_covers_the_peaks_measured_on_one(label: str, peak_mib: int) -> None:
    """Parity at batch 1024, one seed, on an H200 with torch 2.11, evaluation included (23 November 2026)."""
    estimate, measured = gpu_bytes(CELLS[label], (0,)), gpu_bytes_measured(peak_mib * 2**20)
    assert 0.8 * measured < estimate < 1.6 * measured


def test_a_measured_peak_counts_with_cudas_own_memory() -> None:
    assert gpu_bytes_measured(2**30) == pytest.approx(1.2 * 2**30 + CUDA_BYTES)
