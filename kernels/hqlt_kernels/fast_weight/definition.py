"""What fast weights compute, one token at a time: what every faster form is compared with."""

import torch
from torch import Tensor

from hqlt_kernels.feature_maps import FeatureMap, map_features
from hqlt_kernels.precision import compute_dtype, outside_autocast


@outside_autocast
def fast_weight(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    *,
    feature_map: FeatureMap,
    scale: float,
    read_chunk: int | None,
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token; slow on purpose, differentiable, any float dtype.

        S = exp(log_decay_t) S                                    if log_decay is given
        S = S + k (v - S^T k)^T beta     for each write i of t    if beta is given, else  S = S + k v^T
        o_t = scale S^T q                                         q and k stand for phi(q) and phi(k)

    q [B, T, H, K]; k, v and beta [B, T, H, ...], or [B, T, n, H, ...] with n writes a token; S [B, H, K, V]. With
    `read_chunk`, o_t reads S as it was at the start of t's chunk of that many tokens. Returns o in the dtype of v and
    the final S in the dtype computed in.

    Source: Schlag et al. 2021 (arXiv:2102.11174), Yang et al. 2024 (arXiv:2412.06464), Siems et al. 2025
    (arXiv:2502.10297).
    """
    dtype = compute_dtype(q, k, v)
    q, k = map_features(q.to(dtype), feature_map), map_features(k.to(dtype), feature_map)
    values = v.to(dtype)
    if k.dim() == 4:
        k, values = k.unsqueeze(2), values.unsqueeze(2)
        beta = None if beta is None else beta.unsqueeze(2)
    n_tokens, n_writes = k.shape[1:3]
    state = q.new_zeros(*k.shape[:1], *k.shape[3:], v.shape[-1]) if initial_state is None else initial_state.to(dtype)
    read = state
    outputs = []
    for t in range(n_tokens):
        if read_chunk is not None and t % read_chunk == 0:
            read = state
        if log_decay is not None:
            state = state * log_decay[:, t].to(dtype).exp()[..., None, None]
        for i in range(n_writes):
            key, value = k[:, t, i], values[:, t, i]
            if beta is not None:
                known = torch.einsum("bhk,bhkv->bhv", key, state)
                value = beta[:, t, i].to(dtype)[..., None] * (value - known)
            state = state + key[..., :, None] * value[..., None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state if read_chunk is None else read))
    return (torch.stack(outputs, 1) * scale).to(v.dtype), state
