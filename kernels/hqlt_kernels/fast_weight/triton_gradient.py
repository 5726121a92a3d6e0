"""The last kernel of the backward: gradients of q, k, beta and log_decay, all tiles at once.

In the words of triton_kernels.py, with dR = dv:

    P = tril(D do U^T)      M = -tril(D dR U^T, -1)
    dq = gamma do S^T + P k
    dk = (gamma_last / gamma) U dS^T + P^T q + M^T k - gamma dR S^T + M k
    b^2 dbeta = rowsum(dR U)
    <q, dq> = rowsum(do o)             <k, dk> = 2 b dbeta - rowsum(dv v)   (additive: rowsum(dv v))

A tile's queries and keys both read, the state and the tile's writes, and the keys with a minus sign. So they are rows
of one matrix of 2 BT readers, do and dR above each other, and half as many products do the work. No product of three
C x C matrices is left. dbeta divides by b twice; a b of exactly zero is replaced by a tiny one, whose writes are far
below rounding. The inner products in the last line are what the backward of the l2 norm needs of a whole row; known
from the values' side, they let a program finish a slice of the columns of dq and dk before it has seen the next.

The gradient of a log decay at t sums what is read after t of what was written before it. With <y, dy> summed over each
reader and each write, that is the readers from t on, less the writes from t on, plus what the writes leave behind at
the tile's end, plus gamma_last <S, dS>. Pairs within t's past or future cancel: they are the same products of the same
rounded numbers. Taken over the whole sequence, or from rowsum(do o) and rowsum(dv v), they would not.

What a strong decay leaves of that is still small beside the terms. So float32 adds up the pairs themselves, each by the
decays it contains: one more product in three parts, which 16-bit results would not show.
"""

# What is inside @triton.jit is not Python to a type checker.
# mypy: ignore-errors

import triton
import triton.language as tl

from hqlt_kernels.fast_weight.triton_kernels import _decay, _features_backward, _load, _place, _readable, _store, _tile


@triton.jit
def _reads(r, j, BT: tl.constexpr, READ: tl.constexpr, DELTA: tl.constexpr):
    """Whether reader r of a tile, its queries and then its keys, reads write j."""
    i = r % BT
    seen = _readable(i, j, READ) & (r < BT)
    if DELTA:
        seen = seen | ((r >= BT) & (i > j))
    return seen


@triton.jit
def gradient_kernel(
    q,
    k,
    q_features,
    k_features,
    v,
    beta,
    gates,
    norms,
    o,
    do,
    dv,
    writes,
    states,
    dstates,
    dq,
    dk,
    dv_sum,
    dbeta,
    dlog_decay,
    T,
    NT,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    STRIDE: tl.constexpr,
    PARTS: tl.constexpr,
    READ: tl.constexpr,
    SHIFT: tl.constexpr,
    MASKED: tl.constexpr,
    FEATURE: tl.constexpr,
    DELTA: tl.constexpr,
    DECAY: tl.constexpr,
    TINY: tl.constexpr,
    ADD: tl.constexpr,
    STAGES: tl.constexpr,
    PREC: tl.constexpr,
):
    """dq, dk before the feature map, dbeta and dlog_decay [B, T, H].

    The 2 BT readers of a tile, its queries and then its keys, are rows of one matrix: both read S and earlier writes,
    the keys with a minus sign. Columns of K are worked on BK at a time, while the next are loaded. q_features,
    k_features from prepare_kernel, q with the scale. With ADD, dq, dk and dv are added to what stands in dq, dk and
    dv_sum. Grid NT * B * H.
    """
    PAIRS: tl.constexpr = PREC == "tf32x3"  # float32
    c, bh = _place(NT)
    first, count = _tile(c, T, BT, PARTS, STRIDE)
    tile = bh * NT + c
    j = tl.arange(0, BT)
    r = tl.arange(0, 2 * BT)
    i = r % BT
    is_k = r >= BT
    e = tl.arange(0, V)
    row = (bh // H) * T * H + bh % H + first * H
    row_k = row - SHIFT * H
    ok_j = j < count
    ok_v = ok_j & (first + j >= SHIFT)
    ok_i = i < count
    ok = ok_i & (first + i >= tl.where(is_k, SHIFT, 0))
    at = tl.where(is_k, row_k, row) + i * H
    vectors = at[:, None] * V + e[None, :]
    dread = _load(tl.where(is_k[:, None], dv, do) + vectors, ok, MASKED)  # of what is read, by reader
    answer = _load(tl.where(is_k[:, None], v, o) + vectors, ok, MASKED)
    inner = tl.sum(dread.to(tl.float32) * answer.to(tl.float32), 1)
    vectors_v = (row_k + j * H)[:, None] * V + e[None, :]
    if DELTA:
        U = _load(writes + (row + j * H)[:, None] * V + e[None, :], ok_j, MASKED)
    else:
        U = _load(v + vectors_v, ok_v, MASKED)

    P = tl.dot(dread, tl.trans(U), input_precision=PREC)  # [reader, write]
    if DELTA:
        b = tl.load(beta + row + i * H, mask=ok_i, other=1.0).to(tl.float32)
        b = tl.where(tl.abs(b) < TINY, TINY, b)
        bdb = tl.sum(tl.where(r[:, None] == BT + j[None, :], P, 0.0), 1) / b
        tl.store(dbeta + row + i * H, (bdb / b).to(dbeta.dtype.element_ty), mask=ok_i & is_k)
        inner = tl.where(is_k, 2 * bdb - inner, inner)
        sign = tl.where(is_k, -1.0, 1.0)
    else:
        sign = tl.where(is_k, 0.0, 1.0)
    PT = tl.dot(U, tl.trans(dread), input_precision=PREC)  # [write, reader]
    reads = _reads(r[:, None], j[None, :], BT, READ, DELTA)
    read_by = _reads(r[None, :], j[:, None], BT, READ, DELTA)
    P *= sign[:, None]
    PT *= sign[None, :]
    if DECAY:
        gate = gates + tile * (2 * BT)
        g_read = tl.load(gate + tl.where(is_k, 0, BT) + i)
        g_written = tl.load(gate + j)
        last = tl.load(gate + BT - 1)
        P *= _decay(tl.where(reads, g_read[:, None] - g_written[None, :], 0.0))
        PT *= _decay(tl.where(read_by, g_read[None, :] - g_written[:, None], 0.0))
        sign *= _decay(g_read)
        left = _decay(last - g_written)
        read = tl.zeros((2 * BT,), tl.float32)  # <y, dy> of each reader, of each write, and of what writes leave behind
        written = tl.zeros((BT,), tl.float32)
        passed = tl.zeros((BT,), tl.float32)
        kept = tl.zeros((BK,), tl.float32)
    P = tl.where(reads, P, 0.0).to(U.dtype)
    PT = tl.where(read_by, PT, 0.0).to(U.dtype)

    # The gradient of a query's phi is dy * scale, and phi is y / scale.
    norm = tl.load(norms + tile * (2 * BT) + tl.where(is_k, 0, BT) + i) * tl.where(is_k, 1.0, scale)
    inner *= tl.where(is_k, 1.0, 1 / (scale * scale))
    half = tl.arange(0, 2)[:, None, None]
    for n in tl.range(0, K, BK, num_stages=STAGES):
        d = n + tl.arange(0, BK)
        columns = at[:, None] * K + d[None, :]
        to = tl.where(is_k[:, None], dk, dq) + columns
        x = _load(tl.where(is_k[:, None], k, q) + columns, ok, MASKED)  # early: needed last, and not pipelined
        if ADD:
            added = _load(to, ok, MASKED)
        state_at = tile * (K * V) + d[:, None] * V + e[None, :]
        S = tl.load(states + state_at)
        dS = tl.load(dstates + state_at)
        features = tl.where(is_k[:, None], k_features, q_features) + (row + i * H)[:, None] * K + d[None, :]
        yb = _load(features, ok_i, MASKED)
        kb = _load(k_features + (row + j * H)[:, None] * K + d[None, :], ok_j, MASKED)
        y = yb.to(tl.float32)
        dy = tl.dot(dread, tl.trans(S), input_precision=PREC)
        if PARTS > 1:  # queries read the state at the start of the block
            S_read = tl.load(states + state_at - (c % PARTS) * (K * V))
            dy = tl.where(is_k[:, None], dy, tl.dot(dread, tl.trans(S_read), input_precision=PREC))
        dy *= sign[:, None]
        if DECAY and PAIRS:
            read += tl.sum(dy * y, 1)
        dy = tl.dot(P, kb, dy, input_precision=PREC)
        dk_written = tl.dot(U, tl.trans(dS), input_precision=PREC)
        if DECAY:
            kept += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
            dk_written *= left[:, None]
            passed += tl.sum(dk_written * kb.to(tl.float32), 1)
        dk_written = tl.dot(PT, yb, dk_written, input_precision=PREC)
        if DECAY and not PAIRS:
            read += tl.sum(dy * y, 1)
            written += tl.sum(dk_written * kb.to(tl.float32), 1)
        dy += tl.reshape(tl.where(half == 1, dk_written[None, :, :], 0.0), (2 * BT, BK))
        dx = _features_backward(x.to(tl.float32), y, dy, norm, inner, FEATURE)
        if ADD:
            dx += added.to(tl.float32)
        _store(to, dx, ok, MASKED)

    if ADD:
        total = _load(dv_sum + vectors_v, ok_v, MASKED).to(tl.float32)
        total += _load(dv + vectors_v, ok_v, MASKED).to(tl.float32)
        _store(dv_sum + vectors_v, total, ok_v, MASKED)
    if DECAY:
        if PAIRS:
            scores = tl.zeros((2 * BT, BT), tl.float32)  # <y, k> of readers and writes
            for n in range(0, K, BK):
                d = n + tl.arange(0, BK)
                features = tl.where(is_k[:, None], k_features, q_features) + (row + i * H)[:, None] * K + d[None, :]
                yb = _load(features, ok_i, MASKED)
                kb = _load(k_features + (row + j * H)[:, None] * K + d[None, :], ok_j, MASKED)
                scores = tl.dot(yb, tl.trans(kb), scores, input_precision=PREC)
            # Writes up to j are the past of the decay after j; the last place is that of the tile's first decay.
            after = (j + 1) % BT
            pairs = tl.where(after[None, :] > 0, tl.cumsum(P * scores, 1), 0.0)  # [reader, decay]
            later = tl.where(is_k[:, None], i[:, None] >= after[None, :], _readable(i[:, None], after[None, :], READ))
            dg = tl.sum(tl.where(later, read[:, None] + pairs, 0.0), 0)
            dg += tl.where(after > 0, tl.cumsum(passed, 0), 0.0) + _decay(last) * tl.sum(kept, 0)
            tl.store(dlog_decay + row + after * H, dg.to(dlog_decay.dtype.element_ty), mask=after < count)
        else:
            read_q, read_k = tl.split(tl.trans(tl.reshape(read, (2, BT))))
            if READ == 0:
                dg = tl.cumsum(read_q + read_k - written, 0, reverse=True)
            else:
                dg = tl.cumsum(read_k - written, 0, reverse=True)
                if PARTS == 1 and STRIDE > READ:
                    dg += tl.sum(tl.where(_readable(j[:, None], j[None, :], READ), read_q[:, None], 0.0), 0)
            dg += tl.sum(passed, 0) + _decay(last) * tl.sum(kept, 0)
            tl.store(dlog_decay + row + j * H, dg.to(dlog_decay.dtype.element_ty), mask=ok_j)
