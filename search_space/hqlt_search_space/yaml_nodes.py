"""YAML 1.2 to plain data in which every value knows its line and column. Only what a study file needs.

The parser's events are read one by one and nothing is ever expanded: an anchor, an alias, a tag, a merge key, a
repeated key or one of the limits below ends or marks the reading before it can cost anything.
"""

import math
import re
from dataclasses import dataclass, field

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentEndEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
    StreamStartEvent,
)

from hqlt_search_space.wording import printable

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_NODES = 10_000
MAX_INTEGER = 2**53
"""Beyond it a whole number does not survive programs that read JSON as floating point."""

MAX_PROBLEMS = 50

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Position:
    """A place in a file; both count from 1."""

    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.line}:{self.column}"


@dataclass
class Node:
    """A value and where it starts: a scalar, the items of a list, or the entries of a mapping by key."""

    at: Position
    scalar: Scalar = None
    items: list["Node"] | None = None
    entries: dict[str, "Node"] | None = None
    keys: dict[str, Position] = field(default_factory=dict)
    """Where each key of `entries` stands."""

    def data(self) -> object:
        """The value without positions."""
        if self.items is not None:
            return [item.data() for item in self.items]
        if self.entries is not None:
            return {key: value.data() for key, value in self.entries.items()}
        return self.scalar


class UnreadableError(Exception):
    """The text is not YAML, or not YAML that we read: `problems` are (position, sentence)."""

    def __init__(self, problems: tuple[tuple[Position, str], ...]) -> None:
        super().__init__(problems)
        self.problems = problems


def read_nodes(text: str) -> Node:
    """The one document in `text`.

    Raises:
        UnreadableError: every problem up to the first that makes the rest unreadable.
    """
    reader = _Reader()
    try:
        for event in YAML(typ="safe", pure=True).parse(text):
            reader.take(event)
    except _StopReading:
        pass
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = Position(mark.line + 1, mark.column + 1) if mark is not None else Position(1, 1)
        reader.report(at, f"not YAML: {_problem(error)}")
    except YAMLError as error:
        reader.report(Position(1, 1), f"not YAML: {str(error).splitlines()[0]}")
    except (ValueError, OverflowError) as error:  # ruamel lets these through for escapes such as "\UFFFFFFFF"
        reader.report(Position(1, 1), f"not YAML: {error}")
    if reader.problems:
        raise UnreadableError(tuple(reader.problems))
    if reader.root is None:
        raise UnreadableError(((Position(1, 1), "the file is empty"),))
    return reader.root


def _problem(error: MarkedYAMLError) -> str:
    text = error.problem or error.context or "unreadable"
    if r"'\t'" in text:
        return "a tab; indent with spaces"
    mark = error.context_mark
    return text if mark is None else f"{text} ({error.context} that begins at {mark.line + 1}:{mark.column + 1})"


class _StopReading(Exception):  # noqa: N818 - not an error: its reason has been reported
    pass


@dataclass
class _Open:
    """A list or mapping whose end has not come yet."""

    node: Node
    key: str | None = None
    key_at: Position = Position(1, 1)


class _Reader:
    def __init__(self) -> None:
        self.root: Node | None = None
        self.problems: list[tuple[Position, str]] = []
        self._open: list[_Open] = []
        self._n_nodes = 0
        self._n_documents = 0

    def report(self, at: Position, sentence: str) -> None:
        self.problems.append((at, sentence))
        if len(self.problems) >= MAX_PROBLEMS:
            raise _StopReading

    def take(self, event: Event) -> None:
        at = Position(event.start_mark.line + 1, event.start_mark.column + 1)
        match event:
            case StreamStartEvent() | StreamEndEvent() | DocumentEndEvent():
                return
            case DocumentStartEvent():
                self._n_documents += 1
                if self._n_documents > 1:
                    self._stop(at, "a second document starts here; a study file holds one")
                return
            case MappingEndEvent() | SequenceEndEvent():
                self._open.pop()
                return
            case AliasEvent():
                self.report(at, f"alias *{printable(str(event.anchor))}: aliases are not read; write the value out")
                self._place(Node(at), at)
                return
            case ScalarEvent():
                self._check(event, at)
                if self._is_key():
                    self._take_key(event, at)
                else:
                    self._place(Node(at, scalar=self._scalar(event, at)), at)
            case MappingStartEvent() | SequenceStartEvent():
                self._check(event, at)
                if self._is_key():
                    self._stop(at, "a key must be a word, not a list or a mapping")
                node = Node(at, entries={}) if isinstance(event, MappingStartEvent) else Node(at, items=[])
                self._place(node, at)
                self._open.append(_Open(node))
                if len(self._open) > MAX_DEPTH:
                    self._stop(at, f"nested deeper than {MAX_DEPTH} levels")

    def _check(self, event: ScalarEvent | MappingStartEvent | SequenceStartEvent, at: Position) -> None:
        """Limits and features that are not read, of a scalar, list or mapping."""
        self._n_nodes += 1
        if self._n_nodes > MAX_NODES:
            self._stop(at, f"more than {MAX_NODES} values")
        if event.anchor is not None:
            self.report(at, f"anchor &{printable(str(event.anchor))}: anchors are not read; write the value out")
        if event.tag is not None:
            self.report(at, f"tag {printable(str(event.tag))}: tags are not read; a study file holds plain values")

    def _stop(self, at: Position, sentence: str) -> None:
        self.report(at, sentence)
        raise _StopReading

    def _is_key(self) -> bool:
        return bool(self._open) and self._open[-1].node.entries is not None and self._open[-1].key is None

    def _take_key(self, event: ScalarEvent, at: Position) -> None:
        parent = self._open[-1]
        parent.key, parent.key_at = event.value, at
        if event.value == "<<" and event.style is None:
            self.report(at, "merge keys (<<) are not read; write the keys out")
        assert parent.node.entries is not None
        if event.value in parent.node.entries:
            self.report(
                at, f"key '{printable(event.value)}' is given twice; first in line {parent.node.keys[event.value].line}"
            )

    def _place(self, node: Node, at: Position) -> None:
        """Put a value where the reading stands."""
        if not self._open:
            self.root = node
            return
        parent = self._open[-1]
        if parent.node.items is not None:
            parent.node.items.append(node)
            return
        assert parent.node.entries is not None
        if parent.key is None:
            self._stop(at, "a key must be a word")
            return
        parent.node.entries.setdefault(parent.key, node)
        parent.node.keys.setdefault(parent.key, parent.key_at)
        parent.key = None

    def _scalar(self, event: ScalarEvent, at: Position) -> Scalar:
        text: str = event.value
        if any(0xD800 <= ord(character) <= 0xDFFF for character in text):
            self.report(at, "half of a surrogate pair is not a character")
            return None
        if event.style is not None:
            return text
        value = resolve_plain(text)
        if isinstance(value, Unrepresentable):
            self.report(at, f"{printable(text)} {value.reason}")
            return None
        return value


@dataclass(frozen=True)
class Unrepresentable:
    """Why a plain scalar has no value."""

    reason: str


_DECIMAL = re.compile(r"[-+]?[0-9]+(_[0-9]+)*")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_REAL = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: dict[str, Scalar] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


def resolve_plain(text: str) -> Scalar | Unrepresentable:
    """An unquoted scalar by YAML 1.2's core schema, with one addition: digits may be grouped as in 500_000.

    >>> [resolve_plain(text) for text in ("1e-3", "500_000", "3:1", "no", "0x10", "~")]
    [0.001, 500000, '3:1', 'no', 16, None]
    """
    if text in _WORDS:
        return _WORDS[text]
    if _NOT_FINITE.fullmatch(text):
        return Unrepresentable("is not a finite number")
    if _DECIMAL.fullmatch(text) or _BASED.fullmatch(text):
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        digits = (text[2:] if base != 10 else text.lstrip("+-").replace("_", "")).lstrip("0") or "0"
        # Twenty digits are beyond the limit in any base, and converting thousands of them would take long.
        value = int(digits, base) if len(digits) <= 20 else MAX_INTEGER + 1
        if value > MAX_INTEGER:
            return Unrepresentable(f"is too large: whole numbers go up to {MAX_INTEGER:,}")
        return -value if text.startswith("-") else value
    if _REAL.fullmatch(text):
        number = float(text)
        return number if math.isfinite(number) else Unrepresentable("is too large for a number")
    return text
