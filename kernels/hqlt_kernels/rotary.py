"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

Entry i of the first half of a vector and entry i of the second are one plane, turned by position * base^(-2 i / D):
the pairing of GPT-NeoX, which the released code of arXiv:2506.00744 uses.
"""

import torch
from torch import Tensor


def rotate(x: Tensor, base: float, position: int = 0) -> Tensor:
    """`x` [B, T, ..., D] turned along axis 1; `position` is the absolute position of its first token. D is even.

    Inner products of rotated vectors depend on the distance of their positions only. Angles are computed in float64:
    in float32 a position of a million is already off by a tenth of a radian.

    Raises:
        ValueError: D is odd.
    """
    length, width = x.shape[1], x.shape[-1]
    if width % 2:
        raise ValueError(f"rotary position embedding needs an even width, got {width}")
    cos, sin = _turns(length, width, base, position, x)
    return x * cos + x.roll(width // 2, -1) * sin


def _turns(length: int, width: int, base: float, position: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """cos and signed sin, shaped to broadcast against `x`: [T, 1..., D]."""
    frequencies = base ** -(torch.arange(0, width, 2, dtype=torch.float64, device=x.device) / width)
    positions = torch.arange(position, position + length, dtype=torch.float64, device=x.device)
    angles = torch.outer(positions, frequencies)
    sin = angles.sin()
    shape = (length, *(1 for _ in range(x.dim() - 3)), width)
    cos_full = torch.cat([angles.cos()] * 2, -1).to(x.dtype).reshape(shape)
    sin_full = torch.cat([-sin, sin], -1).to(x.dtype).reshape(shape)
    return cos_full, sin_full
