"""What a user would take instead of our kernels, as functions of the same tensors; for bench_gpu.py.

Everything of another package is imported when it is called: a package that is absent is a row that says so.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hqlt_kernels.backends import Library
from hqlt_kernels.window_attention.libraries import ATTEND

ROPE_BASE = 10_000.0

Attention = Callable[[Tensor, Tensor, Tensor, int | None], Tensor]
"""q, k, v [B, T, H, D] and the window -> [B, T, H, D]; causal, no rotary embedding."""


def attention(library: Library) -> Attention:
    """The attention of another package, at our scale."""
    attend = ATTEND[library]
    return lambda q, k, v, window: attend(q, k, v, window, q.shape[-1] ** -0.5)


def fla_delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """fla's chunked delta rule with the l2 norm in its kernels; q and k have been through SiLU."""
    from fla.ops.delta_rule import chunk_delta_rule

    o: Tensor = chunk_delta_rule(q, k, v, beta.to(q.dtype), use_qk_l2norm_in_kernel=True)[0]
    return o


def fla_gated(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
    """fla's chunked gated delta rule, the same.

    Raises:
        RuntimeError: what its backward would say, before its forward is tuned.
    """
    from fla import utils
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    if utils.IS_NVIDIA_HOPPER and utils.TRITON_ABOVE_3_4_0 and not utils.TRITON_ABOVE_3_7_1:
        raise RuntimeError("its backward refuses Hopper with Triton 3.4.0 to 3.7.0 (its issue 640)")

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
