"""The front and the ablation table as text that fits a terminal of 80 columns."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from hqlt_search_space.trial import StudyResults

from hqlt_dashboards.ablation import AblationTable
from hqlt_dashboards.front import FrontMember, front_members
from hqlt_dashboards.published import TITLES, PublishedTable
from hqlt_dashboards.seeds import CAVEATS
from hqlt_dashboards.words import describe, format_value, spoken

SHORTEST_ID = 8
TRIALS_NAMED = 6  # in a sentence; the rest is counted
GAP = "  "
INTERVAL = "[low, high] is the 95 % bootstrap interval of the mean."
HEADER_WIDTH = 14  # a column's title breaks over lines beyond this; "normalised" and "[0.942, 0.988]" fit
NARROWEST = 24  # of the column with running text; below this it gets lines of its own


@dataclass(frozen=True, slots=True)
class _Column:
    title: str
    cells: Sequence[str]
    right: bool = False

    @property
    def width(self) -> int:
        words = textwrap.wrap(self.title, HEADER_WIDTH, break_long_words=False)
        return max(len(line) for text in (*words, *self.cells) for line in text.split("\n"))

    def lines(self, text: str, width: int) -> list[str]:
        """`text` broken and padded to `width`."""
        broken = [part for line in text.split("\n") for part in textwrap.wrap(line, width)]
        return [part.rjust(width) if self.right else part.ljust(width) for part in broken]


def front_text(results: StudyResults, width: int = 80, most: int | None = None) -> str:
    """The front as plain text of at most `width` columns; a sentence if the study has none yet.

    With `most` only so many members, and how many there are besides.

    Number, the shortest trial id that is unique in the study, mixers, objectives, and seeds where they say more than
    one each. Below, in sentences, what kind of values these are. With many objectives the mixers stand on a line of
    their own; only objectives that cannot stand side by side at all make a line longer than `width`.
    """
    every_member = front_members(results)
    if not every_member:
        return f"study {results.name!r} has no complete trial yet, so it has no front\n"
    members = every_member[:most]
    digits = id_length(results)
    columns = [
        _Column("no.", [str(member.record.number) for member in members], right=True),
        _Column("trial", [member.record.trial_id[:digits] for member in members]),
    ]
    for objective in results.objectives:
        title = f"{spoken(objective.name)} ({'max' if objective.direction == 'maximize' else 'min'})"
        columns.append(_Column(title, [_value(member, objective.name) for member in members], right=True))
    if any(member.n_seeds != 1 or member.n_failed for member in members):
        columns.append(_Column("seeds", [_seeds(member) for member in members], right=True))
    mixers = _Column("mixers, first layer to last", [describe(member.record.config.arch) for member in members])
    lines = _lay_out(columns, mixers, 2, width)
    if len(members) < len(every_member):
        lines.append(f"and {len(every_member) - len(members)} more: hqlt pareto {results.name}")
    return _with_remarks(lines, front_remarks(results, every_member), width)


def ablation_text(table: AblationTable, width: int = 80) -> str:
    """The ablation table as plain text of at most `width` columns, with its remarks below."""
    labels, *others = zip(*table.cells(gap="\n"), strict=True)
    titles = ("mean", "IQM", "difference to baseline", "seeds")
    columns = [_Column(title, texts, right=True) for title, texts in zip(titles, others, strict=True)]
    remarks = ("IQM is the interquartile mean over seeds.", INTERVAL, *table.remarks)
    return _with_remarks(_lay_out(columns, _Column("cell", labels), 0, width), remarks, width)


def published_text(tables: Sequence[PublishedTable], width: int = 80) -> str:
    """A study's models beside the paper's numbers, task by task, as plain text of at most `width` columns."""
    lines: list[str] = []
    for table in tables:
        labels, *others = zip(*(line.texts() for line in table.lines), strict=True)
        columns = [_Column(title, texts, right=True) for title, texts in zip(TITLES[1:], others, strict=True)]
        heading = textwrap.wrap(f"{table.study}: beside the published numbers", width)
        lines += [*([""] if lines else []), *heading, "", *_lay_out(columns, _Column(TITLES[0], labels), 0, width)]
    remarks = list(dict.fromkeys(remark for table in tables for remark in table.remarks))
    return _with_remarks(lines, remarks, width)


def _with_remarks(lines: list[str], remarks: Sequence[str], width: int) -> str:
    below = [line for remark in remarks for line in textwrap.wrap(remark, width)]
    return "\n".join([*lines, *([""] if below else []), *below]) + "\n"


def _lay_out(columns: Sequence[_Column], flexible: _Column, position: int, width: int) -> list[str]:
    """The lines of a table with a rule under its titles.

    `flexible` stands at `position` among the columns and takes the width they leave; if that is too little it gets
    lines of its own, under each row or, if it names the row, above.
    """
    left = width - sum(column.width + len(GAP) for column in columns)
    beside = left >= min(flexible.width, NARROWEST)
    if beside:
        columns = [*columns[:position], flexible, *columns[position:]]
    widths = [min(column.width, left) if column is flexible else column.width for column in columns]

    def row(texts: Sequence[str]) -> list[str]:
        cells = [column.lines(text, w) for column, text, w in zip(columns, texts, widths, strict=True)]
        filled = zip_longest(*cells, fillvalue=None)
        return [
            GAP.join(" " * w if cell is None else cell for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in filled
        ]

    lines = row([column.title for column in columns])
    lines.append("-" * (sum(widths) + len(GAP) * (len(widths) - 1)))
    for i, text in enumerate(flexible.cells):
        numbers = row([column.cells[i] for column in columns])
        indent = " " * (widths[0] + len(GAP)) if position else ""
        own = [] if beside else textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)
        lines += [*numbers, *own] if position else [*own, *numbers]
    return lines


def _value(member: FrontMember, name: str) -> str:
    """The value, and on a second line its interval if there is one."""
    value = format_value(name, member.values[name])
    found = member.estimates.get(name)
    if found is None or found.low is None or found.high is None:
        return value
    return f"{value}\n[{format_value(name, found.low, digits=3)}, {format_value(name, found.high, digits=3)}]"


def _seeds(member: FrontMember) -> str:
    return str(member.n_seeds) + (f"\n{member.n_failed} failed" if member.n_failed else "")


def front_remarks(results: StudyResults, members: Sequence[FrontMember]) -> list[str]:
    """What a reader must know about the values, a sentence each."""
    remarks: list[str] = []
    waiting = [member.record.number for member in members if not member.record.replication]
    if any(member.replicated for member in members):
        remarks.append("Means over fresh seeds; the seed of the search does not count.")
    elif waiting and any(record.replication for record in results.trials):
        remarks.append(f"Values of the search: {_trials(waiting)} not replicated yet.")
    counts = sorted({found.n for member in members for found in member.estimates.values()})
    if counts and counts[-1] > 1:
        remarks.append(INTERVAL)
        remarks += [f"{CAVEATS[n]}." for n in counts if n in CAVEATS]
    return remarks


def _trials(numbers: Sequence[int]) -> str:
    shown = ", ".join(str(number) for number in numbers[:TRIALS_NAMED])
    more = len(numbers) - TRIALS_NAMED
    return f"trial{'s' if len(numbers) > 1 else ''} {shown}" + (f" and {more} more" if more > 0 else "")


def id_length(results: StudyResults) -> int:
    """The least number of digits, from 8 on, that tells the configs of the study apart."""
    ids = {record.trial_id for record in results.trials}
    longest = max((len(i) for i in ids), default=SHORTEST_ID)
    return next((n for n in range(SHORTEST_ID, longest) if len({i[:n] for i in ids}) == len(ids)), longest)
