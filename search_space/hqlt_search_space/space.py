"""How a study file writes axes: closed records of settings, lists of choices, and ranges.

The types at the end are dicts to Python and records to pydantic: known axes only, each value of its axis' own type, so
that a wrong key or value is reported at its own place and the JSON Schema names and describes every axis.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import GenericAlias
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, GetCoreSchemaHandler, Tag, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from hqlt_search_space.axes import (
    AXES,
    MODEL_AXES,
    RECIPE_AXES,
    Axis,
    AxisDomain,
    AxisValue,
    Choices,
    IntegerRange,
    RealRange,
    with_metadata,
)
from hqlt_search_space.spec import Spec
from hqlt_search_space.wording import in_words, sentence

Number = Annotated[
    Annotated[int, Tag("whole")] | Annotated[float, Tag("number")],
    Discriminator(lambda value: "whole" if isinstance(value, int) else "number"),
]


class Range(Spec):
    """All numbers from low to high, both included."""

    low: Number = Field(description="The smallest value.")
    high: Number = Field(description="The largest value.")
    step: Annotated[int, Field(ge=1)] | None = Field(default=None, description="Between neighbouring whole numbers.")
    scale: Literal["linear", "log"] = Field(default="linear", description="Spread evenly: the value, or its logarithm.")


Domain = tuple[AxisValue, ...] | Range
"""What a study file says of an axis: a list of choices, or a range."""


def domain_of(name: str, domain: Domain) -> AxisDomain:
    """`domain` as a sampler sees it."""
    if not isinstance(domain, Range):
        return Choices(tuple(domain))
    log = domain.scale == "log"
    if AXES[name].integer:
        return IntegerRange(int(domain.low), int(domain.high), domain.step or 1, log)
    return RealRange(float(domain.low), float(domain.high), log)


def _check_range(axis: Axis, value: Range) -> Range:
    """`value`, if it is a range that `axis` can have and a sampler can draw from."""
    problems: list[tuple[str, str]] = []
    for end in ("low", "high"):
        try:
            TypeAdapter(axis.ends).validate_python(getattr(value, end), strict=True)
        except ValidationError as error:
            problems += [(end, sentence(details, end)) for details in error.errors()]
    if not problems and value.low >= value.high:
        problems.append(("high", f"high {value.high} is not above low {value.low}"))
    if not problems and value.scale == "log" and value.low <= 0:
        problems.append(("low", f"a log scale needs low above 0, got {value.low}"))
    if value.step is not None and not axis.integer:
        problems.append(("step", f"{axis.name} is not an axis of whole numbers: leave step out"))
    elif value.step is not None and value.scale == "log":
        problems.append(("step", "a log scale has no step"))
    elif not problems and value.step is not None and (value.high - value.low) % value.step:
        last = value.high - (value.high - value.low) % value.step
        problems.append(("high", f"steps of {value.step} from {value.low} end at {last}, not at {value.high}"))
    if problems:
        raise located_error([((end,), text, getattr(value, end)) for end, text in problems])
    return value


def check_distinct(values: tuple[AxisValue, ...]) -> tuple[AxisValue, ...]:
    """`values`, if all differ."""
    repeated = [i for i, value in enumerate(values) if value in values[:i]]
    twice = [((i,), f"{in_words(values[i])} is in the list already", values[i]) for i in repeated]
    if twice:
        raise located_error(twice)
    return values


Place = tuple[str | int, ...]
"""A path of keys and positions."""

Problem = tuple[Place, str, object]
"""Where, what is wrong, and what stands there."""


def located_error(problems: Sequence[Problem]) -> ValidationError:
    """A pydantic error with each problem's sentence at its place, counted from the value being validated."""
    # The sentence goes in as a value: as a template, its braces would be filled in.
    return ValidationError.from_exception_data(
        "study",
        [
            InitErrorDetails(
                type=PydanticCustomError("sentence", "{sentence}", {"sentence": text}), loc=loc, input=given
            )
            for loc, text, given in problems
        ],
    )


def _choices_annotation(axis: Axis) -> Any:
    """The type of a list of an axis' values."""
    limits = Field(min_length=1, json_schema_extra={"uniqueItems": True})
    return with_metadata(GenericAlias(tuple, (axis.annotation, ...)), limits, AfterValidator(check_distinct))


def _domain_annotation(axis: Axis) -> Any:
    """The type of an axis' entry in a search space."""
    choices = _choices_annotation(axis)
    if axis.ends is None:
        return choices
    either = with_metadata(choices, Tag("choices")) | with_metadata(
        Range, AfterValidator(partial(_check_range, axis)), Tag("range")
    )
    return with_metadata(
        either, Discriminator(lambda value: "range" if isinstance(value, Mapping | Range) else "choices")
    )


@dataclass(frozen=True)
class Closed:
    """Makes a dict of axes a closed record for pydantic: known keys only, each value of its axis' own type."""

    names: tuple[str, ...]
    annotation: Callable[[Axis], Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        fields = {}
        for axis in (AXES[name] for name in self.names):
            description = axis.meaning + (f" No meaning: {axis.without_meaning}." if axis.without_meaning else "")
            annotation = with_metadata(
                self.annotation(axis), Field(description=f"{description} Default: {axis.default}.")
            )
            fields[axis.name] = core_schema.typed_dict_field(handler.generate_schema(annotation), required=False)
        return core_schema.typed_dict_schema(fields, extra_behavior="forbid")


def _value_annotation(axis: Axis) -> Any:
    """The type of one value of an axis."""
    return axis.annotation


ModelSettings = Annotated[dict[str, AxisValue], Closed(MODEL_AXES, _value_annotation)]
RecipeSettings = Annotated[dict[str, AxisValue], Closed(RECIPE_AXES, _value_annotation)]
Settings = Annotated[dict[str, AxisValue], Closed(tuple(AXES), _value_annotation)]
Varied = Annotated[dict[str, tuple[AxisValue, ...]], Closed(tuple(AXES), _choices_annotation)]
Space = Annotated[dict[str, Domain], Closed(tuple(AXES), _domain_annotation)]
