"""Which kernels run a blend: one program a head for short sequences, scans for long ones, or those of its parts."""

import torch
from torch import Tensor

from hqlt_kernels.backends import Capability, Choice, Forced, choose_backend, keys_seen
from hqlt_kernels.fast_weight.operator import Normaliser

SHORT = 64
"""Tokens that one program takes."""
SHORT_HEAD_DIM = 64


def choose_blend(
    *,
    n_tokens: int,
    window: int | None,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int | None = None,
    normaliser: Normaliser = "none",
    several_writes: bool = False,
    kv_positions: bool = False,
    fw_positions: bool = False,
    carries_state: bool = False,
    capability: Capability | None = None,
    forced: Forced = "auto",
) -> Choice:
    """`choose_backend` for a blend of sequences of `n_tokens`.

    "triton" is one operator for both memories, and the reason says whether it is one program a head. Where there is no
    such operator the choice is "chunked", of its parts: the two memories then choose for themselves.

    Raises:
        BackendUnavailableError: the forced backend cannot run here.
    """
    choice = choose_backend(
        "blend",
        device=device,
        dtype=dtype,
        head_dim=head_dim,
        value_dim=value_dim,
        capability=capability,
        forced=forced,
    )
    if choice.backend != "triton":
        return choice
    value_dim = head_dim if value_dim is None else value_dim
    short = is_short(n_tokens, max(head_dim, value_dim), dtype, kv_positions)
    refusal = None
    if several_writes:
        refusal = "several writes a token"
    elif fw_positions:
        refusal = "positions in FW-memory"
    elif carries_state:
        refusal = "a state is carried"
    elif normaliser != "none" and not short:
        refusal = f"normaliser {normaliser} beyond one program a head"
    elif keys_seen(window, n_tokens) is None:  # better done by itself
        refusal = "attention to all keys"
    if refusal is not None:
        return Choice("blend", "chunked", f"of its parts: {refusal}")
    return Choice("blend", "triton", f"{choice.reason}; {'one program a head' if short else 'scans'}")


def is_short(n_tokens: int, widest: int, dtype: torch.dtype, kv_positions: bool) -> bool:
    """Whether a head is one program. Positions are not turned there: the models for short sequences have none. In three
    tf32 parts such a program is twice as slow as the scans."""
    return n_tokens <= SHORT and widest <= SHORT_HEAD_DIM and dtype != torch.float32 and not kv_positions


def kernel_dtype(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    """The dtype in which a GPU's kernels compute; float64, for which there are none, stays."""
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    if dtype != torch.float64 and torch.is_autocast_enabled(q.device.type):
        return torch.get_autocast_dtype(q.device.type)
    return dtype
