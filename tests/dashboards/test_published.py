import pytest
from hqlt_dashboards.ablation import ablation_table, by_task
from hqlt_dashboards.published import published_tables
from hqlt_dashboards.tables import published_text
from hqlt_search_space.paper import paper_arch
from hqlt_search_space.recipe import Recipe
from hqlt_search_space.tasks import Lengths, ModularArithmetic, Parity
from hqlt_search_space.trial import Config

CELLS = {"baseline": "hqlt_synchronous", "deltanet": "deltanet", "delayed_chunk": "hqlt_delayed_chunk"}
TASKS = (Parity(), ModularArithmetic())


@pytest.fixture(scope="session")
def make_table(make_record, make_study, make_replica):
    """A study of three models on two tasks, from cell -> accuracies; a seed without one has not been run."""

    def make(accuracies, tasks=TASKS):
        records = []
        for task in tasks:
            for cell, model in CELLS.items():
                config = Config(arch=paper_arch(model, task.kind), recipe=Recipe(steps=100), task=task)
                replicas = [
                    make_replica(seed, 0.5, normalised_test_accuracy=value)
                    for seed, value in enumerate(accuracies.get(cell, []))
                ]
                records.append(
                    make_record(len(records), phase="ablate", cell=cell, config=config, replicas=tuple(replicas))
                )
        return make_study(*records, seeds=(0, 1, 2))

    return make


def test_best_median_and_spread_stand_beside_the_papers_number(make_table):
    parity, modular = published_tables(make_table({"baseline": [0.5, 1.0, 0.9], "deltanet": [0.25]}))
    assert [line.texts() for line in parity.lines] == [
        ("baseline (HQLT Synchronous)", "100.0", "90.0", "50.0", "3", "100.0"),
        ("deltanet (DeltaNet, eigenvalues in [-1, 1])", "25.0", "25.0", "0.0", "1 of 3", "100.0"),
        ("delayed_chunk", "-", "-", "-", "0 of 3", "-"),
    ]
    assert modular.lines[0].published == 97.0
    assert any("arXiv:2411.12537" in remark for remark in parity.remarks)


def test_an_accuracy_just_below_chance_is_no_negative_zero(make_table):
    table = published_tables(make_table({"baseline": [-0.0001]}))[0]
    assert table.lines[0].texts()[1] == "0.0"


def test_a_study_with_other_lengths_is_not_compared_with_the_paper(make_table):
    short = Parity(test_length=Lengths(low=40, high=64))
    assert published_tables(make_table({"baseline": [1.0]}, tasks=(short,))) == ()


def test_the_text_fits_and_the_written_forms_have_every_cell(make_table):
    tables = published_tables(make_table({"baseline": [0.5, 1.0, 0.9]}))
    table, text = tables[0], published_text(tables)
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("arXiv:2506.00744") == 1
    for written in (text, table.to_markdown(), table.to_latex()):
        assert written.count("100.0") >= 2
        assert "0 of 3" in written


def test_each_task_is_compared_with_its_own_baseline(make_table):
    results = make_table({"baseline": [0.5], "deltanet": [0.7]})
    parts = by_task(results)
    assert [part.name for part in parts] == ["parity-blends, parity", "parity-blends, modular arithmetic"]
    assert [len(part.trials) for part in parts] == [3, 3]
    row = ablation_table(parts[1], "normalised_test_accuracy").rows[1]
    assert row.difference.mean == pytest.approx(0.2)
    assert row.missing == {1: "not run", 2: "not run"}


def test_a_task_that_nothing_has_been_run_on_has_a_table_of_gaps(make_table):
    part = by_task(make_table({}))[1]
    table = ablation_table(part, "normalised_validation_accuracy")
    assert [row.missing for row in table.rows] == [dict.fromkeys((0, 1, 2), "not run")] * 3
    assert "Not run yet: baseline, deltanet, delayed_chunk." in table.remarks
