"""The front as a file for other programs (.csv, .json, .parquet) or for people (.html, .png)."""

import csv
import io
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hqlt_search_space.errors import HqltError, NoResultError
from hqlt_search_space.trial import StudyResults

from hqlt_dashboards.front import FrontMember, front_members
from hqlt_dashboards.words import describe

Scalar = str | int | float | bool | None

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet runs a cell that begins so (OWASP, "CSV Injection")."""


def export_front(results: StudyResults, path: Path) -> None:
    """Write the front of `results` to `path`, in the format that its suffix names; a file of that name is replaced.

    The file appears whole or not at all: it is written beside `path` and renamed. `.json` has for each member
    `trial_id`, `number`, `arch`, `recipe`, `objectives` (means over fresh seeds once the front was redrawn on them),
    `replicas`, and beside them `task`, `intervals` ([low, high] of an objective, where seeds give one), `replication`
    (the fresh seeds), `costs` and `choices`; `.csv` and `.parquet` are flat, a row a member;
    `.html` has the front, learning curves and the table.

    Raises:
        HqltError: another suffix, or the file cannot be written.
        NoResultError: the study has no complete trial.
    """
    path = Path(path)
    write = _WRITERS.get(path.suffix.lower())
    if write is None:
        got = repr(path.suffix) if path.suffix else "no suffix"
        raise HqltError(f"cannot tell the format of {str(path)!r}: {got}; use {', '.join(_WRITERS)}")
    members = front_members(results)
    if not members:
        raise NoResultError(f"study {results.name!r} has no complete trial yet, so it has no front to export")
    try:
        write_whole(path, write(results, members))
    except OSError as error:
        raise HqltError(f"cannot write {str(path)!r}: {error.strerror or error}") from error


def flat_rows(results: StudyResults, members: Sequence[FrontMember]) -> list[dict[str, Scalar]]:
    """A row for each member, all with the same columns.

    `number`, `trial_id`, `mixers`; each objective, with `<objective>_low` and `_high` where seeds give an interval;
    `seeds` and `failed_seeds`; every cost; every axis as `axis.<name>`. A column that mixes words with numbers or
    truth values has words only, so that it has one type.
    """
    rows = [_flat(results, member) for member in members]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    mixed = {c for c in columns if len({_sort_of(row[c]) for row in rows if row.get(c) is not None}) > 1}
    return [{c: _word(row.get(c)) if c in mixed else row.get(c) for c in columns} for row in rows]


def _flat(results: StudyResults, member: FrontMember) -> dict[str, Scalar]:
    record = member.record
    row: dict[str, Scalar] = {
        "number": record.number,
        "trial_id": record.trial_id,
        "mixers": describe(record.config.arch),
    }
    for objective in results.objectives:
        row[objective.name] = member.values[objective.name]
        found = member.estimates.get(objective.name)
        if found is not None and found.low is not None:
            row |= {f"{objective.name}_low": found.low, f"{objective.name}_high": found.high}
    row |= {"seeds": member.n_seeds, "failed_seeds": member.n_failed}
    row |= {name: value for name, value in record.costs.items() if name not in row}
    return row | {f"axis.{name}": value for name, value in record.choices.items()}


def _sort_of(value: Scalar) -> str:
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def _word(value: Scalar) -> str | None:
    return None if value is None else value if isinstance(value, str) else json.dumps(value)


def _csv(results: StudyResults, members: Sequence[FrontMember]) -> bytes:
    rows = flat_rows(results, members)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([_harmless(name) for name in rows[0]])
    writer.writerows([_harmless(value) for value in row.values()] for row in rows)
    return text.getvalue().encode()


def _harmless(value: Scalar) -> Scalar:
    """`value` unless it is text that a spreadsheet would run; then with an apostrophe before it."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA_STARTS) else value


def _json(results: StudyResults, members: Sequence[FrontMember]) -> bytes:
    entries = [
        {
            "trial_id": member.record.trial_id,
            "number": member.record.number,
            "arch": member.record.config.arch.model_dump(mode="json"),
            "recipe": member.record.config.recipe.model_dump(mode="json"),
            "task": member.record.config.task.model_dump(mode="json"),
            "objectives": member.values,
            "intervals": {
                name: [found.low, found.high] for name, found in member.estimates.items() if found.low is not None
            },
            "replicas": [replica.model_dump(mode="json") for replica in member.record.replicas],
            "replication": [replica.model_dump(mode="json") for replica in member.record.replication],
            "costs": member.record.costs,
            "choices": member.record.choices,
        }
        for member in members
    ]
    return (json.dumps(entries, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def _parquet(results: StudyResults, members: Sequence[FrontMember]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table: Any = pa.Table.from_pylist(flat_rows(results, members))
    directions = {objective.name: objective.direction for objective in results.objectives}
    table = table.replace_schema_metadata({"study": results.name, "objectives": json.dumps(directions)})
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def _html(results: StudyResults, members: Sequence[FrontMember]) -> bytes:
    from hqlt_dashboards.curves import curve_metric, curves_chart
    from hqlt_dashboards.drawing import page
    from hqlt_dashboards.plots import front_chart
    from hqlt_dashboards.tables import front_text

    metric = curve_metric(results)
    charts = [front_chart(results), *([curves_chart(results, metric)] if metric else [])]
    return page(f"{results.name}: front", charts, front_text(results, width=120)).encode()


def _png(results: StudyResults, members: Sequence[FrontMember]) -> bytes:
    from hqlt_dashboards.drawing import png
    from hqlt_dashboards.plots import front_figure

    return png(front_figure(results))


_WRITERS: dict[str, Callable[[StudyResults, Sequence[FrontMember]], bytes]] = {
    ".csv": _csv,
    ".json": _json,
    ".parquet": _parquet,
    ".html": _html,
    ".png": _png,
}


def write_whole(path: Path, content: bytes) -> None:
    """Make `content` the file `path` in one step: a reader, or a crash, meets the old file or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        with suppress(OSError):  # the first error is the one to report
            beside.unlink(missing_ok=True)
        raise
