"""Learning curves as a matplotlib figure (report) and as a plotly chart (html), drawn from the same prepared values."""

import html
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import plotly.graph_objects as go
from hqlt_search_space.trial import ReplicaResult, StudyResults, TrialRecord
from matplotlib.figure import Figure

from hqlt_dashboards.ablation import BASELINE
from hqlt_dashboards.drawing import QUIET_COLOUR, STEP, finish, finish_chart, label_axes, plotly_axis, styles_of
from hqlt_dashboards.front import front_members
from hqlt_dashboards.words import describe, mixer_kinds

MOST_LINES = 300  # grey ones; more become one image in an SVG, which would be slow to open


@dataclass(frozen=True, slots=True)
class _Curve:
    """One seed's readings of a metric."""

    record: TrialRecord
    kinds: str
    seed: int
    steps: list[int]
    values: list[float]
    in_colour: bool


def curves_figure(results: StudyResults, metric: str) -> Figure:
    """Learning curves of `metric`, a line per seed: the front's in colour, or an ablation's baseline; the others grey.

    A stopped trial's line ends where it was stopped. A study without a reading of `metric` gives empty axes.
    """
    curves = list(_curves(results, metric))
    styles = styles_of(curve.kinds for curve in curves if curve.in_colour)
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
    label_axes(axes, STEP, metric, [], [value for curve in curves for value in curve.values])
    finish(figure, _curves_title(results))
    return figure


def curves_chart(results: StudyResults, metric: str) -> go.Figure:
    """`curves_figure` as an interactive plotly chart."""
    curves = list(_curves(results, metric))
    styles = styles_of(curve.kinds for curve in curves if curve.in_colour)
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
    chart.update_xaxes(**plotly_axis(STEP, []))
    chart.update_yaxes(**plotly_axis(metric, [value for curve in curves for value in curve.values]))
    finish_chart(chart, _curves_title(results), styles, "lines", width=860, height=560)
    return chart


def curve_metric(results: StudyResults) -> str | None:
    """The first objective that some training read more than once, else the training loss; None if nothing was read."""
    replicas = [replica for record in results.trials for replica in record.replicas + record.replication]
    counts = [Counter(name for reading in replica.curve for name in reading.metrics) for replica in replicas]
    for objective in results.objectives:
        if any(count[objective.name] > 1 for count in counts):
            return objective.name
    return "train_loss_nats" if any(count["train_loss_nats"] for count in counts) else None


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


def _curves_title(results: StudyResults) -> str:
    whose = "baseline" if any(record.cell == BASELINE for record in results.trials) else "on the front"
    return f"{results.name}: learning curves, a line per seed (in colour: {whose})"
