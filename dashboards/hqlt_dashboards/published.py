"""The paper's models of a study beside the paper's numbers: best, median and spread over seeds, task by task."""

import re
import statistics
from dataclasses import dataclass

from hqlt_search_space.paper import PUBLISHED, paper_model
from hqlt_search_space.trial import StudyResults, TrialRecord

from hqlt_dashboards.ablation import ABSENT, as_latex, as_markdown, by_task
from hqlt_dashboards.seeds import readings
from hqlt_dashboards.words import spoken

METRIC = "normalised_test_accuracy"
TITLES = ("cell", "best", "median", "spread", "seeds", "published")
EXPLAINED = (
    "Test accuracy in per cent, 0 being chance. Spread: best less worst seed.",
    "Published: arXiv:2506.00744, version 2, Table 3, the best of three seeds on the test set, as is `best`.",
)


@dataclass(frozen=True, slots=True)
class PublishedLine:
    """A cell: its accuracies in per cent, one a seed that has one, and what the paper has of the model."""

    cell: str
    accuracies: tuple[float, ...]
    n_expected: int
    published: float | None
    remark: str

    def texts(self) -> tuple[str, ...]:
        """The line in the order of `TITLES`."""
        found = self.accuracies
        ours = (max(found), statistics.median(found), max(found) - min(found)) if found else (None, None, None)
        missing = f" of {self.n_expected}" if len(found) < self.n_expected else ""
        shown = [_percent(value) for value in (*ours, self.published)]
        return (self.cell, *shown[:3], f"{len(found)}{missing}", shown[3])


@dataclass(frozen=True, slots=True)
class PublishedTable:
    """The cells of a study on one task."""

    study: str
    lines: tuple[PublishedLine, ...]

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a reader must know, some sentences each."""
        return (*EXPLAINED, *(f"{line.cell}: {line.remark}" for line in self.lines if line.remark))

    def to_markdown(self) -> str:
        return as_markdown(self.study, spoken(METRIC), TITLES, [line.texts() for line in self.lines], self.remarks)

    def to_latex(self) -> str:
        caption = " ".join([f"{self.study}: {spoken(METRIC)}.", *self.remarks])
        return as_latex(caption, TITLES, [line.texts() for line in self.lines])


def published_tables(results: StudyResults) -> tuple[PublishedTable, ...]:
    """A table for each task on which some cell is a model of the paper, with lengths as published; mostly none."""
    tables = []
    for part in by_task(results):
        records = [record for record in part.trials if record.cell is not None]
        if any(paper_model(record.config) is not None for record in records):
            tables.append(PublishedTable(part.name, tuple(_line(record, len(results.seeds)) for record in records)))
    return tuple(tables)


def _line(record: TrialRecord, n_seeds: int) -> PublishedLine:
    model, task = paper_model(record.config), record.config.task.kind
    rows = (row for row in PUBLISHED if row.table == "expressivity" and row.model is not None)
    row = next((row for row in rows if row.model == model), None)
    accuracies = tuple(100 * value for value in readings(record.replicas, METRIC).values())
    name = f"{record.cell} ({row.label})" if row is not None else str(record.cell)
    return PublishedLine(
        name,
        accuracies,
        max(n_seeds, len(record.replicas)),
        None if row is None else row.values[task],
        "" if row is None else row.remark,
    )


def _percent(value: float | None) -> str:
    return ABSENT if value is None else re.sub(r"^-0\.0$", "0.0", f"{value:.1f}")
