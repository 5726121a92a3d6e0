"""Matrix products that read a norm or SwiGLU, without keeping what lies between.

    total = x + delta      y = rms_norm(total) SiLU(g)      out_i = y W_i^T
    y = rms_norm(kv + sigmoid(g) (fw - kv))          out = y W^T
    y = SiLU(gate) up                                out = y W^T

For the gradient of W autograd would keep y, which is as large as the tensors that it is made of. The kernels of the
backward have y in their registers anyway and write it once more: 2 bytes an element to write for 2 to keep. In a block
of the 340M model that is 385 of 1,900 MB at 32,768 tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from hqlt_kernels.block_parts.operator import add_rms_norm, has_kernel, rms_norm, swiglu
from hqlt_kernels.triton_eager import nobody_looks_on


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T over the last axis; `weight` [out, in], or [replicas, out, in] with the rows of x one replica's after the
    other's.
    """
    if weight.dim() == 2:
        return functional.linear(x, weight)
    return torch.bmm(_rows(x, weight), weight.mT).view(*x.shape[:-1], -1)


def norm_linear(
    x: Tensor,
    delta: Tensor | None,
    norm: Tensor,
    epsilon: float,
    weights: Sequence[Tensor],
    gate: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """x + delta (x without one), and the `linear` of its `rms_norm` with each of `weights`.

    With x [..., H, D] and weights that read H D columns, the heads are put one after the other.
    """
    if has_kernel(x, norm) and nobody_looks_on(x):
        total, *outs = _NormLinear.apply(x, delta, norm, gate, epsilon, *weights)  # type: ignore[no-untyped-call]
        return x if delta is None else total, tuple(outs)
    total, y = (x, rms_norm(x, norm, epsilon, gate)) if delta is None else add_rms_norm(x, delta, norm, epsilon)
    if y.shape[-1] != weights[0].shape[-1]:
        y = y.flatten(-2)
    return total, tuple(linear(y, weight) for weight in weights)


def mix_norm_linear(kv: Tensor, fw: Tensor, logits: Tensor, norm: Tensor, epsilon: float, weight: Tensor) -> Tensor:
    """The `linear` of the `rms_norm` of kv + sigmoid(logits) (fw - kv), [..., H, D] each, heads one after the other."""
    if has_kernel(kv, norm) and nobody_looks_on(kv):
        out: Tensor = _MixNormLinear.apply(kv, fw, logits, norm, epsilon, weight)  # type: ignore[no-untyped-call]
        return out
    mixed = torch.lerp(kv, fw, logits.sigmoid().to(kv.dtype))
    return linear(rms_norm(mixed, norm, epsilon).flatten(-2), weight)


def swiglu_linear(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """The `linear` of SiLU(gate) * up."""
    if has_kernel(gate) and nobody_looks_on(gate):
        out: Tensor = _SwiGLULinear.apply(gate, up, weight)  # type: ignore[no-untyped-call]
        return out
    return linear(swiglu(gate, up), weight)


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        delta: Tensor | None,
        norm: Tensor,
        gate: Tensor | None,
        epsilon: float,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        from hqlt_kernels.block_parts import triton_operator

        x, delta = x.contiguous(), None if delta is None else delta.contiguous()
        ctx.dtype = triton_operator.narrow(x)
        y, total = triton_operator.run_norm(x, delta, norm, gate, epsilon, ctx.dtype)
        ctx.save_for_backward(x if delta is None else total, norm, gate, *weights)
        ctx.epsilon, ctx.delta_dtype = epsilon, None if delta is None else delta.dtype
        if y.shape[-1] != weights[0].shape[-1]:
            y = y.flatten(-2)
        return (total, *(linear(y, weight.to(ctx.dtype)) for weight in weights))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor, *douts: Tensor) -> tuple[Tensor | None, ...]:
        from hqlt_kernels.block_parts import triton_operator

        total, norm, gate, *weights = ctx.saved_tensors
        dy = _input_gradient(douts, weights).view(total.shape)
        # x and delta have one gradient; it is written twice only where they differ in type.
        other_dtype = None if ctx.delta_dtype == total.dtype else ctx.delta_dtype
        dx, ddelta, dnorm, dgate, y = triton_operator.run_norm_gradient(
            total, norm, gate, dy, dtotal.contiguous() if dtotal.numel() else None, ctx.epsilon, other_dtype, ctx.dtype
        )
        dweights = (_weight_gradient(dout, y, weight) for dout, weight in zip(douts, weights, strict=True))
        return (
            dx,
            None if ctx.delta_dtype is None else dx if other_dtype is None else ddelta,
            dnorm,
            None if gate is None else dgate,
            None,
            *dweights,
        )


class _MixNormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kv: Tensor, fw: Tensor, logits: Tensor, norm: Tensor, epsilon: float, weight: Tensor
    ) -> Tensor:
        from hqlt_kernels.block_parts import triton_operator

        kv, fw, logits = kv.contiguous(), fw.contiguous(), logits.contiguous()
        ctx.save_for_backward(kv, fw, logits, norm, weight)
        ctx.epsilon, ctx.dtype = epsilon, triton_operator.narrow(kv)
        y = triton_operator.run_mix_norm(kv, fw, logits, norm, epsilon, ctx.dtype)
        return linear(y.flatten(-2), weight.to(ctx.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        from hqlt_kernels.block_parts import triton_operator

        kv, fw, logits, norm, weight = ctx.saved_tensors
        dy = _input_gradient([dout], [weight]).view(kv.shape)
        dkv, dfw, dlogits, dnorm, y = triton_operator.run_mix_norm_gradient(
            kv, fw, logits, norm, dy, ctx.epsilon, ctx.dtype
        )
        return dkv, dfw, dlogits, dnorm, None, _weight_gradient(dout, y, weight)


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        from hqlt_kernels.block_parts import triton_operator

        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up, weight)
        (y,) = triton_operator.run_swiglu(gate, up)
        return linear(y, weight.to(y.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
        from hqlt_kernels.block_parts import triton_operator

        gate, up, weight = ctx.saved_tensors
        dy = _input_gradient([dout], [weight]).view(gate.shape)
        dgate, dup = triton_operator.run_swiglu_gradient_(gate, up, dy)
        return dgate, dup, _weight_gradient(dout, dy, weight)


def _rows(x: Tensor, weight: Tensor) -> Tensor:
    """[..., C] as [N, C], or where the weight has replicas [replicas, N, C]."""
    return x.reshape(*weight.shape[:-2], -1, x.shape[-1])


def _input_gradient(douts: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The sum of dout_i W_i, one product adding to the one before."""
    narrow = [weight.to(douts[0].dtype) for weight in weights]
    dy = _rows(douts[0], weights[0]) @ narrow[0]
    for dout, weight in zip(douts[1:], narrow[1:], strict=True):
        add = dy.addmm_ if weight.dim() == 2 else dy.baddbmm_
        add(_rows(dout, weight), weight)
    return dy


def _weight_gradient(dout: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """dout^T y in the type of `weight`; on a GPU the product's float32 sums as they are."""
    left = _rows(dout, weight).mT
    right = y.reshape(*weight.shape[:-2], -1, weight.shape[-1])
    if not y.is_cuda or weight.dtype == y.dtype:
        return (left @ right).to(weight.dtype)
    product = torch.mm if weight.dim() == 2 else torch.bmm
    return product(left, right, out_dtype=weight.dtype)
