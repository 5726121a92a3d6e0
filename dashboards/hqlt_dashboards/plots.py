"""The front as a matplotlib figure (png, report) and as a plotly chart (html), drawn from the same prepared values."""

import html
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from hqlt_search_space.trial import Objective, StudyResults, TrialRecord
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plotly.subplots import make_subplots

from hqlt_dashboards.drawing import (
    LINE_COLOUR,
    TRIAL_NUMBER,
    Style,
    finish,
    finish_chart,
    label_axes,
    plotly_axis,
    styles_of,
)
from hqlt_dashboards.front import FrontMember, front_members
from hqlt_dashboards.seeds import Estimate
from hqlt_dashboards.words import describe, format_value, mixer_kinds

MOST_NUMBERS_SHOWN = 15  # members named in a panel; more would overlap
PANELS_A_ROW = 3

_PALE = 0.35


@dataclass(frozen=True, slots=True)
class _Dot:
    """A trial as a point. `values` has every objective, and the trial's number under TRIAL_NUMBER."""

    record: TrialRecord
    kinds: str
    values: dict[str, float]
    estimates: dict[str, Estimate]
    on_front: bool


@dataclass(frozen=True, slots=True)
class _Panel:
    """Two quantities against each other. `staircase`: the border of what the front dominates; None in a projection."""

    x: str
    y: str
    staircase: tuple[list[float], list[float]] | None
    holds_after: bool
    """Whether a step's height holds from its point to the right (else to the left)."""


def front_figure(results: StudyResults) -> Figure:
    """All trials with a result and the front among them, as a matplotlib figure.

    Two objectives: the second on x, the first on y, the front as a step line. One: its value by trial number. Three
    or more: a panel for each pair, without a line, because a front is no staircase in a projection. Members carry
    their trial number and, where seeds give one, their interval.
    """
    dots, panels = _dots(results), _panels(results)
    styles = styles_of(dot.kinds for dot in dots)
    n_columns = min(PANELS_A_ROW, len(panels))
    n_rows = math.ceil(len(panels) / n_columns)
    figure = Figure(figsize=(5.2 * n_columns + 3.0, 4.2 * n_rows + 0.8), layout="constrained")
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(n_rows, n_columns, i + 1)
        _draw_panel(axes, panel, dots, styles)
    finish(figure, _title(results, dots))
    return figure


def front_chart(results: StudyResults) -> go.Figure:
    """`front_figure` as an interactive plotly chart; a trial tells its details under the pointer."""
    dots, panels = _dots(results), _panels(results)
    styles = styles_of(dot.kinds for dot in dots)
    n_columns = min(PANELS_A_ROW, len(panels))
    n_rows = math.ceil(len(panels) / n_columns)
    chart = make_subplots(rows=n_rows, cols=n_columns)
    for i, panel in enumerate(panels):
        place = {"row": i // n_columns + 1, "col": i % n_columns + 1}
        for trace in _panel_traces(panel, dots, styles):
            chart.add_trace(trace, **place)
        chart.update_xaxes(**plotly_axis(panel.x, [dot.values[panel.x] for dot in dots]), **place)
        chart.update_yaxes(**plotly_axis(panel.y, [dot.values[panel.y] for dot in dots]), **place)
    finish_chart(chart, _title(results, dots), styles, "markers", width=560 * n_columns + 260, height=480 * n_rows + 90)
    return chart


def _dots(results: StudyResults) -> list[_Dot]:
    """Every complete trial with all objectives; the front's members last, so that they are drawn on top."""
    members = {member.record.number: member for member in front_members(results)}
    names = [objective.name for objective in results.objectives]
    others = [
        record
        for record in results.trials
        if record.number not in members and record.state == "complete" and set(names) <= record.objectives.keys()
    ]
    dots = [_dot(record, {name: record.objectives[name] for name in names}, None) for record in others]
    return dots + [_dot(member.record, member.values, member) for member in members.values()]


def _dot(record: TrialRecord, values: dict[str, float], member: FrontMember | None) -> _Dot:
    return _Dot(
        record=record,
        kinds=mixer_kinds(record.config.arch),
        values={**values, TRIAL_NUMBER: float(record.number)},
        estimates=member.estimates if member else {},
        on_front=member is not None,
    )


def _panels(results: StudyResults) -> list[_Panel]:
    objectives = results.objectives
    if len(objectives) == 1:
        return [_Panel(TRIAL_NUMBER, objectives[0].name, _best_so_far(results, objectives[0]), holds_after=True)]
    if len(objectives) > 2:
        return [_Panel(x.name, y.name, None, holds_after=True) for y, x in itertools.combinations(objectives, 2)]
    y, x = objectives
    corners = sorted((m.values[x.name], m.values[y.name]) for m in front_members(results))
    staircase = [px for px, _ in corners], [py for _, py in corners]
    return [_Panel(x.name, y.name, staircase, holds_after=x.direction == "minimize")]


def _best_so_far(results: StudyResults, objective: Objective) -> tuple[list[float], list[float]]:
    done = [r for r in results.trials if r.state == "complete" and objective.name in r.objectives]
    done.sort(key=lambda record: record.number)
    best = min if objective.direction == "minimize" else max
    values = itertools.accumulate((record.objectives[objective.name] for record in done), best)
    return [float(record.number) for record in done], list(values)


def _title(results: StudyResults, dots: Sequence[_Dot]) -> str:
    n_front = sum(dot.on_front for dot in dots)
    line = f"{results.name}: {n_front} of {len(dots)} trials with a result are on the front"
    if any(member.replicated for member in front_members(results)):
        line += "\nfront: means over fresh seeds, bootstrap intervals; pale: what the search saw"
    return line


def _draw_panel(axes: Axes, panel: _Panel, dots: Sequence[_Dot], styles: dict[str, Style]) -> None:
    if panel.staircase is not None:
        xs, ys = panel.staircase
        axes.step(xs, ys, where="post" if panel.holds_after else "pre", color=LINE_COLOUR, linewidth=1.2, zorder=2)
    for kinds, style in styles.items():
        for on_front in (False, True):
            chosen = [dot for dot in dots if dot.kinds == kinds and dot.on_front is on_front]
            axes.scatter(
                [dot.values[panel.x] for dot in chosen],
                [dot.values[panel.y] for dot in chosen],
                s=70 if on_front else 26,
                c=style.colour,
                marker=style.matplotlib_marker,
                alpha=1.0 if on_front else _PALE,
                linewidths=0.9 if on_front else 0.0,
                edgecolors="black" if on_front else "none",
                zorder=4 if on_front else 3,
            )
        axes.scatter([], [], s=50, c=style.colour, marker=style.matplotlib_marker, label=kinds)
    members = [dot for dot in dots if dot.on_front]
    for dot in members:
        axes.errorbar(
            dot.values[panel.x],
            dot.values[panel.y],
            xerr=_column(_reach(dot, panel.x)),
            yerr=_column(_reach(dot, panel.y)),
            color=styles[dot.kinds].colour,
            linewidth=1.2,
            capsize=3,
            zorder=3,
        )
    for place, numbers in _numbers(panel, dots).items():
        axes.annotate(
            numbers,
            place,
            xytext=(6, 5),
            textcoords="offset points",
            fontsize=9,
            zorder=5,
        )
    label_axes(axes, panel.x, panel.y, [d.values[panel.x] for d in dots], [d.values[panel.y] for d in dots])


def _numbers(panel: _Panel, dots: Sequence[_Dot]) -> dict[tuple[float, float], str]:
    """The numbers of the front's members by their place in `panel`: those that tie share a place, and so a label."""
    numbers: dict[tuple[float, float], list[int]] = {}
    for dot in [dot for dot in dots if dot.on_front][:MOST_NUMBERS_SHOWN]:
        numbers.setdefault((dot.values[panel.x], dot.values[panel.y]), []).append(dot.record.number)
    return {place: ", ".join(map(str, sorted(there))) for place, there in numbers.items()}


def _reach(dot: _Dot, name: str) -> tuple[float, float] | None:
    """How far the interval of `name` reaches below and above the dot's value."""
    found = dot.estimates.get(name)
    if found is None or found.low is None or found.high is None:
        return None
    return max(0.0, dot.values[name] - found.low), max(0.0, found.high - dot.values[name])


def _column(reach: tuple[float, float] | None) -> list[list[float]] | None:
    """A reach as matplotlib's errorbar wants it: below in the first row, above in the second."""
    return None if reach is None else [[reach[0]], [reach[1]]]


def _panel_traces(panel: _Panel, dots: Sequence[_Dot], styles: dict[str, Style]) -> Iterator[go.Scatter]:
    if panel.staircase is not None:
        xs, ys = panel.staircase
        shape = "hv" if panel.holds_after else "vh"
        yield go.Scatter(
            x=xs, y=ys, mode="lines", line={"shape": shape, "color": LINE_COLOUR}, showlegend=False, hoverinfo="skip"
        )
    numbers = _numbers(panel, dots)
    for kinds, style in styles.items():
        for on_front in (False, True):
            chosen = [dot for dot in dots if dot.kinds == kinds and dot.on_front is on_front]
            places = [(dot.values[panel.x], dot.values[panel.y]) for dot in chosen]
            yield go.Scatter(
                x=[dot.values[panel.x] for dot in chosen],
                y=[dot.values[panel.y] for dot in chosen],
                mode="markers+text" if on_front else "markers",
                text=[numbers.pop(place, "") for place in places] if on_front else None,  # a shared label once
                textposition="top right",
                legendgroup=kinds,
                showlegend=False,
                customdata=[_details(dot) for dot in chosen],
                hovertemplate="%{customdata}<extra></extra>",
                error_x=_plotly_reach(chosen, panel.x),
                error_y=_plotly_reach(chosen, panel.y),
                marker={
                    "color": style.colour,
                    "symbol": style.plotly_marker,
                    "size": 12 if on_front else 7,
                    "opacity": 1.0 if on_front else _PALE,
                    "line": {"color": "black", "width": 1 if on_front else 0},
                },
            )


def _plotly_reach(dots: Sequence[_Dot], name: str) -> dict[str, Any] | None:
    reaches = [_reach(dot, name) for dot in dots]
    if not any(reaches):
        return None
    return {
        "type": "data",
        "symmetric": False,
        "arrayminus": [reach[0] if reach else 0.0 for reach in reaches],
        "array": [reach[1] if reach else 0.0 for reach in reaches],
    }


def _details(dot: _Dot) -> str:
    """What the pointer shows: plotly reads a little HTML there, so a user's words are escaped."""
    lines = [f"trial {dot.record.number} ({dot.record.trial_id[:8]})", describe(dot.record.config.arch)]
    for name, value in dot.values.items():
        if name != TRIAL_NUMBER:
            lines.append(f"{name}: {format_value(name, value)}")
    lines += [f"{axis} = {value}" for axis, value in dot.record.choices.items()]
    return "<br>".join(html.escape(line) for line in lines)
