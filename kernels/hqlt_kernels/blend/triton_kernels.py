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
def mix_gradient_kernel(kv, fw, gate, dmixed, dkv, dfw, dgate, n_elements, BLOCK: tl.constexpr):
    """The gradients of all three, from that of mixed."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < n_elements
    a = tl.load(kv + at, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(fw + at, mask=ok, other=0.0).to(tl.float32)
    s = tl.sigmoid(tl.load(gate + at, mask=ok, other=0.0).to(tl.float32))
    dm = tl.load(dmixed + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(dgate + at, (dm * (b - a) * s * (1 - s)).to(dgate.dtype.element_ty), mask=ok)
    tl.store(dkv + at, (dm * (1 - s)).to(dkv.dtype.element_ty), mask=ok)
    tl.store(dfw + at, (dm * s).to(dfw.dtype.element_ty), mask=ok)
