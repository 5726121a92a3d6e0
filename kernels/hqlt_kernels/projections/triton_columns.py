"""The kernel of columns.py."""

# What is inside @triton.jit is not Python to a type checker.
# mypy: ignore-errors

from typing import Literal

import triton
import triton.language as tl
from torch import Tensor

from hqlt_kernels.triton_device import on_its_device

ELEMENTS = 4096
"""In a tile: thirty-two a thread at four warps."""


@triton.jit
def columns_kernel(
    source, target, before, n, width, source_stride, target_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ACTIVATE: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """target = source, both [n, width] with a stride between rows. ACTIVATE: its SiLU, and `before` [n, width] keeps
    the source. SLOPE: the source times the slope of SiLU at `before`.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    ok = (row < n) & (column < width)
    x = tl.load(source + row * source_stride + column, mask=ok, other=0.0)
    if ACTIVATE:
        tl.store(before + row * width + column, x, mask=ok)
        wide = x.to(tl.float32)
        x = (wide * tl.sigmoid(wide)).to(x.dtype)
    if SLOPE:
        z = tl.load(before + row * width + column, mask=ok, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(z)
        x = (x.to(tl.float32) * sigmoid * (1 + z * (1 - sigmoid))).to(x.dtype)
    tl.store(target + row * target_stride + column, x, mask=ok)


@on_its_device
def copy_columns(source: Tensor, target: Tensor, before: Tensor, what: Literal["copy", "activate", "slope"]) -> None:
    """[N, C] to [N, C], whose last axes have stride 1; what else is done, see `columns_kernel`."""
    n, width = target.shape
    if not target.numel():
        return
    if source.stride(1) != 1 and width > 1:
        source = source.contiguous()
    block = min(512, triton.next_power_of_2(width))
    rows = ELEMENTS // block
    columns_kernel[(triton.cdiv(n, rows), triton.cdiv(width, block))](
        source, target, before, n, width, source.stride(0), target.stride(0),
        ROWS=rows, BLOCK=block, ACTIVATE=what == "activate", SLOPE=what == "slope",
    )  # fmt: skip
