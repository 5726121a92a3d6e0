"""Triton kernels of what stands around the memories in a block: norm, SwiGLU, short convolution.

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
    x, delta, weight, gate, total, y, per_replica, gate_stride,
    EPSILON: tl.constexpr, D: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ADD: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """total = x + delta (with ADD); y = total / rms(total) weight (with GATE: SiLU(gate)).

    x, delta, total, y are [n, D]; gate is [n / H, H D] with a stride between rows; weight [replicas, D].
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
    w = tl.load(weight + replica * D + column, mask=column < D, other=0.0).to(tl.float32)
    out = s * tl.rsqrt(tl.sum(s * s, 1) / D + EPSILON)[:, None] * w
    if GATE:
        gate_at = (base + row) // H * gate_stride + (base + row) % H * D + column
        g = tl.load(gate + gate_at, mask=ok, other=0.0).to(tl.float32)
        out *= g * tl.sigmoid(g)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=ok)


@triton.jit
def norm_gradient_kernel(
    total, weight, gate, dy, dtotal, dx, ddelta, dgate, dweight, y, per_replica, gate_stride,
    EPSILON: tl.constexpr, D: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ADD: tl.constexpr, HAS_DTOTAL: tl.constexpr, GATE: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """dx, and with ADD its copy ddelta in delta's type; dgate [n, D]; dweight [replicas, programs, D], to be summed;
    with AGAIN the forward's y.
    """
    replica = tl.program_id(1)
    n_programs = tl.num_programs(0)
    column = tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + replica * D + column, mask=column < D, other=0.0).to(tl.float32)
    row = tl.arange(0, ROWS)[:, None]
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(tl.program_id(0) * ROWS, per_replica, n_programs * ROWS):
        ok = (tile + row < per_replica) & (column < D)
        base = replica.to(tl.int64) * per_replica + tile
        at = base * D + row * D + column
        s = tl.load(total + at, mask=ok, other=0.0).to(tl.float32)
        d = tl.load(dy + at, mask=ok, other=0.0).to(tl.float32)
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
            out += tl.load(dtotal + at, mask=ok, other=0.0).to(tl.float32)
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=ok)
        if ADD:
            tl.store(ddelta + at, out.to(ddelta.dtype.element_ty), mask=ok)
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
    """With AGAIN the forward's y too."""
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


@triton.jit
def _part(block, first, second, third, W1: tl.constexpr, W2: tl.constexpr, W3: tl.constexpr, BLOCK: tl.constexpr):
    """Of the `block`-th block of columns: its part's pointer, width and first column, and its own columns in there."""
    second_at: tl.constexpr = (W1 + BLOCK - 1) // BLOCK
    third_at: tl.constexpr = second_at + (W2 + BLOCK - 1) // BLOCK
    part = first
    if block >= second_at:
        part = second
    if block >= third_at:
        part = third
    width = tl.where(block >= third_at, W3, tl.where(block >= second_at, W2, W1))
    start = tl.where(block >= third_at, W1 + W2, tl.where(block >= second_at, W1, 0))
    within = tl.where(block >= third_at, block - third_at, tl.where(block >= second_at, block - second_at, block))
    return part, width, start, (within * BLOCK + tl.arange(0, BLOCK))[None, :]


@triton.jit
def _filtered(x, weight, row, t, shift, column, width, stride, T, TAPS: tl.constexpr, ok):
    """The convolution at the tokens `shift` after `row`, from inputs at `x` with a stride between rows."""
    z = tl.zeros((row.shape[0], column.shape[1]), tl.float32)
    for i in tl.static_range(TAPS):
        w = tl.load(weight + column * TAPS + i, mask=column < width, other=0.0).to(tl.float32)
        back = TAPS - 1 - i
        seen = ok & (t + shift >= back) & (t + shift < T)
        z += w * tl.load(x + (row + (shift - back)) * stride + column, mask=seen, other=0.0).to(tl.float32)
    return z


@triton.jit
def convolution_kernel(
    x, weight, first, second, third, T, per_replica, stride,
    W1: tl.constexpr, W2: tl.constexpr, W3: tl.constexpr, TAPS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ACTIVATE: tl.constexpr,
):  # fmt: skip
    """A causal convolution along T, a filter a column, split into three contiguous parts; ACTIVATE: SiLU of the third.

    x is [B T, W1 + W2 + W3] with a stride between rows, weight [replicas, columns, TAPS].
    """
    part, width, start, own = _part(tl.program_id(1), first, second, third, W1, W2, W3, BLOCK)
    replica = tl.program_id(2)
    tile = tl.program_id(0) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    ok = (tile + row < per_replica) & (own < width)
    base = replica.to(tl.int64) * per_replica + tile
    weight += replica * ((W1 + W2 + W3) * TAPS) + start * TAPS
    z = _filtered(x + base * stride + start, weight, row, (tile + row) % T, 0, own, width, stride, T, TAPS, ok)
    if ACTIVATE and start == W1 + W2:
        z *= tl.sigmoid(z)
    tl.store(part + base * width + row * width + own, z.to(first.dtype.element_ty), mask=ok)


@triton.jit
def convolution_gradient_kernel(
    x, weight, first, second, third, dx, dweight, T, per_replica, stride,
    W1: tl.constexpr, W2: tl.constexpr, W3: tl.constexpr, TAPS: tl.constexpr, TAPS_PADDED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ACTIVATE: tl.constexpr,
):  # fmt: skip
    """dx [B T, columns], contiguous; dweight [replicas, programs, columns, TAPS], to be summed. `first` to `third` are
    the gradients of the parts.
    """
    COLUMNS: tl.constexpr = W1 + W2 + W3
    grad, width, start, own = _part(tl.program_id(1), first, second, third, W1, W2, W3, BLOCK)
    replica = tl.program_id(2)
    weight += replica * (COLUMNS * TAPS) + start * TAPS
    row = tl.arange(0, ROWS)[:, None]
    tap = tl.arange(0, TAPS_PADDED)[:, None]
    dw = tl.zeros((TAPS_PADDED, BLOCK), tl.float32)
    for tile in range(tl.program_id(0) * ROWS, per_replica, tl.num_programs(0) * ROWS):
        ok = (tile + row < per_replica) & (own < width)
        t = (tile + row) % T
        base = replica.to(tl.int64) * per_replica + tile
        inputs = x + base * stride + start
        here = tl.load(inputs + row * stride + own, mask=ok, other=0.0).to(tl.float32)
        out = tl.zeros((ROWS, BLOCK), tl.float32)
        for shift in tl.static_range(TAPS):  # dx_t = sum of weight_{TAPS - 1 - shift} dz_{t + shift}
            later = ok & (t + shift < T)
            dz = tl.load(grad + base * width + (row + shift) * width + own, mask=later, other=0.0).to(tl.float32)
            if ACTIVATE and start == W1 + W2:
                z = _filtered(inputs, weight, row, t, shift, own, width, stride, T, TAPS, ok)
                sigmoid = tl.sigmoid(z)
                dz *= sigmoid * (1 + z * (1 - sigmoid))
            out += dz * tl.load(weight + own * TAPS + TAPS - 1 - shift, mask=own < width, other=0.0).to(tl.float32)
            dw += tl.where(tap == TAPS - 1 - shift, tl.sum(dz * here, 0)[None, :], 0.0)
        tl.store(dx + base * COLUMNS + start + row * COLUMNS + own, out.to(dx.dtype.element_ty), mask=ok)
    place = ((replica * tl.num_programs(0) + tl.program_id(0)) * COLUMNS + start + own) * TAPS + tap
    tl.store(dweight + place, dw, mask=(tap < TAPS) & (own < width))
