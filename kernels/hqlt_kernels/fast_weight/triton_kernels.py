"""Triton kernels of the fast-weight rules: one family, whose constexpr switches take parts out.

Tokens are cut into tiles of at most BT rows. Inside a tile (rows i, j; S the state before it; U the writes; R what the
memory did not know yet; b = beta), with gamma_i = exp(sum of log_decay up to i) and D_ij = gamma_i / gamma_j:

    A  = tril(D k k^T, -1) diag(b)     T = diag(b) (I + A)^-1     prepare_kernel, all tiles at once
    R  = v - gamma k S                 U = T R (additive: U = v)  scan_kernel, one tile after the other
    o  = gamma q S + tril(D q k^T) U   S' = gamma_last S + k^T (gamma_last / gamma) U

and backward, with dS the gradient of S':

    dU = tril(D q k^T)^T do + (gamma_last / gamma) k dS           dR = dv = T^T dU   (additive: dv = dU)
    dS_before = gamma_last dS + q^T gamma do - k^T gamma dR       reverse_scan_kernel, the tiles in reverse
    P = tril(D do U^T)      M = -tril(D dR U^T, -1)               gradient_kernel, all tiles at once
    dq = gamma do S^T + P k
    dk = (gamma_last / gamma) U dS^T + P^T q - gamma dR S^T + (M + M^T) k
    b^2 dbeta = rowsum(dR U)           d(sum of log_decay)_i = q dq + k dk - 2 b dbeta, and <S', dS> for the last row

The scale is multiplied into q by prepare_kernel, and b into T, so that the two scans, which are serial in time, load
neither. dbeta divides by b twice; a b of exactly zero is replaced by a tiny one, whose writes are far below rounding.
No product of three C x C matrices is left in the backward, and no tensor w, u, dw beside the writes.

Reading: query i reads the writes j <= i (READ = 0), or those of earlier blocks of READ tokens. A tile then holds whole
blocks (READ < BT), or a block is cut into PARTS tiles, all of which read the state at the block's start. STRIDE is the
distance in tokens between tiles (PARTS = 1) or between blocks. SHIFT reads keys and values that many tokens earlier.

No transposed accumulator is an operand of a dot: what is needed transposed is computed transposed. Such operands are
miscompiled on Hopper by Triton 3.4 to 3.7.0 (flash-linear-attention issue 640).
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
L2_EPSILON = tl.constexpr(1e-6)

# Values of the constexpr FEATURE.
IDENTITY = tl.constexpr(0)
SILU_L2 = tl.constexpr(1)
ELU_PLUS_ONE = tl.constexpr(2)
RELU_L2 = tl.constexpr(3)


@triton.jit
def _tile(c, T, BT: tl.constexpr, PARTS: tl.constexpr, STRIDE: tl.constexpr):
    """First token and number of tokens of tile c; the number may be zero or less after the end of the sequence."""
    first = (c // PARTS) * STRIDE + (c % PARTS) * BT
    count = tl.minimum(tl.minimum(BT, STRIDE - (c % PARTS) * BT), T - first)
    return first, count


@triton.jit
def _activate(x, FEATURE: tl.constexpr):
    """The feature map before its l2 norm."""
    if FEATURE == SILU_L2:
        x = x * tl.sigmoid(x)
    elif FEATURE == ELU_PLUS_ONE:
        x = tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0.0)))
    elif FEATURE == RELU_L2:
        x = tl.maximum(x, 0.0)
    return x


@triton.jit
def _activate_backward(x, dy, FEATURE: tl.constexpr):
    if FEATURE == SILU_L2:
        s = tl.sigmoid(x)
        dy = dy * (s + x * s * (1 - s))
    elif FEATURE == ELU_PLUS_ONE:
        dy = dy * tl.where(x > 0, 1.0, tl.exp(tl.minimum(x, 0.0)))
    elif FEATURE == RELU_L2:
        dy = tl.where(x > 0, dy, 0.0)
    return dy


@triton.jit
def _features(x, FEATURE: tl.constexpr):
    x = _activate(x, FEATURE)
    if FEATURE == SILU_L2 or FEATURE == RELU_L2:
        x = x * tl.rsqrt(tl.sum(x * x, 1) + L2_EPSILON)[:, None]
    return x


@triton.jit
def _readable(i, j, READ: tl.constexpr):
    """Whether query i reads write j of its own tile."""
    if READ == 0:
        seen = i >= j
    else:
        seen = (i // READ) > (j // READ)
    return seen


@triton.jit
def _inverse(A, BT: tl.constexpr, PREC: tl.constexpr):
    """(I + A)^-1 for strictly lower A [BT, BT] in float32.

    The 16 x 16 blocks on the diagonal by elimination in float32: repeated squaring (Neumann) grows binomially and is
    wrong for correlated keys. Then exact block merges (T A_off T, as (T A_off)^2 = 0) on the tensor core.
    """
    NB: tl.constexpr = BT // 16
    i = tl.arange(0, BT)
    j = tl.arange(0, 16)
    block = tl.arange(0, NB)
    own = block[:, None, None, None] == block[None, None, :, None]
    Ad = tl.sum(tl.where(own, tl.reshape(A, (NB, 16, NB, 16)), 0.0), 2)
    X = tl.zeros((NB, 16, 16), tl.float32) + tl.where(j[:, None] == j[None, :], 1.0, 0.0)[None, :, :]
    for s in range(15):
        column = tl.sum(tl.where((j == s)[None, None, :], Ad, 0.0), 2)
        row = tl.sum(tl.where((j == s)[None, :, None], X, 0.0), 1)
        X -= column[:, :, None] * row[:, None, :]
    X = tl.reshape(tl.where(own, X[:, :, None, :], 0.0), (BT, BT))
    if BT == 32:
        A = tl.where((i[:, None] // 16) == (i[None, :] // 16), 0.0, A)
        X -= tl.dot(tl.dot(X, A, input_precision=PREC), X, input_precision=PREC)
    if BT == 64:
        # M = X A_off has M^4 = 0, so (I + M)^-1 X = (I - M)(I + M^2) X exactly.
        A = tl.where((i[:, None] // 16) == (i[None, :] // 16), 0.0, A)
        M = tl.dot(X, A, input_precision=PREC)
        M2 = tl.dot(M, M, input_precision=PREC)
        X = X - tl.dot(M, X, input_precision=PREC)
        X = X + tl.dot(M2, X, input_precision=PREC)
    return X


@triton.jit
def prepare_kernel(
    q,
    k,
    beta,
    log_decay,
    q_out,
    k_out,
    transfer,
    gates,
    T,
    NT,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    STRIDE: tl.constexpr,
    PARTS: tl.constexpr,
    READ: tl.constexpr,
    SHIFT: tl.constexpr,
    FEATURE: tl.constexpr,
    DELTA: tl.constexpr,
    DECAY: tl.constexpr,
    TINY: tl.constexpr,
    PREC: tl.constexpr,
):
    """Features of q (times scale) and k, the matrix T, and the log2 of gamma for keys and for queries.

    q, k, q_out, k_out [B, T, H, K]; beta, log_decay [B, T, H]; transfer [B * H, NT, BT, BT];
    gates [B * H, NT, 2, BT] float32 (keys, queries). Grid (NT, B * H). k_out is by the time of writing (SHIFT applied).
    """
    c = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    first, count = _tile(c, T, BT, PARTS, STRIDE)
    i = tl.arange(0, BT)
    d = tl.arange(0, K)
    row = (bh // H) * T * H + bh % H + first * H
    ok = i < count
    x = tl.load(q + row * K + i[:, None] * (H * K) + d[None, :], mask=ok[:, None], other=0.0).to(tl.float32)
    x = _features(x, FEATURE) * scale
    tl.store(q_out + row * K + i[:, None] * (H * K) + d[None, :], x.to(q_out.dtype.element_ty), mask=ok[:, None])
    ok_k = ok & (first + i >= SHIFT)
    x = tl.load(
        k + (row - SHIFT * H) * K + i[:, None] * (H * K) + d[None, :], mask=ok_k[:, None], other=0.0
    ).to(tl.float32)
    x = tl.where(ok_k[:, None], _features(x, FEATURE), 0.0)
    kb = x.to(k_out.dtype.element_ty)
    tl.store(k_out + row * K + i[:, None] * (H * K) + d[None, :], kb, mask=ok[:, None])
    if DECAY:
        g = tl.load(log_decay + row + i * H, mask=ok, other=0.0).to(tl.float32) * LOG2E
        gk = tl.cumsum(g, 0)
        gate = gates + (bh * NT + c) * (2 * BT) + i
        tl.store(gate, gk)
        if READ == 0:
            gq = gk
        elif PARTS > 1:
            gq = tl.zeros((BT,), tl.float32)
        else:
            gq = tl.sum(tl.where((i[None, :] // READ) < (i[:, None] // READ), g[None, :], 0.0), 1)
        tl.store(gate + BT, gq)
    if DELTA:
        b = tl.load(beta + row + i * H, mask=ok, other=0.0).to(tl.float32)
        b = tl.where(tl.abs(b) < TINY, TINY, b)
        A = tl.dot(kb, tl.trans(kb), input_precision=PREC) * b[None, :]
        lower = i[:, None] > i[None, :]
        if DECAY:
            A *= tl.exp2(tl.where(lower, gk[:, None] - gk[None, :], 0.0))
        X = _inverse(tl.where(lower, A, 0.0), BT, PREC) * b[:, None]
        at = transfer + (bh * NT + c) * (BT * BT) + i[:, None] * BT + i[None, :]
        tl.store(at, X.to(transfer.dtype.element_ty))


@triton.jit
def scan_kernel(
    q,
    k,
    v,
    transfer,
    gates,
    o,
    states,
    writes,
    initial,
    final,
    T,
    NT,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    STRIDE: tl.constexpr,
    PARTS: tl.constexpr,
    READ: tl.constexpr,
    SHIFT: tl.constexpr,
    DELTA: tl.constexpr,
    DECAY: tl.constexpr,
    OUTPUT: tl.constexpr,
    SAVE: tl.constexpr,
    INITIAL: tl.constexpr,
    PREC: tl.constexpr,
):
    """o [B, T, H, V] and the final state [B * H, K, V]; with SAVE also the states before each tile and the writes U.

    q, k from prepare_kernel; states [B * H, NT, K, V] in the dtype of k. Grid (V / BV, B * H).
    """
    bh = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, BT)
    d = tl.arange(0, K)
    e = tl.program_id(0) * BV + tl.arange(0, BV)
    state_at = d[:, None] * V + e[None, :]
    if INITIAL:
        S = tl.load(initial + bh * (K * V) + state_at)
    else:
        S = tl.zeros((K, BV), tl.float32)
    read = S.to(k.dtype.element_ty)
    LOCAL: tl.constexpr = READ == 0 or (PARTS == 1 and STRIDE > READ)  # whether queries read writes of their own tile
    for c in range(0, NT):
        first, count = _tile(c, T, BT, PARTS, STRIDE)
        ok = i < count
        row = (bh // H) * T * H + bh % H + first * H
        Sb = S.to(k.dtype.element_ty)
        if SAVE:
            tl.store(states + (bh * NT + c) * (K * V) + state_at, Sb)
        if PARTS == 1:
            read = Sb
        elif c % PARTS == 0:
            read = Sb
        kb = tl.load(k + row * K + i[:, None] * (H * K) + d[None, :], mask=ok[:, None], other=0.0)
        ok_v = ok & (first + i >= SHIFT)
        vb = tl.load(v + (row - SHIFT * H) * V + i[:, None] * (H * V) + e[None, :], mask=ok_v[:, None], other=0.0)
        if DECAY:
            gk = tl.load(gates + (bh * NT + c) * (2 * BT) + i)
            last = tl.load(gates + (bh * NT + c) * (2 * BT) + BT - 1)
        if DELTA:
            tb = tl.load(transfer + (bh * NT + c) * (BT * BT) + i[:, None] * BT + i[None, :])
            R = tl.dot(kb, Sb, input_precision=PREC)
            if DECAY:
                R *= tl.exp2(gk)[:, None]
            R = vb.to(tl.float32) - R
            U = tl.dot(tb, R.to(kb.dtype), input_precision=PREC)
            Ub = U.to(kb.dtype)
            if SAVE:
                tl.store(writes + row * V + i[:, None] * (H * V) + e[None, :], Ub, mask=ok[:, None])
        else:
            Ub = vb
        if OUTPUT:
            qb = tl.load(q + row * K + i[:, None] * (H * K) + d[None, :], mask=ok[:, None], other=0.0)
            acc = tl.dot(qb, read, input_precision=PREC)
            if DECAY:
                gq = tl.load(gates + ((bh * NT + c) * 2 + 1) * BT + i)
                acc *= tl.exp2(gq)[:, None]
            if LOCAL:
                P = tl.dot(qb, tl.trans(kb), input_precision=PREC)
                seen = _readable(i[:, None], i[None, :], READ)
                if DECAY:
                    P *= tl.exp2(tl.where(seen, gq[:, None] - gk[None, :], 0.0))
                P = tl.where(seen, P, 0.0)
                acc = tl.dot(P.to(kb.dtype), Ub, acc, input_precision=PREC)
            tl.store(
                o + row * V + i[:, None] * (H * V) + e[None, :], acc.to(o.dtype.element_ty), mask=ok[:, None]
            )
        if DECAY:
            Ub = (Ub.to(tl.float32) * tl.exp2(last - gk)[:, None]).to(kb.dtype)
            S *= tl.exp2(last)
        S = tl.dot(tl.trans(kb), Ub, S, input_precision=PREC)
    tl.store(final + bh * (K * V) + state_at, S)


@triton.jit
def reverse_scan_kernel(
    q,
    k,
    transfer,
    gates,
    do,
    dfinal,
    dv,
    dstates,
    dinitial,
    T,
    NT,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    STRIDE: tl.constexpr,
    PARTS: tl.constexpr,
    READ: tl.constexpr,
    SHIFT: tl.constexpr,
    DELTA: tl.constexpr,
    DECAY: tl.constexpr,
    FINAL: tl.constexpr,
    PREC: tl.constexpr,
):
    """dv, and the gradients of the states after each tile and of the initial state.

    dv, do [B, T, H, V]; dstates [B * H, NT, K, V]; dfinal, dinitial [B * H, K, V] float32. Grid (V / BV, B * H).
    """
    bh = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, BT)
    d = tl.arange(0, K)
    e = tl.program_id(0) * BV + tl.arange(0, BV)
    state_at = d[:, None] * V + e[None, :]
    if FINAL:
        dS = tl.load(dfinal + bh * (K * V) + state_at)
    else:
        dS = tl.zeros((K, BV), tl.float32)
    dread = tl.zeros((K, BV), tl.float32)  # of the state at the start of a block that is cut into parts
    LOCAL: tl.constexpr = READ == 0 or (PARTS == 1 and STRIDE > READ)
    for n in range(0, NT):
        c = NT - 1 - n
        first, count = _tile(c, T, BT, PARTS, STRIDE)
        ok = i < count
        row = (bh // H) * T * H + bh % H + first * H
        dSb = dS.to(k.dtype.element_ty)
        tl.store(dstates + (bh * NT + c) * (K * V) + state_at, dSb)
        kb = tl.load(k + row * K + i[:, None] * (H * K) + d[None, :], mask=ok[:, None], other=0.0)
        qb = tl.load(q + row * K + i[:, None] * (H * K) + d[None, :], mask=ok[:, None], other=0.0)
        dob = tl.load(do + row * V + i[:, None] * (H * V) + e[None, :], mask=ok[:, None], other=0.0)
        dU = tl.dot(kb, dSb, input_precision=PREC)
        if DECAY:
            gk = tl.load(gates + (bh * NT + c) * (2 * BT) + i)
            gq = tl.load(gates + ((bh * NT + c) * 2 + 1) * BT + i)
            last = tl.load(gates + (bh * NT + c) * (2 * BT) + BT - 1)
            dU *= tl.exp2(last - gk)[:, None]
            dS *= tl.exp2(last)
        if LOCAL:
            P = tl.dot(kb, tl.trans(qb), input_precision=PREC)  # [write, query]
            seen = _readable(i[None, :], i[:, None], READ)
            if DECAY:
                P *= tl.exp2(tl.where(seen, gq[None, :] - gk[:, None], 0.0))
            P = tl.where(seen, P, 0.0)
            dU = tl.dot(P.to(kb.dtype), dob, dU, input_precision=PREC)
        if DELTA:
            tb = tl.load(transfer + (bh * NT + c) * (BT * BT) + i[:, None] * BT + i[None, :])
            dR = tl.dot(tl.trans(tb), dU.to(kb.dtype), input_precision=PREC)
        else:
            dR = dU
        ok_v = ok & (first + i >= SHIFT)
        dv_at = dv + (row - SHIFT * H) * V + i[:, None] * (H * V) + e[None, :]
        tl.store(dv_at, dR.to(dv.dtype.element_ty), mask=ok_v[:, None])
        if DECAY:
            dob = (dob.to(tl.float32) * tl.exp2(gq)[:, None]).to(kb.dtype)
        if PARTS == 1:
            dS = tl.dot(tl.trans(qb), dob, dS, input_precision=PREC)
        else:
            dread = tl.dot(tl.trans(qb), dob, dread, input_precision=PREC)
        if DELTA:
            if DECAY:
                dR *= tl.exp2(gk)[:, None]
            dS = tl.dot(tl.trans(kb), (-dR).to(kb.dtype), dS, input_precision=PREC)
        if PARTS > 1:
            if c % PARTS == 0:
                dS += dread
                dread = tl.zeros((K, BV), tl.float32)
    tl.store(dinitial + bh * (K * V) + state_at, dS)


@triton.jit
def _slice_gradients(
    q,
    k,
    do,
    U,
    dR,
    P,
    PT,
    M,
    state,
    read,
    dstate,
    row_q,
    row_k,
    ok_q,
    ok_k,
    norm_q,
    norm_k,
    gk,
    gq,
    last,
    scale,
    k0: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
    FEATURE: tl.constexpr,
    DELTA: tl.constexpr,
    DECAY: tl.constexpr,
    LOCAL: tl.constexpr,
    PREC: tl.constexpr,
):
    """Of the columns k0 to k0 + BK: dq, dk [BT, BK], their inner products with q and k by row, and <S', dS>."""
    i = tl.arange(0, BT)
    d = k0 + tl.arange(0, BK)
    e = tl.arange(0, V)
    at = d[:, None] * V + e[None, :]
    rows = i[:, None] * (H * K) + d[None, :]
    S = tl.load(read + at)
    dq = tl.dot(do, tl.trans(S), input_precision=PREC)
    if DECAY:
        dq *= tl.exp2(gq)[:, None]
    dS = tl.load(dstate + at)
    dk = tl.dot(U, tl.trans(dS), input_precision=PREC)
    yk = _activate(tl.load(k + row_k * K + rows, mask=ok_k[:, None], other=0.0).to(tl.float32), FEATURE)
    yk = tl.where(ok_k[:, None], yk * norm_k[:, None], 0.0)
    dlast = 0.0
    if PARTS > 1:
        S = tl.load(state + at)
    if DECAY:
        dk *= tl.exp2(last - gk)[:, None]
        dlast = tl.sum(tl.sum(yk * dk, 1), 0)
        dlast += tl.exp2(last) * tl.sum(tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1), 0)
    yq = _activate(tl.load(q + row_q * K + rows, mask=ok_q[:, None], other=0.0).to(tl.float32), FEATURE)
    yq *= norm_q[:, None]
    if DELTA:
        dk_read = tl.dot(dR, tl.trans(S), input_precision=PREC)
        if DECAY:
            dk_read *= tl.exp2(gk)[:, None]
        dk -= dk_read
    kb = yk.to(do.dtype)
    if LOCAL:
        dq = tl.dot(P, kb, dq, input_precision=PREC)
        dk = tl.dot(PT, (yq * scale).to(do.dtype), dk, input_precision=PREC)
    if DELTA:
        dk = tl.dot(M, kb, dk, input_precision=PREC)
    dq *= scale
    return dq, dk, tl.sum(yq * dq, 1), tl.sum(yk * dk, 1), dlast


@triton.jit
def _store_input_gradient(
    x,
    dx,
    dy,
    row,
    ok,
    norm,
    inner,
    k0: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    FEATURE: tl.constexpr,
):
    """dx of columns k0 to k0 + BK from the gradient dy of the features; inner = <y, dy> by row."""
    i = tl.arange(0, BT)
    d = k0 + tl.arange(0, BK)
    at = row * K + i[:, None] * (H * K) + d[None, :]
    if FEATURE != IDENTITY:
        x = tl.load(x + at, mask=ok[:, None], other=0.0).to(tl.float32)
        if FEATURE == SILU_L2 or FEATURE == RELU_L2:
            y = _activate(x, FEATURE) * norm[:, None]
            dy = (dy - y * inner[:, None]) * norm[:, None]
        dy = _activate_backward(x, dy, FEATURE)
    tl.store(dx + at, dy.to(dx.dtype.element_ty), mask=ok[:, None])


@triton.jit
def _norms(x, row, ok, H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, FEATURE: tl.constexpr):
    """1 / l2 norm by row, or 1 where the feature map has none."""
    norm = tl.full((BT,), 1.0, tl.float32)
    if FEATURE == SILU_L2 or FEATURE == RELU_L2:
        i = tl.arange(0, BT)
        d = tl.arange(0, K)
        y = tl.load(x + row * K + i[:, None] * (H * K) + d[None, :], mask=ok[:, None], other=0.0).to(tl.float32)
        y = _activate(y, FEATURE)
        norm = tl.rsqrt(tl.sum(y * y, 1) + L2_EPSILON)
    return norm


@triton.jit
def gradient_kernel(
    q,
    k,
    beta,
    gates,
    do,
    dv,
    writes,
    states,
    dstates,
    dq,
    dk,
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
    FEATURE: tl.constexpr,
    DELTA: tl.constexpr,
    DECAY: tl.constexpr,
    TINY: tl.constexpr,
    PREC: tl.constexpr,
):
    """dq, dk before the feature map, dbeta and dlog_decay. q, k are the inputs, not the features. Grid (NT, B * H).

    writes is U, or v itself for the additive rules. A program takes K in slices of BK columns (at most two), to keep
    the accumulators in registers; the l2 norm's backward needs the inner products of whole rows.
    """
    c = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    first, count = _tile(c, T, BT, PARTS, STRIDE)
    i = tl.arange(0, BT)
    e = tl.arange(0, V)
    ok = i < count
    ok_k = ok & (first + i >= SHIFT)
    row = (bh // H) * T * H + bh % H + first * H
    row_k = row - SHIFT * H
    LOCAL: tl.constexpr = READ == 0 or (PARTS == 1 and STRIDE > READ)
    rows = i[:, None] * (H * V) + e[None, :]
    dob = tl.load(do + row * V + rows, mask=ok[:, None], other=0.0)
    if DELTA:
        U = tl.load(writes + row * V + rows, mask=ok[:, None], other=0.0)
        dR = tl.load(dv + row_k * V + rows, mask=ok_k[:, None], other=0.0)
    else:
        U = tl.load(writes + row_k * V + rows, mask=ok_k[:, None], other=0.0)
        dR = U
    gk = tl.zeros((BT,), tl.float32)
    gq = tl.zeros((BT,), tl.float32)
    last = 0.0
    if DECAY:
        gk = tl.load(gates + (bh * NT + c) * (2 * BT) + i)
        gq = tl.load(gates + ((bh * NT + c) * 2 + 1) * BT + i)
        last = tl.load(gates + (bh * NT + c) * (2 * BT) + BT - 1)
    P = U
    PT = U
    M = U
    if LOCAL:
        dP = tl.dot(dob, tl.trans(U), input_precision=PREC)
        dPT = tl.dot(U, tl.trans(dob), input_precision=PREC)
        seen = _readable(i[:, None], i[None, :], READ)
        seenT = _readable(i[None, :], i[:, None], READ)
        if DECAY:
            dP *= tl.exp2(tl.where(seen, gq[:, None] - gk[None, :], 0.0))
            dPT *= tl.exp2(tl.where(seenT, gq[None, :] - gk[:, None], 0.0))
        P = tl.where(seen, dP, 0.0).to(dob.dtype)
        PT = tl.where(seenT, dPT, 0.0).to(dob.dtype)
    db = tl.zeros((BT,), tl.float32)
    b = tl.full((BT,), 1.0, tl.float32)
    if DELTA:
        lower = i[:, None] > i[None, :]
        dM = tl.dot(dR, tl.trans(U), input_precision=PREC)
        dMT = tl.dot(U, tl.trans(dR), input_precision=PREC)
        dM = tl.where(i[:, None] == i[None, :], 0.0, tl.where(lower, dM, dMT))
        if DECAY:
            ahead = gk[:, None] - gk[None, :]
            dM *= tl.exp2(tl.where(lower, ahead, -ahead))
        M = (-dM).to(dob.dtype)
        b = tl.load(beta + row + i * H, mask=ok, other=1.0).to(tl.float32)
        b = tl.where(tl.abs(b) < TINY, TINY, b)
        db = tl.sum((dR.to(tl.float32) / b[:, None]) * (U.to(tl.float32) / b[:, None]), 1)
        tl.store(dbeta + row + i * H, db.to(dbeta.dtype.element_ty), mask=ok)
    norm_q = _norms(q, row, ok, H, K, BT, FEATURE)
    norm_k = _norms(k, row_k, ok_k, H, K, BT, FEATURE)
    state = states + (bh * NT + c) * (K * V)
    read = states + (bh * NT + (c // PARTS) * PARTS) * (K * V)
    dstate = dstates + (bh * NT + c) * (K * V)
    dq0, dk0, inner_q, inner_k, dlast = _slice_gradients(
        q, k, dob, U, dR, P, PT, M, state, read, dstate, row, row_k, ok, ok_k, norm_q, norm_k, gk, gq, last, scale,
        0, H, K, V, BT, BK, PARTS, FEATURE, DELTA, DECAY, LOCAL, PREC,
    )  # fmt: skip
    if K > BK:
        dq1, dk1, inner_q1, inner_k1, dlast1 = _slice_gradients(
            q, k, dob, U, dR, P, PT, M, state, read, dstate, row, row_k, ok, ok_k, norm_q, norm_k, gk, gq, last, scale,
            BK, H, K, V, BT, BK, PARTS, FEATURE, DELTA, DECAY, LOCAL, PREC,
        )  # fmt: skip
        inner_q += inner_q1
        inner_k += inner_k1
        dlast += dlast1
    _store_input_gradient(q, dq, dq0, row, ok, norm_q, inner_q, 0, H, K, BT, BK, FEATURE)
    _store_input_gradient(k, dk, dk0, row_k, ok_k, norm_k, inner_k, 0, H, K, BT, BK, FEATURE)
    if K > BK:
        _store_input_gradient(q, dq, dq1, row, ok, norm_q, inner_q, BK, H, K, BT, BK, FEATURE)
        _store_input_gradient(k, dk, dk1, row_k, ok_k, norm_k, inner_k, BK, H, K, BT, BK, FEATURE)
    if DECAY:
        if DELTA:
            dgk = inner_k - 2 * b * db
        else:
            dgk = -inner_k
        dg = tl.sum(tl.where(i[:, None] >= i[None, :], dgk[:, None], 0.0), 0) + dlast
        if READ == 0:
            dg += tl.sum(tl.where(i[:, None] >= i[None, :], inner_q[:, None], 0.0), 0)
        elif LOCAL:
            dg += tl.sum(tl.where((i[None, :] // READ) < (i[:, None] // READ), inner_q[:, None], 0.0), 0)
        tl.store(dlog_decay + row + i * H, dg.to(dlog_decay.dtype.element_ty), mask=ok)
