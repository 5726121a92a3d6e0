"""The kernels of triton_kernels.py as custom operators with autograd, opaque to `torch.compile`, which sees fakes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from hqlt_kernels.projections import triton_kernels as kernels
from hqlt_kernels.triton_device import on_its_device
from hqlt_kernels.triton_eager import eager_operator, nobody_looks_on

PROGRAMS = 528
"""That share the rows of a sum, four for each of an H200's multiprocessors; a constant, so that sums are too."""
BLOCK = 64
SPLIT_ROWS, GRADIENT_ROWS = 64, 128
"""The quickest of twelve tiles each at 1024 x 39 tokens and 384 + 260 columns on an H200, four warps; see README.md."""


def sum_parts(parts: Tensor, total: Tensor) -> None:
    """total = the sum of parts [replicas, parts, ...] over its second axis; contiguous, in a fixed order."""
    replicas, n_parts = parts.shape[:2]
    n = parts.numel() // (replicas * n_parts)
    kernels.sum_kernel[(triton.cdiv(n, 32), replicas)](parts, total, n_parts, n, BLOCK=32, PARTS=128)


def _replicas(parameter: Tensor, own_axes: int) -> int:
    return 1 if parameter.dim() == own_axes else len(parameter)


def _replica_stride(parameter: Tensor, own_axes: int) -> tuple[Tensor, int]:
    """A parameter whose replicas are contiguous, and the elements from one to the next."""
    if parameter.dim() == own_axes:
        return parameter.contiguous(), 0
    if not parameter[0].is_contiguous():
        parameter = parameter.contiguous()
    return parameter, parameter.stride(0)


def split_projections(rows: Tensor, filters: Tensor, widths: tuple[int, ...], activate: bool) -> tuple[Tensor, ...]:
    """The seven parts, contiguous."""
    run = eager_split if nobody_looks_on(rows) else split_forward
    return tuple(run(rows, filters, list(widths), activate, torch.is_grad_enabled())[:7])


@on_its_device
def run_split(rows: Tensor, filters: Tensor, widths: list[int], activate: bool, save: bool) -> list[Tensor]:
    """The seven parts, and the third before SiLU (empty where it is not kept)."""
    outputs = _fake_split(rows, filters, widths, activate, save)
    q, k, v, beta, decay, mixing, gate, before_silu = outputs
    flat = rows.flatten(0, 1)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    filters, filter_stride = _replica_stride(filters, 2)
    replicas, taps = _replicas(filters, 2), filters.shape[-1]
    per_replica = len(flat) // replicas
    n_filtered = sum(triton.cdiv(width, BLOCK) for width in widths[:3])
    n_blocks = n_filtered + sum(triton.cdiv(width, BLOCK) for width in widths[3:])
    kernels.split_kernel[(triton.cdiv(per_replica, SPLIT_ROWS), n_blocks, replicas)](
        flat, filters, q, k, v, before_silu, beta, decay, mixing, gate, rows.shape[1], per_replica, flat.stride(0),
        filter_stride, *widths, TAPS=taps, ROWS=SPLIT_ROWS, BLOCK=BLOCK, FILTERED=n_filtered,
        ACTIVATE=activate, SAVE=before_silu.numel() > 0,
    )  # fmt: skip
    return outputs


def _fake_split(rows: Tensor, filters: Tensor, widths: list[int], activate: bool, save: bool) -> list[Tensor]:
    parts = [rows.new_empty(*rows.shape[:-1], width) for width in widths]
    return [*parts, torch.empty_like(parts[2]) if activate and save else rows.new_empty(0)]


def run_split_gradient(
    rows: Tensor, filters: Tensor, before_silu: Tensor, grads: list[Tensor], activate: bool
) -> list[Tensor]:
    """Gradients of rows and filters."""
    drows, dfilters = _fake_split_gradient(rows, filters, before_silu, grads, activate)
    flat = rows.flatten(0, 1)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    widths = [grad.shape[-1] for grad in grads]
    unused = rows.shape[-1] - sum(widths)
    filters, filter_stride = _replica_stride(filters, 2)
    replicas, taps = _replicas(filters, 2), filters.shape[-1]
    per_replica = len(flat) // replicas
    n_filtered = sum(triton.cdiv(width, BLOCK) for width in widths[:3])
    n_blocks = n_filtered + sum(triton.cdiv(width, BLOCK) for width in [*widths[3:], unused])
    programs = triton.cdiv(per_replica, GRADIENT_ROWS)
    parts = torch.empty(replicas, programs, *filters.shape[-2:], dtype=torch.float32, device=rows.device)
    kernels.split_gradient_kernel[(programs, n_blocks, replicas)](
        flat, filters, *grads[:3], before_silu, *grads[3:], drows, parts, rows.shape[1], per_replica, flat.stride(0),
        filter_stride, *widths, UNUSED=unused, TAPS=taps, ROWS=GRADIENT_ROWS, BLOCK=BLOCK, FILTERED=n_filtered,
        ACTIVATE=activate,
    )  # fmt: skip
    sum_parts(parts, dfilters)
    return [drows, dfilters]


def _fake_split_gradient(
    rows: Tensor, filters: Tensor, before_silu: Tensor, grads: list[Tensor], activate: bool
) -> list[Tensor]:
    return [rows.new_empty(rows.shape), filters.new_empty(filters.shape)]


def _setup_split(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    rows, filters, _, ctx.activate, _ = inputs
    ctx.save_for_backward(rows, filters, output[7])


def _split_backward(run: Callable[..., list[Tensor]], ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    rows, filters, before_silu = ctx.saved_tensors
    return *run(rows, filters, before_silu, [g.contiguous() for g in grads[:7]], ctx.activate), None, None, None


split_forward = torch.library.custom_op("hqlt::split_projections", run_split, mutates_args=())
split_forward.register_fake(_fake_split)
split_backward = torch.library.custom_op("hqlt::split_projections_backward", run_split_gradient, mutates_args=())
split_backward.register_fake(_fake_split_gradient)
split_forward.register_autograd(
    lambda ctx, grads: _split_backward(split_backward, ctx, grads), setup_context=_setup_split
)
eager_split = eager_operator(
    run_split, _setup_split, lambda ctx, *grads: _split_backward(run_split_gradient, ctx, grads), 8
)


def take_rows(x: Tensor, at: Tensor) -> Tensor:
    """The rows `at` of x."""
    run = eager_take if nobody_looks_on(x) else take_forward
    y: Tensor = run(x, at)[0]
    return y


def run_take(x: Tensor, at: Tensor) -> list[Tensor]:
    return [x.index_select(0, at)]


def run_put(dy: Tensor, at: Tensor, n: int) -> list[Tensor]:
    """Zeros [n, ...] with dy in the rows `at`."""
    dx = dy.new_zeros(n, *dy.shape[1:])
    width = dx[0].numel()  # dy may have no rows
    kernels.scatter_kernel[(len(dy),)](
        dy, at.contiguous(), dx, D=width, BLOCK=triton.next_power_of_2(width), num_warps=1
    )
    return [dx]


def _setup_take(ctx: Any, inputs: tuple[Tensor, Tensor], output: Sequence[Tensor]) -> None:
    x, at = inputs
    ctx.save_for_backward(at)
    ctx.n = len(x)


def _take_backward(run: Callable[..., list[Tensor]], ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    (at,) = ctx.saved_tensors
    return run(grads[0].contiguous(), at, ctx.n)[0], None


take_forward = torch.library.custom_op("hqlt::take_rows", run_take, mutates_args=())
take_forward.register_fake(lambda x, at: [x.new_empty(len(at), *x.shape[1:])])
take_backward = torch.library.custom_op("hqlt::put_rows", run_put, mutates_args=())
take_backward.register_fake(lambda dy, at, n: [dy.new_empty(n, *dy.shape[1:])])
take_forward.register_autograd(lambda ctx, grads: _take_backward(take_backward, ctx, grads), setup_context=_setup_take)
eager_take = eager_operator(run_take, _setup_take, lambda ctx, *grads: _take_backward(run_put, ctx, grads), 1)


def embed(tokens: Tensor, weight: Tensor) -> Tensor:
    """Rows of `weight`, in autocast's type where that is on."""
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    run = eager_embed if nobody_looks_on(weight) else embed_forward
    y: Tensor = run(tokens.contiguous(), weight, dtype)[0]
    return y


@on_its_device
def run_embed(tokens: Tensor, weight: Tensor, dtype: torch.dtype) -> list[Tensor]:
    (y,) = _fake_embed(tokens, weight, dtype)
    width, replicas = weight.shape[-1], _replicas(weight, 2)
    weight, weight_stride = _replica_stride(weight, 2)
    per_replica, block = tokens.numel() // replicas, triton.next_power_of_2(width)
    rows = max(1, 2048 // block)
    kernels.embed_kernel[(triton.cdiv(per_replica, rows), replicas)](
        tokens, weight, y, per_replica, weight_stride, D=width, ROWS=rows, BLOCK=block
    )
    return [y]


def _fake_embed(tokens: Tensor, weight: Tensor, dtype: torch.dtype) -> list[Tensor]:
    return [weight.new_empty(*tokens.shape, weight.shape[-1], dtype=dtype)]


def run_embed_gradient(tokens: Tensor, dy: Tensor, shape: list[int], dtype: torch.dtype) -> list[Tensor]:
    """The gradient of a weight of this shape and type."""
    n_tokens, width = shape[-2:]
    replicas = 1 if len(shape) == 2 else shape[0]
    per_replica, rows, block = tokens.numel() // replicas, 32, 64
    n_blocks = triton.cdiv(width, block)
    programs = min(triton.cdiv(per_replica, rows), max(1, PROGRAMS // (n_blocks * replicas)))
    parts = torch.empty(replicas, programs, n_tokens, width, dtype=torch.float32, device=dy.device)
    kernels.embed_gradient_kernel[(programs, n_blocks, replicas)](
        tokens, dy, parts, per_replica, V=n_tokens, D=width, V_PADDED=max(16, triton.next_power_of_2(n_tokens)),
        ROWS=rows, BLOCK=block,
    )  # fmt: skip
    dweight = torch.empty(shape, dtype=dtype, device=dy.device)
    sum_parts(parts, dweight)
    return [dweight]


def _setup_embed(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    tokens, weight, _ = inputs
    ctx.save_for_backward(tokens)
    ctx.shape, ctx.dtype = list(weight.shape), weight.dtype


def _embed_backward(run: Callable[..., list[Tensor]], ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    (tokens,) = ctx.saved_tensors
    return None, run(tokens, grads[0].contiguous(), ctx.shape, ctx.dtype)[0], None


embed_forward = torch.library.custom_op("hqlt::embed", run_embed, mutates_args=())
embed_forward.register_fake(_fake_embed)
embed_backward = torch.library.custom_op("hqlt::embed_backward", run_embed_gradient, mutates_args=())
embed_backward.register_fake(lambda tokens, dy, shape, dtype: [dy.new_empty(shape, dtype=dtype)])
embed_forward.register_autograd(
    lambda ctx, grads: _embed_backward(embed_backward, ctx, grads), setup_context=_setup_embed
)
eager_embed = eager_operator(
    run_embed, _setup_embed, lambda ctx, *grads: _embed_backward(run_embed_gradient, ctx, grads), 1
)
