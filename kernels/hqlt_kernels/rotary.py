"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

Entry i of the first half of a vector and entry i of the second are one plane, turned by position * base^(-2 i / D):
the pairing of GPT-NeoX, which the released code of arXiv:2506.00744 uses.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hqlt_kernels.functions import quick_to_apply
from hqlt_kernels.precision import compute_dtype

LONGEST_REMEMBERED = 2**14  # positions of a table that is kept: 16 MiB for both halves at width 128


def rotate(x: Tensor, base: float, position: int = 0) -> Tensor:
    """`x` [B, T, ..., D] turned along axis 1; `position` is the absolute position of its first token. D is even.

    Inner products of rotated vectors depend on the distance of their positions only. Computed in float32, or float64
    if `x` is; returned in the dtype of `x`. Works under `torch.func.vmap`.

    Raises:
        ValueError: D is odd.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"rotary position embedding needs an even width, got {x.shape[-1]}")
    y: Tensor = _Rotation.apply(x.to(compute_dtype(x)), base, position, 1)  # type: ignore[no-untyped-call]
    return y.to(x.dtype)


@quick_to_apply
class _Rotation(torch.autograd.Function):
    """x, base, position of the first token, index of the time axis -> x turned. The gradient is turned back."""

    @staticmethod
    def forward(x: Tensor, base: float, position: int, time_axis: int) -> Tensor:
        return _turn(x, base, position, time_axis, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *ctx.arguments = inputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        base, position, time_axis = ctx.arguments
        return _turn(grad_y, base, position, time_axis, -1), None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: Tensor, base: float, position: int, time_axis: int
    ) -> tuple[Tensor, int]:
        x = x.movedim(in_dims[0], 0)
        y: Tensor = _Rotation.apply(x, base, position, time_axis + 1)  # type: ignore[no-untyped-call]
        return y, 0


def _turn(x: Tensor, base: float, position: int, time_axis: int, direction: int) -> Tensor:
    width, end = x.shape[-1], position + x.shape[time_axis]
    if end <= LONGEST_REMEMBERED:  # decoding asks for another position at every token
        first, last = 0, max(256, 1 << (end - 1).bit_length())
    else:
        first, last = position, end
    cos, sin = (table[position - first : end - first] for table in _tables(base, first, last, width, x.dtype, x.device))
    shape = (-1, *(1,) * (x.dim() - time_axis - 2), width)
    return (x * cos.view(shape)).addcmul_(x.roll(width // 2, -1), sin.view(shape), value=direction)


@lru_cache(maxsize=16)
def _tables(
    base: float, first: int, last: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles at positions first to last - 1, [positions, D].

    sin is negative in the first half, which takes minus the second. Angles are computed in float64: in float32 a
    position of a million is already off by a tenth of a radian.
    """
    with torch.inference_mode(False):  # what is remembered must serve training too
        frequencies = base ** -(torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
        angles = torch.outer(torch.arange(first, last, dtype=torch.float64, device=device), frequencies)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)
