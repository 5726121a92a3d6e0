"""The estimate of training memory against what is kept on a CPU."""

from pathlib import Path

import pytest
import torch
from hqlt_search_space.cost import parameters, saved_bytes_per_token, training_bytes
from hqlt_search_space.study_file import load_study
from hqlt_search_space.trial import Config, Runtime
from hqlt_trainer.environment import reproducible
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
    ("label", "training_mib", "evaluation_mib"),
    [
        ("baseline", 552, 1498),
        ("transformer", 383, 1292),
        ("deltanet", 603, 1293),
        ("delayed_stream", 488, 1497),
        ("linear_attention", 1036, 1826),
    ],
)
def test_what_a_gpu_must_have_covers_what_one_had(label: str, training_mib: int, evaluation_mib: int) -> None:
    """Peaks of parity at batch 1024, one seed, on an H200 with torch 2.11 (23 November 2026)."""
    taken = (training_mib + evaluation_mib) * 2**20 + CUDA_BYTES
    assert taken < gpu_bytes(CELLS[label], (0,)) < 1.8 * taken
    assert taken < gpu_bytes_measured(max(training_mib, evaluation_mib) * 2**20) < 1.8 * taken


@pytest.mark.gpu
def test_a_process_cannot_take_more_of_a_gpu_than_its_share() -> None:
    a_twentieth = torch.cuda.get_device_properties(0).total_memory // 20
    with reproducible(Runtime(device="cuda", gpu_share=0.05)), pytest.raises(torch.OutOfMemoryError):
        torch.empty(a_twentieth, dtype=torch.uint8, device="cuda")
    with reproducible(Runtime(device="cuda")):
        torch.empty(a_twentieth, dtype=torch.uint8, device="cuda")
