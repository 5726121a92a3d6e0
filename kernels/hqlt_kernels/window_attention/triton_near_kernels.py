"""Triton kernels of window attention for windows that fit a tile: a query sees keys of its own and of the tile before.

Of both tiles together it sees at most one row's worth: of its own tile the keys up to it, of the tile before only keys
that stand after it. So one matrix [BT, BT] holds the weights of a whole tile of queries, the own tile's in its lower
triangle, the diagonal included, and those of the tile before above it:

    S = scale log2(e) (own: q k^T; else: q k_before^T)     P = softmax(S)     o = own(P) v + rest(P) v_before

The forward stores P. In the backward a row of it is all of a query's weights, so rowsum(do o) = rowsum(P dP), and
neither o nor the sums of the exponentials are needed:

    dP = own: do v^T; else: do v_before^T      dS = scale P (dP - rowsum(P dP))      dq = own(dS) k + rest(dS) k_before
    dk = own(dS)^T q + rest(dS_after)^T q_after          dv = own(P)^T do + rest(P_after)^T do_after

The kernel of dq stores dS for that of dk and dv. Such tiles are read in less time than it takes to compute them again,
and what is read may be transposed: it did not come out of a product. See triton_kernels.py for the rest.
"""

# ruff: noqa: SIM108  # Triton compiles a subset of Python; `if` on a constexpr takes code out
# What is inside @triton.jit is not Python to a type checker.
# mypy: ignore-errors

import triton
import triton.language as tl

from hqlt_kernels.window_attention.triton_kernels import (
    LOG2E,
    NEVER,
    _place,
    _store_turned_back,
    _turned_halves,
    _visible,
)


@triton.jit
def _present(token, n_tokens, BT: tl.constexpr, MASKED: tl.constexpr):
    """Which tokens from `token` on there are; without MASKED, when all tiles are full, the compiler sees: all."""
    i = tl.arange(0, BT)
    if MASKED:
        ok = token + i < n_tokens
    else:
        ok = i < BT
    return ok


@triton.jit
def _values(x, row, i, ok, H: tl.constexpr, V: tl.constexpr):
    return tl.load(x + row * V + i[:, None] * (H * V) + tl.arange(0, V)[None, :], mask=ok[:, None], other=0.0)


@triton.jit
def _seen(
    c, token, i, ok, starts, window, phase, BT: tl.constexpr, ALIGNED: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """Whether the query of a row sees the key of a column, which is one of the tile before above the diagonal."""
    own = i[:, None] >= i[None, :]
    query = token + i[:, None]
    key = token + i[None, :] - tl.where(own, 0, BT)
    if PACKED:
        start = tl.load(starts + token + i, mask=ok, other=0)[:, None]
        seen = _visible(query - start, key - start, window, phase, ALIGNED) & (key >= start)
    else:
        seen = _visible(query, key, window, phase, ALIGNED)
    return seen & (own | (c > 0))


@triton.jit
def forward_kernel(
    q, k, v, starts, cos, sin, o, weights, n_tokens, window, phase, scale,
    H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
    ALIGNED: tl.constexpr, ROPE: tl.constexpr, SAVE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """o [B, T, H, V]; with SAVE also P [B * H, tiles, BT, BT]. window at most BT. Grid tiles * B * H.

    With PACKED, starts [B, T] is the index of the first token of each token's sequence, and nobody sees before it.
    """
    c, bh = _place(tl.cdiv(n_tokens, BT))
    i = tl.arange(0, BT)
    own = i[:, None] >= i[None, :]
    token = c * BT
    before = tl.maximum(token - BT, 0)
    ok = _present(token, n_tokens, BT, MASKED)
    ok_before = _present(before, n_tokens, BT, MASKED)
    head = (bh // H) * n_tokens * H + bh % H
    row = head + token * H
    row_before = head + before * H
    q1, q2 = _turned_halves(q, row, i, ok, BT, cos, sin, H, D, ROPE)
    k1, k2 = _turned_halves(k, row, i, ok, BT, cos, sin, H, D, ROPE)
    s = tl.dot(q1, tl.trans(k1), input_precision=PREC)
    s = tl.dot(q2, tl.trans(k2), s, input_precision=PREC)
    k1, k2 = _turned_halves(k, row_before, i, ok_before, 0, cos, sin, H, D, ROPE)
    vb = _values(v, row, i, ok, H, V)
    v_before = _values(v, row_before, i, ok_before, H, V)
    s_before = tl.dot(q1, tl.trans(k1), input_precision=PREC)
    s_before = tl.dot(q2, tl.trans(k2), s_before, input_precision=PREC)
    if PACKED:
        starts += (bh // H) * n_tokens
    seen = _seen(c, token, i, ok, starts, window, phase, BT, ALIGNED, PACKED)
    s = tl.where(seen, tl.where(own, s, s_before) * (scale * LOG2E), NEVER)
    p = tl.exp2(s - tl.max(s, 1)[:, None])
    p = (p / tl.sum(p, 1)[:, None]).to(vb.dtype)
    if SAVE:
        at = (bh * tl.cdiv(n_tokens, BT) + c) * (BT * BT) + i[:, None] * BT + i[None, :]
        tl.store(weights + at, p)
    acc = tl.dot(tl.where(own, p, 0.0).to(vb.dtype), vb, input_precision=PREC)
    acc = tl.dot(tl.where(own, 0.0, p).to(vb.dtype), v_before, acc, input_precision=PREC)
    at = o + row * V + i[:, None] * (H * V) + tl.arange(0, V)[None, :]
    tl.store(at, acc.to(o.dtype.element_ty), mask=ok[:, None])


@triton.jit
def query_gradient_kernel(
    k, v, cos, sin, do, weights, dq, dscores, n_tokens, scale,
    H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, MASKED: tl.constexpr,
    ROPE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dq, and dS [B * H, tiles, BT, BT] in the dtype of P. Grid tiles * B * H."""
    c, bh = _place(tl.cdiv(n_tokens, BT))
    i = tl.arange(0, BT)
    own = i[:, None] >= i[None, :]
    token = c * BT
    before = tl.maximum(token - BT, 0)
    ok = _present(token, n_tokens, BT, MASKED)
    ok_before = _present(before, n_tokens, BT, MASKED)
    head = (bh // H) * n_tokens * H + bh % H
    row = head + token * H
    row_before = head + before * H
    k1, k2 = _turned_halves(k, row, i, ok, BT, cos, sin, H, D, ROPE)
    before1, before2 = _turned_halves(k, row_before, i, ok_before, 0, cos, sin, H, D, ROPE)
    dob = _values(do, row, i, ok, H, V)
    dp = tl.dot(dob, tl.trans(_values(v, row, i, ok, H, V)), input_precision=PREC)
    v_before = _values(v, row_before, i, ok_before, H, V)
    dp = tl.where(own, dp, tl.dot(dob, tl.trans(v_before), input_precision=PREC))
    at = (bh * tl.cdiv(n_tokens, BT) + c) * (BT * BT) + i[:, None] * BT + i[None, :]
    p = tl.load(weights + at).to(tl.float32)
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) * scale).to(dob.dtype)
    tl.store(dscores + at, ds)
    part = tl.where(own, ds, 0.0).to(dob.dtype)
    acc1 = tl.dot(part, k1, input_precision=PREC)
    acc2 = tl.dot(part, k2, input_precision=PREC)
    part = tl.where(own, 0.0, ds).to(dob.dtype)
    acc1 = tl.dot(part, before1, acc1, input_precision=PREC)
    acc2 = tl.dot(part, before2, acc2, input_precision=PREC)
    _store_turned_back(dq, row, i, ok, BT, cos, sin, acc1, acc2, H, D, ROPE)


@triton.jit
def _column(x, tile, hidden, BT: tl.constexpr):
    """A stored tile transposed, [key, query], without what is `hidden`."""
    i = tl.arange(0, BT)
    y = tl.trans(tl.load(x + tile * (BT * BT) + i[:, None] * BT + i[None, :]))
    return tl.where(hidden, 0.0, y).to(x.dtype.element_ty)


@triton.jit
def key_value_gradient_kernel(
    q, cos, sin, do, weights, dscores, dk, dv, n_tokens,
    H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, MASKED: tl.constexpr,
    ROPE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dk in one program, dv in the next. Grid 2 * tiles * B * H."""
    n_tiles = tl.cdiv(n_tokens, BT)
    place, bh = _place(2 * n_tiles)
    c = place // 2
    i = tl.arange(0, BT)
    later = i[:, None] > i[None, :]  # [key, query]
    own_or_none = (i[:, None] <= i[None, :]) | (c + 1 == n_tiles)
    after = tl.minimum(c + 1, n_tiles - 1)
    ok = _present(c * BT, n_tokens, BT, MASKED)
    ok_after = _present(after * BT, n_tokens, BT, MASKED)
    head = (bh // H) * n_tokens * H + bh % H
    row = head + c * BT * H
    row_after = head + after * BT * H
    tile = bh * n_tiles + c
    tile_after = bh * n_tiles + after
    if place % 2 == 0:
        acc = tl.dot(_column(weights, tile, later, BT), _values(do, row, i, ok, H, V), input_precision=PREC)
        p = _column(weights, tile_after, own_or_none, BT)
        acc = tl.dot(p, _values(do, row_after, i, ok_after, H, V), acc, input_precision=PREC)
        at = dv + row * V + i[:, None] * (H * V) + tl.arange(0, V)[None, :]
        tl.store(at, acc.to(dv.dtype.element_ty), mask=ok[:, None])
    else:  # positions relative to the key tile's start, which is row 0 of the table
        q1, q2 = _turned_halves(q, row, i, ok, 0, cos, sin, H, D, ROPE)
        ds = _column(dscores, tile, later, BT)
        acc1 = tl.dot(ds, q1, input_precision=PREC)
        acc2 = tl.dot(ds, q2, input_precision=PREC)
        q1, q2 = _turned_halves(q, row_after, i, ok_after, BT, cos, sin, H, D, ROPE)
        ds = _column(dscores, tile_after, own_or_none, BT)
        acc1 = tl.dot(ds, q1, acc1, input_precision=PREC)
        acc2 = tl.dot(ds, q2, acc2, input_precision=PREC)
        _store_turned_back(dk, row, i, ok, 0, cos, sin, acc1, acc2, H, D, ROPE)
