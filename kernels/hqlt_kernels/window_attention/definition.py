"""What KV-memory computes, one query at a time: what every faster form is compared with."""

import torch
from torch import Tensor

from hqlt_kernels.precision import compute_dtype, outside_autocast


@outside_autocast
def window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None, chunk_aligned: bool, position: int, scale: float
) -> Tensor:
    """Softmax attention of each query over its window of keys; slow on purpose, differentiable, any float dtype.

        o_t = sum_j softmax_j(scale q_t . k_j) v_j      t - window < j <= t, or chunk start <= j <= t if chunk_aligned

    q [B, T, H, K]; k [B, L, H, K] and v [B, L, H, V] with L >= T: the queries belong to the last T keys. `position` is
    the absolute position of the first key; chunks of `window` tokens start at its multiples. Returns [B, T, H, V].
    """
    dtype = compute_dtype(q, k, v)
    q, k, values = q.to(dtype), k.to(dtype), v.to(dtype)
    outputs = []
    for t in range(q.shape[1]):
        last = k.shape[1] - q.shape[1] + t
        if window is None:
            first = 0
        elif chunk_aligned:
            first = max(0, last - (position + last) % window)
        else:
            first = max(0, last - window + 1)
        scores = scale * torch.einsum("bhk,bjhk->bhj", q[:, t], k[:, first : last + 1])
        outputs.append(torch.einsum("bhj,bjhv->bhv", scores.softmax(-1), values[:, first : last + 1]))
    return torch.stack(outputs, 1).to(v.dtype)
