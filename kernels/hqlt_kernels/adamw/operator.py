"""The public function and its plain PyTorch form, which is also the definition."""

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

_TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class Settings:
    """What AdamW is told, but for the learning rate."""

    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float

    @staticmethod
    def table(settings: Sequence["Settings"], like: Tensor) -> Tensor:
        """[replicas, 6], as `adamw_` reads it: the four, and the logarithms of both betas (0 of a beta of 0)."""
        rows = [(*astuple(s), *(math.log(beta) if beta else 0.0 for beta in (s.beta1, s.beta2))) for s in settings]
        return torch.tensor(rows, dtype=like.dtype, device=like.device)


def adamw_(
    weights: Tensor,
    gradients: Tensor,
    means: Tensor,
    squares: Tensor,
    steps: Tensor,
    rates: Tensor,
    factors: Tensor,
    takes: Tensor,
    settings: Tensor,
    n_decayed: int,
) -> None:
    """A step of AdamW for R models of P parameters each, in place: weights, means, squares [R, P] and steps [R].

        m = beta1 m + (1 - beta1) g    v = beta2 v + (1 - beta2) g^2    with g = factor * gradient
        w = (1 - rate * weight_decay) w - rate / (1 - beta1^n) m / (sqrt(v / (1 - beta2^n)) + epsilon)    n: steps taken

    Rates, factors and `takes` (bool) are [R]; nothing of a model changes that does not take the step, whatever its
    gradient holds. The first `n_decayed` parameters decay. Loshchilov and Hutter 2019, arXiv:1711.05101.
    """
    if weights.is_cuda and _TRITON_IS_INSTALLED and weights.dtype == torch.float32:
        from hqlt_kernels.adamw.triton_kernels import run_adamw_

        run_adamw_(weights, gradients, means, squares, steps, rates, factors, takes, settings, n_decayed)
        return
    beta1, beta2, epsilon, weight_decay = settings[:, :4, None].unbind(1)
    takes, rates = takes[:, None], rates[:, None]
    steps += takes[:, 0]
    n = steps[:, None].to(weights.dtype)
    g = torch.where(takes, gradients * factors[:, None], 0)
    m, v = means + (1 - beta1) * (g - means), squares + (1 - beta2) * (g * g - squares)
    decay = rates * weight_decay * (torch.arange(weights.shape[1], device=weights.device) < n_decayed)
    new = weights * (1 - decay) - rates / (1 - beta1**n) * m / ((v / (1 - beta2**n)).sqrt() + epsilon)
    for old, value in ((means, m), (squares, v), (weights, new)):
        old.copy_(torch.where(takes, value, old))
