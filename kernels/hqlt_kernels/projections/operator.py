"""The public functions and their plain PyTorch forms, which are also the definitions.

On a CUDA device, in 16 bits or float32, Triton kernels move each tensor once; in plain PyTorch the gradients are put
together by concatenation, sorting or scattering. A parameter may have a replica axis in front of its own; the rows of
x (its first axis) are then those of the first replica, then those of the second, as many of each.
"""

import importlib.util

import torch
from torch import Tensor
from torch.nn import functional

_TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None
MOST_TOKENS = 64
"""Largest vocabulary whose gradient is a product with a one-hot matrix; a larger one is sorted, by PyTorch."""


def _has_kernel(*tensors: Tensor) -> bool:
    return _TRITON_IS_INSTALLED and all(x.is_cuda and x.dtype != torch.float64 and x.numel() > 0 for x in tensors)


def split_projections(rows: Tensor, filters: Tensor, widths: tuple[int, ...], activate: bool) -> tuple[Tensor, ...]:
    """The columns of `rows` [B, T, W] in parts of these widths; through the first three runs a short convolution.

        y_t = sum_i filters[:, i] x_{t - taps + 1 + i}        filters: [columns of the three parts, taps]

    Before the first token there are zeros. With `activate` the third part is SiLU(y). Columns beyond the sum of the
    widths are not read. There are seven widths, any of which may be 0.
    """
    if _has_kernel(rows, filters):
        from hqlt_kernels.projections import triton_operator

        return triton_operator.split_projections(rows, filters, widths, activate)
    filtered = sum(widths[:3])
    x, *rest = torch.split(rows, [filtered, *widths[3:], rows.shape[-1] - sum(widths)], dim=-1)
    if filters.dim() == 2:
        y = _filter(x, filters)
    else:
        y = torch.cat([_filter(part, w) for part, w in zip(torch.chunk(x, len(filters)), filters, strict=True)])
    first, second, third = torch.split(y, list(widths[:3]), dim=-1)
    return first, second, functional.silu(third) if activate else third, *rest[:-1]


def _filter(x: Tensor, filters: Tensor) -> Tensor:
    # As an image of height 1 in channels-last order, [B, T, C] needs no copy: 3x faster on a CPU than conv1d.
    image = x.transpose(1, 2).unsqueeze(2)
    kernel = filters[:, None, None].contiguous(memory_format=torch.channels_last)
    y = functional.conv2d(image, kernel, padding=(0, filters.shape[1] - 1), groups=x.shape[2])
    return y.squeeze(2).transpose(1, 2)[:, : x.shape[1]]


def take_rows(x: Tensor, at: Tensor) -> Tensor:
    """The rows `at` (int64, no two equal) of x [N, ...]."""
    if _has_kernel(x):
        from hqlt_kernels.projections import triton_operator

        return triton_operator.take_rows(x, at)
    return x.index_select(0, at)


def embed(tokens: Tensor, weight: Tensor) -> Tensor:
    """The row of `weight` [tokens, D] for each of `tokens` (int64, any shape); on a GPU under autocast in its type."""
    small = weight.shape[-2] <= MOST_TOKENS and tokens.numel() * weight.shape[-1] < 2**31  # 32 bits index its rows
    if small and _has_kernel(weight):
        from hqlt_kernels.projections import triton_operator

        return triton_operator.embed(tokens, weight)
    if weight.dim() == 2:
        return functional.embedding(tokens, weight)
    n_replicas, n_tokens, _ = weight.shape
    first = torch.arange(0, n_replicas * n_tokens, n_tokens, device=tokens.device)
    rows = tokens.view(n_replicas, -1) + first[:, None]
    return functional.embedding(rows.view(tokens.shape), weight.flatten(0, 1))
