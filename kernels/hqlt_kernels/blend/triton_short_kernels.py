"""Triton kernels of the blend of short sequences: a program computes both memories of one head, in one tile.

The equations are those of `window_attention/triton_kernels.py` and `fast_weight/triton_kernels.py` with no state before
the tile and none after it. Nothing is stored between forward and backward: a tile is computed again in less time than
it takes to read.

What the backward needs transposed, it computes transposed, with an accumulator only as a left or a right operand as it
stands (i: a query or the time of a write; D the decay between the two, M = tril(U dR^T)^T):

    dU^T = do^T P       dR^T = dU^T T       dq^T = k^T (D U do^T)       dk = (D U do^T) q - M^T k - (k^T M)^T

Linear attention may have a normaliser in place of the scale: query i is multiplied by r_i = 1 / (q_i . z_i + 1e-10).
With TIME z_i is the sum of the keys that it reads, so q_i . z_i is the sum of its weights P. With HEADS it is the sum
over the heads up to this one of the key that is written at i; programs beside this one bring them into the cache. The
gradient of a normaliser is dn_i = -r_i (do_i . o_i), and then

    TIME     what stood for do_i . U_j is r_i (do_i . U_j) + dn_i
    HEADS    the same without dn_i; dq_i += dn_i z_i; a key is in the z of all later heads: `heads_gradient_kernel`
"""

# ruff: noqa: SIM108  # Triton compiles a subset of Python; `if` on a constexpr takes code out
# What is inside @triton.jit is not Python to a type checker.
# mypy: ignore-errors

import triton
import triton.language as tl

from hqlt_kernels.fast_weight.triton_kernels import _features, _features_backward, _inverse, _readable
from hqlt_kernels.window_attention.triton_kernels import LOG2E, NEVER, _visible

# Values of the constexpr NORMALISER, by their places in `fast_weight.operator.NORMALISERS`; 0 is none.
TIME = tl.constexpr(1)
HEADS = tl.constexpr(2)
NORMALISER_EPSILON = tl.constexpr(1e-10)


@triton.jit
def _attention(q, k, window, scale, BT: tl.constexpr, ALIGNED: tl.constexpr, PREC: tl.constexpr):
    """The softmax weights [query, key] of KV-memory."""
    i = tl.arange(0, BT)
    s = tl.dot(q, tl.trans(k), input_precision=PREC) * (scale * LOG2E)
    s = tl.where(_visible(i[:, None], i[None, :], window, 0, ALIGNED), s, NEVER)
    p = tl.exp2(s - tl.max(s, 1)[:, None])
    return p / tl.sum(p, 1)[:, None]


@triton.jit
def _gates(log_decay, head, ok, H: tl.constexpr, BT: tl.constexpr, READ: tl.constexpr, DECAY: tl.constexpr):
    """log2 of gamma for keys and for queries."""
    i = tl.arange(0, BT)
    gk = tl.zeros((BT,), tl.float32)
    gq = gk
    if DECAY:
        g = tl.load(log_decay + head + i * H, mask=ok, other=0.0).to(tl.float32) * LOG2E
        gk = tl.cumsum(g, 0)
        if READ == 0:
            gq = gk
        else:
            gq = tl.sum(tl.where((i[None, :] // READ) < (i[:, None] // READ), g[None, :], 0.0), 1)
    return gk, gq


@triton.jit
def _transfer(
    k, b, gk, BT: tl.constexpr, DECAY: tl.constexpr, TYPE: tl.constexpr, PREC: tl.constexpr
):  # fmt: skip
    """T, so that the writes are T v."""
    i = tl.arange(0, BT)
    lower = i[:, None] > i[None, :]
    A = tl.dot(k, tl.trans(k), input_precision=PREC) * b[None, :]
    if DECAY:
        A *= tl.exp2(tl.where(lower, gk[:, None] - gk[None, :], 0.0))
    return (_inverse(tl.where(lower, A, 0.0), BT, PREC) * b[:, None]).to(TYPE)


@triton.jit
def _reads(q, k, gq, gk, BT: tl.constexpr, READ: tl.constexpr, DECAY: tl.constexpr, PREC: tl.constexpr):
    """The weights [query, write] of FW-memory."""
    i = tl.arange(0, BT)
    seen = _readable(i[:, None], i[None, :], READ)
    P = tl.dot(q, tl.trans(k), input_precision=PREC)
    if DECAY:
        P *= tl.exp2(tl.where(seen, gq[:, None] - gk[None, :], 0.0))
    return tl.where(seen, P, 0.0)


@triton.jit
def _across(x, READ: tl.constexpr, BT: tl.constexpr):
    """At t, the sum of x [write j, read i] over the pairs that a decay at t comes between: j < t, i reads after it."""
    t = tl.arange(0, BT)
    before = tl.cumsum(x, 0) - x
    return tl.sum(tl.where(_readable(t[None, :], t[:, None], READ), before, 0.0), 1)


@triton.jit
def _sum_of_heads(at, head, ok, K: tl.constexpr, BT: tl.constexpr, FEATURE: tl.constexpr):
    """The features of the keys at `at` [BT, K], which are those of `head`, and of all heads before it, added up."""
    total = tl.zeros((BT, K), tl.float32)
    for back in range(head + 1):
        y, _ = _features(tl.load(at - back * K, mask=ok[:, None], other=0.0).to(tl.float32), FEATURE, BT)
        total += y
    return total


@triton.jit
def _rates(
    P, q, at, head, ok, K: tl.constexpr, BT: tl.constexpr, READ: tl.constexpr, FEATURE: tl.constexpr,
    NORMALISER: tl.constexpr,
):  # fmt: skip
    """What a normaliser multiplies the queries by; zero where nothing is read: there it may be the epsilon alone."""
    if NORMALISER == TIME:
        n = tl.sum(P, 1)
    else:
        n = tl.sum(q * _sum_of_heads(at, head, ok, K, BT, FEATURE), 1)
    return tl.where(ok & (tl.arange(0, BT) >= READ), 1 / (n + NORMALISER_EPSILON), 0.0)


@triton.jit
def short_forward_kernel(
    q, k, v, beta, log_decay, gate, kv, fw, mixed, T, window, scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, READ: tl.constexpr, SHIFT: tl.constexpr,
    ALIGNED: tl.constexpr, FEATURE: tl.constexpr, NORMALISER: tl.constexpr, DELTA: tl.constexpr, DECAY: tl.constexpr,
    MIX: tl.constexpr, TINY: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """kv and fw, or with MIX mixed, [B, T, H, V]; T at most BT. Grid B * H."""
    bh = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BT)
    ok = i < T
    head = (bh // H) * T * H + bh % H
    keys = head * K + i[:, None] * (H * K) + tl.arange(0, K)[None, :]
    values = head * V + i[:, None] * (H * V) + tl.arange(0, V)[None, :]
    TYPE: tl.constexpr = q.dtype.element_ty

    xq = tl.load(q + keys, mask=ok[:, None], other=0.0)
    xk = tl.load(k + keys, mask=ok[:, None], other=0.0)
    xv = tl.load(v + values, mask=ok[:, None], other=0.0)
    weights = _attention(xq, xk, window, scale, BT, ALIGNED, PREC)
    answer_kv = tl.dot(weights.to(TYPE), xv, input_precision=PREC)

    if SHIFT > 0:
        ok_k = ok & (i >= SHIFT)
        xk = tl.load(k + keys - SHIFT * H * K, mask=ok_k[:, None], other=0.0)
        xv = tl.load(v + values - SHIFT * H * V, mask=ok_k[:, None], other=0.0)
    else:
        ok_k = ok
    yq, _ = _features(xq.to(tl.float32), FEATURE, BT)
    yk, _ = _features(xk.to(tl.float32), FEATURE, BT)
    yk = tl.where(ok_k[:, None], yk, 0.0).to(TYPE)
    gk, gq = _gates(log_decay, head, ok, H, BT, READ, DECAY)
    if DELTA:
        b = tl.load(beta + head + i * H, mask=ok, other=0.0).to(tl.float32)
        b = tl.where(tl.abs(b) < TINY, TINY, b)
        U = tl.dot(_transfer(yk, b, gk, BT, DECAY, TYPE, PREC), xv, input_precision=PREC).to(TYPE)
    else:
        U = xv
    if NORMALISER == 0:
        P = _reads((yq * scale).to(TYPE), yk, gq, gk, BT, READ, DECAY, PREC)
    else:
        P = _reads(yq.to(TYPE), yk, gq, gk, BT, READ, DECAY, PREC)
        at = k + keys - SHIFT * H * K
        P *= _rates(P, yq, at, bh % H, ok_k, K, BT, READ, FEATURE, NORMALISER)[:, None]
    answer_fw = tl.dot(P.to(TYPE), U, input_precision=PREC)

    if MIX:
        s = tl.sigmoid(tl.load(gate + values, mask=ok[:, None], other=0.0).to(tl.float32))
        tl.store(mixed + values, (answer_kv + s * (answer_fw - answer_kv)).to(TYPE), mask=ok[:, None])
    else:
        tl.store(kv + values, answer_kv.to(TYPE), mask=ok[:, None])
        tl.store(fw + values, answer_fw.to(TYPE), mask=ok[:, None])


@triton.jit
def short_backward_kernel(
    q, k, v, beta, log_decay, gate, dkv, dfw, dmixed, dq, dk, dv, dbeta, dlog_decay, dgate, dnorm, T, window, scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, READ: tl.constexpr, SHIFT: tl.constexpr,
    ALIGNED: tl.constexpr, FEATURE: tl.constexpr, NORMALISER: tl.constexpr, DELTA: tl.constexpr, DECAY: tl.constexpr,
    MIX: tl.constexpr, TINY: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """All gradients; those of kv and fw, or with MIX that of mixed, are given. Grid B * H.

    With the normaliser over heads dk is not whole: dnorm [B, T, H] float32 are the gradients of the normalisers.
    """
    bh = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BT)
    ok = i < T
    head = (bh // H) * T * H + bh % H
    keys = head * K + i[:, None] * (H * K) + tl.arange(0, K)[None, :]
    values = head * V + i[:, None] * (H * V) + tl.arange(0, V)[None, :]
    TYPE: tl.constexpr = q.dtype.element_ty

    # FW-memory, forward
    ok_k = ok & (i >= SHIFT)
    xq = tl.load(q + keys, mask=ok[:, None], other=0.0)
    xk = tl.load(k + keys - SHIFT * H * K, mask=ok_k[:, None], other=0.0)
    xv = tl.load(v + values - SHIFT * H * V, mask=ok_k[:, None], other=0.0)
    y, _ = _features(xq.to(tl.float32), FEATURE, BT)
    if NORMALISER == 0:
        qb = (y * scale).to(TYPE)
    else:
        yq = y
        qb = yq.to(TYPE)
    y, _ = _features(xk.to(tl.float32), FEATURE, BT)
    kb = tl.where(ok_k[:, None], y, 0.0).to(TYPE)
    gk, gq = _gates(log_decay, head, ok, H, BT, READ, DECAY)
    if DELTA:
        b = tl.load(beta + head + i * H, mask=ok, other=1.0).to(tl.float32)
        b = tl.where(tl.abs(b) < TINY, TINY, b)
        X = _transfer(kb, b, gk, BT, DECAY, TYPE, PREC)
        U = tl.dot(X, xv, input_precision=PREC).to(TYPE)
    else:
        U = xv
    if NORMALISER == 0:
        P = _reads(qb, kb, gq, gk, BT, READ, DECAY, PREC).to(TYPE)
    else:
        P = _reads(qb, kb, gq, gk, BT, READ, DECAY, PREC)
        at = k + keys - SHIFT * H * K
        rates = _rates(P, yq, at, bh % H, ok_k, K, BT, READ, FEATURE, NORMALISER)
        P = (P * rates[:, None]).to(TYPE)

    # KV-memory, forward
    if SHIFT > 0:
        ak = tl.load(k + keys, mask=ok[:, None], other=0.0)
        av = tl.load(v + values, mask=ok[:, None], other=0.0)
    else:
        ak = xk
        av = xv
    weights = _attention(xq, ak, window, scale, BT, ALIGNED, PREC).to(TYPE)
    if MIX:
        answer_kv = tl.dot(weights, av, input_precision=PREC)
        answer_fw = tl.dot(P, U, input_precision=PREC)
        s = tl.sigmoid(tl.load(gate + values, mask=ok[:, None], other=0.0).to(tl.float32))
        dm = tl.load(dmixed + values, mask=ok[:, None], other=0.0).to(tl.float32)
        tl.store(dgate + values, (dm * (answer_fw - answer_kv) * s * (1 - s)).to(TYPE), mask=ok[:, None])
        da = (dm * (1 - s)).to(TYPE)
        do = (dm * s).to(TYPE)
    else:
        da = tl.load(dkv + values, mask=ok[:, None], other=0.0)
        do = tl.load(dfw + values, mask=ok[:, None], other=0.0)
        if NORMALISER > 0:
            answer_fw = tl.dot(P, U, input_precision=PREC)
    if NORMALISER > 0:
        inner = tl.sum(do.to(tl.float32) * answer_fw, 1)

    # KV-memory, backward
    dw = tl.dot(da, tl.trans(av), input_precision=PREC)
    p = weights.to(tl.float32)
    ds = (p * (dw - tl.sum(p * dw, 1)[:, None]) * scale).to(TYPE)
    sum_q = tl.dot(ds, ak, input_precision=PREC)
    sum_k = tl.trans(tl.dot(tl.trans(xq), ds, input_precision=PREC))
    sum_v = tl.trans(tl.dot(tl.trans(da), weights, input_precision=PREC))
    if SHIFT > 0:  # FW-memory's gradients belong to other rows: they are added in memory
        tl.store(dk + keys, sum_k.to(TYPE), mask=ok[:, None])
        tl.store(dv + values, sum_v.to(TYPE), mask=ok[:, None])
        tl.debug_barrier()
        sum_k = tl.load(dk + keys - SHIFT * H * K, mask=ok_k[:, None], other=0.0).to(tl.float32)
        sum_v = tl.load(dv + values - SHIFT * H * V, mask=ok_k[:, None], other=0.0).to(tl.float32)
        tl.debug_barrier()

    # FW-memory, backward
    dR = tl.dot(tl.trans(do), P, input_precision=PREC)  # dU^T
    if DELTA:
        dR = tl.dot(dR.to(TYPE), X, input_precision=PREC)
    sum_v += tl.trans(dR)
    tl.store(dv + values - SHIFT * H * V, sum_v.to(TYPE), mask=ok_k[:, None])
    seen = _readable(i[None, :], i[:, None], READ)
    dP = tl.dot(U, tl.trans(do), input_precision=PREC)  # [write, query]
    if DECAY:
        dP *= tl.exp2(tl.where(seen, gq[None, :] - gk[:, None], 0.0))
    if NORMALISER == TIME:
        dP -= inner[None, :]
    dP = tl.where(seen, dP, 0.0)
    if DECAY:
        dg = _across(dP * tl.dot(kb, tl.trans(qb), input_precision=PREC), READ, BT)
    dP = dP.to(TYPE)
    dy = tl.trans(tl.dot(tl.trans(kb), dP, input_precision=PREC))
    if NORMALISER == 0:
        dy *= scale
    else:
        dy *= rates[:, None]
    if NORMALISER == HEADS:
        dn = -inner * rates
        dy += dn[:, None] * _sum_of_heads(k + keys - SHIFT * H * K, bh % H, ok_k, K, BT, FEATURE)
        tl.store(dnorm + head + i * H, dn, mask=ok)
    x = tl.load(q + keys, mask=ok[:, None], other=0.0).to(tl.float32)  # again: registers are what is short here
    y, norm = _features(x, FEATURE, BT)
    sum_q += _features_backward(x, y, dy, norm, tl.sum(y * dy, 1), FEATURE)
    tl.store(dq + keys, sum_q.to(TYPE), mask=ok[:, None])
    if NORMALISER > 0:
        qb = (y * rates[:, None]).to(TYPE)
    dy = tl.dot(dP, qb, input_precision=PREC)
    if DELTA:
        M = tl.dot(U, dR.to(TYPE), input_precision=PREC)  # [write j, reader i]: the reader's own write knew of j
        inner = tl.sum(tl.where(i[:, None] == i[None, :], M, 0.0), 1)
        tl.store(dbeta + head + i * H, (inner / (b * b)).to(dbeta.dtype.element_ty), mask=ok)
        M = tl.where(i[:, None] < i[None, :], -M, 0.0)
        if DECAY:
            M *= tl.exp2(tl.where(i[:, None] < i[None, :], gk[None, :] - gk[:, None], 0.0))
            dg += _across(M * tl.dot(kb, tl.trans(kb), input_precision=PREC), 0, BT)
        M = M.to(TYPE)
        dy = tl.dot(M, kb, dy, input_precision=PREC)
        dy += tl.trans(tl.dot(tl.trans(kb), M, input_precision=PREC))
    x = tl.load(k + keys - SHIFT * H * K, mask=ok_k[:, None], other=0.0).to(tl.float32)
    y, norm = _features(x, FEATURE, BT)
    sum_k += _features_backward(x, y, dy, norm, tl.sum(y * dy, 1), FEATURE)
    tl.store(dk + keys - SHIFT * H * K, sum_k.to(TYPE), mask=ok_k[:, None])
    if DECAY:
        tl.store(dlog_decay + head + i * H, dg.to(dlog_decay.dtype.element_ty), mask=ok)


@triton.jit
def heads_gradient_kernel(
    q, k, dnorm, dk, T, n_rows,
    H: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, SHIFT: tl.constexpr, FEATURE: tl.constexpr,
):  # fmt: skip
    """Adds to dk what comes through the normaliser over heads. Rows are tokens, B * T; grid cdiv(n_rows, ROWS)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = (row < n_rows) & (row % T >= SHIFT)
    total = tl.zeros((ROWS, K), tl.float32)
    for back in range(H):
        head = row * H + (H - 1 - back)
        at = head[:, None] * K + tl.arange(0, K)[None, :]
        y, _ = _features(tl.load(q + at, mask=ok[:, None], other=0.0).to(tl.float32), FEATURE, ROWS)
        total += tl.load(dnorm + head, mask=ok, other=0.0)[:, None] * y
        at -= SHIFT * H * K
        x = tl.load(k + at, mask=ok[:, None], other=0.0).to(tl.float32)
        y, norm = _features(x, FEATURE, ROWS)
        dx = _features_backward(x, y, total, norm, tl.sum(y * total, 1), FEATURE)
        dx += tl.load(dk + at, mask=ok[:, None], other=0.0).to(tl.float32)
        tl.store(dk + at, dx.to(dk.dtype.element_ty), mask=ok[:, None])
