"""Eager calls of our operators without the dispatcher: its Python layers cost more time than a short kernel."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode


def nobody_looks_on(x: Tensor) -> bool:
    """Whether a call on `x` is plain eager PyTorch: no tracing, no `torch.func` transform, no dispatch mode."""
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
        and _get_current_dispatch_mode() is None
    )


def eager_operator(
    forward: Callable[..., Sequence[Tensor]],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., tuple[Tensor | None, ...]],
    n_outputs: int,
) -> Callable[..., tuple[Tensor, ...]]:
    """The operator of these three as a plain autograd function that returns the first `n_outputs` of `forward`.

    The others are kept for the backward, which is given the gradients of those returned.
    """

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
            output = forward(*inputs)
            setup_context(ctx, inputs, output)
            return tuple(output[:n_outputs])

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            return backward(ctx, *gradients)

    call: Callable[..., tuple[Tensor, ...]] = Eager.apply
    return call
