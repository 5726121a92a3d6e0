"""`torch.vmap` over our Triton operators: the mapped axis (a stack of replicas) is folded into the batch."""

from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef


def fold_replicas(op: CustomOpDef) -> None:
    """Register a vmap rule for an operator whose tensors all have the batch (or batch times heads) as axis 0.

    A tensor that is not mapped is the same for every replica. Empty outputs stay as they are.
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        n = info.batch_size

        def fold(x: Any, dim: int | None) -> Any:
            if not isinstance(x, Tensor) or x.numel() == 0:
                return x
            x = x.unsqueeze(0).expand(n, *x.shape) if dim is None else x.movedim(dim, 0)
            # Into a batch of one PyTorch folds an axis of any stride, such as 0, without a copy.
            return x.flatten(0, 1).contiguous()

        outputs = op(*(fold(x, dim) for x, dim in zip(args, in_dims, strict=True)))
        if isinstance(outputs, Tensor):
            return outputs.reshape(n, -1, *outputs.shape[1:]), 0
        unfolded = [x if x.numel() == 0 else x.unflatten(0, (n, -1)) for x in outputs]
        dims = [None if x.numel() == 0 else 0 for x in outputs]
        return (unfolded, dims) if isinstance(outputs, list) else (tuple(unfolded), tuple(dims))

    torch.library.register_vmap(op, rule)
