"""The number format of a recipe."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """bfloat16 matrix products with float32 weights and sums, or float32 throughout."""
    if precision == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def at_least_float32(x: Tensor) -> Tensor:
    """`x`, widened if it has 16 bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def activation(x: Tensor) -> Tensor:
    """`x` in the type that activations have: autocast's where that is on, else its own."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
