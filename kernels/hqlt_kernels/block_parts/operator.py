"""The public functions and their plain PyTorch forms, which are also the definitions.

On a CUDA device, in 16 bits or float32, a Triton kernel computes each in one pass over its tensors. A parameter may
have a replica axis in front of its own; the rows of x (its first axis) are then those of the first replica, then those
of the second, as many of each.
"""

import importlib.util

import torch
from torch import Tensor
from torch.nn import functional

_TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None


def has_kernel(x: Tensor, weight: Tensor | None = None) -> bool:
    """Whether a Triton kernel can take these."""
    return (
        x.is_cuda
        and _TRITON_IS_INSTALLED
        and x.dtype != torch.float64
        and (weight is None or weight.dtype != torch.float64)
        and x.numel() > 0
    )


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, gate: Tensor | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis, in the type of `weight`; times SiLU(gate) if given.

    `weight` is [D] or [replicas, D]. With x [..., H, D], `gate` is [..., H D]. Returned in the type of `x`; on a GPU
    under autocast in the narrow type, which is what a matrix product would make of it.
    """
    if has_kernel(x, weight):
        from hqlt_kernels.block_parts import triton_operator

        return triton_operator.rms_norm(x, None, weight, gate, epsilon)[0]
    y = x.to(weight.dtype)
    if weight.dim() == 1:
        y = functional.rms_norm(y, weight.shape, weight, epsilon)
    else:
        y = functional.rms_norm(y, weight.shape[1:], None, epsilon)
        y = (y.reshape(len(weight), -1, x.shape[-1]) * weight.unsqueeze(1)).view(x.shape)
    y = y.to(x.dtype)
    return y if gate is None else y * functional.silu(gate).view(y.shape)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x + delta, and its `rms_norm`."""
    if has_kernel(x, weight):
        from hqlt_kernels.block_parts import triton_operator

        normed, total = triton_operator.rms_norm(x, delta, weight, None, epsilon)
        return total, normed
    total = x + delta
    return total, rms_norm(total, weight, epsilon)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up; one shape."""
    if has_kernel(gate):
        from hqlt_kernels.block_parts import triton_operator

        return triton_operator.swiglu(gate, up)
    return functional.silu(gate) * up
