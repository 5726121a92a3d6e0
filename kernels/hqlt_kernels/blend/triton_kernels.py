"""Triton kernels of the gated mix of two answers: mixed = sigmoid(gate) fw + (1 - sigmoid(gate)) kv."""

# What is inside @triton.jit is not Python to a type checker.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def mix_kernel(kv, fw, gate, mixed, n_elements, BLOCK: tl.constexpr):
    """All tensors are contiguous and of one shape."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < n_elements
    a = tl.load(kv + at, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(fw + at, mask=ok, other=0.0).to(tl.float32)
    s = tl.sigmoid(tl.load(gate + at, mask=ok, other=0.0).to(tl.float32))
    tl.store(mixed + at, (a + s * (b - a)).to(mixed.dtype.element_ty), mask=ok)


@triton.jit
def mix_gradient_kernel(
    kv, fw, gate, dmixed, dkv, dfw, dgate, n_elements, BLOCK: tl.constexpr, ADD_KV: tl.constexpr, ADD_FW: tl.constexpr
):
    """With ADD_KV (ADD_FW) the gradient is added to what stands in dkv (dfw)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < n_elements
    a = tl.load(kv + at, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(fw + at, mask=ok, other=0.0).to(tl.float32)
    s = tl.sigmoid(tl.load(gate + at, mask=ok, other=0.0).to(tl.float32))
    dm = tl.load(dmixed + at, mask=ok, other=0.0).to(tl.float32)
    da = dm * (1 - s)
    db = dm * s
    tl.store(dgate + at, (dm * (b - a) * s * (1 - s)).to(dgate.dtype.element_ty), mask=ok)
    if ADD_KV:
        da += tl.load(dkv + at, mask=ok, other=0.0).to(tl.float32)
    if ADD_FW:
        db += tl.load(dfw + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(dkv + at, da.to(dkv.dtype.element_ty), mask=ok)
    tl.store(dfw + at, db.to(dfw.dtype.element_ty), mask=ok)
