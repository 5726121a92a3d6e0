"""What a user would take instead of our kernels, as functions of the same tensors; for bench_gpu.py.

Everything of another package is imported when it is called: a package that is absent is a row that says so.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

ROPE_BASE = 10_000.0

Attention = Callable[[Tensor, Tensor, Tensor, int | None], Tensor]
"""q, k, v [B, T, H, D] and the window -> [B, T, H, D]; causal, no rotary embedding."""


def flash_attention_4(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """flash-attn-4, in CuTe DSL."""
    from flash_attn.cute import flash_attn_func

    sides = (None, None) if window is None else (window - 1, 0)
    out = flash_attn_func(q, k, v, causal=True, window_size=sides)
    o: Tensor = out[0] if isinstance(out, tuple) else out
    return o


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """FlashAttention 2 as it is built into torch."""
    from torch.nn.attention.varlen import varlen_attn

    batch, n_tokens = q.shape[:2]
    starts = torch.arange(0, (batch + 1) * n_tokens, n_tokens, device=q.device, dtype=torch.int32)
    sides = (-1, 0) if window is None else (window - 1, 0)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    out = varlen_attn(q, k, v, starts, starts, n_tokens, n_tokens, window_size=sides)
    assert isinstance(out, Tensor)
    return out.reshape(batch, n_tokens, *out.shape[1:])


def flex_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """FlexAttention, compiled for the shape."""
    compiled = _compiled_flex(q.shape[1], q.shape[1] if window is None else window)
    return compiled(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


@lru_cache
def _compiled_flex(n_tokens: int, window: int) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query - key < window)

    mask = create_block_mask(visible, None, None, n_tokens, n_tokens, device="cuda")
    compiled = torch.compile(flex, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = compiled(q, k, v, block_mask=mask)
        assert isinstance(o, Tensor)
        return o

    return run


def fla_delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """fla's chunked delta rule with the l2 norm in its kernels; q and k have been through SiLU."""
    from fla.ops.delta_rule import chunk_delta_rule

    o: Tensor = chunk_delta_rule(q, k, v, beta.to(q.dtype), use_qk_l2norm_in_kernel=True)[0]
    return o


def fla_gated(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
    """fla's chunked gated delta rule, the same."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    o: Tensor = chunk_gated_delta_rule(q, k, v, g=log_decay, beta=beta.to(q.dtype), use_qk_l2norm_in_kernel=True)[0]
    return o


def fla_linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """fla's chunked linear attention without a feature map, norm or normaliser."""
    from fla.ops.linear_attn import chunk_linear_attn

    o: Tensor = chunk_linear_attn(q, k, v, normalize=False)[0]
    return o


class Elementwise:
    """The arithmetic between the parts of a composed layer, in eager PyTorch or compiled."""

    def __init__(self, compiled: bool) -> None:
        wrap: Any = torch.compile(dynamic=False) if compiled else lambda f: f
        self.turn: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = wrap(_turn)
        self.activate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = wrap(_activate)
        self.mix: Callable[[Tensor, Tensor, Tensor], Tensor] = wrap(_mix)


@lru_cache
def _angles(n_tokens: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [T, 1, D]; made once, as a model would."""
    frequencies = ROPE_BASE ** -(torch.arange(0, width, 2, dtype=torch.float64, device="cuda") / width)
    angles = torch.outer(torch.arange(n_tokens, dtype=torch.float64, device="cuda"), frequencies).repeat(1, 2)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def turn(x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        return x * cos + torch.cat([-high, low], -1) * sin

    return turn(q), turn(k)


def _activate(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return functional.silu(q), functional.silu(k)


def _mix(kv: Tensor, fw: Tensor, gate: Tensor) -> Tensor:
    return torch.lerp(kv, fw, gate.sigmoid())


def turned(attend: Attention, parts: Elementwise) -> Attention:
    """`attend` after rotary embedding."""
    return lambda q, k, v, window: attend(*parts.turn(q, k, *_angles(*q.shape[1::2], q.dtype)), v, window)


def composed(
    attend: Attention, rule: Callable[..., Tensor], parts: Elementwise, window: int | None
) -> Callable[..., Tensor]:
    """The synchronous blend from parts: RoPE + attention, SiLU + delta rule, sigmoid mix."""

    def run(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, beta: Tensor) -> Tensor:
        return parts.mix(turned(attend, parts)(q, k, v, window), rule(*parts.activate(q, k), v, beta), gate)

    return run
