"""Triton kernels of window attention, forward and a backward without atomics.

A program takes a tile of BT queries and N_BLOCKS blocks of BN keys that end with it (dk and dv: a tile of keys and
blocks of queries that begin with it); N_BLOCKS = 0: as many as the window needs, found at run time. Scores are kept
times log2(e), so that exp2 gives the probabilities:

    S = scale log2(e) q k^T      P = exp2(S - lse)      o = P v
    dP = do v^T      dS = P (dP - rowsum(do o))      dq = scale dS k      dk = scale dS^T q      dv = P^T do

Rotary embedding: an inner product depends on the distance of two positions only, so a tile pair is turned by positions
relative to the first of them, from a table of N_BLOCKS * BN rows that stays in cache, whatever the sequence length.
Entries d and d + D/2 form a plane, so vectors are held in halves and their inner products add.

dk and dv compute the transposed scores k q^T: a transposed accumulator as operand of a dot is miscompiled on Hopper by
Triton 3.4 to 3.7.0 (flash-linear-attention issue 640).
"""

# ruff: noqa: SIM108  # Triton compiles a subset of Python; `if` on a constexpr takes code out
# What is inside @triton.jit is not Python to a type checker.
# mypy: ignore-errors

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NEVER = tl.constexpr(-1e30)


@triton.jit
def _place(n):
    """Which of a head's n programs this is, and the head. One axis: the others of a grid end at 65,535 programs."""
    i = tl.program_id(0)
    return i % n, (i // n).to(tl.int64)


@triton.jit
def _turned_halves(x, row, i, ok, turn, cos, sin, H: tl.constexpr, D: tl.constexpr, ROPE: tl.constexpr):
    """Both halves [BT, D/2] of the vectors of a tile, turned by the angles in rows `turn` + i of the table."""
    d = tl.arange(0, D // 2)
    at = x + row * D + i[:, None] * (H * D) + d[None, :]
    x1 = tl.load(at, mask=ok[:, None], other=0.0)
    x2 = tl.load(at + D // 2, mask=ok[:, None], other=0.0)
    if ROPE:
        angle = (turn + i)[:, None] * (D // 2) + d[None, :]
        c = tl.load(cos + angle).to(tl.float32)
        s = tl.load(sin + angle).to(tl.float32)
        y1 = (x1.to(tl.float32) * c - x2.to(tl.float32) * s).to(x1.dtype)
        x2 = (x2.to(tl.float32) * c + x1.to(tl.float32) * s).to(x1.dtype)
        x1 = y1
    return x1, x2


@triton.jit
def _store_turned_back(x, row, i, ok, turn, cos, sin, y1, y2, H: tl.constexpr, D: tl.constexpr, ROPE: tl.constexpr):
    d = tl.arange(0, D // 2)
    at = x + row * D + i[:, None] * (H * D) + d[None, :]
    if ROPE:
        angle = (turn + i)[:, None] * (D // 2) + d[None, :]
        c = tl.load(cos + angle).to(tl.float32)
        s = tl.load(sin + angle).to(tl.float32)
        x1 = y1 * c + y2 * s
        y2 = y2 * c - y1 * s
        y1 = x1
    tl.store(at, y1.to(x.dtype.element_ty), mask=ok[:, None])
    tl.store(at + D // 2, y2.to(x.dtype.element_ty), mask=ok[:, None])


@triton.jit
def _visible(query, key, window, phase, ALIGNED: tl.constexpr):
    """Whether a query sees a key; both by index of key. `phase` is the absolute position of key 0."""
    if ALIGNED:
        seen = (key <= query) & (key >= query - (phase + query) % window)
    else:
        seen = (key <= query) & (key > query - window)
    return seen


@triton.jit
def _attend(
    q1, q2, m, norm, acc, k, v, first, query, start, n_keys, turn, cos, sin, scale, window, phase,
    H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BN: tl.constexpr,
    ALIGNED: tl.constexpr, ROPE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One step of the running softmax: BN keys from `start`."""
    i = tl.arange(0, BN)
    key = start + i
    ok = (key >= 0) & (key < n_keys)
    row = first + start * H
    k1, k2 = _turned_halves(k, row, i, ok, turn, cos, sin, H, D, ROPE)
    vb = tl.load(v + row * V + i[:, None] * (H * V) + tl.arange(0, V)[None, :], mask=ok[:, None], other=0.0)
    s = tl.dot(q1, tl.trans(k1), input_precision=PREC)
    s = tl.dot(q2, tl.trans(k2), s, input_precision=PREC) * (scale * LOG2E)
    seen = _visible(query[:, None], key[None, :], window, phase, ALIGNED) & ok[None, :]
    s = tl.where(seen, s, NEVER)
    top = tl.maximum(m, tl.max(s, 1))
    p = tl.where(seen, tl.exp2(s - top[:, None]), 0.0)
    shrink = tl.exp2(m - top)
    norm = norm * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(vb.dtype), vb, acc * shrink[:, None], input_precision=PREC)
    return top, norm, acc


@triton.jit
def _first_block(query, window, phase, BN: tl.constexpr, ALIGNED: tl.constexpr):
    """The first block of BN keys that a query sees anything of."""
    if ALIGNED:
        key = query - (phase + query) % window
    else:
        key = query - window + 1
    return tl.maximum(key, 0) // BN


@triton.jit
def forward_kernel(
    q, k, v, cos, sin, o, lse, n_queries, n_keys, window, phase, scale,
    H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    N_BLOCKS: tl.constexpr, ALIGNED: tl.constexpr, ROPE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """o [B, T, H, V] and lse [B * H, T], in units of log2. q [B, T, H, D]; k, v [B, L, H, ...]. Grid tiles * B * H."""
    c, bh = _place(tl.cdiv(n_queries, BT))
    i = tl.arange(0, BT)
    ok = c * BT + i < n_queries
    row = ((bh // H) * n_queries + c * BT) * H + bh % H
    first = (bh // H) * n_keys * H + bh % H  # row of key 0
    query = n_keys - n_queries + c * BT + i
    own: tl.constexpr = N_BLOCKS * BN - BT if N_BLOCKS > 0 else 0  # row of the table for a query tile's first token
    q1, q2 = _turned_halves(q, row, i, ok, own, cos, sin, H, D, ROPE)
    m = tl.full((BT,), NEVER, tl.float32)
    norm = tl.zeros((BT,), tl.float32)
    acc = tl.zeros((BT, V), tl.float32)
    start = n_keys - n_queries + c * BT
    if N_BLOCKS > 0:
        for t in range(N_BLOCKS):
            m, norm, acc = _attend(
                q1, q2, m, norm, acc, k, v, first, query, start - own + t * BN, n_keys, t * BN, cos, sin,
                scale, window, phase, H, D, V, BN, ALIGNED, ROPE, PREC,
            )  # fmt: skip
    else:
        for n in range(
            _first_block(start, window, phase, BN, ALIGNED), tl.minimum(start + BT - 1, n_keys - 1) // BN + 1
        ):
            m, norm, acc = _attend(
                q1, q2, m, norm, acc, k, v, first, query, n * BN, n_keys, 0, cos, sin,
                scale, window, phase, H, D, V, BN, ALIGNED, False, PREC,
            )  # fmt: skip
    norm = tl.where(ok, norm, 1.0)
    at = o + row * V + i[:, None] * (H * V) + tl.arange(0, V)[None, :]
    tl.store(at, (acc / norm[:, None]).to(o.dtype.element_ty), mask=ok[:, None])
    tl.store(lse + bh * n_queries + c * BT + i, m + tl.log2(norm), mask=ok)


@triton.jit
def _query_step(
    q1, q2, dob, top, delta, acc1, acc2, k, v, first, query, start, n_keys, turn, cos, sin, scale, window, phase,
    H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BN: tl.constexpr,
    ALIGNED: tl.constexpr, ROPE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dq from BN keys from `start`, without the scale."""
    i = tl.arange(0, BN)
    key = start + i
    ok = (key >= 0) & (key < n_keys)
    row = first + start * H
    k1, k2 = _turned_halves(k, row, i, ok, turn, cos, sin, H, D, ROPE)
    vb = tl.load(v + row * V + i[:, None] * (H * V) + tl.arange(0, V)[None, :], mask=ok[:, None], other=0.0)
    s = tl.dot(q1, tl.trans(k1), input_precision=PREC)
    s = tl.dot(q2, tl.trans(k2), s, input_precision=PREC) * (scale * LOG2E)
    seen = _visible(query[:, None], key[None, :], window, phase, ALIGNED) & ok[None, :]
    p = tl.where(seen, tl.exp2(s - top[:, None]), 0.0)
    ds = (p * (tl.dot(dob, tl.trans(vb), input_precision=PREC) - delta[:, None])).to(k1.dtype)
    acc1 = tl.dot(ds, k1, acc1, input_precision=PREC)
    acc2 = tl.dot(ds, k2, acc2, input_precision=PREC)
    return acc1, acc2


@triton.jit
def query_gradient_kernel(
    q, k, v, cos, sin, o, do, lse, delta, dq, n_queries, n_keys, window, phase, scale,
    H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    N_BLOCKS: tl.constexpr, ALIGNED: tl.constexpr, ROPE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dq, and delta [B * H, T] = rowsum(do o) for the other kernel. Grid tiles of queries * B * H."""
    c, bh = _place(tl.cdiv(n_queries, BT))
    i = tl.arange(0, BT)
    ok = c * BT + i < n_queries
    row = ((bh // H) * n_queries + c * BT) * H + bh % H
    first = (bh // H) * n_keys * H + bh % H
    query = n_keys - n_queries + c * BT + i
    own: tl.constexpr = N_BLOCKS * BN - BT if N_BLOCKS > 0 else 0
    at = row * V + i[:, None] * (H * V) + tl.arange(0, V)[None, :]
    dob = tl.load(do + at, mask=ok[:, None], other=0.0)
    inner = tl.sum(dob.to(tl.float32) * tl.load(o + at, mask=ok[:, None], other=0.0).to(tl.float32), 1)
    tl.store(delta + bh * n_queries + c * BT + i, inner, mask=ok)
    top = tl.load(lse + bh * n_queries + c * BT + i, mask=ok, other=0.0)
    q1, q2 = _turned_halves(q, row, i, ok, own, cos, sin, H, D, ROPE)
    acc1 = tl.zeros((BT, D // 2), tl.float32)
    acc2 = tl.zeros((BT, D // 2), tl.float32)
    start = n_keys - n_queries + c * BT
    if N_BLOCKS > 0:
        for t in range(N_BLOCKS):
            acc1, acc2 = _query_step(
                q1, q2, dob, top, inner, acc1, acc2, k, v, first, query, start - own + t * BN, n_keys, t * BN,
                cos, sin, scale, window, phase, H, D, V, BN, ALIGNED, ROPE, PREC,
            )  # fmt: skip
    else:
        for n in range(
            _first_block(start, window, phase, BN, ALIGNED), tl.minimum(start + BT - 1, n_keys - 1) // BN + 1
        ):
            acc1, acc2 = _query_step(
                q1, q2, dob, top, inner, acc1, acc2, k, v, first, query, n * BN, n_keys, 0,
                cos, sin, scale, window, phase, H, D, V, BN, ALIGNED, False, PREC,
            )  # fmt: skip
    _store_turned_back(dq, row, i, ok, own, cos, sin, acc1 * scale, acc2 * scale, H, D, ROPE)


@triton.jit
def _key_step(
    k1, k2, vb, acc1, acc2, accv, q, do, lse, delta, first, key, start, n_queries, offset, turn, cos, sin, scale,
    window, phase, H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BN: tl.constexpr,
    ALIGNED: tl.constexpr, ROPE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dk (without the scale) and dv from BN queries from `start`; scores are transposed, [key, query]."""
    i = tl.arange(0, BN)
    token = start + i
    ok = token < n_queries
    row = first + start * H
    q1, q2 = _turned_halves(q, row, i, ok, turn, cos, sin, H, D, ROPE)
    dob = tl.load(do + row * V + i[:, None] * (H * V) + tl.arange(0, V)[None, :], mask=ok[:, None], other=0.0)
    top = tl.load(lse + token, mask=ok, other=0.0)
    inner = tl.load(delta + token, mask=ok, other=0.0)
    s = tl.dot(k1, tl.trans(q1), input_precision=PREC)
    s = tl.dot(k2, tl.trans(q2), s, input_precision=PREC) * (scale * LOG2E)
    seen = _visible((offset + token)[None, :], key[:, None], window, phase, ALIGNED) & ok[None, :]
    p = tl.where(seen, tl.exp2(s - top[None, :]), 0.0)
    accv = tl.dot(p.to(dob.dtype), dob, accv, input_precision=PREC)
    ds = (p * (tl.dot(vb, tl.trans(dob), input_precision=PREC) - inner[None, :])).to(q1.dtype)
    acc1 = tl.dot(ds, q1, acc1, input_precision=PREC)
    acc2 = tl.dot(ds, q2, acc2, input_precision=PREC)
    return acc1, acc2, accv


@triton.jit
def key_value_gradient_kernel(
    q, k, v, cos, sin, do, lse, delta, dk, dv, n_queries, n_keys, window, phase, scale,
    H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    N_BLOCKS: tl.constexpr, ALIGNED: tl.constexpr, ROPE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dk and dv. Grid tiles of keys * B * H."""
    c, bh = _place(tl.cdiv(n_keys, BT))
    i = tl.arange(0, BT)
    key = c * BT + i
    ok = key < n_keys
    row = ((bh // H) * n_keys + c * BT) * H + bh % H
    first = (bh // H) * n_queries * H + bh % H
    offset = n_keys - n_queries
    vb = tl.load(v + row * V + i[:, None] * (H * V) + tl.arange(0, V)[None, :], mask=ok[:, None], other=0.0)
    # Positions relative to the key tile's start, which is row 0 of the table.
    k1, k2 = _turned_halves(k, row, i, ok, 0, cos, sin, H, D, ROPE)
    acc1 = tl.zeros((BT, D // 2), tl.float32)
    acc2 = tl.zeros((BT, D // 2), tl.float32)
    accv = tl.zeros((BT, V), tl.float32)
    if N_BLOCKS > 0:
        for t in range(N_BLOCKS):
            acc1, acc2, accv = _key_step(
                k1, k2, vb, acc1, acc2, accv, q, do, lse + bh * n_queries, delta + bh * n_queries, first, key,
                c * BT + t * BN, n_queries, offset, t * BN, cos, sin, scale, window, phase,
                H, D, V, BN, ALIGNED, ROPE, PREC,
            )  # fmt: skip
    else:
        if ALIGNED:
            last = c * BT + BT - 1
            last += window - 1 - (phase + last) % window
        else:
            last = c * BT + BT + window - 2
        last = tl.minimum(last, n_keys - 1) - offset
        for n in range(tl.maximum(c * BT - offset, 0) // BN, last // BN + 1):
            acc1, acc2, accv = _key_step(
                k1, k2, vb, acc1, acc2, accv, q, do, lse + bh * n_queries, delta + bh * n_queries, first, key,
                n * BN, n_queries, offset, 0, cos, sin, scale, window, phase, H, D, V, BN, ALIGNED, False, PREC,
            )  # fmt: skip
    _store_turned_back(dk, row, i, ok, 0, cos, sin, acc1 * scale, acc2 * scale, H, D, ROPE)
    at = dv + row * V + i[:, None] * (H * V) + tl.arange(0, V)[None, :]
    tl.store(at, accv.to(dv.dtype.element_ty), mask=ok[:, None])


@triton.jit
def turn_kernel(
    x, y, cos, sin, n_tokens, H: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BACK: tl.constexpr
):  # fmt: skip
    """y = x turned by the table's row of each token, or turned back. Grid tiles * B * H."""
    c, bh = _place(tl.cdiv(n_tokens, BT))
    i = tl.arange(0, BT)
    ok = c * BT + i < n_tokens
    row = ((bh // H) * n_tokens + c * BT) * H + bh % H
    d = tl.arange(0, D // 2)
    at = row * D + i[:, None] * (H * D) + d[None, :]
    angle = (c * BT + i)[:, None] * (D // 2) + d[None, :]
    x1 = tl.load(x + at, mask=ok[:, None], other=0.0).to(tl.float32)
    x2 = tl.load(x + at + D // 2, mask=ok[:, None], other=0.0).to(tl.float32)
    co = tl.load(cos + angle, mask=ok[:, None], other=0.0)
    si = tl.load(sin + angle, mask=ok[:, None], other=0.0)
    if BACK:
        si = -si
    tl.store(y + at, (x1 * co - x2 * si).to(y.dtype.element_ty), mask=ok[:, None])
    tl.store(y + at + D // 2, (x2 * co + x1 * si).to(y.dtype.element_ty), mask=ok[:, None])
