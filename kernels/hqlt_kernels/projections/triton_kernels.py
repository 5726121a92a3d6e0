"""Triton kernels that move rows and columns of activations, with a short convolution on the way.

A stack of replicas has `per_replica` rows of each, one replica's after the other's, and parameters with a replica axis
in front; program ids say which replica. Gradients of parameters are sums over the rows: every program adds up a fixed
set of rows and writes its sum, so no sum depends on the order in which programs run.
"""

# What is inside @triton.jit is not Python to a type checker.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def _filtered_part(
    block, q, k, v, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Of a block of filtered columns: its part's pointer, width and first column, and its own first column in there."""
    k_at: tl.constexpr = (W0 + BLOCK - 1) // BLOCK
    v_at: tl.constexpr = k_at + (W1 + BLOCK - 1) // BLOCK
    part = q
    if block >= k_at:
        part = k
    if block >= v_at:
        part = v
    width = tl.where(block >= v_at, W2, tl.where(block >= k_at, W1, W0))
    start = tl.where(block >= v_at, W0 + W1, tl.where(block >= k_at, W0, 0))
    first = tl.where(block >= v_at, block - v_at, tl.where(block >= k_at, block - k_at, block)) * BLOCK
    return part, width, start, first


@triton.jit
def _copied_part(
    block, beta, decay, mixing, gate, W3: tl.constexpr, W4: tl.constexpr, W5: tl.constexpr, W6: tl.constexpr,
    UNUSED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same for the columns that are copied; those behind the last part belong to `gate` here."""
    decay_at: tl.constexpr = (W3 + BLOCK - 1) // BLOCK
    mixing_at: tl.constexpr = decay_at + (W4 + BLOCK - 1) // BLOCK
    gate_at: tl.constexpr = mixing_at + (W5 + BLOCK - 1) // BLOCK
    unused_at: tl.constexpr = gate_at + (W6 + BLOCK - 1) // BLOCK
    part = beta
    if block >= decay_at:
        part = decay
    if block >= mixing_at:
        part = mixing
    if block >= gate_at:
        part = gate
    width = tl.where(block >= gate_at, W6, tl.where(block >= mixing_at, W5, tl.where(block >= decay_at, W4, W3)))
    start = tl.where(
        block >= gate_at, W3 + W4 + W5, tl.where(block >= mixing_at, W3 + W4, tl.where(block >= decay_at, W3, 0))
    )
    before = tl.where(
        block >= gate_at, gate_at, tl.where(block >= mixing_at, mixing_at, tl.where(block >= decay_at, decay_at, 0))
    )
    first = (block - before) * BLOCK
    is_unused = block >= unused_at
    width = tl.where(is_unused, UNUSED, width)
    start = tl.where(is_unused, W3 + W4 + W5 + W6, start)
    first = tl.where(is_unused, (block - unused_at) * BLOCK, first)
    return part, width, start, first, is_unused


@triton.jit
def split_kernel(
    rows, filters, q, k, v, before_silu, beta, decay, mixing, gate, T, per_replica, stride, filter_stride,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, W3: tl.constexpr, W4: tl.constexpr, W5: tl.constexpr,
    W6: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    FILTERED: tl.constexpr, ACTIVATE: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """`rows` [B T, ...] with a stride between rows into contiguous parts; filters [replicas, W0 + W1 + W2, TAPS].

    FILTERED is the number of blocks of columns that are filtered. With SAVE the third part is also written as it was
    before SiLU.
    """
    block = tl.program_id(1)
    replica = tl.program_id(2)
    tile = tl.program_id(0) * ROWS
    base = replica.to(tl.int64) * per_replica + tile
    row = tl.arange(0, ROWS)[:, None]
    if block < FILTERED:
        part, width, start, first = _filtered_part(block, q, k, v, W0, W1, W2, BLOCK)
        own = first + tl.arange(0, BLOCK)[None, :]
        ok = (tile + row < per_replica) & (own < width)
        t = (tile + row) % T
        weights = filters + replica * filter_stride + (start + own) * TAPS
        z = tl.zeros((ROWS, BLOCK), tl.float32)
        for tap in tl.static_range(TAPS):
            back = TAPS - 1 - tap
            at = base * stride + start + (row - back) * stride + own
            x = tl.load(rows + at, mask=ok & (t >= back), other=0.0).to(tl.float32)
            z += x * tl.load(weights + tap, mask=own < width, other=0.0).to(tl.float32)
        at = base * width + row * width + own
        if ACTIVATE and start == W0 + W1:
            if SAVE:
                tl.store(before_silu + at, z.to(q.dtype.element_ty), mask=ok)
            z *= tl.sigmoid(z)
        tl.store(part + at, z.to(q.dtype.element_ty), mask=ok)
    else:
        part, width, start, first, _ = _copied_part(
            block - FILTERED, beta, decay, mixing, gate, W3, W4, W5, W6, 0, BLOCK
        )
        own = first + tl.arange(0, BLOCK)[None, :]
        ok = (tile + row < per_replica) & (own < width)
        y = tl.load(rows + base * stride + W0 + W1 + W2 + start + row * stride + own, mask=ok, other=0.0)
        tl.store(part + base * width + row * width + own, y, mask=ok)


@triton.jit
def split_gradient_kernel(
    rows, filters, q, k, v, before_silu, beta, decay, mixing, gate, drows, dfilters, T, per_replica, stride,
    filter_stride,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, W3: tl.constexpr, W4: tl.constexpr, W5: tl.constexpr,
    W6: tl.constexpr, UNUSED: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    FILTERED: tl.constexpr, ACTIVATE: tl.constexpr,
):  # fmt: skip
    """drows, contiguous, whole; dfilters [replicas, tiles, filtered columns, TAPS], to be summed. The seven parts are
    their gradients.
    """
    C: tl.constexpr = W0 + W1 + W2
    W: tl.constexpr = C + W3 + W4 + W5 + W6 + UNUSED
    block = tl.program_id(1)
    replica = tl.program_id(2)
    tile = tl.program_id(0) * ROWS
    base = replica.to(tl.int64) * per_replica + tile
    row = tl.arange(0, ROWS)[:, None]
    if block < FILTERED:
        grad, width, start, first = _filtered_part(block, q, k, v, W0, W1, W2, BLOCK)
        own = first + tl.arange(0, BLOCK)[None, :]
        ok = (tile + row < per_replica) & (own < width)
        t = (tile + row) % T
        weights = filters + replica * filter_stride + (start + own) * TAPS
        sums = dfilters + ((replica * tl.num_programs(0) + tl.program_id(0)) * C + start + own) * TAPS
        x = tl.load(rows + base * stride + start + row * stride + own, mask=ok, other=0.0).to(tl.float32)
        dx = tl.zeros((ROWS, BLOCK), tl.float32)
        for tap in tl.static_range(TAPS):
            ahead = TAPS - 1 - tap
            later = ok & (t + ahead < T)
            at = base * width + (row + ahead) * width + own
            dz = tl.load(grad + at, mask=later, other=0.0).to(tl.float32)
            if ACTIVATE and start == W0 + W1:
                z = tl.load(before_silu + at, mask=later, other=0.0).to(tl.float32)
                sigmoid = tl.sigmoid(z)
                dz *= sigmoid * (1 + z * (1 - sigmoid))
            dx += dz * tl.load(weights + tap, mask=own < width, other=0.0).to(tl.float32)
            tl.store(sums + tap, tl.sum(dz * x, 0)[None, :], mask=own < width)
        tl.store(drows + base * W + start + row * W + own, dx.to(drows.dtype.element_ty), mask=ok)
    else:
        grad, width, start, first, is_unused = _copied_part(
            block - FILTERED, beta, decay, mixing, gate, W3, W4, W5, W6, UNUSED, BLOCK
        )
        own = first + tl.arange(0, BLOCK)[None, :]
        ok = (tile + row < per_replica) & (own < width)
        d = tl.load(grad + base * width + row * width + own, mask=ok & (is_unused == 0), other=0.0)
        tl.store(drows + base * W + C + start + row * W + own, d.to(drows.dtype.element_ty), mask=ok)


@triton.jit
def scatter_kernel(source, at, target, D: tl.constexpr, BLOCK: tl.constexpr):
    """target[at[i]] = source[i], rows of D; one program each."""
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(at + i)
    column = tl.arange(0, BLOCK)
    x = tl.load(source + i * D + column, mask=column < D)
    tl.store(target + row * D + column, x, mask=column < D)


@triton.jit
def embed_kernel(
    tokens, weight, y, per_replica, weight_stride, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """y [n, D] = weight[replica, tokens]."""
    replica = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    base = replica.to(tl.int64) * per_replica
    token = tl.load(tokens + base + row, mask=row < per_replica, other=0)
    column = tl.arange(0, BLOCK)[None, :]
    ok = (row[:, None] < per_replica) & (column < D)
    x = tl.load(weight + replica * weight_stride + token[:, None] * D + column, mask=ok)
    tl.store(y + base * D + row[:, None] * D + column, x.to(y.dtype.element_ty), mask=ok)


@triton.jit
def embed_gradient_kernel(
    tokens, dy, dweight, per_replica, V: tl.constexpr, D: tl.constexpr, V_PADDED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dweight [replicas, programs, V, D], to be summed: one-hot tokens times dy."""
    replica = tl.program_id(2)
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    v = tl.arange(0, V_PADDED)[:, None]
    base = replica.to(tl.int64) * per_replica
    dw = tl.zeros((V_PADDED, BLOCK), tl.float32)
    for tile in range(tl.program_id(0) * ROWS, per_replica, tl.num_programs(0) * ROWS):
        row = tile + tl.arange(0, ROWS)
        token = tl.load(tokens + base + row, mask=row < per_replica, other=-1)
        ok = (row[:, None] < per_replica) & (column < D)
        d = tl.load(dy + base * D + row[:, None] * D + column, mask=ok, other=0.0)
        dw += tl.dot((token[None, :] == v).to(d.dtype), d, input_precision="ieee")
    place = ((replica * tl.num_programs(0) + tl.program_id(0)) * V + v) * D + column
    tl.store(dweight + place, dw, mask=(v < V) & (column < D))


@triton.jit
def sum_kernel(parts, total, n_parts, n, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """total [replicas, n] = the sum over the second axis of parts [replicas, n_parts, n], PARTS at a time."""
    replica = tl.program_id(1)
    column = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    sums = tl.zeros((PARTS, BLOCK), tl.float32)
    for first in range(0, n_parts, PARTS):
        part = (first + tl.arange(0, PARTS))[:, None]
        at = (replica * n_parts + part).to(tl.int64) * n + column
        sums += tl.load(parts + at, mask=(part < n_parts) & (column < n), other=0.0)
    out = tl.sum(sums, 0)[None, :]
    tl.store(total + replica * n + column, out.to(total.dtype.element_ty), mask=column < n)
