"""Triton launches on the current device, wherever the tensors are that it is given."""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def on_its_device(
    launch: Callable[Concatenate[Tensor, Arguments], Result],
) -> Callable[Concatenate[Tensor, Arguments], Result]:
    """Decorates a function that launches kernels: the device of its first tensor is the current one inside.

    Gradients do without: autograd makes the device of a node the current one before it runs it.
    """

    @wraps(launch)
    def run(first: Tensor, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if not first.is_cuda or first.device.index == torch.cuda.current_device():
            return launch(first, *args, **kwargs)
        with torch.cuda.device(first.device):
            return launch(first, *args, **kwargs)

    return run
