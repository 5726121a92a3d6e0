"""A YAML file -> a Study, with every problem at once: line, column, path and a sentence."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from hqlt_search_space.errors import MatchError, StudyFileError
from hqlt_search_space.study import Study
from hqlt_search_space.wording import advice, nearest, printable, sentence
from hqlt_search_space.yaml_nodes import MAX_BYTES, MAX_PROBLEMS, Node, Position, UnreadableError, read_nodes


def load_study(path: Path | str) -> Study:
    """The study that the YAML 1.2 file at `path` describes.

    Raises:
        StudyFileError: the file cannot be read, is not YAML, or does not describe a study; with every problem.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # a pipe waits for somebody to write into it
            raise StudyFileError(str(path), ("this is no file but a pipe, a socket or a device",))
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise StudyFileError(str(path), ("there is no such file",)) from None
    except IsADirectoryError:
        raise StudyFileError(str(path), ("this is a folder; give the study's YAML file",)) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise StudyFileError(str(path), (f"the file cannot be read: {reason}",)) from None
    return read_study(raw, str(path))


def read_study(raw: bytes, path: str) -> Study:
    """The study that `raw`, the contents of a file called `path`, describes.

    Raises:
        StudyFileError: as `load_study`.
    """
    if len(raw) > MAX_BYTES:
        raise StudyFileError(path, (f"the file is larger than {MAX_BYTES // 1024} KiB",))
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8-sig").split("\n")
        at = Position(len(before), len(before[-1]) + 1)
        problem = f"byte {raw[error.start]:#04x} is not UTF-8; save the file in that encoding"
        raise StudyFileError(path, (f"{at}  {problem}",)) from None
    try:
        root = read_nodes(text)
    except UnreadableError as error:
        raise StudyFileError(path, tuple(f"{at}  {text}" for at, text in error.problems)) from None
    if root.entries is None:
        what = "a list" if root.items is not None else "empty" if root.scalar is None else "a single value"
        raise StudyFileError(path, (f"{root.at}  the file is {what}; a study is a mapping of keys to values",))
    try:
        # Through JSON and strict: a list may stand for a tuple there, but true is no number and "8" is no 8.
        study = Study.model_validate_json(json.dumps(root.data()), strict=True)
    except ValidationError as error:
        # A list whose items are all wrong is not also too short.
        details = [each for each in error.errors() if each["type"] != "too_short" or not each["input"]]
        # A key that is misspelt is not also missing.
        unknown = [each["loc"] for each in details if each["type"] == "extra_forbidden"]
        meant = {(*loc[:-1], near) for loc in unknown for near in nearest(str(loc[-1]), _known_keys(loc[:-1]))}
        details = [each for each in details if each["type"] != "missing" or each["loc"] not in meant]
        found = sorted({_describe(each, root) for each in details})
        problems = [f"{at}  {path_in_file}: {text}" for (_, _, at, path_in_file, text) in found]
        if len(problems) > MAX_PROBLEMS:
            problems[MAX_PROBLEMS:] = [f"and {len(problems) - MAX_PROBLEMS} more"]
        raise StudyFileError(path, tuple(problems)) from None
    if study.search is not None and (reason := study.why_empty()) is not None:
        key = "constraints" if "constraints" in root.entries else "search"
        raise StudyFileError(path, (f"{root.entries[key].at}  {key}: {reason}",))
    try:
        study.cells()
    except MatchError as error:
        raise StudyFileError(path, (f"{root.entries['ablation'].at}  ablation: {error}",)) from None
    return study


def study_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a study file, for completion and hover texts in an editor.

    `hqlt schema` prints it; search_space/studies/study.schema.json is a copy.
    """
    schema = _without_titles(Study.model_json_schema())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "hqlt study", **schema}


def _without_titles(schema: Any) -> Any:
    """Pydantic titles every property with its own name; editors would show it twice."""
    if isinstance(schema, list):
        return [_without_titles(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _without_titles(part) for key, part in schema.items() if key != "title" or not isinstance(part, str)}


def _describe(error: ErrorDetails, root: Node) -> tuple[int, int, str, str, str]:
    """A problem as (line, column, position, path, sentence)."""
    is_unknown_key = error["type"] == "extra_forbidden" or error["loc"][-1:] == ("[key]",)
    node, key_at, keys = _locate(error["loc"], root)
    at = key_at if is_unknown_key else node.at
    if error["type"] == "extra_forbidden":
        text = f"unknown key; {advice(str(error['loc'][-1]), _known_keys(error['loc'][:-1]))}"
    else:
        text = sentence(error, next((key for key in reversed(keys) if isinstance(key, str)), "study"))
    if error["type"] == "sentence" and error["loc"] and not keys:
        keys = error["loc"]  # a key that should be there and is not
    path = "".join(f"[{key}]" if isinstance(key, int) else f".{printable(key)}" for key in keys).removeprefix(".")
    return at.line, at.column, str(at), path or "study", text


def _locate(loc: tuple[str | int, ...], root: Node) -> tuple[Node, Position, tuple[str | int, ...]]:
    """The deepest value of the file on the path `loc`, where its key stands, and the path to it as the user wrote it.

    Pydantic puts the tag of a union into `loc`; it is no key of the file, so it is skipped, and so is a missing key.
    """
    node, key_at, keys = root, root.at, list[str | int]()
    for part in loc:
        if isinstance(part, int) and node.items is not None and part < len(node.items):
            node = node.items[part]
        elif isinstance(part, str) and node.entries is not None and part in node.entries:
            key_at = node.keys[part]
            node = node.entries[part]
        else:
            continue
        keys.append(part)
    return node, key_at, tuple(keys)


@cache
def _schema() -> dict[str, Any]:
    return study_schema()


def _known_keys(loc: tuple[str | int, ...]) -> tuple[str, ...]:
    """The keys that the schema allows at `loc`."""
    nodes = list(_branches(_schema()))
    for part in loc:
        tagged = [node for node in nodes if node.get("properties", {}).get("kind", {}).get("const") == part]
        inner = [child for node in nodes for child in _children(node, part)]
        nodes = [branch for child in inner for branch in _branches(child)] or tagged or nodes
    return tuple(dict.fromkeys(key for node in nodes for key in node.get("properties", {})))


def _branches(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """`node` with references followed and unions opened."""
    if "$ref" in node:
        yield from _branches(_schema()["$defs"][node["$ref"].rsplit("/", 1)[-1]])
        return
    parts = node.get("anyOf") or node.get("oneOf")
    if parts is None:
        yield node
        return
    for part in parts:
        yield from _branches(part)


def _children(node: dict[str, Any], part: str | int) -> Iterator[dict[str, Any]]:
    if isinstance(part, int):
        if isinstance(node.get("items"), dict):
            yield node["items"]
    elif part in node.get("properties", {}):
        yield node["properties"][part]
    elif isinstance(node.get("additionalProperties"), dict):
        yield node["additionalProperties"]
