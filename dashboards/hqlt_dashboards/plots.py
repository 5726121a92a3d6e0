"""Pictures: the front and learning curves, as matplotlib figures (png) and plotly charts (html).

Both libraries draw from the same prepared values, so the two pictures of a study agree. Colours are those of Okabe and
Ito (2008), which colour-blind readers can tell apart; every colour also has a marker of its own. Nothing here touches
pyplot, so no figure outlives its caller and no display is needed.
"""

import html
import io
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from hqlt_search_space.trial import Objective, ReplicaResult, StudyResults, TrialRecord
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from plotly.subplots import make_subplots

from hqlt_dashboards.ablation import BASELINE
from hqlt_dashboards.front import FrontMember, front_members
from hqlt_dashboards.seeds import Estimate
from hqlt_dashboards.words import axis_label, describe, format_value, mixer_kinds

TRIAL_NUMBER = "trial_number"
LOG_FROM_RATIO = 20.0  # largest over smallest value from which an axis is logarithmic
MOST_NUMBERS_SHOWN = 15  # members named in a panel; more would overlap
PANELS_A_ROW = 3
LONGEST_LABEL = 40  # characters beside an axis of a plotly chart; a longer label puts its unit on a second line

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = (("o", "circle"), ("s", "square"), ("^", "triangle-up"), ("D", "diamond"), ("v", "triangle-down"))
_FIRST_KINDS = ("hybrid", "attention", "fast_weight")  # they keep their colour in every picture
_PALE = 0.35
LINE_COLOUR = "#555555"
GRID_COLOUR = "#e4e4e4"
QUIET_COLOUR = "#9aa0a8"  # of curves that are there to compare with
MOST_LINES = 300  # of those, drawn as lines; more become one image in an SVG, which would be slow to open


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


@dataclass(frozen=True, slots=True)
class _Style:
    colour: str
    matplotlib_marker: str
    plotly_marker: str


@dataclass(frozen=True, slots=True)
class _Curve:
    """One seed's readings of a metric."""

    record: TrialRecord
    kinds: str
    seed: int
    steps: list[int]
    values: list[float]
    in_colour: bool


def front_figure(results: StudyResults) -> Figure:
    """All trials with a result and the front among them, as a matplotlib figure.

    Two objectives: the second on x, the first on y, the front as a step line. One: its value by trial number. Three
    or more: a panel for each pair, without a line, because a front is no staircase in a projection. Members carry
    their trial number and, where seeds give one, their interval.
    """
    dots, panels = _dots(results), _panels(results)
    styles = _styles(dot.kinds for dot in dots)
    n_columns = min(PANELS_A_ROW, len(panels))
    n_rows = math.ceil(len(panels) / n_columns)
    figure = Figure(figsize=(5.2 * n_columns + 3.0, 4.2 * n_rows + 0.8), layout="constrained")
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(n_rows, n_columns, i + 1)
        _draw_panel(axes, panel, dots, styles)
    _finish(figure, _title(results, dots))
    return figure


def front_chart(results: StudyResults) -> go.Figure:
    """`front_figure` as an interactive plotly chart; a trial tells its details under the pointer."""
    dots, panels = _dots(results), _panels(results)
    styles = _styles(dot.kinds for dot in dots)
    n_columns = min(PANELS_A_ROW, len(panels))
    n_rows = math.ceil(len(panels) / n_columns)
    chart = make_subplots(rows=n_rows, cols=n_columns)
    for i, panel in enumerate(panels):
        place = {"row": i // n_columns + 1, "col": i % n_columns + 1}
        for trace in _panel_traces(panel, dots, styles):
            chart.add_trace(trace, **place)
        chart.update_xaxes(**_plotly_axis(panel.x, [dot.values[panel.x] for dot in dots]), **place)
        chart.update_yaxes(**_plotly_axis(panel.y, [dot.values[panel.y] for dot in dots]), **place)
    _finish_chart(
        chart, _title(results, dots), styles, "markers", width=560 * n_columns + 260, height=480 * n_rows + 90
    )
    return chart


def curves_figure(results: StudyResults, metric: str) -> Figure:
    """Learning curves of `metric`, a line per seed: the front's in colour, or an ablation's baseline; the others grey.

    A stopped trial's line ends where it was stopped. A study without a reading of `metric` gives empty axes.
    """
    curves = list(_curves(results, metric))
    styles = _styles(curve.kinds for curve in curves if curve.in_colour)
    figure = Figure(figsize=(8.2, 5.0), layout="constrained")
    axes = figure.add_subplot()
    for curve in curves:
        axes.plot(
            curve.steps,
            curve.values,
            color=styles[curve.kinds].colour if curve.in_colour else QUIET_COLOUR,
            linewidth=1.8 if curve.in_colour else 0.8,
            zorder=3 if curve.in_colour else 2,
        )
    if sum(not curve.in_colour for curve in curves) > MOST_LINES:
        axes.set_rasterization_zorder(2.5)
    for kinds, style in styles.items():
        axes.plot([], [], color=style.colour, label=kinds)
    if not all(curve.in_colour for curve in curves):
        axes.plot([], [], color=QUIET_COLOUR, label="the others")
    _label_axes(axes, "step", metric, [], [value for curve in curves for value in curve.values])
    _finish(figure, _curves_title(results))
    return figure


def curves_chart(results: StudyResults, metric: str) -> go.Figure:
    """`curves_figure` as an interactive plotly chart."""
    curves = list(_curves(results, metric))
    styles = _styles(curve.kinds for curve in curves if curve.in_colour)
    chart = go.Figure()
    for curve in curves:
        chart.add_trace(
            go.Scatter(
                x=curve.steps,
                y=curve.values,
                mode="lines",
                legendgroup=curve.kinds if curve.in_colour else None,
                showlegend=False,
                line={
                    "color": styles[curve.kinds].colour if curve.in_colour else QUIET_COLOUR,
                    "width": 2.4 if curve.in_colour else 1.0,
                },
                text=html.escape(describe(curve.record.config.arch)),
                hovertemplate=f"trial {curve.record.number}, seed {curve.seed}<br>%{{text}}<br>step %{{x}}: %{{y:.4g}}"
                "<extra></extra>",
            )
        )
    chart.update_xaxes(**_plotly_axis("step", []))
    chart.update_yaxes(**_plotly_axis(metric, [value for curve in curves for value in curve.values]))
    _finish_chart(chart, _curves_title(results), styles, "lines", width=860, height=560)
    return chart


def curve_metric(results: StudyResults) -> str | None:
    """The first objective that some training read more than once, else the training loss; None if nothing was read."""
    replicas = [replica for record in results.trials for replica in record.replicas + record.replication]
    counts = [Counter(name for reading in replica.curve for name in reading.metrics) for replica in replicas]
    for objective in results.objectives:
        if any(count[objective.name] > 1 for count in counts):
            return objective.name
    return "train_loss_nats" if any(count["train_loss_nats"] for count in counts) else None


def png(figure: Figure, dots_per_inch: int = 150) -> bytes:
    """`figure` as a PNG file's content."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dots_per_inch)
    return content.getvalue()


def page(title: str, charts: Sequence[go.Figure], text: str = "") -> str:
    """A self-contained HTML page: the charts, then `text` as it stands. It holds plotly.js once and fetches nothing.

    The charts are as wide as they were made, or as the window where that is narrower (a telephone, MLflow).
    """
    parts = []
    for i, chart in enumerate(charts):
        drawn = go.Figure(chart, layout_width=None).to_html(
            full_html=False,
            include_plotlyjs=i == 0,
            div_id=f"chart-{i}",  # a random one would make two exports of the same front differ
            config={"displaylogo": False, "responsive": True},
        )
        parts.append(f'<div style="max-width: {chart.layout.width}px">{drawn}</div>')
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            f'<head><meta charset="utf-8"><title>{html.escape(title)}</title></head>',
            '<body style="font-family: sans-serif">',
            *parts,
            f"<pre>{html.escape(text)}</pre>" if text else "",
            "</body>",
            "</html>",
            "",
        ]
    )


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


def _styles(kinds: Iterator[str] | Sequence[str]) -> dict[str, _Style]:
    """A colour and a marker for each combination of mixers, the usual ones first."""
    present = set(kinds)
    ordered = [*_FIRST_KINDS, *sorted(present.difference(_FIRST_KINDS))]
    return {
        kind: _Style(_COLOURS[i % len(_COLOURS)], *_MARKERS[i % len(_MARKERS)])
        for i, kind in enumerate(ordered)
        if kind in present
    }


def _curves(results: StudyResults, metric: str) -> Iterator[_Curve]:
    """A curve for each seed that has readings, those in colour last, so that they are drawn on top."""
    chosen = {record.number for record in results.trials if record.cell == BASELINE}
    chosen = chosen or {member.record.number for member in front_members(results)}
    for record in sorted(results.trials, key=lambda record: record.number in chosen):
        replicas: tuple[ReplicaResult, ...] = record.replicas + record.replication
        for replica in replicas:
            points = [(p.step, p.metrics[metric]) for p in replica.curve if metric in p.metrics]
            if points:
                yield _Curve(
                    record=record,
                    kinds=mixer_kinds(record.config.arch),
                    seed=replica.seed,
                    steps=[step for step, _ in points],
                    values=[value for _, value in points],
                    in_colour=record.number in chosen,
                )


def _title(results: StudyResults, dots: Sequence[_Dot]) -> str:
    n_front = sum(dot.on_front for dot in dots)
    line = f"{results.name}: {n_front} of {len(dots)} trials with a result are on the front"
    if any(member.replicated for member in front_members(results)):
        line += "\nfront: means over fresh seeds, 95 % intervals; pale: what the search saw"
    return line


def _curves_title(results: StudyResults) -> str:
    whose = "baseline" if any(record.cell == BASELINE for record in results.trials) else "on the front"
    return f"{results.name}: learning curves, a line per seed (in colour: {whose})"


def _label(name: str) -> str:
    return {TRIAL_NUMBER: "Trial number", "step": "Optimiser step"}.get(name) or axis_label(name)


def _is_log(name: str, values: Sequence[float]) -> bool:
    if name in (TRIAL_NUMBER, "step") or "accuracy" in name or not values or min(values) <= 0:
        return False
    return max(values) / min(values) >= LOG_FROM_RATIO


def _draw_panel(axes: Axes, panel: _Panel, dots: Sequence[_Dot], styles: dict[str, _Style]) -> None:
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
    _label_axes(axes, panel.x, panel.y, [d.values[panel.x] for d in dots], [d.values[panel.y] for d in dots])


def _numbers(panel: _Panel, dots: Sequence[_Dot]) -> dict[tuple[float, float], str]:
    """The numbers of the front's members by their place in `panel`: those that tie share a place, and so a label."""
    numbers: dict[tuple[float, float], list[int]] = {}
    for dot in [dot for dot in dots if dot.on_front][:MOST_NUMBERS_SHOWN]:
        numbers.setdefault((dot.values[panel.x], dot.values[panel.y]), []).append(dot.record.number)
    return {place: ", ".join(map(str, sorted(there))) for place, there in numbers.items()}


def _label_axes(axes: Axes, x: str, y: str, xs: Sequence[float], ys: Sequence[float]) -> None:
    axes.set_xlabel(_label(x), parse_math=False)
    axes.set_ylabel(_label(y), parse_math=False)
    axes.grid(visible=True, color=GRID_COLOUR, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for name, values, axis, set_scale in ((x, xs, axes.xaxis, axes.set_xscale), (y, ys, axes.yaxis, axes.set_yscale)):
        if _is_log(name, values):
            is_bytes = name.endswith("bytes")
            set_scale("log", base=2 if is_bytes else 10)
            axis.set_major_locator(LogLocator(base=2 if is_bytes else 10, numticks=7))
            axis.set_minor_locator(NullLocator())
            axis.set_minor_formatter(NullFormatter())
        if name not in (TRIAL_NUMBER, "step"):
            axis.set_major_formatter(FuncFormatter(lambda value, _, name=name: format_value(name, value)))


def _reach(dot: _Dot, name: str) -> tuple[float, float] | None:
    """How far the interval of `name` reaches below and above the dot's value."""
    found = dot.estimates.get(name)
    if found is None or found.low is None or found.high is None:
        return None
    return max(0.0, dot.values[name] - found.low), max(0.0, found.high - dot.values[name])


def _column(reach: tuple[float, float] | None) -> list[list[float]] | None:
    """A reach as matplotlib's errorbar wants it: below in the first row, above in the second."""
    return None if reach is None else [[reach[0]], [reach[1]]]


def _finish(figure: Figure, title: str) -> None:
    """Title on the left and legend on the right, both outside the axes."""
    figure.suptitle(title, x=0.01, horizontalalignment="left", parse_math=False, fontsize=11)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, title="mixers", loc="outside right center", frameon=False)


def _finish_chart(
    chart: go.Figure, title: str, styles: dict[str, _Style], mode: str, *, width: int, height: int
) -> None:
    """Title, and a legend with an entry for each combination of mixers, which hides and shows its group."""
    for kinds, style in styles.items():
        # An entry without a point: the real traces may be pale, or empty for a combination that is not on the front.
        chart.add_trace(
            go.Scatter(
                x=[None],
                y=[None],
                mode=mode,
                name=kinds,
                legendgroup=kinds,
                showlegend=True,
                line={"color": style.colour},
                marker={"color": style.colour, "symbol": style.plotly_marker, "size": 10},
            )
        )
    chart.update_layout(
        template="plotly_white",
        title={"text": html.escape(title).replace("\n", "<br>")},
        legend={"title": {"text": "mixers"}},
        width=width,
        height=height,
    )


def _panel_traces(panel: _Panel, dots: Sequence[_Dot], styles: dict[str, _Style]) -> Iterator[go.Scatter]:
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


def _plotly_axis(name: str, values: Sequence[float]) -> dict[str, Any]:
    label = html.escape(_label(name))
    if len(label) > LONGEST_LABEL:
        label = label.replace(" (", "<br>(")
    axis: dict[str, Any] = {"title": {"text": label}}
    if _is_log(name, values):
        axis |= {"type": "log"}
    if name.endswith("bytes") and values:
        ticks = _byte_ticks(min(values), max(values)) if _is_log(name, values) else None
        if ticks:
            axis |= {"tickmode": "array", "tickvals": ticks, "ticktext": [format_value(name, tick) for tick in ticks]}
    return axis


def _byte_ticks(low: float, high: float) -> list[float]:
    """Powers of two from `low` to `high`, at most nine."""
    first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
    return [2.0**power for power in range(first, last + 1, max(1, math.ceil((last - first) / 8)))]


def _details(dot: _Dot) -> str:
    """What the pointer shows: plotly reads a little HTML there, so a user's words are escaped."""
    lines = [f"trial {dot.record.number} ({dot.record.trial_id[:8]})", describe(dot.record.config.arch)]
    for name, value in dot.values.items():
        if name != TRIAL_NUMBER:
            lines.append(f"{name}: {format_value(name, value)}")
    lines += [f"{axis} = {value}" for axis, value in dot.record.choices.items()]
    return "<br>".join(html.escape(line) for line in lines)
