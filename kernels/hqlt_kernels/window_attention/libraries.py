"""Window attention by other people's kernels, in 16 bits on a GPU: what `backends.Library` names.

    q [B, T, H, D], k and v [B, L, H, D], the queries those of the last T of L keys; window None is all keys

Each imports its package when it is called, and none knows of positions: queries and keys are turned before.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hqlt_kernels.backends import Library


def flash_attn_4(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    from flash_attn.cute import flash_attn_func

    sides = (None, None) if window is None else (window - 1, 0)
    out = flash_attn_func(q, k, v, softmax_scale=scale, causal=True, window_size=sides)
    o: Tensor = out[0] if isinstance(out, tuple) else out
    return o


def flash_attn_2(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    from flash_attn import flash_attn_func

    sides = (-1, -1) if window is None else (window - 1, 0)
    o: Tensor = flash_attn_func(q, k, v, softmax_scale=scale, causal=True, window_size=sides)
    return o


def torch_flash(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    (batch, n_queries), n_keys = q.shape[:2], k.shape[1]
    if (window is None or window >= n_keys) and n_queries == n_keys:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)
    from torch.nn.attention.varlen import varlen_attn

    def borders(n: int) -> Tensor:
        return torch.arange(0, (batch + 1) * n, n, device=q.device, dtype=torch.int32)

    sides = (-1, 0) if window is None else (window - 1, 0)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    o = varlen_attn(q, k, v, borders(n_queries), borders(n_keys), n_queries, n_keys, scale=scale, window_size=sides)
    assert isinstance(o, Tensor)
    return o.reshape(batch, n_queries, *o.shape[1:])


def flex_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    n_queries, n_keys = q.shape[1], k.shape[1]
    run = _compiled_flex(n_queries, n_keys, n_keys if window is None else window, q.device)
    return run(*(x.transpose(1, 2) for x in (q, k, v)), scale).transpose(1, 2)


@lru_cache(maxsize=32)
def _compiled_flex(n_queries: int, n_keys: int, window: int, device: torch.device) -> Callable[..., Tensor]:
    """FlexAttention for one shape, with its block mask; kept, as both take seconds to make."""
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        age = query + (n_keys - n_queries) - key
        return (age >= 0) & (age < window)

    mask = create_block_mask(visible, None, None, n_queries, n_keys, device=str(device))
    compiled = torch.compile(flex, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        o = compiled(q, k, v, block_mask=mask, scale=scale)
        assert isinstance(o, Tensor)
        return o

    return run


ATTEND: dict[Library, Callable[[Tensor, Tensor, Tensor, int | None, float], Tensor]] = {
    "flash_attn_4": flash_attn_4,
    "flash_attn_2": flash_attn_2,
    "torch_flash": torch_flash,
    "flex_attention": flex_attention,
}
