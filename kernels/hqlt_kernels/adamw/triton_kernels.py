"""The Triton kernel of AdamW; see operator.py."""

# What is inside @triton.jit is not Python to a type checker.
# mypy: ignore-errors

import triton
import triton.language as tl
from torch import Tensor

from hqlt_kernels.triton_device import on_its_device


@triton.jit
def _one_minus_power(log_beta, n):
    """1 - beta^n, also where it is small: 0.001 at the first step of beta 0.999."""
    x = n * log_beta
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
    return tl.where(x > -0.3, -series, 1 - tl.exp(x))


@triton.jit
def adamw_kernel(
    weights, gradients, means, squares, steps, rates, factors, takes, settings, n, n_decayed, BLOCK: tl.constexpr
):
    """One replica and BLOCK of its parameters. `steps` counts those before this one."""
    replica = tl.program_id(1)
    if tl.load(takes + replica) != 0:
        settings += replica * 6
        beta1 = tl.load(settings)
        beta2 = tl.load(settings + 1)
        epsilon = tl.load(settings + 2)
        weight_decay = tl.load(settings + 3)
        step = tl.load(steps + replica) + 1
        # The logarithm of a beta of 0 is given as 0.
        bias1 = tl.where(beta1 > 0, _one_minus_power(tl.load(settings + 4), step), 1.0)
        bias2 = tl.where(beta2 > 0, _one_minus_power(tl.load(settings + 5), step), 1.0)
        rate = tl.load(rates + replica)
        own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        ok = own < n
        at = replica.to(tl.int64) * n + own
        g = tl.load(gradients + at, mask=ok, other=0.0) * tl.load(factors + replica)
        m = tl.load(means + at, mask=ok, other=0.0)
        v = tl.load(squares + at, mask=ok, other=0.0)
        w = tl.load(weights + at, mask=ok, other=0.0)
        m += (1 - beta1) * (g - m)
        v += (1 - beta2) * (g * g - v)
        w *= 1 - tl.where(own < n_decayed, rate * weight_decay, 0.0)
        w -= rate / bias1 * m / (tl.sqrt(v) / tl.sqrt(bias2) + epsilon)
        tl.store(means + at, m, mask=ok)
        tl.store(squares + at, v, mask=ok)
        tl.store(weights + at, w, mask=ok)


@on_its_device
def run_adamw_(
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
    replicas, n = weights.shape
    adamw_kernel[(triton.cdiv(n, 1024), replicas)](
        weights, gradients, means, squares, steps, rates, factors, takes, settings, n, n_decayed, BLOCK=1024
    )
    steps += takes
