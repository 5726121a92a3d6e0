"""The loss of a head over many tokens: logits of some positions at a time, and at once turned into their gradient.

For a batch of 16 x 2048 positions and 32,000 tokens the logits would be 2 GiB, their float32 copy 4 GiB, and autograd
would keep both. Here a block of logits lives until the products with its gradient are done, so the backward has only
a factor to multiply by. No product is computed twice.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

BLOCK_LOGITS = 2**27
"""Most logits in memory at a time: a quarter of a GiB in 16 bits, and products still large enough for a whole GPU."""

_TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The sum over positions of the cross-entropy of softmax(weight x), in nats, for each of R replicas: [R].

        sum_n  log sum_v exp(weight_v . x_n) - weight_{targets_n} . x_n

    x [R, N, d], weight [R, V, d], targets int64 [R, N] in 0..V-1. Products are computed in the dtype of x, everything
    else in float32 or wider, which is the dtype of the result. Differentiable once, in x and weight. Positions that do
    not count are left out by the caller.
    """
    loss: Tensor = _LinearCrossEntropy.apply(x, weight, targets)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        n_replicas, n_positions, _ = x.shape
        narrow = weight.to(x.dtype)
        loss = x.new_zeros(n_replicas, dtype=torch.promote_types(x.dtype, torch.float32))
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight)
        n_blocks = -(-n_replicas * n_positions * weight.shape[1] // BLOCK_LOGITS)
        size = max(1, -(-n_positions // max(1, n_blocks)))
        for start in range(0, n_positions, size):
            rows = x[:, start : start + size]
            logits = torch.bmm(rows, narrow.mT)
            loss += softmax_gradient_(logits, targets[:, start : start + size]).sum(1)
            dx[:, start : start + size] = torch.bmm(logits, narrow)
            _add_product(dweight, logits.mT, rows)
        ctx.save_for_backward(dx, dweight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, Tensor, None]:
        dx, dweight = ctx.saved_tensors
        factor = dloss.view(-1, 1, 1)
        return dx * factor.to(dx.dtype), dweight * factor.to(dweight.dtype), None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b; on a GPU the product's float32 sums as they are."""
    if total.is_cuda and total.dtype == torch.float32 != a.dtype:
        torch.baddbmm(total, a, b, out_dtype=torch.float32, out=total)
    elif total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total += torch.bmm(a, b)


def softmax_gradient_(logits: Tensor, targets: Tensor) -> Tensor:
    """The losses [..., N] of logits [..., N, V], which are replaced by the gradient of their sum: softmax - one-hot."""
    if logits.is_cuda and _TRITON_IS_INSTALLED and logits.dtype != torch.float64:
        from hqlt_kernels.linear_cross_entropy.triton_kernels import run_softmax_gradient_

        return run_softmax_gradient_(logits, targets)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_softmax = functional.log_softmax(wide, -1)
    at_target = targets.unsqueeze(-1)
    losses = -log_softmax.gather(-1, at_target).squeeze(-1)
    gradient = log_softmax.exp_()
    logits.copy_(gradient.scatter_(-1, at_target, gradient.gather(-1, at_target) - 1))
    return losses
