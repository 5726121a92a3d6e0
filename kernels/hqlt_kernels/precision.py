"""The number format operators compute in."""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any tensor is, else float32: 16-bit inputs are stored narrow and computed wide."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def outside_autocast(
    operator: Callable[Concatenate[Tensor, Arguments], Result],
) -> Callable[Concatenate[Tensor, Arguments], Result]:
    """Decorates an operator that chooses its own precision: autocast would narrow the products inside it."""

    @wraps(operator)
    def run(first: Tensor, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if not torch.is_autocast_enabled(first.device.type):
            return operator(first, *args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return operator(first, *args, **kwargs)

    return run
