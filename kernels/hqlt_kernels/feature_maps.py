"""phi, the map from a query or key to the features that fast weights are addressed with.

    identity       x
    silu_l2        SiLU(x) / sqrt(|SiLU(x)|^2 + 1e-6)
    elu_plus_one   ELU(x) + 1, positive everywhere
    relu_l2        ReLU(x) / sqrt(|ReLU(x)|^2 + 1e-6); zero where no entry is positive

The l2 norm runs over the last axis. The epsilon stands inside the root, as in the released code of arXiv:2506.00744.
"""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

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
    if feature_map == "silu_l2":
        return _l2_normalise(functional.silu(x))
    if feature_map == "relu_l2":
        return _l2_normalise(functional.relu(x))
    raise ValueError(f"no feature map {feature_map!r}; there is {', '.join(FEATURE_MAPS)}")


def _l2_normalise(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + L2_EPSILON)
