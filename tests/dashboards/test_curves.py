from hqlt_dashboards.curves import curve_metric, curves_chart, curves_figure
from hqlt_dashboards.drawing import QUIET_COLOUR


def test_a_learning_curve_is_drawn_for_every_seed_that_has_readings(make_results):
    results = make_results(2, {1: 0.5, 2: None})
    drawn = [line for line in curves_figure(results, "train_loss_nats").axes[0].get_lines() if len(line.get_xdata())]
    assert len(drawn) == 12
    chart = curves_chart(results, "train_loss_nats")
    assert sum(len(trace.x) == 4 for trace in chart.data) == 12


def test_learning_curves_show_an_objective_if_one_was_read_during_training(make_results, make_study, make_record):
    assert curve_metric(make_results(2)) == "normalised_validation_accuracy"
    assert (
        curve_metric(make_results(2).model_copy(update={"objectives": make_results(3).objectives[1:]}))
        == "train_loss_nats"
    )
    assert curve_metric(make_study(make_record(0, None))) is None


def test_an_objective_that_was_read_only_at_the_end_gives_way_to_the_training_loss(make_study, make_record):
    record = make_record(0)
    (replica,) = record.replicas
    early = tuple(
        reading.model_copy(update={"metrics": {"train_loss_nats": 1.0}}) if reading.step < 200 else reading
        for reading in replica.curve
    )
    record = record.model_copy(update={"replicas": (replica.model_copy(update={"curve": early}),)})
    assert curve_metric(make_study(record)) == "train_loss_nats"


def test_curves_of_an_ablation_have_its_baseline_in_colour(make_study, make_record):
    cells = [make_record(i, i / 4, cell=cell) for i, cell in enumerate(["baseline", "window=4", "mixing=sum"])]
    drawn = list(curves_figure(make_study(*cells), "train_loss_nats").axes[0].get_lines())
    assert [line.get_color() for line in drawn if len(line.get_xdata())] == [QUIET_COLOUR] * 2 + ["#0072B2"]
