import csv
import io
import json

import pyarrow.parquet as pq
import pytest
from hqlt_dashboards.export import export_front
from hqlt_search_space.arch import Arch
from hqlt_search_space.errors import HqltError, NoResultError
from hqlt_search_space.recipe import Recipe
from hqlt_search_space.trial import ReplicaResult

SUFFIXES = [".csv", ".json", ".parquet", ".html", ".png"]


@pytest.fixture(scope="session")
def results(make_record, make_study):
    return make_study(
        make_record(0, 0.9, 2048, choices={"fw_chunk": "window", "window": 8, "delay_beta": True, "note": None}),
        make_record(1, 0.5, 1024, choices={"fw_chunk": 64, "window": 4, "delay_beta": False, "note": "=1+1"}),
    )


def test_json_has_the_keys_that_programs_rely_on(results, tmp_path):
    export_front(results, tmp_path / "front.json")
    first, second = json.loads((tmp_path / "front.json").read_text())
    assert first.keys() >= {"trial_id", "number", "arch", "recipe", "objectives", "replicas"}
    assert (first["number"], second["number"]) == (0, 1)
    assert first["trial_id"] == results.trials[0].trial_id
    assert first["objectives"] == {"normalised_validation_accuracy": 0.9, "state_bytes": 2048.0}
    assert Arch.model_validate(first["arch"]) == results.trials[0].config.arch
    assert Recipe.model_validate(first["recipe"]) == results.trials[0].config.recipe
    assert ReplicaResult.model_validate(first["replicas"][0]) == results.trials[0].replicas[0]


def test_json_has_the_intervals_of_what_seeds_measured(make_record, make_study, tmp_path):
    export_front(make_study(make_record(0, replication={1: 0.5, 2: 0.6, 3: 0.7})), tmp_path / "front.json")
    (member,) = json.loads((tmp_path / "front.json").read_text())
    assert member["intervals"] == {"normalised_validation_accuracy": pytest.approx([0.5, 0.7])}
    assert [replica["seed"] for replica in member["replication"]] == [1, 2, 3]


def test_csv_has_a_row_for_each_member_with_the_full_precision(make_record, make_study, tmp_path):
    value = 0.1 + 0.2
    export_front(make_study(make_record(0, value)), tmp_path / "front.csv")
    (row,) = csv.DictReader(io.StringIO((tmp_path / "front.csv").read_text()))
    assert float(row["normalised_validation_accuracy"]) == value
    assert row["mixers"] == "hybrid synchronous delta W8 dynamic_vector x2"


def test_csv_disarms_what_a_spreadsheet_would_run_and_leaves_negative_numbers_alone(make_record, make_study, tmp_path):
    record = make_record(0, -0.25, choices={"first": "=HYPERLINK(1)", "@second": "+1", "window": -1})
    export_front(make_study(record), tmp_path / "front.csv")
    (row,) = csv.DictReader(io.StringIO((tmp_path / "front.csv").read_text()))
    assert row["axis.first"] == "'=HYPERLINK(1)"
    assert row["axis.@second"] == "'+1"
    assert (row["axis.window"], row["normalised_validation_accuracy"]) == ("-1", "-0.25")


def test_parquet_has_one_type_a_column_and_says_what_is_optimised(results, tmp_path):
    export_front(results, tmp_path / "front.parquet")
    table = pq.read_table(tmp_path / "front.parquet")
    assert table["axis.fw_chunk"].to_pylist() == ["window", "64"]
    assert table["axis.window"].to_pylist() == [8, 4]
    assert table["axis.delay_beta"].to_pylist() == [True, False]
    directions = {"normalised_validation_accuracy": "maximize", "state_bytes": "minimize"}
    assert json.loads(table.schema.metadata[b"objectives"]) == directions


def test_html_is_one_file_that_holds_plotly_once_and_fetches_nothing(results, tmp_path):
    export_front(results, tmp_path / "front.html")
    text = (tmp_path / "front.html").read_text()
    assert text.count("* plotly.js v") == 1
    assert "<script src" not in text
    assert "<link" not in text
    assert "learning curves" in text


def test_html_shows_a_users_words_as_text(make_record, make_study, tmp_path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    export_front(make_study(make_record(0, choices={"first": evil}), name=evil), tmp_path / "front.html")
    text = (tmp_path / "front.html").read_text()
    assert "<script>alert" not in text
    assert "<img src=x" not in text


def test_png_is_a_picture(results, tmp_path):
    export_front(results, tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_two_exports_of_a_front_are_equal_byte_for_byte(results, tmp_path, suffix):
    for name in ("a", "b"):
        export_front(results, (tmp_path / name).with_suffix(suffix))
    assert (tmp_path / "a").with_suffix(suffix).read_bytes() == (tmp_path / "b").with_suffix(suffix).read_bytes()


@pytest.mark.parametrize(("name", "got"), [("front.xlsx", "'.xlsx'"), ("front", "no suffix")], ids=["other", "none"])
def test_an_unknown_suffix_is_answered_with_the_known_ones(results, tmp_path, name, got):
    with pytest.raises(HqltError, match=rf"{got}; use .csv, .json, .parquet, .html, .png"):
        export_front(results, tmp_path / name)


def test_a_capital_suffix_is_the_same_suffix(results, tmp_path):
    export_front(results, tmp_path / "FRONT.JSON")
    assert len(json.loads((tmp_path / "FRONT.JSON").read_text())) == 2


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_study_without_a_result_is_a_sentence_and_no_file(make_study, tmp_path, suffix):
    with pytest.raises(NoResultError, match="has no complete trial yet"):
        export_front(make_study(), (tmp_path / "front").with_suffix(suffix))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_a_sentence(results, tmp_path):
    with pytest.raises(HqltError, match=r"cannot write '.*missing/front.csv': No such file or directory"):
        export_front(results, tmp_path / "missing" / "front.csv")


def test_a_file_that_cannot_be_replaced_stays_and_nothing_lies_beside_it(results, tmp_path):
    (tmp_path / "front.csv").mkdir()
    with pytest.raises(HqltError, match="cannot write"):
        export_front(results, tmp_path / "front.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["front.csv"]
