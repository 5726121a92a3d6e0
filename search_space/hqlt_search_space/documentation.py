"""The table of axes in search_space/README.md, written from the axes: `python -m hqlt_search_space.documentation`."""

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from hqlt_search_space.axes import AXES, Axis
from hqlt_search_space.wording import in_words


def axes_table() -> str:
    """All axes as a Markdown table: what search_space/README.md shows."""
    rows = ["| axis | values | default | meaning | dropped |", "|---|---|---|---|---|"]
    for axis in AXES.values():
        cells = (f"`{axis.name}`", _values_in_words(axis), axis.default, axis.meaning, axis.without_meaning)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _values_in_words(axis: Axis) -> str:
    """The values of an axis, read off its JSON Schema."""
    schema = TypeAdapter(axis.annotation).json_schema()
    parts = [_part_in_words(part) for part in schema.get("oneOf") or schema.get("anyOf") or [schema]]
    nested = [
        _part_in_words(inner) for part in schema.get("anyOf", []) for inner in part.get("oneOf", part.get("anyOf", []))
    ]
    return ", ".join(word for word in dict.fromkeys([*nested, *parts]) if word)


def _part_in_words(schema: Mapping[str, Any]) -> str:
    if "const" in schema:
        return f"`{in_words(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{in_words(value)}`" for value in schema["enum"])
    kind = schema.get("type")
    if kind in ("integer", "number"):
        least, most = schema.get("minimum"), schema.get("maximum")
        if "exclusiveMinimum" in schema:
            least = 1 if kind == "integer" else f"above {schema['exclusiveMinimum']:g}"
        if "exclusiveMaximum" in schema:
            most = f"below {schema['exclusiveMaximum']:g}"
        is_open = str(least).startswith("above")
        limits = f" {least}" + (f" to {most}" if most is not None else "" if is_open else " or more")
        return ("whole number" if kind == "integer" else "number") + limits
    return {"null": "`null`", "boolean": "`false`, `true`", "string": "`N:M`"}.get(str(kind), "")


if __name__ == "__main__":
    print(axes_table())
