"""The public function: arguments are checked, positions are rotated in, a backend is chosen."""

from collections.abc import Collection

import torch
from torch import Tensor

from hqlt_kernels.backends import (
    LIBRARIES,
    BackendName,
    BackendUnavailableError,
    Forced,
    Library,
    choose_backend,
    keys_seen,
)
from hqlt_kernels.packed import Packed, first_tokens
from hqlt_kernels.rotary import rotate
from hqlt_kernels.triton_eager import nobody_looks_on
from hqlt_kernels.window_attention import chunked, definition
from hqlt_kernels.window_attention.libraries import ATTEND


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    rope_base: float | None = None,
    chunk_aligned: bool = False,
    position: int = 0,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    longest: int | None = None,
    backend: Forced = "auto",
) -> Tensor:
    """Causal softmax attention over the last `window` keys, the current one included; None is all keys.

        o_t = sum_j softmax_j(scale q_t . k_j) v_j      t - window < j <= t; scale is K^-0.5 unless given

    With `chunk_aligned`, j runs from the start of t's chunk of `window` tokens instead, so a query sees 1 to `window`
    keys. `rope_base` turns q and k by their positions first (`hqlt_kernels.rotary`).

    q [B, T, H, K]; k [B, L, H, K] and v [B, L, H, V] with L >= T. The queries belong to the last T keys: L > T is
    decoding with a KV cache in front. `position` is the absolute position of the first key. Returns [B, T, H, V] in
    the dtype of v, computed in float32, or float64 if an input is. Works under `torch.func.vmap`.

    `cu_seqlens` [n + 1]: B is 1 and n sequences stand one after the other, borders first to last, each from position
    `position`. Where the Triton kernels run and the window is at most 64 (float32: 32) they are taken as they stand;
    else they are padded to the longest (given, or read from the device) inside.

    Raises:
        ValueError: shapes that do not fit together, a window below 1, chunks without a window.
        BackendUnavailableError: a forced backend cannot run here.
    """
    _check(q, k, v, window, chunk_aligned)
    if cu_seqlens is not None:
        if q.shape[0] != 1 or q.shape[1] != k.shape[1]:
            raise ValueError(f"packed sequences are a batch of 1 with a key for each query; got q {tuple(q.shape)}")
        if window is not None and _choose(q, k, v, window, chunk_aligned, backend) == "triton":
            from hqlt_kernels.window_attention import triton_operator

            if window <= triton_operator.tile_rows(_dtype(q, k, v)):
                return triton_operator.window_attention(
                    q,
                    k,
                    v,
                    window=window,
                    rope_base=rope_base,
                    chunk_aligned=chunk_aligned,
                    position=position,
                    scale=q.shape[-1] ** -0.5 if scale is None else scale,
                    starts=first_tokens(cu_seqlens, q.shape[1]).unsqueeze(0),
                )
        layout = Packed.of(cu_seqlens, q.shape[1], longest)
        o = window_attention(
            layout.padded(q),
            layout.padded(k),
            layout.padded(v),
            window=window,
            rope_base=rope_base,
            chunk_aligned=chunk_aligned,
            position=position,
            scale=scale,
            backend=backend,
        )
        return layout.packed(o)
    n_queries, n_keys = q.shape[1], k.shape[1]
    if window is not None and n_keys > n_queries + window - 1:  # older keys are in nobody's window
        stale = n_keys - (n_queries + window - 1)
        k, v, position = k[:, stale:], v[:, stale:], position + stale
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = _choose(q, k, v, window, chunk_aligned, backend)
    if chosen == "triton":
        from hqlt_kernels.window_attention import triton_operator  # triton is there only where it can run

        return triton_operator.window_attention(
            q,
            k,
            v,
            window=window,
            rope_base=rope_base,
            chunk_aligned=chunk_aligned,
            position=position,
            scale=scale,
        )
    out_dtype = v.dtype
    if chosen in LIBRARIES:
        if chunk_aligned:
            raise BackendUnavailableError(f"the {chosen} backend has no chunk-aligned windows; use 'auto' or 'chunked'")
        q, k, v = (x.to(_dtype(q, k, v)) for x in (q, k, v))
    if rope_base is not None:
        q = turned(q, rope_base, position + k.shape[1] - n_queries)
        k = turned(k, rope_base, position)
    if chosen in LIBRARIES:
        return ATTEND[chosen](q, k, v, window, scale).to(out_dtype)
    attend = chunked.window_attention if chosen == "chunked" else definition.window_attention
    return attend(q, k, v, window=window, chunk_aligned=chunk_aligned, position=position, scale=scale)


def turned(x: Tensor, rope_base: float, position: int) -> Tensor:
    """`rotate`, by the Triton kernel where that can run."""
    width = x.shape[-1]
    choice = choose_backend("window_attention", device=x.device, dtype=x.dtype, head_dim=width, libraries=())
    if choice.backend != "triton":
        return rotate(x, rope_base, position)
    from hqlt_kernels.window_attention import triton_operator

    y: Tensor = triton_operator.turn(x.contiguous(), rope_base, position, False)
    return y


def _choose(q: Tensor, k: Tensor, v: Tensor, window: int | None, chunk_aligned: bool, forced: Forced) -> BackendName:
    n_keys = k.shape[1]
    return choose_backend(
        "window_attention",
        device=q.device,
        dtype=_dtype(q, k, v),
        head_dim=q.shape[-1],
        value_dim=v.shape[-1],
        keys=keys_seen(window, n_keys),
        libraries=_libraries(q, n_keys, window, chunk_aligned),
        forced=forced,
    ).backend


def _dtype(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    """The dtype in which a GPU's kernels compute."""
    if torch.is_autocast_enabled(q.device.type):
        return torch.get_autocast_dtype(q.device.type)
    return torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)


def _libraries(q: Tensor, n_keys: int, window: int | None, chunk_aligned: bool) -> Collection[Library]:
    """Those that can do what is asked: causal attention of whole sequences, some of it in plain eager PyTorch only."""
    if chunk_aligned or q.shape[1] != n_keys:
        return ()
    if nobody_looks_on(q):
        return LIBRARIES
    return {"torch_flash"} if keys_seen(window, n_keys) is None else ()


def _check(q: Tensor, k: Tensor, v: Tensor, window: int | None, chunk_aligned: bool) -> None:
    batch, n_queries, n_heads, width = q.shape
    n_keys = k.shape[1]
    if tuple(k.shape) != (batch, n_keys, n_heads, width) or tuple(v.shape[:-1]) != (batch, n_keys, n_heads):
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    if not 1 <= n_queries <= n_keys:
        raise ValueError(f"{n_queries} queries for {n_keys} keys; there is at least one query, and a key for each")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; a query sees at least its own key")
    if window is None and chunk_aligned:
        raise ValueError("chunk_aligned needs a window: the length of a chunk")
