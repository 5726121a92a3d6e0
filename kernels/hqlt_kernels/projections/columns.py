"""The columns of one projection as tensors of their own, and their gradients as the columns of one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from hqlt_kernels.block_parts.operator import has_kernel
from hqlt_kernels.triton_eager import nobody_looks_on


def split_columns(rows: Tensor, widths: Sequence[int], activated: int | None = None) -> tuple[Tensor, ...]:
    """`rows` [..., C] as one [..., width] for each of `widths`, which need not reach C; SiLU of the part `activated`.

    On a GPU the parts are contiguous and nothing keeps `rows`: not even SiLU, which keeps its own columns.
    """
    if len(widths) == 1 and widths[0] == rows.shape[-1] and activated is None:
        return (rows,)
    if has_kernel(rows) and nobody_looks_on(rows):
        split: tuple[Tensor, ...] = _SplitColumns.apply(rows, activated, *widths)  # type: ignore[no-untyped-call]
        return split
    parts = list(torch.split(rows[..., : sum(widths)], list(widths), dim=-1))
    if activated is not None:
        parts[activated] = functional.silu(parts[activated])
    return tuple(parts)


class _SplitColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, activated: int | None, *widths: int) -> tuple[Tensor, ...]:
        from hqlt_kernels.projections.triton_columns import copy_columns

        parts = tuple(rows.new_empty(*rows.shape[:-1], width) for width in widths)
        before = rows.new_empty(0) if activated is None else torch.empty_like(parts[activated])
        for i, (part, columns) in enumerate(zip(parts, _columns(rows, widths), strict=False)):
            copy_columns(columns, part.flatten(0, -2), before, "activate" if i == activated else "copy")
        ctx.save_for_backward(before)
        ctx.shape, ctx.activated, ctx.widths = rows.shape, activated, widths
        return parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dparts: Tensor) -> tuple[Tensor | None, ...]:
        from hqlt_kernels.projections.triton_columns import copy_columns

        (before,) = ctx.saved_tensors
        drows = dparts[0].new_empty(ctx.shape)
        *targets, unused = _columns(drows, ctx.widths)
        for i, (dpart, target) in enumerate(zip(dparts, targets, strict=True)):
            copy_columns(dpart.reshape(target.shape), target, before, "slope" if i == ctx.activated else "copy")
        unused.zero_()
        return drows, None, *(None for _ in ctx.widths)


def _columns(rows: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
    """Views [N, width] of [..., C], and one of what is left."""
    flat = rows.flatten(0, -2)
    return torch.split(flat, [*widths, flat.shape[1] - sum(widths)], dim=1)
