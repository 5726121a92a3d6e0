"""One fully decided model: width, depth, one mixer per layer. No choices left in it."""

import math
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from hqlt_search_space.mixers import Attention, DelayedChunk, DelayedStreaming, Hybrid, Mixer, Synchronous
from hqlt_search_space.rules import Delta, DeltaProduct, has_token_dependent_write
from hqlt_search_space.spec import Spec, short_hash

MLP_MULTIPLE = 256  # the published models round the SwiGLU width up to a multiple of 256 (2816 at d 1024, 512 at d 128)


def published_mlp_inner(d_model: int) -> int:
    """The SwiGLU inner width of the published models: 8/3 of the model width, rounded up to a multiple of 256.

    >>> [published_mlp_inner(d) for d in (128, 1024, 2048)]
    [512, 2816, 5632]
    """
    return MLP_MULTIPLE * math.ceil(8 * d_model / 3 / MLP_MULTIPLE)


class Arch(Spec):
    """A decoder: embedding, then per layer (RMSNorm, mixer, residual, RMSNorm, SwiGLU MLP, residual), RMSNorm, head.

    Embedding and head are untied; no projection has a bias. The vocabulary belongs to the task, not to the arch.
    Layers come out in canonical form: `fw_chunk` equal to the window is `window`, `delta_product` with one Householder
    step is `delta`, and `delay_beta` is false where there is nothing to delay.
    """

    d_model: Annotated[int, Field(ge=2, description="Width of the residual stream.")]
    mlp_inner: Annotated[int, Field(ge=1, description="Inner width of the SwiGLU MLP.")]
    layers: Annotated[tuple[Mixer, ...], Field(min_length=1, description="The mixer of each layer, first to last.")]

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def arch_id(self) -> str:
        """Sixteen hexadecimal digits; equal for equal architectures."""
        return short_hash(self.canonical_json())

    @field_validator("layers")
    @classmethod
    def _canonical_layers(cls, layers: tuple[Mixer, ...]) -> tuple[Mixer, ...]:
        return tuple(_canonical(mixer) for mixer in layers)

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        reasons = tuple(dict.fromkeys(reason for layer in self.layers for reason in _objections(layer, self.d_model)))
        if reasons:
            raise ValueError("; ".join(reasons))
        return self


def _canonical(mixer: Mixer) -> Mixer:
    """The one value for all descriptions of the same mixer, so that equal models have equal ids."""
    if isinstance(mixer, Attention):
        return mixer
    rule, changes = mixer.rule, dict[str, object]()
    if isinstance(rule, DeltaProduct) and rule.n_householder == 1:
        changes["rule"] = Delta(feature_map=rule.feature_map, beta_range=rule.beta_range)
    if isinstance(mixer, Hybrid):
        match mixer.blend:
            case DelayedChunk(fw_chunk=int(fw_chunk)) if fw_chunk == mixer.window:
                changes["blend"] = DelayedChunk()
            case DelayedStreaming(delay_beta=True) if not has_token_dependent_write(rule):
                changes["blend"] = DelayedStreaming()
    return mixer.model_copy(update=changes) if changes else mixer


def _objections(mixer: Mixer, d_model: int) -> list[str]:
    """Why `mixer` cannot stand in a model of width `d_model`; empty if it can."""
    reasons: list[str] = []
    if d_model % mixer.n_heads:
        reasons.append(f"n_heads {mixer.n_heads} does not divide d_model {d_model}")
    elif (d_model // mixer.n_heads) % 2 and "rope" in (
        getattr(mixer, "positions", "none"),
        getattr(mixer, "fw_positions", "none"),
    ):
        reasons.append(f"rope needs an even head width; d_model {d_model} / n_heads {mixer.n_heads} is odd")
    if isinstance(mixer, Hybrid):
        if mixer.window is None and not isinstance(mixer.blend, Synchronous):
            reasons.append(
                f"a {mixer.blend.kind} blend needs a window, not null (all keys): nothing would ever leave it"
            )
        match mixer.blend:
            case DelayedChunk(fw_chunk=int(fw_chunk)) if mixer.window is not None and fw_chunk % mixer.window:
                reasons.append(f"fw_chunk {fw_chunk} is not a multiple of window {mixer.window}")
    return reasons
