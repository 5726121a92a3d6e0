"""What `linear_cross_entropy` means, in plain PyTorch: all logits at once."""

import torch
from torch import Tensor
from torch.nn import functional


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """x [R, N, d], weight [R, V, d] and targets [R, N] -> [R], in float32 or wider."""
    logits = torch.bmm(x, weight.to(x.dtype).mT)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (
        functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape).sum(1)
    )
