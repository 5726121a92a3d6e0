"""Window attention on Triton kernels, as custom operators with autograd and vmap.

A window that fits a tile takes triton_near_kernels.py; a longer one, and queries behind a cache of keys, take
triton_kernels.py.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
import triton
from torch import Tensor

from hqlt_kernels.rotary import LONGEST_REMEMBERED
from hqlt_kernels.triton_device import on_its_device
from hqlt_kernels.triton_eager import eager_operator, nobody_looks_on
from hqlt_kernels.triton_replicas import fold_replicas
from hqlt_kernels.window_attention import triton_kernels as kernels
from hqlt_kernels.window_attention import triton_near_kernels as near_kernels

HEAD_DIMS = (32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Windows that reach over more keys than this are looped over at run time, and queries and keys are turned before: here
# a key is turned once for each query tile that sees it.
LARGEST_REACH = 256


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    rope_base: float | None,
    chunk_aligned: bool,
    position: int,
    scale: float,
    starts: Tensor | None = None,
) -> Tensor:
    """The attention of `definition.window_attention`, with rotary embedding inside.

    `starts` [B, T] int32, for near windows only: the index of the first token of each token's sequence, where sequences
    stand one after the other, each from `position`. Dots take operands in the dtype of the inputs and add in float32;
    float32 inputs are multiplied in three tf32 parts.
    """
    out_dtype = v.dtype
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
    n_keys = k.shape[1]
    forward = eager_forward if nobody_looks_on(q) else window_forward
    o: Tensor = forward(
        q.to(dtype).contiguous(),
        k.to(dtype).contiguous(),
        v.to(dtype).contiguous(),
        starts,
        span(window, n_keys, chunk_aligned),
        0.0 if rope_base is None else rope_base,
        chunk_aligned,
        position % window if chunk_aligned and window is not None else 0,
        scale,
        torch.is_grad_enabled(),
    )[0]
    return o.to(out_dtype)


def span(window: int | None, n_keys: int, chunk_aligned: bool) -> int:
    """The window as the kernels take it: never None, and no larger than it needs to be."""
    if window is None:
        return n_keys
    return window if chunk_aligned else min(window, n_keys)


def tile_rows(dtype: torch.dtype) -> int:
    """Queries in a tile. float32 takes short ones: it multiplies in three tf32 parts."""
    return 32 if dtype == torch.float32 else 64


def is_near(q: Tensor, k: Tensor, window: int) -> bool:
    """Whether no query sees further back than the tile before its own."""
    return q.shape[1] == k.shape[1] and window <= tile_rows(q.dtype)


@on_its_device
def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None,
    window: int,
    rope_base: float,
    aligned: bool,
    phase: int,
    scale: float,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """o, and what the backward needs: the weights of a near window, [B * H, tiles, BT, BT] (empty unless `save`), or
    lse [B * H, T], log2 of the sums of exponentials. rope_base 0 is no rotary embedding."""
    o, kept = _forward_outputs(q, k, v, window, save)
    if is_near(q, k, window):
        constants = _near_constants(q, v, rope_base)
        near_kernels.forward_kernel[_near_grid(q)](
            q, k, v, starts, *_near_table(q, rope_base), o, kept, q.shape[1], window, phase, scale,
            ALIGNED=aligned, PACKED=starts is not None, SAVE=save, **constants,
        )  # fmt: skip
        return o, kept
    lse = kept
    plan = _Plan(q, k, v, window, rope_base, aligned, phase)
    if plan.turned_before:
        q, k = run_turn(q, rope_base, k.shape[1] - q.shape[1], False), run_turn(k, rope_base, 0, False)
    kernels.forward_kernel[(triton.cdiv(q.shape[1], plan.tile) * q.shape[0] * q.shape[2],)](
        q, k, v, plan.cos, plan.sin, o, lse, q.shape[1], k.shape[1], window, phase, scale, **plan.constants,
        **plan.forward,
    )  # fmt: skip
    return o, kept


window_forward = torch.library.custom_op("hqlt::window_forward", run_forward, mutates_args=())


def run_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor | None,
    kept: Tensor,
    do: Tensor,
    window: int,
    rope_base: float,
    aligned: bool,
    phase: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv. A near window takes no o."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if is_near(q, k, window):
        table, constants = _near_table(q, rope_base), _near_constants(q, v, rope_base)
        dscores = torch.empty_like(kept)
        near_kernels.query_gradient_kernel[_near_grid(q)](
            k, v, *table, do, kept, dq, dscores, q.shape[1], scale, **constants
        )
        near_kernels.key_value_gradient_kernel[_near_grid(q, 2)](
            q, *table, do, kept, dscores, dk, dv, q.shape[1], **constants
        )
        return dq, dk, dv
    lse = kept
    plan = _Plan(q, k, v, window, rope_base, aligned, phase)
    offset = k.shape[1] - q.shape[1]
    if plan.turned_before:
        q, k = run_turn(q, rope_base, offset, False), run_turn(k, rope_base, 0, False)
    delta = torch.empty_like(lse)
    sizes = (q.shape[1], k.shape[1], window, phase, scale)
    kernels.query_gradient_kernel[(triton.cdiv(q.shape[1], plan.tile) * q.shape[0] * q.shape[2],)](
        q, k, v, plan.cos, plan.sin, o, do, lse, delta, dq, *sizes, **plan.constants,
        **plan.backward,
    )  # fmt: skip
    kernels.key_value_gradient_kernel[(triton.cdiv(k.shape[1], plan.tile) * q.shape[0] * q.shape[2],)](
        q, k, v, plan.cos, plan.sin, do, lse, delta, dk, dv, *sizes, **plan.constants,
        **plan.backward,
    )  # fmt: skip
    if plan.turned_before:
        dq, dk = run_turn(dq, rope_base, offset, True), run_turn(dk, rope_base, 0, True)
    return dq, dk, dv


window_backward = torch.library.custom_op("hqlt::window_backward", run_backward, mutates_args=())


def _near_grid(q: Tensor, programs: int = 1) -> tuple[int]:
    return (programs * triton.cdiv(q.shape[1], tile_rows(q.dtype)) * q.shape[0] * q.shape[2],)


def _near_table(q: Tensor, rope_base: float) -> tuple[Tensor, Tensor]:
    """cos and sin for the rows of two tiles."""
    if rope_base == 0:
        return q, q
    return _table(rope_base, 2 * tile_rows(q.dtype), q.shape[-1], 0, q.device, _angle_dtype(q))


def _near_constants(q: Tensor, v: Tensor, rope_base: float) -> dict[str, Any]:
    tile = tile_rows(q.dtype)
    return {
        "H": q.shape[2],
        "D": q.shape[-1],
        "V": v.shape[-1],
        "BT": tile,
        "MASKED": q.shape[1] % tile != 0,
        "ROPE": rope_base > 0,
        "PREC": "tf32x3" if q.dtype == torch.float32 else "tf32",
        "num_warps": 4,
        "num_stages": 1,
        **at_most_168_registers(q),
    }


def at_most_168_registers(q: Tensor) -> dict[str, int]:
    """Three programs of four warps fit on a multiprocessor with 168 registers each (measured: kernels/README.md)."""
    return {} if q.dtype == torch.float32 else {"maxnreg": 168}


def _angle_dtype(q: Tensor) -> torch.dtype:
    """Half-precision angles: a quarter of bfloat16's rounding, and half the traffic of the cache they stay in."""
    return torch.float32 if q.dtype == torch.float32 else torch.float16


class _Plan:
    """How the kernels of triton_kernels.py are launched for one call."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, window: int, rope_base: float, aligned: bool, phase: int
    ) -> None:
        head_dim = q.shape[-1]
        self.tile = tile = tile_rows(q.dtype)
        own_chunks = aligned and tile % window == 0 and phase % window == 0
        reach = tile if own_chunks else tile + window - 1  # keys that one tile of queries sees
        fixed = reach <= LARGEST_REACH and k.shape[1] == q.shape[1]
        block = tile
        blocks = triton.cdiv(reach, block) if fixed else 0
        self.turned_before = rope_base > 0 and not fixed
        wide = q.dtype == torch.float32
        self.forward = {"num_warps": 4, "num_stages": 1 if fixed or wide else 2}
        if fixed:
            self.forward |= at_most_168_registers(q)
        self.backward = {"num_warps": 4, "num_stages": 1 if wide else 2}
        rope = rope_base > 0 and fixed
        table = _table(rope_base, blocks * block, head_dim, 0, q.device, _angle_dtype(q)) if rope else (q, q)
        self.cos, self.sin = table
        self.constants: dict[str, Any] = {
            "H": q.shape[2],
            "D": head_dim,
            "V": v.shape[-1],
            "BT": tile,
            "BN": block,
            "N_BLOCKS": blocks,
            "ALIGNED": aligned,
            "ROPE": rope,
            "PREC": "tf32x3" if q.dtype == torch.float32 else "tf32",
        }


@on_its_device
def run_turn(x: Tensor, base: float, position: int, back: bool) -> Tensor:
    """`x` [B, T, H, D] turned by absolute positions, or turned back."""
    batch, n_tokens, n_heads, head_dim = x.shape
    first, rows = position, n_tokens
    if position == 0 or 0 < position <= LONGEST_REMEMBERED - n_tokens:
        # Decoding asks for others at every token: few tables serve them all, and none that a CUDA graph reads is lost.
        first, rows = 0, max(256, triton.next_power_of_2(position + n_tokens))
    table = _table(base, rows, head_dim, first, x.device, torch.float32)
    cos, sin = (angles[position - first :] for angles in table)
    y = torch.empty_like(x)
    kernels.turn_kernel[(triton.cdiv(n_tokens, 32) * batch * n_heads,)](
        x, y, cos, sin, n_tokens, H=n_heads, D=head_dim, BT=32, BACK=back
    )
    return y


turn = torch.library.custom_op("hqlt::turn", run_turn, mutates_args=())


@lru_cache(maxsize=64)
def _table(
    base: float, rows: int, head_dim: int, position: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin of position * base^(-2 i / D), [rows, D / 2], computed in float64.

    Kept between calls: a CUDA graph must be warmed up with the same shapes before it is captured, and finds its table
    until 64 others have been asked for.
    """
    frequencies = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    angles = torch.outer(torch.arange(position, position + rows, dtype=torch.float64, device=device), frequencies)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _forward_outputs(q: Tensor, k: Tensor, v: Tensor, window: int, save: bool) -> tuple[Tensor, Tensor]:
    batch, n_queries, n_heads, _ = q.shape
    o = q.new_empty(batch, n_queries, n_heads, v.shape[-1])
    if not is_near(q, k, window):
        return o, q.new_empty(batch * n_heads, n_queries, dtype=torch.float32)
    tile = tile_rows(q.dtype)
    return o, q.new_empty(batch * n_heads if save else 0, triton.cdiv(n_queries, tile), tile, tile)


@window_forward.register_fake
def _(q, k, v, starts, window, rope_base, aligned, phase, scale, save):  # type: ignore[no-untyped-def]  # torch calls it
    return _forward_outputs(q, k, v, window, save)


@window_backward.register_fake
def _(q, k, v, *_rest):  # type: ignore[no-untyped-def]  # torch calls it
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, _starts, *options = inputs
    o, kept = output
    ctx.save_for_backward(q, k, v, None if is_near(q, k, options[0]) else o, kept)
    ctx.options = options[:-1]
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, do: Tensor | None, _dkept: None = None, run: Callable[..., tuple[Tensor, ...]] = window_backward
) -> tuple[Tensor | None, ...]:
    if do is None:
        return (None,) * 10
    return (*run(*ctx.saved_tensors, do.contiguous(), *ctx.options), *(None,) * 7)


eager_forward = eager_operator(run_forward, _setup_context, partial(_backward, run=run_backward), 1)


def _turn_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.options = inputs[1:]


def _turn_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    base, position, back = ctx.options
    return turn(dy.contiguous(), base, position, not back), None, None, None


turn.register_fake(lambda x, *_: torch.empty_like(x))
turn.register_autograd(_turn_backward, setup_context=_turn_setup_context)
window_forward.register_autograd(_backward, setup_context=_setup_context)
fold_replicas(window_forward)
fold_replicas(window_backward)
fold_replicas(turn)
