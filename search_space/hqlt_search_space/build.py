"""From settings (axis -> value) to an Arch: the ratio's pattern of layers, and one mixer for each place.

What is asked for while building has a meaning for this choice; everything else is dropped. A contradiction is refused.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import ValidationError

from hqlt_search_space.arch import Arch, published_mlp_inner
from hqlt_search_space.axes import AxisValue, MixerName, Placement
from hqlt_search_space.errors import InvalidArchError
from hqlt_search_space.mixers import (
    Attention,
    BlendName,
    DelayedChunk,
    DelayedStreaming,
    FastWeight,
    Hybrid,
    Mixer,
    Synchronous,
)
from hqlt_search_space.rules import (
    Additive,
    Decay,
    Delta,
    DeltaProduct,
    GatedDelta,
    NormalisedFeatureMap,
    Rule,
    RuleName,
    has_token_dependent_write,
)
from hqlt_search_space.wording import reasons

Place = Literal["first", "second"]

DEFAULTS: dict[str, AxisValue] = {
    "first": "hybrid",
    "second": "attention",
    "ratio": "1:0",
    "placement": "interleaved",
    "blend": "synchronous",
    "rule": "delta",
    "attention_window": "window",
    "d_model": 128,
    "n_layers": 2,
    "n_heads": 4,
    "mlp_ratio": None,
}
"""Of the axes that are no field of a mixer or a rule; the others have the default of the value they belong to."""


def layer_pattern(n_layers: int, ratio: str, placement: Placement) -> tuple[Place, ...]:
    """Which mixer each layer has, for a ratio "a:b" of first to second.

    The number of second layers is n_layers * b / (a + b), rounded (halves up), at least one and at most n_layers - 1
    where a and b are both positive. `interleaved` spreads them evenly, each at the end of its group; `first`, `last`
    and `middle` keep them together (an odd one out of the middle goes to the end).

    >>> layer_pattern(4, "3:1", "interleaved")
    ('first', 'first', 'first', 'second')
    >>> layer_pattern(4, "1:1", "middle")
    ('first', 'second', 'second', 'first')

    Raises:
        InvalidArchError: one layer cannot hold two mixers.
    """
    a, b = (int(part) for part in ratio.split(":"))
    if a and b and n_layers < 2:
        raise InvalidArchError((f"ratio {ratio} needs at least 2 layers; n_layers is {n_layers}",))
    n_second = math.floor(n_layers * b / (a + b) + 0.5)
    if a and b:
        n_second = min(max(n_second, 1), n_layers - 1)
    if placement == "interleaved":
        is_second = [(i + 1) * n_second // n_layers > i * n_second // n_layers for i in range(n_layers)]
    else:
        starts = {"first": 0, "last": n_layers - n_second, "middle": (n_layers - n_second) // 2}
        is_second = [starts[placement] <= i < starts[placement] + n_second for i in range(n_layers)]
    pattern: list[Place] = ["second" if second else "first" for second in is_second]
    return tuple(pattern)


class _Settings:
    """Settings that remember which of them were asked for."""

    def __init__(self, values: Mapping[str, AxisValue]) -> None:
        self.values = values
        self.asked: set[str] = set()

    def one(self, name: str) -> Any:
        """The value of an axis, or its default."""
        return self.given(name).get(name, DEFAULTS.get(name))

    def given(self, *names: str) -> dict[str, Any]:
        """Those of the axes `names` that are set. The others keep the default of the value they belong to."""
        self.asked.update(names)
        return {name: self.values[name] for name in names if name in self.values}


def build_arch(settings: Mapping[str, AxisValue]) -> tuple[Arch, frozenset[str]]:
    """The architecture that `settings` describe, and the axes that have a meaning for it, set or not.

    Values must be of their axis' type (`axes.check_value`); axes of the recipe are passed over.

    Raises:
        InvalidArchError: the combination cannot be built or makes no sense, with every reason found.
    """
    read = _Settings(settings)
    d_model: int = read.one("d_model")
    mlp_ratio: float | None = read.one("mlp_ratio")
    pattern = _pattern(read)
    found: list[str] = []
    mixers: dict[str, Mixer] = {}
    for place in dict.fromkeys(pattern):
        try:
            mixers[place] = _build_mixer(read, read.one(place))
        except InvalidArchError as error:
            found += error.reasons
    if found:
        raise InvalidArchError(tuple(dict.fromkeys(found)))
    inner = published_mlp_inner(d_model) if mlp_ratio is None else max(1, round(mlp_ratio * d_model))
    try:
        arch = Arch(d_model=d_model, mlp_inner=inner, layers=tuple(mixers[place] for place in pattern))
    except ValidationError as error:
        raise InvalidArchError(reasons(error)) from None
    return arch, frozenset(read.asked)


def built_ratio(arch: Arch, settings: Mapping[str, AxisValue]) -> str:
    """The layer ratio that `arch` has, in lowest terms: of two layers, 3:1 is 1:1."""
    n_second = _pattern(_Settings(settings)).count("second")
    divisor = math.gcd(n_second, arch.n_layers - n_second)
    return f"{(arch.n_layers - n_second) // divisor}:{n_second // divisor}"


def _pattern(read: _Settings) -> tuple[Place, ...]:
    """Where first and second stand. Two equal mixers are one, and then ratio and placement mean nothing."""
    n_layers: int = read.one("n_layers")
    peek = _Settings(read.values)
    if peek.one("first") == peek.one("second"):
        alone: Place = "first"
        return (alone,) * n_layers
    ratio: str = read.one("ratio")
    placement: Placement = peek.one("placement") if _is_pure(ratio) else read.one("placement")
    return layer_pattern(n_layers, ratio, placement)


def _is_pure(ratio: str) -> bool:
    return 0 in (int(part) for part in ratio.split(":"))


def _build_mixer(read: _Settings, kind: MixerName) -> Mixer:
    shared = {"n_heads": read.one("n_heads"), **read.given("short_conv", "output_gate")}
    if kind == "attention":
        window = read.one("attention_window")
        own = read.given("window") if window == "window" else {"window": window}
        return Attention(**shared, **own, **read.given("positions"))
    rule = _build_rule(read)
    if kind == "fast_weight":
        return FastWeight(**shared, rule=rule, **read.given("fw_positions"))
    return Hybrid(
        **shared,
        blend=_build_blend(read, rule),
        rule=rule,
        **read.given("window", "positions", "fw_positions", "mixing", "branch_norm"),
    )


def _build_rule(read: _Settings) -> Rule:
    name: RuleName = read.one("rule")
    feature_map = read.given("feature_map")
    if name == "additive":
        return Additive(**feature_map, **read.given("normaliser"))
    if name == "decay":
        return Decay(**feature_map, **read.given("decay"))
    if feature_map and feature_map["feature_map"] not in get_args(NormalisedFeatureMap):
        raise InvalidArchError(
            (
                f"rule {name} needs keys of unit length, else it diverges: feature_map silu_l2 or relu_l2, "
                f"not {feature_map['feature_map']}",
            )
        )
    delta = {**feature_map, **read.given("beta_range")}
    if name == "delta":
        return Delta(**delta)
    if name == "gated_delta":
        return GatedDelta(**delta)
    return DeltaProduct(**delta, **read.given("n_householder"))


def _build_blend(read: _Settings, rule: Rule) -> Synchronous | DelayedStreaming | DelayedChunk:
    name: BlendName = read.one("blend")
    if name == "synchronous":
        return Synchronous()
    if name == "delayed_chunk":
        return DelayedChunk(**read.given("fw_chunk"))
    return DelayedStreaming(**read.given("delay_beta")) if has_token_dependent_write(rule) else DelayedStreaming()
