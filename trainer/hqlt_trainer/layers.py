"""The parts of every layer that have parameters: products, embedding, norm, short convolution.

Parameters may have one axis more in front, a replica each (`hqlt_trainer.replicas`). The batch then holds the rows of
the first replica, then those of the second, as many of each; to whatever has no parameters they are one batch.
"""

from collections.abc import Sequence

import torch
from hqlt_kernels.block_parts import add_rms_norm, linear, norm_linear, rms_norm
from hqlt_kernels.projections import embed, split_projections
from torch import Tensor, nn

NORM_EPSILON = 1e-5


def broadcast_to_rows(parameter: Tensor, own_axes: int, x: Tensor) -> Tensor:
    """`parameter`, which has `own_axes` axes in an ordinary model, so that it broadcasts against [B, T, ...].

    Replicas in front are repeated for each of their rows of `x`: [replicas, ...] -> [B, 1, ...].
    """
    if parameter.dim() == own_axes:
        return parameter
    return parameter.repeat_interleave(len(x) // len(parameter), 0).unsqueeze(1)


class Linear(nn.Linear):
    """x W^T over the last axis, without a bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class Embedding(nn.Embedding):
    """A vector for each token."""

    def forward(self, tokens: Tensor) -> Tensor:
        return embed(tokens, self.weight)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-5) * weight over the last axis, in the type of the weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """With `gate` [..., H D] for x [..., H, D]: times SiLU(gate)."""
        return rms_norm(x, self.weight, NORM_EPSILON, gate)

    def after_adding(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """x + delta, or `x` without one; and the norm of that."""
        if delta is None:
            return x, self(x)
        return add_rms_norm(x, delta, self.weight, NORM_EPSILON)

    def into(
        self, weights: Sequence[Tensor], x: Tensor, delta: Tensor | None = None, gate: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x + delta, and the products of its norm with `weights`; the norm itself is not kept for the backward."""
        return norm_linear(x, delta, self.weight, NORM_EPSILON, weights, gate)


class ShortConvolution(nn.Module):
    """A causal convolution along T, one filter of `taps` a channel: y_t = sum_i weight[:, i] x_{t - taps + 1 + i}."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, taps))

    def forward(
        self, rows: Tensor, before: Tensor | None, widths: tuple[int, ...], activate: bool
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """The columns of `rows` [B, T, at least their sum] in parts of seven widths, of which q, k and v are filtered.

        `before` are the last taps - 1 inputs of the filters before the first token, zeros at the start of a sequence;
        with them the second result is the last taps - 1 inputs now. With `activate`, SiLU of v.
        """
        if before is None:
            return split_projections(rows, self.weight, widths, activate), None
        x, *rest = torch.split(rows, [sum(widths[:3]), *widths[3:], rows.shape[-1] - sum(widths)], dim=-1)
        x = torch.cat([before, x], dim=1)
        n_before = before.shape[1]
        filtered = split_projections(x, self.weight, (*widths[:3], 0, 0, 0, 0), activate)[:3]
        return (*(part[:, n_before:] for part in filtered), *rest[:-1]), x[:, x.shape[1] - n_before :]
