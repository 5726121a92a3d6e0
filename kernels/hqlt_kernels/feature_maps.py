"""phi, the map from a query or key to the features that fast weights are addressed with.

    identity       x
    silu_l2        SiLU(x) / sqrt(|SiLU(x)|^2 + 1e-6)
    elu_plus_one   ELU(x) + 1, positive everywhere
    relu_l2        ReLU(x) / sqrt(|ReLU(x)|^2 + 1e-6); zero where no entry is positive

The l2 norm runs over the last axis. The epsilon stands inside the root, as in the released code of arXiv:2506.00744.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from hqlt_kernels.functions import quick_to_apply

FeatureMap = Literal["identity", "silu_l2", "elu_plus_one", "relu_l2"]
FEATURE_MAPS: tuple[FeatureMap, ...] = get_args(FeatureMap)
L2_EPSILON = 1e-6


def map_features(x: Tensor, feature_map: FeatureMap) -> Tensor:
    """phi(x) over the last axis, in the dtype of `x`. Any shape.

    Raises:
        ValueError: `feature_map` is not one of `FEATURE_MAPS`.
    """
    if feature_map == "identity":
        return x
    if feature_map == "elu_plus_one":
        return functional.elu(x) + 1
    if feature_map in ("silu_l2", "relu_l2"):
        y: Tensor = _Direction.apply(x, feature_map == "silu_l2")[0]  # type: ignore[no-untyped-call]
        return y
    raise ValueError(f"no feature map {feature_map!r}; there is {', '.join(FEATURE_MAPS)}")


@quick_to_apply
class _Direction(torch.autograd.Function):
    """SiLU or ReLU, then s / |s| with the epsilon: y = s r, r = 1 / sqrt(|s|^2 + epsilon). Returns (y, r).

    By hand because dS = r (dY - y <y, dY>) takes a third of the passes over memory that autograd takes.
    """

    @staticmethod
    def forward(x: Tensor, is_silu: bool) -> tuple[Tensor, Tensor]:
        s = functional.silu(x) if is_silu else functional.relu(x)
        r = torch.linalg.vector_norm(s, dim=-1, keepdim=True).square_().add_(L2_EPSILON).rsqrt_()
        return s.mul_(r), r

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, ctx.is_silu = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, *output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, _: Tensor) -> tuple[Tensor, None]:
        x, y, r = ctx.saved_tensors
        grad_s = torch.addcmul(grad_y, y, (y * grad_y).sum(-1, keepdim=True), value=-1).mul_(r)
        if ctx.is_silu:
            return torch.ops.aten.silu_backward(grad_s, x), None
        return torch.ops.aten.threshold_backward(grad_s, y, 0), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, is_silu: bool) -> tuple[Any, tuple[int, int]]:
        return _Direction.apply(x.movedim(in_dims[0], 0), is_silu), (0, 0)  # type: ignore[no-untyped-call]
