import itertools
import subprocess
import sys

import pytest
from hqlt_dashboards.curves import curves_figure
from hqlt_dashboards.drawing import png
from hqlt_dashboards.front import front_members
from hqlt_dashboards.plots import front_chart, front_figure
from hqlt_search_space.mixers import FastWeight
from hqlt_search_space.trial import Objective

OBJECTIVES = (
    Objective(name="normalised_validation_accuracy", direction="maximize"),
    Objective(name="state_bytes", direction="minimize"),
    Objective(name="parameters", direction="minimize"),
)


@pytest.mark.parametrize(("n_objectives", "n_panels"), [(1, 1), (2, 1), (3, 3)], ids=["one", "two", "three"])
def test_every_pair_of_objectives_has_a_panel_with_labels_and_units(make_results, n_objectives, n_panels):
    figure = front_figure(make_results(n_objectives))
    labels = [(axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes]
    assert len(set(labels)) == n_panels
    assert all(ylabel.endswith(")") for _, ylabel in labels)
    chart = front_chart(make_results(n_objectives))
    assert sum(name.startswith("xaxis") for name in chart.to_plotly_json()["layout"]) == n_panels


@pytest.mark.parametrize(
    "directions", ["max min", "max max", "min min", "min max"], ids=lambda d: d.replace(" ", " on y, ")
)
def test_the_step_line_passes_no_trial_on_the_good_side(make_record, make_study, directions):
    """No trial may be better than the border of the dominated region: checked at the corners of the drawn line."""
    y, x = ({"max": "maximize", "min": "minimize"}[word] for word in directions.split())
    objectives = (Objective(name="a_nats", direction=y), Objective(name="b_nats", direction=x))
    values = [(1, 5), (2, 3), (3, 4), (4, 1), (5, 2), (2, 2), (4, 4), (1, 1), (5, 5)]
    records = [make_record(i, objectives={"a_nats": a, "b_nats": b}) for i, (a, b) in enumerate(values)]
    results = make_study(*records, objectives=objectives)
    (line,) = front_figure(results).axes[0].get_lines()[:1]
    corners = line.get_path().vertices if line.get_drawstyle() == "default" else _steps(line)
    sign_x, sign_y = (1 if d == "minimize" else -1 for d in (x, y))
    for corner_x, corner_y in corners:
        assert not any(sign_x * b < sign_x * corner_x and sign_y * a < sign_y * corner_y for a, b in values)
    assert len(corners) == 2 * len(front_members(results)) - 1


def _steps(line):
    """The corners that matplotlib draws for a step line."""
    points = list(zip(line.get_xdata(), line.get_ydata(), strict=True))
    after = line.get_drawstyle() == "steps-post"
    corners = [points[0]]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        corners += [(x1, y0) if after else (x0, y1), (x1, y1)]
    return corners


def test_both_libraries_draw_every_trial_that_has_a_result(make_results):
    results = make_results(2)
    (axes,) = front_figure(results).axes
    drawn = sum(len(collection.get_offsets()) for collection in axes.collections)
    assert drawn == 6
    traces = [trace for trace in front_chart(results).data if trace.mode and "markers" in trace.mode]
    assert sum(len([x for x in trace.x if x is not None]) for trace in traces) == 6


def test_costs_that_differ_by_much_are_on_a_logarithmic_axis(make_results):
    results = make_results(2)
    (axes,) = front_figure(results).axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")
    assert front_chart(results).layout.xaxis.type == "log"


def test_members_carry_their_interval_after_replication(make_results):
    replicated = make_results(2, {1: 0.5, 2: 0.6, 3: 0.7})
    errors = [trace.error_y.array for trace in front_chart(replicated).data if trace.error_y.array]
    assert errors
    assert "means over fresh seeds" in front_figure(replicated).get_suptitle()


def test_members_that_tie_share_a_label(make_record, make_study):
    results = make_study(make_record(3), make_record(11, layers=(FastWeight(n_heads=2),)), make_record(4, 0.1))
    assert [text.get_text() for text in front_figure(results).axes[0].texts] == ["3, 11"]
    assert [text for trace in front_chart(results).data for text in trace.text or () if text] == ["3, 11"]


def test_a_long_name_breaks_the_title_instead_of_running_out_of_the_picture(make_results):
    results = make_results(2).model_copy(update={"name": "n" * 128})
    figure = front_figure(results)
    figure.draw_without_rendering()
    assert figure._suptitle.get_window_extent().x1 < figure.bbox.x1
    assert max(map(len, front_chart(results).layout.title.text.split("<br>"))) < 80


def test_a_dollar_or_a_tag_in_a_name_is_drawn_as_it_is(make_results):
    results = make_results(2).model_copy(update={"name": "a$b_{c$ <b>d"})
    assert png(front_figure(results)).startswith(b"\x89PNG")
    assert "&lt;b&gt;d" in front_chart(results).layout.title.text


def test_a_study_without_results_is_drawn_as_an_empty_picture(make_study):
    assert png(front_figure(make_study())).startswith(b"\x89PNG")
    assert png(curves_figure(make_study(), "train_loss_nats")).startswith(b"\x89PNG")


def test_drawing_needs_neither_pyplot_nor_torch_nor_a_database():
    code = (
        "import hqlt_dashboards.export, hqlt_dashboards.plots, hqlt_dashboards.report, sys;"
        "print(sorted({'matplotlib.pyplot', 'torch', 'ray', 'optuna', 'mlflow', 'sqlalchemy'} & sys.modules.keys()))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
