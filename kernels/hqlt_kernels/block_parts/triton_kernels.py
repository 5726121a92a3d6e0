"""Triton kernels of what stands around the memories in a block: norm and SwiGLU.

They move bytes and compute next to nothing, so each reads its inputs once and writes its outputs once; arithmetic is in
float32 whatever is stored. A stack of replicas has `per_replica` rows of each, one replica's after the other's, and
parameters with a replica axis in front; program ids say which replica. Gradients of parameters are sums over the rows:
every program adds up a fixed set of rows and writes its sum, so no sum depends on the order in which programs run.
"""

# What is inside @triton.jit is not Python to a type checker.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def norm_kernel(
    x, delta, weight, gate, total, y, per_replica, weight_stride, gate_stride,
    EPSILON: tl.constexpr, D: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ADD: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """total = x + delta (with ADD); y = total / rms(total) weight (with GATE: SiLU(gate)).

    x, delta, total, y are [n, D]; gate is [n / H, H D] with a stride between rows; weight [replicas, D] with
    a stride between replicas.
    """
    replica = tl.program_id(1)
    tile = tl.program_id(0) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    ok = (tile + row < per_replica) & (column < D)
    base = replica.to(tl.int64) * per_replica + tile
    at = base * D + row * D + column
    s = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    if ADD:
        s += tl.load(delta + at, mask=ok, other=0.0).to(tl.float32)
        tl.store(total + at, s.to(total.dtype.element_ty), mask=ok)
    w = tl.load(weight + replica * weight_stride + column, mask=column < D, other=0.0).to(tl.float32)
    out = s * tl.rsqrt(tl.sum(s * s, 1) / D + EPSILON)[:, None] * w
    if GATE:
        gate_at = (base + row) // H * gate_stride + (base + row) % H * D + column
        g = tl.load(gate + gate_at, mask=ok, other=0.0).to(tl.float32)
        out *= g * tl.sigmoid(g)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=ok)


@triton.jit
def norm_gradient_kernel(
    total, weight, gate, dy, dtotal, dx, ddelta, dgate, dweight, y, per_replica, weight_stride, gate_stride,
    EPSILON: tl.constexpr, D: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ADD: tl.constexpr, HAS_DTOTAL: tl.constexpr, GATE: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """dx, and with ADD its copy ddelta in delta's type; dgate [n, D]; dweight [replicas, programs, D], to be summed;
    with AGAIN the forward's y.
    """
    replica = tl.program_id(1)
    n_programs = tl.num_programs(0)
    column = tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + replica * weight_stride + column, mask=column < D, other=0.0).to(tl.float32)
    row = tl.arange(0, ROWS)[:, None]
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(tl.program_id(0) * ROWS, per_replica, n_programs * ROWS):
        ok = (tile + row < per_replica) & (column < D)
        base = replica.to(tl.int64) * per_replica + tile
        at = base * D + row * D + column
        s = tl.load(total + at, mask=ok, other=0.0).to(tl.float32)
        d = tl.load(dy + at, mask=ok, other=0.0).to(tl.float32)
        if HAS_DTOTAL:  # before the sums, so that nothing waits for it
            add = tl.load(dtotal + at, mask=ok, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(s * s, 1) / D + EPSILON)[:, None]
        normed = s * r
        again = normed * w
        if GATE:
            gate_at = (base + row) // H * gate_stride + (base + row) % H * D + column
            g = tl.load(gate + gate_at, mask=ok, other=0.0).to(tl.float32)
            sigmoid = tl.sigmoid(g)
            slope = sigmoid * (1 + g * (1 - sigmoid))
            tl.store(dgate + at, (d * again * slope).to(dgate.dtype.element_ty), mask=ok)
            d *= g * sigmoid
            again *= g * sigmoid
        if AGAIN:
            tl.store(y + at, again.to(y.dtype.element_ty), mask=ok)
        dw += d * normed
        d *= w
        out = r * (d - normed * (tl.sum(d * normed, 1) / D)[:, None])
        if HAS_DTOTAL:
            out += add
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=ok)
        if ADD:
            tl.store(ddelta + at, out.to(ddelta.dtype.element_ty), mask=ok)
    place = (replica * n_programs + tl.program_id(0)) * D + column
    tl.store(dweight + place, tl.sum(dw, 0)[None, :], mask=column < D)


@triton.jit
def mix_norm_kernel(
    kv, fw, logits, weight, y, per_replica, weight_stride,
    EPSILON: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = mixed / rms(mixed) weight, mixed = kv + sigmoid(logits) (fw - kv); all [n, D], weight [replicas, D]."""
    replica = tl.program_id(1)
    tile = tl.program_id(0) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    ok = (tile + row < per_replica) & (column < D)
    at = (replica.to(tl.int64) * per_replica + tile) * D + row * D + column
    a = tl.load(kv + at, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(fw + at, mask=ok, other=0.0).to(tl.float32)
    s = a + tl.sigmoid(tl.load(logits + at, mask=ok, other=0.0).to(tl.float32)) * (b - a)
    w = tl.load(weight + replica * weight_stride + column, mask=column < D, other=0.0).to(tl.float32)
    out = s * tl.rsqrt(tl.sum(s * s, 1) / D + EPSILON)[:, None] * w
    tl.store(y + at, out.to(y.dtype.element_ty), mask=ok)


@triton.jit
def mix_norm_gradient_kernel(
    kv, fw, logits, weight, dy, dkv, dfw, dlogits, dweight, y, per_replica, weight_stride,
    EPSILON: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients, dweight [replicas, programs, D] to be summed, and the forward's y."""
    replica = tl.program_id(1)
    n_programs = tl.num_programs(0)
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + replica * weight_stride + column, mask=column < D, other=0.0).to(tl.float32)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(tl.program_id(0) * ROWS, per_replica, n_programs * ROWS):
        ok = (tile + row < per_replica) & (column < D)
        at = (replica.to(tl.int64) * per_replica + tile) * D + row * D + column
        a = tl.load(kv + at, mask=ok, other=0.0).to(tl.float32)
        b = tl.load(fw + at, mask=ok, other=0.0).to(tl.float32)
        g = tl.sigmoid(tl.load(logits + at, mask=ok, other=0.0).to(tl.float32))
        d = tl.load(dy + at, mask=ok, other=0.0).to(tl.float32)
        s = a + g * (b - a)
        r = tl.rsqrt(tl.sum(s * s, 1) / D + EPSILON)[:, None]
        normed = s * r
        tl.store(y + at, (normed * w).to(y.dtype.element_ty), mask=ok)
        dw += d * normed
        d *= w
        ds = r * (d - normed * (tl.sum(d * normed, 1) / D)[:, None])
        tl.store(dkv + at, (ds * (1 - g)).to(dkv.dtype.element_ty), mask=ok)
        tl.store(dfw + at, (ds * g).to(dfw.dtype.element_ty), mask=ok)
        tl.store(dlogits + at, (ds * (b - a) * g * (1 - g)).to(dlogits.dtype.element_ty), mask=ok)
    place = (replica * n_programs + tl.program_id(0)) * D + column
    tl.store(dweight + place, tl.sum(dw, 0)[None, :], mask=column < D)


@triton.jit
def swiglu_kernel(gate, up, y, n, BLOCK: tl.constexpr):
    """y = SiLU(gate) up; all contiguous with n elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < n
    g = tl.load(gate + at, mask=ok, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(y + at, (g * tl.sigmoid(g) * u).to(y.dtype.element_ty), mask=ok)


@triton.jit
def swiglu_gradient_kernel(gate, up, dy, dgate, dup, y, n, BLOCK: tl.constexpr, AGAIN: tl.constexpr):
    """With AGAIN the forward's y too, which may stand where dy does."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < n
    g = tl.load(gate + at, mask=ok, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=ok, other=0.0).to(tl.float32)
    d = tl.load(dy + at, mask=ok, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    tl.store(dgate + at, (d * u * sigmoid * (1 + g * (1 - sigmoid))).to(dgate.dtype.element_ty), mask=ok)
    tl.store(dup + at, (d * g * sigmoid).to(dup.dtype.element_ty), mask=ok)
    if AGAIN:
        tl.store(y + at, (g * sigmoid * u).to(y.dtype.element_ty), mask=ok)
