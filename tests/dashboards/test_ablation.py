import re

import pytest
from hqlt_dashboards.ablation import ablation_table
from hqlt_dashboards.seeds import estimate
from hqlt_search_space.errors import HqltError, UnknownNameError
from hypothesis import given
from hypothesis import strategies as st

METRIC = "normalised_validation_accuracy"
AWKWARD = r"a|b_c \ 50% & $x^2$ #1 {y} ~ <z> `code` *bold* [link](there)"


@pytest.fixture(scope="session")
def make_ablation(make_record, make_study, make_replica):
    def make(cells, metric_of=lambda accuracy: {}):
        records = [
            make_record(
                number,
                phase="ablate",
                cell=cell,
                replicas=[make_replica(seed, accuracy) for seed, accuracy in seeds.items()],
            )
            for number, (cell, seeds) in enumerate(cells.items())
        ]
        return make_study(*records)

    return make


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(-1, 1)), min_size=1, max_size=6))
def test_a_difference_is_paired_so_what_seeds_have_in_common_cancels(make_ablation, pairs):
    cells = {
        "baseline": {seed: common for seed, (common, _) in enumerate(pairs)},
        "mixing=sum": {seed: common + change for seed, (common, change) in enumerate(pairs)},
    }
    row = ablation_table(make_ablation(cells), METRIC).rows[1]
    expected = estimate([change for _, change in pairs])
    assert row.difference.mean == pytest.approx(expected.mean, abs=1e-12)
    if expected.low is not None:
        assert (row.difference.low, row.difference.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_baseline_is_first_and_has_no_difference(make_ablation):
    table = ablation_table(make_ablation({"z": {0: 0.1}, "baseline": {0: 0.5}, "a": {0: 0.2}}), METRIC)
    assert [row.cell for row in table.rows] == ["baseline", "z", "a"]
    assert table.rows[0].difference is None


def test_a_seed_that_one_cell_lacks_is_left_out_of_the_difference_and_named(make_ablation):
    cells = {"baseline": {0: 0.5, 1: 0.6, 2: 0.7}, "rule=additive": {0: 0.4, 1: None}}
    table = ablation_table(make_ablation(cells), METRIC)
    row = table.rows[1]
    assert (row.difference.n, row.difference.mean) == (1, pytest.approx(-0.1))
    assert row.missing == {1: "diverged", 2: "not run"}
    assert "rule=additive: no value for seeds 1 (diverged), 2 (not run)." in table.remarks
    assert "| 1 of 3 |" in table.to_markdown()


def test_a_cell_whose_seeds_all_failed_is_still_a_row(make_ablation):
    table = ablation_table(make_ablation({"baseline": {0: 0.5}, "rule=additive": {0: None}}), METRIC)
    assert table.to_markdown().splitlines()[5] == "| rule=additive | - | - | - | 0 of 1 |"


def test_without_a_baseline_result_there_are_no_differences_and_the_table_says_so(make_ablation):
    table = ablation_table(make_ablation({"baseline": {0: None}, "rule=additive": {0: 0.3}}), METRIC)
    assert table.rows[1].difference is None
    assert "The baseline has no value, so there are no differences." in table.remarks


def test_three_seeds_carry_their_warning(make_ablation):
    table = ablation_table(make_ablation({"baseline": {0: 0.1, 1: 0.2, 2: 0.3}}), METRIC)
    assert any("3 times in 4" in remark for remark in table.remarks)


def test_a_label_cannot_break_the_markdown_table(make_ablation):
    lines = ablation_table(make_ablation({"baseline": {0: 0.5}, AWKWARD: {0: 0.4}}), METRIC).to_markdown().splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {6}
    assert re.findall(r"(?<!\\)[`*<>\[]", rows[-1]) == []


def test_a_label_cannot_break_the_latex_table(make_ablation):
    latex = ablation_table(make_ablation({"baseline": {0: 0.5}, AWKWARD: {0: 0.4}}), METRIC).to_latex()
    row = next(line for line in latex.splitlines() if "textbackslash" in line and "tabular" not in line and "&" in line)
    assert len(re.findall(r"(?<!\\)&", row)) == 4
    assert re.findall(r"(?<!\\)[%#]|(?<!\\)_|[~^<>|]", row) == []
    plain = re.sub(r"\\[a-z]+\{\}|\\[{}]", "", latex)
    assert plain.count("{") == plain.count("}")


def test_a_negative_difference_has_a_minus_and_not_a_hyphen_in_latex(make_ablation):
    latex = ablation_table(make_ablation({"baseline": {0: 0.5}, "a": {0: 0.4}}), METRIC).to_latex()
    assert "$-$0.1000" in latex


def test_a_search_has_no_ablation_table(make_record, make_study):
    with pytest.raises(HqltError, match="is a search and has no ablation table"):
        ablation_table(make_study(make_record(0)), METRIC)


def test_an_unknown_metric_is_answered_with_the_nearest_name(make_ablation):
    with pytest.raises(UnknownNameError, match="did you mean 'normalised_validation_accuracy'"):
        ablation_table(make_ablation({"baseline": {0: 0.5}}), "normalised_accuracy")
