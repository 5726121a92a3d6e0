"""What the pictures of the front and of learning curves share: colours, markers, axes, legends, and files of them.

Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart; every colour also has a marker of
its own. Nothing touches pyplot, so no figure outlives its caller and no display is needed.
"""

import html
import io
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from hqlt_dashboards.words import axis_label, format_value

TRIAL_NUMBER = "trial_number"
STEP = "step"
TITLE_CHARACTERS_AN_INCH = 9
TITLE_PIXELS_A_CHARACTER = 11
LOG_FROM_RATIO = 20.0  # largest over smallest value from which an axis is logarithmic
MOST_TICKS = 9  # of bytes
LONGEST_LABEL = 40  # characters beside an axis of a plotly chart; a longer label puts its unit on a second line
LINE_COLOUR = "#555555"
GRID_COLOUR = "#e4e4e4"
QUIET_COLOUR = "#868c95"  # of what is there to compare with

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = (("o", "circle"), ("s", "square"), ("^", "triangle-up"), ("D", "diamond"), ("v", "triangle-down"))
_FIRST_KINDS = ("hybrid", "attention", "fast_weight")  # they keep their colour in every picture


@dataclass(frozen=True, slots=True)
class Style:
    colour: str
    matplotlib_marker: str
    plotly_marker: str


def styles_of(kinds: Iterator[str] | Sequence[str]) -> dict[str, Style]:
    """A colour and a marker for each combination of mixers, the usual ones first."""
    present = set(kinds)
    ordered = [*_FIRST_KINDS, *sorted(present.difference(_FIRST_KINDS))]
    return {
        kind: Style(_COLOURS[i % len(_COLOURS)], *_MARKERS[i % len(_MARKERS)])
        for i, kind in enumerate(ordered)
        if kind in present
    }


def label_axes(axes: Axes, x: str, y: str, xs: Sequence[float], ys: Sequence[float]) -> None:
    axes.set_xlabel(_label(x), parse_math=False)
    axes.set_ylabel(_label(y), parse_math=False)
    axes.grid(visible=True, color=GRID_COLOUR, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for name, values, axis, set_scale in ((x, xs, axes.xaxis, axes.set_xscale), (y, ys, axes.yaxis, axes.set_yscale)):
        if is_log(name, values):
            set_scale("log")
            axis.set_major_locator(LogLocator(numticks=7))
            axis.set_minor_locator(NullLocator())
            axis.set_minor_formatter(NullFormatter())
        ticks = byte_ticks(name, values)
        if ticks:
            axis.set_major_locator(FixedLocator(ticks))
        if name not in (TRIAL_NUMBER, STEP):
            axis.set_major_formatter(FuncFormatter(lambda value, _, name=name: format_value(name, value)))


def finish(figure: Figure, title: str) -> None:
    """Title on the left and legend on the right, both outside the axes."""
    title = _fitted(title, round(figure.get_figwidth() * TITLE_CHARACTERS_AN_INCH))
    figure.suptitle(title, x=0.01, horizontalalignment="left", parse_math=False, fontsize=11)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, title="mixers", loc="outside right center", frameon=False)


def plotly_axis(name: str, values: Sequence[float]) -> dict[str, Any]:
    label = html.escape(_label(name))
    if len(label) > LONGEST_LABEL:
        label = label.replace(" (", "<br>(")
    axis: dict[str, Any] = {"title": {"text": label}}
    if is_log(name, values):
        axis |= {"type": "log"}
    ticks = byte_ticks(name, values)
    if ticks:
        axis |= {"tickmode": "array", "tickvals": ticks, "ticktext": [format_value(name, tick) for tick in ticks]}
    return axis


def finish_chart(chart: go.Figure, title: str, styles: dict[str, Style], mode: str, *, width: int, height: int) -> None:
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
        title={"text": html.escape(_fitted(title, width // TITLE_PIXELS_A_CHARACTER)).replace("\n", "<br>")},
        legend={"title": {"text": "mixers"}},
        width=width,
        height=height,
    )


def byte_ticks(name: str, values: Sequence[float]) -> list[float]:
    """At most `MOST_TICKS` round places on an axis of bytes: powers of two if it is logarithmic, else multiples of one.

    Empty for another quantity, or where all values are equal.

    >>> byte_ticks("state_bytes", [512, 1536]), byte_ticks("state_bytes", [512, 16384])
    ([512.0, 768.0, 1024.0, 1280.0, 1536.0], [512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0])
    """
    low, high = min(values, default=0.0), max(values, default=0.0)
    if not name.endswith("bytes") or low == high:
        return []
    if is_log(name, values):
        first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
        return [2.0**power for power in range(first, last + 1, math.ceil((last - first) / (MOST_TICKS - 1)))]
    unit = 2.0 ** math.ceil(math.log2((high - low) / (MOST_TICKS - 2)))
    return [unit * i for i in range(math.floor(low / unit), math.ceil(high / unit) + 1)]


def _fitted(title: str, n_characters: int) -> str:
    """`title` with its lines broken where they are longer: a study's name may have 128 characters."""
    return "\n".join(part for line in title.splitlines() for part in textwrap.wrap(line, n_characters))


def _label(name: str) -> str:
    return {TRIAL_NUMBER: "Trial number", STEP: "Optimiser step"}.get(name) or axis_label(name)


def is_log(name: str, values: Sequence[float]) -> bool:
    if name in (TRIAL_NUMBER, STEP) or "accuracy" in name or not values or min(values) <= 0:
        return False
    return max(values) / min(values) >= LOG_FROM_RATIO


def png(figure: Figure, dots_per_inch: int = 150) -> bytes:
    """`figure` as a PNG file's content."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dots_per_inch)
    return content.getvalue()


def page(title: str, charts: Sequence[go.Figure], text: str = "") -> str:
    """A self-contained HTML page: the charts, then `text` as it stands. It holds plotly.js once and fetches nothing.

    The charts are as wide as they were made, or as the window where that is somewhat narrower, as in MLflow's pages.
    """
    parts = []
    for i, chart in enumerate(charts):
        drawn = go.Figure(chart, layout_width=None).to_html(
            full_html=False,
            include_plotlyjs=i == 0,
            div_id=f"chart-{i}",  # a random one would make two exports of the same front differ
            config={"displaylogo": False, "responsive": True},
        )
        width = chart.layout.width
        parts.append(f'<div style="max-width: {width}px; min-width: {3 * width // 4}px">{drawn}</div>')
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
