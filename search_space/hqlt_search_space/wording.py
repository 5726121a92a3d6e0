"""Sentences for people: what is wrong with a value, what was given, what would be right."""

import json
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

_NAMES = {"name": "a name: letters, digits, '.', '_' and '-', at most 128, the first a letter or a digit"}
_RATIO = "a ratio such as 3:1, 1:0 or 0:1"


def in_words(value: object) -> str:
    """A value as a study file writes it.

    >>> [in_words(value) for value in (None, True, 8, "sum", [1, 2])]
    ['null', 'true', '8', 'sum', '[1, 2]']
    """
    return value if isinstance(value, str) else json.dumps(value, default=str)


def printable(text: str) -> str:
    """`text` on one line of at most 60 characters, with nothing in it that a terminal would act on."""
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return text if text.isprintable() else repr(text)


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """What `name` is a misspelling of, if anything: the likeliest of `known`."""
    return get_close_matches(name, tuple(known), n=1)


def advice(name: str, known: Iterable[str]) -> str:
    """`did you mean 'window'?`, or what there is.

    >>> advice("windows", ("window", "rule"))
    "did you mean 'window'?"
    >>> advice("depth", ("window", "rule"))
    'there is window, rule'
    """
    known = tuple(known)
    near = nearest(name, known)
    if near:
        return f"did you mean {near[0]!r}?"
    if not known:
        return "there is none"
    more = f" and {len(known) - 12} more" if len(known) > 12 else ""
    return f"there is {', '.join(known[:12])}{more}"


def sentence(error: ErrorDetails, thing: str) -> str:
    """What pydantic found, in our words. `thing` is the nearest key above the value: what a wrong word would name."""
    context: Mapping[str, Any] = error.get("ctx", {})
    given = _shown(error["input"])
    match error["type"]:
        case "sentence":
            return str(context["sentence"])
        case "value_error":
            return str(context["error"])
        case "missing":
            return f"required key {error['loc'][-1]!r} is missing"
        case "union_tag_not_found":
            return "required key 'kind' is missing"
        case "union_tag_invalid":
            return f"no {thing} {context['tag']!r}; {advice(str(context['tag']), _quoted(context['expected_tags']))}"
        case "literal_error":
            return _wrong_word(error, thing, given)
        case "int_type" | "int_parsing" | "int_from_float":
            return f"{given} is not a whole number"
        case "float_type" | "float_parsing" | "finite_number":
            return f"{given} is not a number"
        case "bool_type" | "bool_parsing":
            return f"{given} is not true or false"
        case "string_type" if thing == "ratio":
            return f"{given} is not {_RATIO}"
        case "string_type":
            return f"{given} is not text; put it in quotes"
        case "tuple_type" | "list_type":
            return f"{given} is not a list; write [{given}]"
        case "dict_type" | "model_type" | "model_attributes_type":
            return f"{given} is not a mapping of keys to values"
        case "greater_than_equal":
            return f"{given} is below the least allowed, {context['ge']:g}"
        case "less_than_equal":
            return f"{given} is above the most allowed, {context['le']:g}"
        case "greater_than":
            return f"{given} is not above {context['gt']:g}"
        case "less_than":
            return f"{given} is not below {context['lt']:g}"
        case "too_short":
            return "needs at least one entry"
        case "string_pattern_mismatch":
            return f"{given} is not {_NAMES.get(thing, _RATIO)}"
        case _:
            return f"{error['msg']} (got {given})"


def reasons(error: ValidationError) -> tuple[str, ...]:
    """All sentences of a pydantic error, each with the name of what it is about where the sentence has none."""
    found = []
    for details in error.errors():
        words = [part for part in details["loc"] if isinstance(part, str)]
        thing = words[-1] if words else "value"
        text = sentence(details, thing)
        found.append(text if details["type"] in ("value_error", "sentence") else f"{thing}: {text}")
    return tuple(found)


def _wrong_word(error: ErrorDetails, thing: str, given: str) -> str:
    expected = str(error["ctx"]["expected"])
    known = _quoted(expected)
    if isinstance(error["input"], str) and len(known) > 2:
        return f"no {thing} {given}; {advice(error['input'], known)}"
    near = nearest(str(error["input"]), known)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    # A union of a word and a number tags its word; the number is allowed as well.
    number = " or a number" if error["loc"][-1:] == ("word",) else ""
    return f"{given} is not {expected.replace(chr(39), '')}{number}{hint}"


def _quoted(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"'([^']*)'", text))


def _shown(value: object) -> str:
    """A value, as short as a message needs it."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple) and len(value) > 3:
        return "a list"
    return printable(repr(value) if isinstance(value, str) else in_words(value))
