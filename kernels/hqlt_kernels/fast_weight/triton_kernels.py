"""Triton kernels of the fast-weight rules: one family, whose constexpr switches take parts out.

Tokens are cut into tiles of at most BT rows. Inside a tile (rows i, j; S the state before it; U the writes; R what the
memory did not know yet; b = beta), with gamma_i = exp(sum of log_decay up to i) and D_ij = gamma_i / gamma_j:

    A  = tril(D k k^T, -1) diag(b)     T = diag(b) (I + A)^-1     prepare_kernel, all tiles at once
    R  = v - gamma k S                 U = T R (additive: U = v)  scan_kernel, one tile after the other
    o  = gamma q S + tril(D q k^T) U   S' = gamma_last S + k^T (gamma_last / gamma) U

and backward, with dS the gradient of S':

    dU = tril(D q k^T)^T do + (gamma_last / gamma) k dS           dR = dv = T^T dU   (additive: dv = dU)
    dS_before = gamma_last dS + q^T gamma do - k^T gamma dR       reverse_scan_kernel, the tiles in reverse

triton_gradient.py makes dq, dk, dbeta and dlog_decay of these, all tiles at once. The scale is multiplied into q by
prepare_kernel, and b into T, so that the two scans, which are serial in time, load neither.

Reading: query i reads the writes j <= i (READ = 0), or those of earlier blocks of READ tokens. A tile then holds whole
blocks (READ < BT), or a block is cut into PARTS tiles, all of which read the state at the block's start. STRIDE is the
distance in tokens between tiles (PARTS = 1) or between blocks. SHIFT reads keys and values that many tokens earlier.

The scans are compiled for any number of tiles: where Triton 3.6.0 knew that there is one, it took the loop away, and
the gradient of the initial state was wrong on an H200, or an address illegal.

No transposed accumulator is an operand of a dot: what is needed transposed is computed transposed. Such operands are
miscompiled on Hopper by Triton 3.4 to 3.7.0 (flash-linear-attention issue 640).
"""

# ruff: noqa: SIM102, SIM108, SIM109  # Triton compiles a subset of Python; `if` on a constexpr takes code out
# What is inside @triton.jit is not Python to a type checker.
# mypy: ignore-errors

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
def _place(n):
    """Which of a head's n programs this is, and the head. One axis: the others of a grid end at 65,535 programs."""
    i = tl.program_id(0)
    return i % n, (i // n).to(tl.int64)


@triton.jit
def _tile(c, T, BT: tl.constexpr, PARTS: tl.constexpr, STRIDE: tl.constexpr):
    """First token and number of tokens of tile c; the number may be zero or less after the end of the sequence."""
    first = (c // PARTS) * STRIDE + (c % PARTS) * BT
    count = tl.minimum(tl.minimum(BT, STRIDE - (c % PARTS) * BT), T - first)
    return first, count


@triton.jit
def _load(at, ok, MASKED: tl.constexpr):
    """A tile whose rows outside `ok` are zero."""
    if MASKED:
        x = tl.load(at, mask=ok[:, None], other=0.0)
    else:
        x = tl.load(at)
    return x


@triton.jit
def _store(at, x, ok, MASKED: tl.constexpr):
    if MASKED:
        tl.store(at, x.to(at.dtype.element_ty), mask=ok[:, None])
    else:
        tl.store(at, x.to(at.dtype.element_ty))


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)) by a reciprocal square root: a division takes three times the instructions."""
    r = tl.rsqrt(1.0 + tl.exp2(x * -LOG2E))
    return r * r


@triton.jit
def _activate(x, FEATURE: tl.constexpr):
    """The feature map before its l2 norm."""
    if FEATURE == SILU_L2:
        x = x * _sigmoid(x)
    elif FEATURE == ELU_PLUS_ONE:
        x = tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0.0)))
    elif FEATURE == RELU_L2:
        x = tl.maximum(x, 0.0)
    return x


@triton.jit
def _features(x, FEATURE: tl.constexpr, BT: tl.constexpr):
    """phi(x) of whole rows [BT, K], and 1 / l2 norm by row (1 where the feature map has none)."""
    x = _activate(x, FEATURE)
    norm = tl.full((BT,), 1.0, tl.float32)
    if FEATURE == SILU_L2 or FEATURE == RELU_L2:
        norm = tl.rsqrt(tl.sum(x * x, 1) + L2_EPSILON)
        x *= norm[:, None]
    return x, norm


@triton.jit
def _decay(log2):
    """2^log2 in float32. The gates of float32 inputs are float64: where a tile forgets, its sums reach thousands, and
    even one decay of e^-30 would lose 4 bits as a float32 power of two."""
    if log2.dtype == tl.float64:
        whole = tl.floor(log2)
        decay = tl.exp2(whole.to(tl.float32)) * tl.exp2((log2 - whole).to(tl.float32))
    else:
        decay = tl.exp2(log2)
    return decay


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
    local,
    gates,
    norms,
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
    MASKED: tl.constexpr,
    FEATURE: tl.constexpr,
    DELTA: tl.constexpr,
    DECAY: tl.constexpr,
    TINY: tl.constexpr,
    STORED: tl.constexpr,
    PREC: tl.constexpr,
):
    """Features of q (times scale) and k with 1 / l2 norm, the log2 of gamma for keys and for queries, T, and with
    STORED the local part tril(D q k^T): the scan of a rule with decay has no registers left to compute it.

    q, k, q_out, k_out [B, T, H, K]; beta, log_decay [B, T, H]; transfer, local [B * H, NT, BT, BT];
    gates, norms [B * H, NT, 2, BT] float32 (keys, queries; gates: see `_decay`). k_out is by the time of writing (SHIFT
    applied). Grid NT * B * H.
    """
    c, bh = _place(NT)
    first, count = _tile(c, T, BT, PARTS, STRIDE)
    i = tl.arange(0, BT)
    d = tl.arange(0, K)
    row = (bh // H) * T * H + bh % H + first * H
    ok = i < count
    tile = bh * NT + c
    x = _load(q + row * K + i[:, None] * (H * K) + d[None, :], ok, MASKED).to(tl.float32)
    x, norm = _features(x, FEATURE, BT)
    qb = (x * scale).to(q_out.dtype.element_ty)
    _store(q_out + row * K + i[:, None] * (H * K) + d[None, :], qb, ok, MASKED)
    norm_at = norms + tile * (2 * BT) + i
    tl.store(norm_at + BT, norm)
    ok_k = ok & (first + i >= SHIFT)
    x = _load(k + (row - SHIFT * H) * K + i[:, None] * (H * K) + d[None, :], ok_k, MASKED).to(tl.float32)
    x, norm = _features(x, FEATURE, BT)
    tl.store(norm_at, norm)
    if FEATURE == ELU_PLUS_ONE and MASKED:
        x = tl.where(ok_k[:, None], x, 0.0)
    kb = x.to(k_out.dtype.element_ty)
    _store(k_out + row * K + i[:, None] * (H * K) + d[None, :], kb, ok, MASKED)
    if DECAY:
        g = tl.load(log_decay + row + i * H, mask=ok, other=0.0).to(gates.dtype.element_ty) * LOG2E
        gk = tl.cumsum(g, 0)
        gate = gates + tile * (2 * BT) + i
        tl.store(gate, gk)
        if READ == 0:
            gq = gk
        elif PARTS > 1:
            gq = tl.zeros((BT,), gates.dtype.element_ty)
        else:
            gq = tl.sum(tl.where((i[None, :] // READ) < (i[:, None] // READ), g[None, :], 0.0), 1)
        tl.store(gate + BT, gq)
    square = tile * (BT * BT) + i[:, None] * BT + i[None, :]
    if STORED:
        P = tl.dot(qb, tl.trans(kb), input_precision=PREC)
        seen = _readable(i[:, None], i[None, :], READ)
        if DECAY:
            P *= _decay(tl.where(seen, gq[:, None] - gk[None, :], 0.0))
        tl.store(local + square, tl.where(seen, P, 0.0).to(local.dtype.element_ty))
    if DELTA:
        b = tl.load(beta + row + i * H, mask=ok, other=0.0).to(tl.float32)
        b = tl.where(tl.abs(b) < TINY, TINY, b)
        A = tl.dot(kb, tl.trans(kb), input_precision=PREC) * b[None, :]
        lower = i[:, None] > i[None, :]
        if DECAY:
            A *= _decay(tl.where(lower, gk[:, None] - gk[None, :], 0.0))
        X = _inverse(tl.where(lower, A, 0.0), BT, PREC) * b[:, None]
        tl.store(transfer + square, X.to(transfer.dtype.element_ty))


@triton.jit(do_not_specialize=["NT"])
def scan_kernel(
    q,
    k,
    v,
    transfer,
    local,
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
    MASKED: tl.constexpr,
    DELTA: tl.constexpr,
    DECAY: tl.constexpr,
    OUTPUT: tl.constexpr,
    SAVE: tl.constexpr,
    STORED: tl.constexpr,
    INITIAL: tl.constexpr,
    PREC: tl.constexpr,
):
    """o [B, T, H, V] and the final state [B * H, K, V]; with SAVE also the states before each tile and the writes U.

    q, k from prepare_kernel; states [B * H, NT, K, V] in the dtype of k. Grid V / BV * B * H.
    """
    part, bh = _place(V // BV)
    i = tl.arange(0, BT)
    d = tl.arange(0, K)
    e = part * BV + tl.arange(0, BV)
    state_at = d[:, None] * V + e[None, :]
    if INITIAL:
        S = tl.load(initial + bh * (K * V) + state_at)
    else:
        S = tl.zeros((K, BV), tl.float32)
    read = S.to(k.dtype.element_ty)
    LOCAL: tl.constexpr = READ == 0 or (PARTS == 1 and STRIDE > READ)  # whether queries read writes of their own tile
    if DECAY:  # gates are loaded one tile ahead: the load pipeline takes operands of dots only
        gate = gates + bh * NT * (2 * BT)
        next_gk = tl.load(gate + i)
        next_gq = tl.load(gate + BT + i)
        next_last = tl.load(gate + BT - 1)
    for c in range(NT):
        first, count = _tile(c, T, BT, PARTS, STRIDE)
        ok = i < count
        row = (bh // H) * T * H + bh % H + first * H
        Sb = S.to(k.dtype.element_ty)
        if SAVE:
            tl.store(states + (bh * NT + c) * (K * V) + state_at, Sb)
        if PARTS == 1:
            read = Sb
        else:  # an `if` here was compiled to wrong numbers for float32 by Triton 3.6.0
            read = tl.where(c % PARTS == 0, Sb, read)
        kb = _load(k + row * K + i[:, None] * (H * K) + d[None, :], ok, MASKED)
        ok_v = ok & (first + i >= SHIFT)
        vb = _load(v + (row - SHIFT * H) * V + i[:, None] * (H * V) + e[None, :], ok_v, MASKED)
        if DECAY:
            gk = next_gk
            gq = next_gq
            last = next_last
            gate += tl.where(c + 1 < NT, 2 * BT, 0)
            next_gk = tl.load(gate + i)
            next_gq = tl.load(gate + BT + i)
            next_last = tl.load(gate + BT - 1)
        if DELTA:
            tb = tl.load(transfer + (bh * NT + c) * (BT * BT) + i[:, None] * BT + i[None, :])
            R = tl.dot(kb, Sb, input_precision=PREC)
            if DECAY:
                R *= _decay(gk)[:, None]
            R = vb.to(tl.float32) - R
            U = tl.dot(tb, R.to(kb.dtype), input_precision=PREC)
            Ub = U.to(kb.dtype)
            if SAVE:
                _store(writes + row * V + i[:, None] * (H * V) + e[None, :], Ub, ok, MASKED)
        else:
            Ub = vb
        if OUTPUT:
            qb = _load(q + row * K + i[:, None] * (H * K) + d[None, :], ok, MASKED)
            acc = tl.dot(qb, read, input_precision=PREC)
            if DECAY:
                acc *= _decay(gq)[:, None]
            if LOCAL:
                if STORED:
                    P = tl.load(local + (bh * NT + c) * (BT * BT) + i[:, None] * BT + i[None, :])
                else:
                    P = tl.dot(qb, tl.trans(kb), input_precision=PREC)
                    seen = _readable(i[:, None], i[None, :], READ)
                    if DECAY:
                        P *= _decay(tl.where(seen, gq[:, None] - gk[None, :], 0.0))
                    P = tl.where(seen, P, 0.0).to(kb.dtype)
                acc = tl.dot(P, Ub, acc, input_precision=PREC)
            _store(o + row * V + i[:, None] * (H * V) + e[None, :], acc, ok, MASKED)
        if DECAY:
            Ub = (Ub.to(tl.float32) * _decay(last - gk)[:, None]).to(kb.dtype)
            S *= _decay(last)
        S = tl.dot(tl.trans(kb), Ub, S, input_precision=PREC)
    tl.store(final + bh * (K * V) + state_at, S)


@triton.jit(do_not_specialize=["NT"])
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
    MASKED: tl.constexpr,
    DELTA: tl.constexpr,
    DECAY: tl.constexpr,
    FINAL: tl.constexpr,
    PREC: tl.constexpr,
):
    """dv, and the gradients of the states after each tile and of the initial state.

    dv, do [B, T, H, V]; dstates [B * H, NT, K, V]; dfinal, dinitial [B * H, K, V] float32. Grid V / BV * B * H.
    """
    part, bh = _place(V // BV)
    i = tl.arange(0, BT)
    d = tl.arange(0, K)
    e = part * BV + tl.arange(0, BV)
    state_at = d[:, None] * V + e[None, :]
    if FINAL:
        dS = tl.load(dfinal + bh * (K * V) + state_at)
    else:
        dS = tl.zeros((K, BV), tl.float32)
    dread = tl.zeros((K, BV), tl.float32)  # of the state at the start of a block that is cut into parts
    LOCAL: tl.constexpr = READ == 0 or (PARTS == 1 and STRIDE > READ)
    if DECAY:
        gate = gates + (bh * NT + NT - 1) * (2 * BT)
        next_gk = tl.load(gate + i)
        next_gq = tl.load(gate + BT + i)
        next_last = tl.load(gate + BT - 1)
    for n in range(NT):
        c = NT - 1 - n
        first, count = _tile(c, T, BT, PARTS, STRIDE)
        ok = i < count
        row = (bh // H) * T * H + bh % H + first * H
        dSb = dS.to(k.dtype.element_ty)
        tl.store(dstates + (bh * NT + c) * (K * V) + state_at, dSb)
        kb = _load(k + row * K + i[:, None] * (H * K) + d[None, :], ok, MASKED)
        qb = _load(q + row * K + i[:, None] * (H * K) + d[None, :], ok, MASKED)
        dob = _load(do + row * V + i[:, None] * (H * V) + e[None, :], ok, MASKED)
        dU = tl.dot(kb, dSb, input_precision=PREC)
        if DECAY:
            gk = next_gk
            gq = next_gq
            last = next_last
            gate -= tl.where(c > 0, 2 * BT, 0)
            next_gk = tl.load(gate + i)
            next_gq = tl.load(gate + BT + i)
            next_last = tl.load(gate + BT - 1)
            dU *= _decay(last - gk)[:, None]
            dS *= _decay(last)
        if LOCAL:
            P = tl.dot(kb, tl.trans(qb), input_precision=PREC)  # [write, query]
            seen = _readable(i[None, :], i[:, None], READ)
            if DECAY:
                P *= _decay(tl.where(seen, gq[None, :] - gk[:, None], 0.0))
            P = tl.where(seen, P, 0.0)
            dU = tl.dot(P.to(kb.dtype), dob, dU, input_precision=PREC)
        if DELTA:
            tb = tl.load(transfer + (bh * NT + c) * (BT * BT) + i[:, None] * BT + i[None, :])
            dR = tl.dot(tl.trans(tb), dU.to(kb.dtype), input_precision=PREC)
        else:
            dR = dU
        ok_v = ok & (first + i >= SHIFT)
        dv_at = dv + (row - SHIFT * H) * V + i[:, None] * (H * V) + e[None, :]
        _store(dv_at, dR, ok_v, MASKED)
        if DECAY:
            dob = (dob.to(tl.float32) * _decay(gq)[:, None]).to(kb.dtype)
        if PARTS == 1:
            dS = tl.dot(tl.trans(qb), dob, dS, input_precision=PREC)
        else:
            dread = tl.dot(tl.trans(qb), dob, dread, input_precision=PREC)
        if DELTA:
            if DECAY:
                dR *= _decay(gk)[:, None]
            dS = tl.dot(tl.trans(kb), (-dR).to(kb.dtype), dS, input_precision=PREC)
        if PARTS > 1:
            if c % PARTS == 0:
                dS += dread
                dread = tl.zeros((K, BV), tl.float32)
    tl.store(dinitial + bh * (K * V) + state_at, dS)


@triton.jit
def _features_backward(x, y, dy, norm, inner, FEATURE: tl.constexpr):
    """The gradient of x from that of y = phi(x); inner = <y, dy> and norm are of whole rows, the rest of a slice."""
    if FEATURE == SILU_L2 or FEATURE == RELU_L2:
        dy -= y * inner[:, None]
    dy *= norm[:, None]
    if FEATURE == SILU_L2:
        s = _sigmoid(x)
        t = x * s
        dy *= t + s * (1 - t)
    elif FEATURE == ELU_PLUS_ONE:
        dy *= tl.where(x > 0, 1.0, tl.exp(tl.minimum(x, 0.0)))
    elif FEATURE == RELU_L2:
        dy = tl.where(x > 0, dy, 0.0)
    return dy


@triton.jit
def step_kernel(
    q,
    k,
    v,
    beta,
    log_decay,
    state,
    o,
    next_state,
    scale,
    N: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    FEATURE: tl.constexpr,
    DELTA: tl.constexpr,
    DECAY: tl.constexpr,
    INITIAL: tl.constexpr,
    OLD: tl.constexpr,
):
    """One token with N writes: o [B, H, V] and the next state [B, H, K, V] float32. OLD: o reads the state before.

    q [B, H, K]; k [B, N, H, K]; v [B, N, H, V]; beta [B, N, H]; log_decay [B, H]. Grid V / BV * B * H. Reads and
    writes the state once; there is no product for the tensor core in one token.
    """
    part, bh = _place(V // BV)
    d = tl.arange(0, K)
    e = part * BV + tl.arange(0, BV)
    state_at = bh * (K * V) + d[:, None] * V + e[None, :]
    if INITIAL:
        S = tl.load(state + state_at)
    else:
        S = tl.zeros((K, BV), tl.float32)
    y = _activate(tl.load(q + bh * K + d).to(tl.float32), FEATURE)
    if FEATURE == SILU_L2 or FEATURE == RELU_L2:
        y *= tl.rsqrt(tl.sum(y * y, 0) + L2_EPSILON)
    read = tl.sum(S * y[:, None], 0)
    if DECAY:
        S *= tl.exp2(tl.load(log_decay + bh).to(tl.float32) * LOG2E)
    for n in tl.static_range(N):
        row = ((bh // H) * N + n) * H + bh % H
        x = _activate(tl.load(k + row * K + d).to(tl.float32), FEATURE)
        if FEATURE == SILU_L2 or FEATURE == RELU_L2:
            x *= tl.rsqrt(tl.sum(x * x, 0) + L2_EPSILON)
        write = tl.load(v + row * V + e).to(tl.float32)
        if DELTA:
            write = (write - tl.sum(S * x[:, None], 0)) * tl.load(beta + row).to(tl.float32)
        S += x[:, None] * write[None, :]
    if not OLD:
        read = tl.sum(S * y[:, None], 0)
    tl.store(o + bh * V + e, (read * scale).to(o.dtype.element_ty))
    tl.store(next_state + state_at, S)
