"""The public functions: arguments are checked, a backend is chosen, the normaliser is applied."""

from typing import Literal, get_args

import torch
from torch import Tensor

from hqlt_kernels.backends import Forced, Operator, choose_backend
from hqlt_kernels.fast_weight import chunked, definition
from hqlt_kernels.feature_maps import FeatureMap, map_features
from hqlt_kernels.packed import Packed
from hqlt_kernels.precision import compute_dtype

Normaliser = Literal["none", "time", "heads"]
NORMALISERS: tuple[Normaliser, ...] = get_args(Normaliser)
NORMALISER_EPSILON = 1e-10  # the published one; it decides only where nothing has been written yet


def fast_weight(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor | None = None,
    log_decay: Tensor | None = None,
    feature_map: FeatureMap = "identity",
    normaliser: Normaliser = "none",
    scale: float | None = None,
    read_chunk: int | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    longest: int | None = None,
    backend: Forced = "auto",
) -> tuple[Tensor, Tensor]:
    """What a fast-weight memory answers to each query, and the memory after the last token.

        S = exp(log_decay_t) S                                  decay, gated_delta: `log_decay` [B, T, H], at most 0
        S = S + phi(k) v^T                                      additive, decay: `beta` is None
        S = S + beta phi(k) (v - S^T phi(k))^T                  delta, gated_delta: `beta` [B, T, H], in [0, 2]
        o_t = scale S^T phi(q_t)                                scale is K^-0.5 unless given

    q, k [B, T, H, K] and v [B, T, H, V]. Delta product: k, v and beta have an axis n after T and write n times a token
    (a `log_decay` acts once, before the first). The delta rules are stable only while beta |phi(k)|^2 <= 2.

    `normaliser` (additive rule only) replaces the scale: with z = sum_{j<=t} phi(k_j) for "time", or the sum of the
    current token's phi(k) over heads up to this one for "heads" (what the released code of arXiv:2506.00744 computed),
    o_t = S^T phi(q_t) / (phi(q_t) . z + 1e-10).

    `read_chunk=C` makes o_t read S (and z over time) as it was before the first token of t's chunk of C tokens; the
    first token stands at the start of a chunk.

    `initial_state` [B, H, K, V] is what an earlier call returned; None is zero. With normaliser "time" it is
    [B, H, K, V + 1] and the last column is z. Gradients flow through both states. Computed in float32, or float64 if
    an input is; o [B, T, H, V] has the dtype of v. Works under `torch.func.vmap`.

    `cu_seqlens` [n + 1]: B is 1 and n sequences stand one after the other, borders first to last; states are
    [n, H, K, V]. They are padded to the longest (given, or read from the device) inside. Not with normaliser "time".

    Raises:
        ValueError: shapes that do not fit together, a normaliser with beta or log_decay, read_chunk below 1.
        BackendUnavailableError: a forced backend cannot run here.
    """
    if cu_seqlens is not None:
        if q.shape[0] != 1 or normaliser == "time":
            raise ValueError(
                f"packed sequences have batch 1 and no normaliser over time; got {q.shape[0]}, {normaliser}"
            )
        layout = Packed.of(cu_seqlens, q.shape[1], longest)
        # Zeros behind the end write nothing: their value is zero, or their beta.
        o, state = fast_weight(
            layout.padded(q),
            layout.padded(k),
            layout.padded(v),
            beta=None if beta is None else layout.padded(beta),
            log_decay=None if log_decay is None else layout.padded(log_decay),
            feature_map=feature_map,
            normaliser=normaliser,
            scale=scale,
            read_chunk=read_chunk,
            initial_state=initial_state,
            backend=backend,
        )
        return layout.packed(o), state
    rule = rule_of(k, beta, log_decay)
    _check(q, k, v, beta, log_decay, normaliser, read_chunk, initial_state)
    if q.shape[1] == 0:
        dtype = compute_dtype(q, k, v)
        columns = v.shape[-1] + (normaliser == "time")
        zeros = q.new_zeros(q.shape[0], *q.shape[2:], columns, dtype=dtype)
        return v[:, :, 0] if v.dim() == 5 else v, zeros if initial_state is None else initial_state.to(dtype)
    chosen = choose_backend(
        rule, device=q.device, dtype=q.dtype, head_dim=q.shape[-1], value_dim=v.shape[-1], forced=backend
    ).backend
    match chosen:
        case "definition":
            recurrence = definition.fast_weight
        case "chunked":
            recurrence = chunked.fast_weight
        case "triton":
            from hqlt_kernels.fast_weight import triton_operator  # triton is there only where it can run

            recurrence = triton_operator.fast_weight
    if normaliser == "none":
        return recurrence(
            q,
            k,
            v,
            beta,
            log_decay,
            initial_state,
            feature_map=feature_map,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            read_chunk=read_chunk,
        )
    # The normaliser needs phi(q) and phi(k) itself, so they are mapped here once, for every backend.
    dtype = compute_dtype(q, k, v)
    q, k = map_features(q.to(dtype), feature_map), map_features(k.to(dtype), feature_map)
    z = None
    if normaliser == "time" and initial_state is not None:
        initial_state, z = initial_state[..., :-1], initial_state[..., -1].to(dtype)
    o, state = recurrence(
        q, k, v.to(dtype), None, None, initial_state, feature_map="identity", scale=1.0, read_chunk=read_chunk
    )
    if normaliser == "heads":
        return (o / ((q * k.cumsum(2)).sum(-1, keepdim=True) + NORMALISER_EPSILON)).to(v.dtype), state
    written = k.cumsum(1)
    if z is not None:
        written = written + z.unsqueeze(1)
    read = written if read_chunk is None else _at_chunk_starts(written, z, read_chunk)
    o = o / ((q * read).sum(-1, keepdim=True) + NORMALISER_EPSILON)
    return o.to(v.dtype), torch.cat([state, written[:, -1].unsqueeze(-1)], -1)


def fast_weight_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    *,
    beta: Tensor | None = None,
    log_decay: Tensor | None = None,
    feature_map: FeatureMap = "identity",
    normaliser: Normaliser = "none",
    scale: float | None = None,
    backend: Forced = "auto",
) -> tuple[Tensor, Tensor]:
    """`fast_weight` for one token: the time axis is left out of every argument and of o. Returns (o, next state)."""
    o, state = fast_weight(
        q.unsqueeze(1),
        k.unsqueeze(1),
        v.unsqueeze(1),
        beta=None if beta is None else beta.unsqueeze(1),
        log_decay=None if log_decay is None else log_decay.unsqueeze(1),
        feature_map=feature_map,
        normaliser=normaliser,
        scale=scale,
        initial_state=state,
        backend=backend,
    )
    return o.squeeze(1), state


def rule_of(k: Tensor, beta: Tensor | None, log_decay: Tensor | None) -> Operator:
    """The name of the update rule that these arguments mean."""
    if k.dim() == 5:
        return "delta_product"
    if beta is None:
        return "additive" if log_decay is None else "decay"
    return "delta" if log_decay is None else "gated_delta"


def check_normaliser(normaliser: Normaliser, beta: Tensor | None, log_decay: Tensor | None) -> None:
    """Raises ValueError unless the rule may have this normaliser."""
    if normaliser not in NORMALISERS:
        raise ValueError(f"no normaliser {normaliser!r}; there is {', '.join(NORMALISERS)}")
    if normaliser != "none" and (beta is not None or log_decay is not None):
        raise ValueError(f"normaliser {normaliser!r} belongs to the additive rule; got beta or log_decay")


def _at_chunk_starts(written: Tensor, z: Tensor | None, read_chunk: int) -> Tensor:
    """`written` [B, T, H, K], the sum of keys after each token, as it was before each token's chunk."""
    before = written.new_zeros(written[:, :1].shape) if z is None else z.unsqueeze(1)
    starts = torch.arange(written.shape[1], device=written.device) // read_chunk * read_chunk
    return torch.cat([before.expand_as(written[:, :1]), written[:, :-1]], 1)[:, starts]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    normaliser: Normaliser,
    read_chunk: int | None,
    initial_state: Tensor | None,
) -> None:
    batch, n_tokens, n_heads, key_width = q.shape
    per_write = (batch, n_tokens, n_heads) if k.dim() == 4 else (batch, n_tokens, k.shape[2], n_heads)
    if tuple(k.shape) != (*per_write, key_width) or tuple(v.shape[:-1]) != per_write:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    if beta is None and k.dim() == 5:
        raise ValueError("several writes a token are a delta product and need beta")
    if beta is not None and tuple(beta.shape) != per_write:
        raise ValueError(f"beta is {tuple(beta.shape)}, not {per_write}")
    if log_decay is not None and tuple(log_decay.shape) != (batch, n_tokens, n_heads):
        raise ValueError(f"log_decay is {tuple(log_decay.shape)}, not {(batch, n_tokens, n_heads)}")
    check_normaliser(normaliser, beta, log_decay)
    if read_chunk is not None and read_chunk < 1:
        raise ValueError(f"read_chunk is {read_chunk}; a chunk has at least one token")
    state_shape = (batch, n_heads, key_width, v.shape[-1] + (normaliser == "time"))
    if initial_state is not None and tuple(initial_state.shape) != state_shape:
        raise ValueError(f"initial_state is {tuple(initial_state.shape)}, not {state_shape}")
