"""The kernels of triton_kernels.py as custom operators with autograd, opaque to `torch.compile`, which sees fakes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from hqlt_kernels.block_parts import triton_kernels as kernels
from hqlt_kernels.projections.triton_operator import sum_parts
from hqlt_kernels.triton_device import on_its_device
from hqlt_kernels.triton_eager import eager_operator, nobody_looks_on

ELEMENTS = 2048
"""In a tile: sixteen a thread at four warps."""
PROGRAMS = 528
"""That share the rows of a sum, four for each of an H200's multiprocessors; a constant, so that sums are too."""


def narrow(x: Tensor) -> torch.dtype:
    """The type that a matrix product will read `x` in."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def _replicas(parameter: Tensor, own_axes: int) -> int:
    return 1 if parameter.dim() == own_axes else len(parameter)


def _rows(x: Tensor) -> Tensor:
    """[..., C] as [N, C] with a stride between rows; copied only where that is no view."""
    rows = x.flatten(0, -2)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, gate: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    """The norm, and x + delta (empty without delta)."""
    run = eager_norm if nobody_looks_on(x) else norm_forward
    y, total = run(x.contiguous(), None if delta is None else delta.contiguous(), weight, gate, epsilon, narrow(x))
    return y, total


@on_its_device
def run_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, gate: Tensor | None, epsilon: float, dtype: torch.dtype
) -> list[Tensor]:
    y, total = _fake_norm(x, delta, weight, gate, epsilon, dtype)
    width, replicas = x.shape[-1], _replicas(weight, 1)
    per_replica = x.numel() // width // replicas
    block = triton.next_power_of_2(width)
    rows = max(1, ELEMENTS // block)
    gates = None if gate is None else _rows(gate)
    kernels.norm_kernel[(triton.cdiv(per_replica, rows), replicas)](
        x, delta, weight, gates, total, y, per_replica, weight.stride(0), 0 if gates is None else gates.stride(0),
        EPSILON=epsilon, D=width, H=1 if gates is None else gates.shape[1] // width, ROWS=rows, BLOCK=block,
        ADD=delta is not None, GATE=gate is not None,
    )  # fmt: skip
    return [y, total]


def _fake_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, gate: Tensor | None, epsilon: float, dtype: torch.dtype
) -> list[Tensor]:
    return [torch.empty_like(x, dtype=dtype), x.new_empty(0) if delta is None else torch.empty_like(x)]


def run_norm_gradient(
    total: Tensor, weight: Tensor, gate: Tensor | None, dy: Tensor, dtotal: Tensor | None,
    epsilon: float, delta_dtype: torch.dtype | None, again: torch.dtype | None = None,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, delta, weight and gate, and the norm `again`, in that type; empty where there is none."""
    dx, ddelta, dweight, dgate, y = _fake_norm_gradient(total, weight, gate, dy, dtotal, epsilon, delta_dtype, again)
    width, replicas = total.shape[-1], _replicas(weight, 1)
    per_replica = total.numel() // width // replicas
    block = triton.next_power_of_2(width)
    rows = max(1, ELEMENTS // block)
    programs = min(triton.cdiv(per_replica, rows), max(1, PROGRAMS // replicas))
    partial = torch.empty(replicas, programs, width, dtype=torch.float32, device=total.device)
    gates = None if gate is None else _rows(gate)
    kernels.norm_gradient_kernel[(programs, replicas)](
        total, weight, gates, dy, dtotal, dx, ddelta, dgate, partial, y, per_replica, weight.stride(0),
        0 if gates is None else gates.stride(0),
        EPSILON=epsilon, D=width, H=1 if gates is None else gates.shape[1] // width, ROWS=rows, BLOCK=block,
        ADD=delta_dtype is not None, HAS_DTOTAL=dtotal is not None, GATE=gate is not None, AGAIN=again is not None,
    )  # fmt: skip
    sum_parts(partial, dweight)
    return [dx, ddelta, dweight, dgate, y]


def _fake_norm_gradient(
    total: Tensor, weight: Tensor, gate: Tensor | None, dy: Tensor, dtotal: Tensor | None,
    epsilon: float, delta_dtype: torch.dtype | None, again: torch.dtype | None = None,
) -> list[Tensor]:  # fmt: skip
    return [
        torch.empty_like(total),
        total.new_empty(0) if delta_dtype is None else torch.empty_like(total, dtype=delta_dtype),
        torch.empty_like(weight, memory_format=torch.contiguous_format),
        total.new_empty(0) if gate is None else torch.empty_like(gate, memory_format=torch.contiguous_format),
        total.new_empty(0) if again is None else torch.empty_like(total, dtype=again),
    ]


def _setup_norm(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    x, delta, weight, gate, ctx.epsilon, _ = inputs
    ctx.save_for_backward(x if delta is None else output[1], weight, gate)
    ctx.delta_dtype = None if delta is None else delta.dtype
    ctx.set_materialize_grads(False)


def _norm_backward(run: Callable[..., list[Tensor]], ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    total, weight, gate = ctx.saved_tensors
    dy, dtotal = grads
    dy = torch.zeros_like(total) if dy is None else dy.contiguous()
    dtotal = None if dtotal is None or not dtotal.numel() else dtotal.contiguous()
    dx, ddelta, dweight, dgate, _ = run(total, weight, gate, dy, dtotal, ctx.epsilon, ctx.delta_dtype)
    return dx, None if ctx.delta_dtype is None else ddelta, dweight, None if gate is None else dgate, None, None


norm_forward = torch.library.custom_op("hqlt::rms_norm", run_norm, mutates_args=())
norm_forward.register_fake(_fake_norm)
norm_backward = torch.library.custom_op("hqlt::rms_norm_backward", run_norm_gradient, mutates_args=())
norm_backward.register_fake(_fake_norm_gradient)
norm_forward.register_autograd(lambda ctx, grads: _norm_backward(norm_backward, ctx, grads), setup_context=_setup_norm)
eager_norm = eager_operator(run_norm, _setup_norm, lambda ctx, *grads: _norm_backward(run_norm_gradient, ctx, grads), 2)


@on_its_device
def run_mix_norm(kv: Tensor, fw: Tensor, logits: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    """The norm of kv + sigmoid(logits) (fw - kv), all [..., D] and contiguous."""
    y = torch.empty_like(kv, dtype=dtype)
    width, replicas = kv.shape[-1], _replicas(weight, 1)
    per_replica = kv.numel() // width // replicas
    block = triton.next_power_of_2(width)
    rows = max(1, ELEMENTS // block)
    kernels.mix_norm_kernel[(triton.cdiv(per_replica, rows), replicas)](
        kv, fw, logits, weight, y, per_replica, weight.stride(0), EPSILON=epsilon, D=width, ROWS=rows, BLOCK=block
    )
    return y


def run_mix_norm_gradient(
    kv: Tensor, fw: Tensor, logits: Tensor, weight: Tensor, dy: Tensor, epsilon: float, again: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of kv, fw, logits and weight, and the forward's output in the type `again`."""
    dkv, dfw, dlogits = torch.empty_like(kv), torch.empty_like(fw), torch.empty_like(logits)
    y = torch.empty_like(kv, dtype=again)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    width, replicas = kv.shape[-1], _replicas(weight, 1)
    per_replica = kv.numel() // width // replicas
    block = triton.next_power_of_2(width)
    rows = max(1, ELEMENTS // block)
    programs = min(triton.cdiv(per_replica, rows), max(1, PROGRAMS // replicas))
    partial = torch.empty(replicas, programs, width, dtype=torch.float32, device=kv.device)
    kernels.mix_norm_gradient_kernel[(programs, replicas)](
        kv, fw, logits, weight, dy, dkv, dfw, dlogits, partial, y, per_replica, weight.stride(0),
        EPSILON=epsilon, D=width, ROWS=rows, BLOCK=block,
    )  # fmt: skip
    sum_parts(partial, dweight)
    return dkv, dfw, dlogits, dweight, y


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) up."""
    run = eager_swiglu if nobody_looks_on(gate) else swiglu_forward
    y: Tensor = run(gate.contiguous(), up.contiguous())[0]
    return y


@on_its_device
def run_swiglu(gate: Tensor, up: Tensor) -> list[Tensor]:
    y = torch.empty_like(gate)
    n = y.numel()
    kernels.swiglu_kernel[(triton.cdiv(n, ELEMENTS),)](gate, up, y, n, BLOCK=ELEMENTS)
    return [y]


def run_swiglu_gradient(gate: Tensor, up: Tensor, dy: Tensor) -> list[Tensor]:
    """Gradients of gate and up."""
    return _swiglu_gradient(gate, up, dy, None)


def run_swiglu_gradient_(gate: Tensor, up: Tensor, dy: Tensor) -> list[Tensor]:
    """The same, and the forward's output takes the place of `dy`: where this runs, a step needs most memory."""
    return _swiglu_gradient(gate, up, dy, dy)


def _swiglu_gradient(gate: Tensor, up: Tensor, dy: Tensor, y: Tensor | None) -> list[Tensor]:
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    n = gate.numel()
    kernels.swiglu_gradient_kernel[(triton.cdiv(n, ELEMENTS),)](
        gate, up, dy, dgate, dup, y, n, BLOCK=ELEMENTS, AGAIN=y is not None
    )
    return [dgate, dup]


def _setup_swiglu(ctx: Any, inputs: tuple[Tensor, Tensor], output: Sequence[Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_backward(run: Callable[..., list[Tensor]], ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    return tuple(run(*ctx.saved_tensors, grads[0].contiguous()))


swiglu_forward = torch.library.custom_op("hqlt::swiglu", run_swiglu, mutates_args=())
swiglu_forward.register_fake(lambda gate, up: [torch.empty_like(gate)])
swiglu_backward = torch.library.custom_op("hqlt::swiglu_backward", run_swiglu_gradient, mutates_args=())
swiglu_backward.register_fake(lambda gate, up, dy: [torch.empty_like(gate), torch.empty_like(up)])
swiglu_forward.register_autograd(
    lambda ctx, grads: _swiglu_backward(swiglu_backward, ctx, grads), setup_context=_setup_swiglu
)
eager_swiglu = eager_operator(
    run_swiglu, _setup_swiglu, lambda ctx, *grads: _swiglu_backward(run_swiglu_gradient, ctx, grads), 1
)
