"""AdamW of many models at once is torch.optim.AdamW on each."""

import pytest
import torch
from hqlt_kernels.adamw import Settings, adamw_
from torch import Tensor
from triton_cases import DEVICE

SETTINGS = [Settings(0.9, 0.999, 1e-8, 0.1), Settings(0.0, 0.95, 1e-3, 0.0)]
N, N_DECAYED = 1500, 1100


def problem(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, N, generator=generator, dtype=torch.float64)
    gradients = [torch.randn(2, N, generator=generator, dtype=torch.float64) for _ in range(5)]
    return weights.to(DEVICE, dtype), [g.to(DEVICE, dtype) for g in gradients]


def torchs(weights: Tensor, gradients: list[Tensor], takes: list[list[bool]], rates: list[float]) -> Tensor:
    """Each model by torch, which takes the gradient halved."""
    for i, s in enumerate(SETTINGS):
        parts = [weights[i, :N_DECAYED], weights[i, N_DECAYED:]]
        groups = [{"params": [p], "weight_decay": wd} for p, wd in zip(parts, (s.weight_decay, 0.0), strict=True)]
        optimiser = torch.optim.AdamW(groups, lr=rates[i], betas=(s.beta1, s.beta2), eps=s.epsilon)
        for gradient, takes_now in zip(gradients, takes, strict=True):
            parts[0].grad, parts[1].grad = gradient[i, :N_DECAYED] / 2, gradient[i, N_DECAYED:] / 2
            if takes_now[i]:
                optimiser.step()
    return weights


@pytest.mark.parametrize(
    ("form", "dtype", "tolerance"),
    [("plain", torch.float64, 1e-13), ("plain", torch.float32, 3e-7), ("kernel", torch.float32, 3e-7)],
    ids=str,
)
def test_it_is_torchs_adamw_on_every_model_that_takes_the_step(form: str, dtype: torch.dtype, tolerance: float) -> None:
    weights, gradients = problem(dtype)
    takes = [[True, True], [True, False], [True, True], [False, True], [True, True]]
    rates = [0.01, 0.003]
    truth = torchs(weights.double(), [g.double() for g in gradients], takes, rates)
    means, squares, steps = torch.zeros_like(weights), torch.zeros_like(weights), weights.new_zeros(2)
    for gradient, takes_now in zip(gradients, takes, strict=True):
        held = torch.where(torch.tensor(takes_now, device=DEVICE)[:, None], gradient, torch.nan)
        arguments = (
            weights, held, means, squares, steps, weights.new_tensor(rates), weights.new_full((2,), 0.5),
            torch.tensor(takes_now, device=DEVICE), Settings.table(SETTINGS, weights), N_DECAYED,
        )  # fmt: skip
        if form == "plain":
            adamw_(*arguments)
        else:
            from hqlt_kernels.adamw.triton_kernels import run_adamw_

            run_adamw_(*arguments)
    assert steps.tolist() == [4, 4]
    assert (weights.double() - truth).abs().max() <= tolerance * truth.abs().max()
