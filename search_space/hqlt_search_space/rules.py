"""How FW-memory is written: the update rules, their feature maps, normalisers and ranges of beta.

A fast-weight memory is a matrix S of shape (key width, value width) per head. With k = phi(key) and v = value:

    additive       S += k v^T
    decay          S  = exp(g) S + k v^T                                 g <= 0, a scalar per head
    delta          S += beta k (v - S^T k)^T                             beta in (0, beta_range)
    gated_delta    S  = exp(g) S;  S += beta k (v - S^T k)^T
    delta_product  n times per token: S += beta_i k_i (v_i - S^T k_i)^T

and read as o = S^T phi(q) * scale. Sources: Katharopoulos et al. 2020 (arXiv:2006.16236), Sun et al. 2023 (RetNet,
arXiv:2307.08621), Schlag et al. 2021 (arXiv:2102.11174), Yang et al. 2024 (arXiv:2412.06464), Siems et al. 2025
(DeltaProduct, arXiv:2502.10297).
"""

from typing import Annotated, Literal

from pydantic import Field

from hqlt_search_space.spec import Spec

FeatureMap = Literal["silu_l2", "elu_plus_one", "relu_l2", "identity"]
"""phi, applied to query and key: SiLU then l2 norm; ELU + 1; ReLU then l2 norm; nothing."""

NormalisedFeatureMap = Literal["silu_l2", "relu_l2"]
"""Feature maps with unit keys. The delta rules need them: I - beta k k^T is stable only while beta |k|^2 <= 2."""

Normaliser = Literal["none", "time", "heads"]
"""What the additive read is divided by: nothing; phi(q) . sum over time of phi(k); the published sum over heads."""

BetaRange = Literal[1, 2]
"""beta = beta_range * sigmoid(...): with 2, the eigenvalue 1 - beta may be negative (arXiv:2411.12537)."""


class Additive(Spec):
    """Linear attention: S += phi(k) v^T.

    With `normaliser: time` the output is divided by phi(q) . sum_{j<=t} phi(k_j) + 1e-10. `heads` is what the paper's
    released code computed instead (a cumulative sum over heads of the current token), kept to reproduce its ablation.
    """

    kind: Literal["additive"] = "additive"
    feature_map: FeatureMap = "elu_plus_one"
    normaliser: Normaliser = "time"


class Decay(Spec):
    """Additive with a scalar decay per head: S = exp(g) S + phi(k) v^T.

    `fixed` is RetNet's g_h = log(1 - 2^(-5 - h)), h the head's index; `data_dependent` is
    g = -exp(A_log) * softplus(W_a x + dt_bias) as in Mamba-2 and Gated DeltaNet.
    """

    kind: Literal["decay"] = "decay"
    feature_map: FeatureMap = "silu_l2"
    decay: Literal["fixed", "data_dependent"] = "data_dependent"


class Delta(Spec):
    """The delta rule: S += beta phi(k) (v - S^T phi(k))^T."""

    kind: Literal["delta"] = "delta"
    feature_map: NormalisedFeatureMap = "silu_l2"
    beta_range: BetaRange = 2


class GatedDelta(Spec):
    """The delta rule on a state that decays first, with a data-dependent scalar per head."""

    kind: Literal["gated_delta"] = "gated_delta"
    feature_map: NormalisedFeatureMap = "silu_l2"
    beta_range: BetaRange = 2


class DeltaProduct(Spec):
    """`n_householder` delta-rule writes per token, each with a key, value and beta of its own."""

    kind: Literal["delta_product"] = "delta_product"
    feature_map: NormalisedFeatureMap = "silu_l2"
    beta_range: BetaRange = 2
    n_householder: Annotated[int, Field(ge=1, le=8, description="Householder steps per token.")] = 2


Rule = Annotated[Additive | Decay | Delta | GatedDelta | DeltaProduct, Field(discriminator="kind")]
RuleName = Literal["additive", "decay", "delta", "gated_delta", "delta_product"]


def has_token_dependent_write(rule: Rule) -> bool:
    """Whether each token brings a beta or a decay of its own, which a delayed blend may delay as well."""
    return not isinstance(rule, Additive) and not (isinstance(rule, Decay) and rule.decay == "fixed")
