"""The ablation table: what each change to the baseline costs or brings, over the same seeds.

A cell is compared with the baseline seed by seed: initial weights and batches of one seed have much in common, so the
mean of the paired differences varies less than the difference of two means. Seeds that only one of the two has are
left out of the difference, and the table says which.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hqlt_search_space.errors import HqltError, UnknownNameError
from hqlt_search_space.trial import ReplicaResult, StudyResults

from hqlt_dashboards.seeds import CAVEATS, Estimate, estimate, readings
from hqlt_dashboards.words import format_value, spoken

BASELINE = "baseline"
ABSENT = "-"
NOT_RUN = "not run"
TITLES = ("cell", "mean [95 % interval]", "interquartile mean", "difference to baseline [95 % interval]", "seeds")


@dataclass(frozen=True, slots=True)
class AblationRow:
    """One cell. `estimate` is None if no seed has a value; `difference` is None for the baseline, or without pairs."""

    cell: str
    estimate: Estimate | None
    difference: Estimate | None
    missing: dict[int, str]
    """Seed -> why it has no value: the failure's reason, `stopped`, `not measured` or `not run`."""


@dataclass(frozen=True, slots=True)
class AblationTable:
    """The cells of an ablation, the baseline first, then in the order of their trials."""

    study: str
    metric: str
    direction: str | None
    """`maximize` or `minimize` if the metric is an objective of the study, else None."""
    seeds: tuple[int, ...]
    rows: tuple[AblationRow, ...]

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a reader must know, a sentence each: direction, seeds that are missing, how far to trust intervals."""
        remarks: list[str] = []
        if self.direction is not None:
            remarks.append(f"{'Higher' if self.direction == 'maximize' else 'Lower'} is better.")
        estimates = [row.estimate for row in self.rows]
        if estimates and estimates[0] is None:
            remarks.append("The baseline has no value, so there are no differences.")
        elif len(self.rows) > 1:
            remarks.append("Differences are paired: cell minus baseline over the seeds that both have.")
        waiting = [row.cell for row in self.rows if row.estimate is None and set(row.missing.values()) == {NOT_RUN}]
        if waiting:
            remarks.append(f"Not run yet: {', '.join(waiting)}.")
        for row in self.rows:
            if row.missing and row.cell not in waiting:
                seeds = ", ".join(f"{seed} ({why})" for seed, why in row.missing.items())
                remarks.append(f"{row.cell}: no value for seed{'s' if len(row.missing) > 1 else ''} {seeds}.")
        counts = {found.n for row in self.rows for found in (row.estimate, row.difference) if found is not None}
        remarks += [f"{CAVEATS[n]}." for n in sorted(counts) if n in CAVEATS]
        return tuple(remarks)

    def to_markdown(self) -> str:
        """A GitHub-flavoured table with the remarks as a list under it."""
        return as_markdown(self.study, spoken(self.metric), TITLES, self.cells(), self.remarks)

    def to_latex(self) -> str:
        """A `table` environment that needs the package booktabs."""
        return as_latex(" ".join([f"{self.study}: {spoken(self.metric)}.", *self.remarks]), TITLES, self.cells())

    def cells(self, gap: str = " ") -> list[tuple[str, ...]]:
        """The texts of each row in the order of `TITLES`; `gap` stands between a mean and its interval."""
        found = [e for row in self.rows for e in (row.estimate, row.difference) if e is not None]
        largest = max((abs(e.mean) for e in found), default=0.0)

        def shown(value: float) -> str:
            # Four decimals line up in a column; bytes, counts and tiny values need digits instead.
            fixed = 0.01 <= largest < 100 and not self.metric.endswith("_bytes")
            return f"{value:.4f}" if fixed else format_value(self.metric, value)

        def with_interval(e: Estimate | None, sign: bool) -> str:
            if e is None:
                return ABSENT
            mean, low, high = (
                "" if value is None else ("+" if sign and value > 0 else "") + shown(value)
                for value in (e.mean, e.low, e.high)
            )
            return f"{mean}{gap}[{low}, {high}]" if low else mean

        return [
            (
                row.cell,
                with_interval(row.estimate, sign=False),
                shown(row.estimate.interquartile_mean) if row.estimate else ABSENT,
                with_interval(row.difference, sign=True),
                f"{len(self.seeds) - len(row.missing)}" + (f" of {len(self.seeds)}" if row.missing else ""),
            )
            for row in self.rows
        ]


def as_markdown(
    study: str, what: str, titles: Sequence[str], rows: Sequence[Sequence[str]], remarks: Sequence[str]
) -> str:
    """A GitHub-flavoured table under its heading, with the remarks as a list under it. Only first cells are escaped."""
    lines = ["| " + " | ".join((_markdown(cells[0]), *cells[1:])) + " |" for cells in (titles, *rows)]
    lines.insert(1, "| --- |" + " ---: |" * (len(titles) - 1))
    heading = f"**{_markdown(study)}**: {_markdown(what)}"
    return "\n".join([heading, "", *lines, "", *(f"- {_markdown(remark)}" for remark in remarks)]) + "\n"


def as_latex(caption: str, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A `table` environment that needs the package booktabs; all cells but the first of a row are numbers."""
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{_latex(caption)}}}",
            r"  \begin{tabular}{l" + "r" * (len(titles) - 1) + "}",
            r"    \toprule",
            "    " + " & ".join(_latex(title) for title in titles) + r" \\",
            r"    \midrule",
            *(
                "    " + " & ".join([_latex(label), *(_latex_number(text) for text in texts)]) + r" \\"
                for label, *texts in rows
            ),
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def by_task(results: StudyResults) -> tuple[StudyResults, ...]:
    """The results on each task of an ablation apart, named after study and task; of a single task as they are."""
    kinds = tuple(dict.fromkeys(record.config.task.kind for record in results.trials))
    if len(kinds) < 2:
        return (results,)
    return tuple(
        results.model_copy(
            update={
                "name": f"{results.name}, {spoken(kind)}",
                "trials": tuple(record for record in results.trials if record.config.task.kind == kind),
            }
        )
        for kind in kinds
    )


def ablation_table(results: StudyResults, metric: str) -> AblationTable:
    """Each cell's `metric` over its seeds, and its paired difference to the cell `baseline`.

    A seed counts for a cell if its replica is complete and has the metric. The study's seeds, and every seed that any
    cell was run for, are expected of all of them.

    Raises:
        HqltError: the study is not an ablation.
        UnknownNameError: replicas have metrics, and none of that name.
    """
    replicas: dict[str, list[ReplicaResult]] = {}
    for record in sorted(results.trials, key=lambda record: record.number):
        if record.cell is not None:
            replicas.setdefault(record.cell, []).extend(record.replicas)
    if not replicas:
        raise HqltError(f"study {results.name!r} is a search and has no ablation table; `hqlt pareto` shows its front")
    values = {cell: readings(of_cell, metric) for cell, of_cell in replicas.items()}
    known = {name for of_cell in replicas.values() for replica in of_cell for name in replica.metrics}
    if known and not any(values.values()):
        raise UnknownNameError("metric", metric, tuple(sorted(known)))
    seeds = tuple(sorted({*results.seeds, *(replica.seed for of_cell in replicas.values() for replica in of_cell)}))
    baseline = values.get(BASELINE, {})
    return AblationTable(
        study=results.name,
        metric=metric,
        direction=next((o.direction for o in results.objectives if o.name == metric), None),
        seeds=seeds,
        rows=tuple(
            AblationRow(
                cell=cell,
                estimate=estimate(list(values[cell].values())) if values[cell] else None,
                difference=None if cell == BASELINE else paired(values[cell], baseline),
                missing=_missing(replicas[cell], seeds, set(values[cell])),
            )
            for cell in sorted(replicas, key=lambda cell: cell != BASELINE)  # stable: the rest keeps its order
        ),
    )


def paired(values: dict[int, float], baseline: dict[int, float]) -> Estimate | None:
    """`values` less `baseline`, both by seed, over the seeds that both have; None if there is none."""
    differences = [value - baseline[seed] for seed, value in values.items() if seed in baseline]
    return estimate(differences) if differences else None


def _missing(replicas: Sequence[ReplicaResult], seeds: Sequence[int], present: set[int]) -> dict[int, str]:
    by_seed = {replica.seed: replica for replica in replicas}
    return {seed: _why(by_seed.get(seed)) for seed in seeds if seed not in present}


def _why(replica: ReplicaResult | None) -> str:
    if replica is None:
        return NOT_RUN
    if replica.status == "complete":
        return "not measured"
    return spoken(replica.reason) if replica.reason else replica.status


def _markdown(text: str) -> str:
    """`text` with everything escaped that a Markdown table would read as markup. An underscore inside a word is not."""
    text = re.sub(r"([\\`*\[\]<>|~#&])", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "[": "{[}",  # at the start of a row it would be read as an option of the line break before it
    "]": "{]}",
    **{character: "\\" + character for character in "&%$#_{}"},
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def _latex_number(text: str) -> str:
    """A number or an interval: a hyphen is a minus here."""
    return text if text == ABSENT else text.replace("-", "$-$").replace("+", "$+$")
