"""The axes: everything about a model or its training that a study can fix, vary or search over.

`AXES` is the closed set, with the meaning of each axis and where it has none. `build_arch` turns settings (axis ->
value) into an Arch and says which settings it used: an axis that is not used has no meaning for that choice (a window
in a pure fast-weight model) and is dropped, so that equal models have equal ids. A contradiction (a delayed blend
without a window) is refused instead. A search axis takes a list of choices or a range; `Choices`, `IntegerRange` and
`RealRange` are what a sampler sees of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    Discriminator,
    Field,
    PositiveInt,
    Tag,
    TypeAdapter,
    ValidationError,
)

from hqlt_search_space.arch import Arch
from hqlt_search_space.errors import InvalidArchError, UnknownNameError
from hqlt_search_space.mixers import BlendName, Mixing, Positions, ShortConv, Window
from hqlt_search_space.recipe import Recipe
from hqlt_search_space.rules import BetaRange, FeatureMap, Normaliser, RuleName
from hqlt_search_space.wording import in_words, sentence

AxisValue = str | int | float | bool | None
MixerName = Literal["attention", "fast_weight", "hybrid"]
Placement = Literal["interleaved", "first", "last", "middle"]


@dataclass(frozen=True)
class Choices:
    """One of `values`, in the order of the study file."""

    values: tuple[AxisValue, ...]


@dataclass(frozen=True)
class IntegerRange:
    """low, low + step, ..., high, both included. With `log`, step is 1."""

    low: int
    high: int
    step: int = 1
    log: bool = False


@dataclass(frozen=True)
class RealRange:
    """A number from low to high, both included; with `log`, its logarithm is what is spread evenly."""

    low: float
    high: float
    log: bool = False


AxisDomain = Choices | IntegerRange | RealRange


def _word_or_number(value: object) -> str:
    return "word" if isinstance(value, str) else "number"


WindowOrNumber = Annotated[
    Annotated[Literal["window"], Tag("word")] | Annotated[PositiveInt, Tag("number")],
    Discriminator(_word_or_number),
]


@dataclass(frozen=True)
class Axis:
    """One axis of the closed set.

    `annotation` is the type of one value. `ends` is the type of a range's two ends; None where only choices make
    sense. `default` is in words; the value itself stands where the axis is used.
    """

    name: str
    annotation: Any
    default: str
    meaning: str
    without_meaning: str = ""
    ends: Any = None
    of: Literal["model", "recipe"] = "model"

    @property
    def integer(self) -> bool:
        """Whether a range of this axis is over whole numbers."""
        return self.ends is not None and _bare(self.ends) is int


def with_metadata(annotation: Any, *metadata: Any) -> Any:
    """`Annotated` of a type that is only known when the program runs."""
    return Annotated[(annotation, *metadata)] if metadata else annotation


def _bare(annotation: Any) -> Any:
    """`annotation` without Annotated and without `| None`."""
    while get_args(annotation):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    return annotation


_NO_FW = "without fast weights"
_NO_HYBRID = "without hybrid layers"
_D_MODEL = Arch.model_fields["d_model"]

_MODEL_AXES = (
    Axis("first", MixerName, "hybrid", "The mixer of most layers.", "ratio 0:N"),
    Axis("second", MixerName, "attention", "The mixer of the other layers.", "ratio N:0"),
    Axis(
        "ratio",
        Annotated[str, Field(pattern=r"^(0*[1-9]\d{0,3}:\d{1,4}|\d{1,4}:0*[1-9]\d{0,3})$")],
        "1:0",
        "Layers of `first` to layers of `second`: 3:1, or 1:0 for `first` alone. The nearest whole number of layers "
        "is taken, at least one of each; what was built is what is recorded.",
        "first = second",
    ),
    Axis(
        "placement",
        Placement,
        "interleaved",
        "Where the layers of `second` stand: the last of each group, all first, all last, or all in the middle.",
        "one mixer",
    ),
    Axis("blend", BlendName, "synchronous", "How a hybrid times its two memories.", _NO_HYBRID),
    Axis("mixing", Mixing, "dynamic_vector", "How a hybrid adds its two outputs.", _NO_HYBRID),
    Axis("branch_norm", bool, "false", "RMSNorm on each branch of a hybrid before mixing.", _NO_HYBRID),
    Axis(
        "window",
        Window | None,
        "64 in a hybrid, null in attention",
        "Keys that KV-memory sees in hybrid and attention layers, the current one included; null = all.",
        "without KV-memory",
        ends=Window,
    ),
    Axis(
        "attention_window",
        WindowOrNumber | None,
        "window",
        "The window of pure attention layers where it differs from `window`; null = all.",
        "without attention layers",
        ends=Window,
    ),
    Axis("rule", RuleName, "delta", "How FW-memory is written.", _NO_FW),
    Axis(
        "feature_map",
        FeatureMap,
        "elu_plus_one for additive, else silu_l2",
        "What is applied to query and key of FW-memory. The delta rules take silu_l2 and relu_l2 only.",
        _NO_FW,
    ),
    Axis("normaliser", Normaliser, "time", "What the read of an additive rule is divided by.", "rule is not additive"),
    Axis(
        "beta_range",
        BetaRange,
        "2",
        "beta lies in (0, 1) or in (0, 2).",
        "rule is not delta, gated_delta or delta_product",
    ),
    Axis(
        "delay_beta",
        bool,
        "false",
        "Whether beta and a data-dependent decay are delayed together with their key and value; false as published.",
        "blend is not delayed_streaming, or the rule has neither",
    ),
    Axis(
        "fw_chunk",
        WindowOrNumber,
        "window",
        "Tokens after which FW-memory's state becomes readable; 64 as published.",
        "blend is not delayed_chunk",
        ends=PositiveInt,
    ),
    Axis(
        "n_householder",
        Annotated[int, Field(ge=1, le=8)],
        "2",
        "Householder steps a token; 1 is the delta rule.",
        "rule is not delta_product",
        ends=Annotated[int, Field(ge=1, le=8)],
    ),
    Axis(
        "decay",
        Literal["fixed", "data_dependent"],
        "data_dependent",
        "RetNet's constants, or computed from the token.",
        "rule is not decay",
    ),
    Axis("positions", Positions, "rope", "Position embedding of KV-memory's queries and keys.", "without KV-memory"),
    Axis("fw_positions", Positions, "none", "Position embedding of FW-memory's queries and keys.", _NO_FW),
    Axis("short_conv", ShortConv | None, "null", "Taps of the causal convolution on q, k and v.", ends=ShortConv),
    Axis("output_gate", bool, "false", "A SiLU gate on the mixer's output, computed from the token."),
    Axis("d_model", Annotated[int, _D_MODEL], "128", "Width of the residual stream.", ends=Annotated[int, _D_MODEL]),
    Axis(
        "n_layers",
        Annotated[int, Field(ge=1, le=1024)],
        "2",
        "Layers, each a mixer and an MLP.",
        ends=Annotated[int, Field(ge=1, le=1024)],
    ),
    Axis("n_heads", PositiveInt, "4", "Heads; must divide d_model.", ends=PositiveInt),
    Axis(
        "mlp_ratio",
        Annotated[float, Field(gt=0, le=64)] | None,
        "null",
        "Inner width of the MLP over d_model; null = 8/3 rounded up to a multiple of 256, as published.",
        "under match: parameters or flops",
        ends=Annotated[float, Field(gt=0, le=64)],
    ),
)


def _recipe_axes() -> tuple[Axis, ...]:
    """An axis for every field of Recipe, with the field's own type, limits, default and description."""
    axes = []
    for name, field in Recipe.model_fields.items():
        annotation = with_metadata(field.annotation, *field.metadata)
        nullable = type(None) in get_args(field.annotation)
        ends = next(part for part in get_args(field.annotation) if part is not type(None)) if nullable else annotation
        default = "null" if field.default is None else str(field.default)
        number = _bare(field.annotation) in (int, float)
        axes.append(
            Axis(name, annotation, default, field.description or "", ends=ends if number else None, of="recipe")
        )
    return tuple(axes)


AXES: dict[str, Axis] = {axis.name: axis for axis in (*_MODEL_AXES, *_recipe_axes())}
MODEL_AXES = tuple(axis.name for axis in AXES.values() if axis.of == "model")
RECIPE_AXES = tuple(axis.name for axis in AXES.values() if axis.of == "recipe")


@cache
def _adapter(name: str) -> TypeAdapter[AxisValue]:
    return TypeAdapter(AXES[name].annotation)


def check_value(name: str, value: object) -> AxisValue:
    """`value` if axis `name` can take it (a whole number given for a real axis becomes a float).

    Raises:
        UnknownNameError: there is no such axis.
        InvalidArchError: the axis cannot take the value; says what it can take.
    """
    if name not in AXES:
        raise UnknownNameError("axis", name, tuple(AXES))
    try:
        return _adapter(name).validate_python(value, strict=True)
    except ValidationError as error:
        raise InvalidArchError(tuple(f"{name}: {sentence(details, name)}" for details in error.errors())) from None


def label(changes: Mapping[str, AxisValue]) -> str:
    """What a cell of an ablation is called.

    >>> label({}), label({"mixing": "sum", "window": None})
    ('baseline', 'mixing=sum, window=null')
    """
    return ", ".join(f"{axis}={in_words(value)}" for axis, value in changes.items()) or "baseline"
