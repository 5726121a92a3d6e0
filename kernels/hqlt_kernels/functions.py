"""What the hand-written autograd functions of this package share."""

import inspect
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

GRADIENT_INSIDE_VMAP = (
    "this operator folds the axis that torch.func.vmap maps into the batch, which a gradient taken inside vmap cannot"
    " follow; map the loss and take its gradient outside, as in torch.autograd.grad(vmap(loss)(inputs).sum(), inputs)"
)

FunctionClass = TypeVar("FunctionClass", bound=type[torch.autograd.Function])


def quick_to_apply(function: FunctionClass) -> FunctionClass:
    """Class decorator: remembers the signature of `forward`.

    `torch.autograd.Function.apply` asks `inspect.signature` for it at every call, which takes longer (25 us) than most
    of the tensor operations inside; `inspect` returns a remembered one at once.
    """
    forward: Any = function.forward
    forward.__signature__ = inspect.signature(forward)
    return function


def fold_mapped_axis(batch_size: int, in_dims: Sequence[int | None], inputs: Sequence[Any]) -> list[Any]:
    """The inputs of a function under `torch.func.vmap`, the mapped axis folded into the batch, axis 0.

    Replicas are only more sequences to the operators here: what is not mapped is repeated for each.
    """
    folded = []
    for x, dim in zip(inputs, in_dims, strict=True):
        if isinstance(x, Tensor):
            mapped = x.expand(batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            folded.append(mapped.flatten(0, 1))
        else:
            folded.append(x)
    return folded


def unfold_mapped_axis(batch_size: int, *outputs: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The outputs of a function whose inputs were folded, with the mapped axis in front again, and where it is."""
    unfolded = tuple(x.reshape(batch_size, -1, *x.shape[1:]) for x in outputs)
    return unfolded, (0,) * len(unfolded)
