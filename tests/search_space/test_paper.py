"""The paper's models and its published rows."""

from pathlib import Path
from typing import get_args

import pytest
from hqlt_search_space.cost import costs
from hqlt_search_space.errors import UnknownNameError
from hqlt_search_space.mixers import Attention, DelayedChunk, FastWeight, Hybrid
from hqlt_search_space.paper import MODELS, PUBLISHED, Size, paper_arch, paper_model
from hqlt_search_space.recipe import Recipe
from hqlt_search_space.rules import Additive, Delta
from hqlt_search_space.study_file import load_study
from hqlt_search_space.tasks import Lengths, Parity
from hqlt_search_space.trial import Config


@pytest.mark.parametrize("size", get_args(Size))
@pytest.mark.parametrize("model", MODELS)
def test_every_model_exists_at_every_size(model: str, size: str) -> None:
    arch = paper_arch(model, size)
    shape = {"parity": (128, 2), "modular_arithmetic": (128, 3), "340m": (1024, 24), "1.3b": (2048, 24)}[size]
    assert (arch.d_model, arch.n_layers) == shape
    assert len(set(arch.layers)) == 1


def test_synthetic_hybrids_are_as_the_paper_trained_them() -> None:
    layer = paper_arch("hqlt_synchronous", "parity").layers[0]
    assert layer == Hybrid(
        n_heads=4,
        window=8,
        positions="none",
        rule=Delta(beta_range=2),
        mixing="dynamic_vector",
        short_conv=4,
        output_gate=True,
    )


def test_language_models_have_heads_of_128_and_the_transformer_of_64() -> None:
    for size, width in (("340m", 1024), ("1.3b", 2048)):
        assert width // paper_arch("hqlt_synchronous", size).layers[0].n_heads == 128
        assert width // paper_arch("deltanet", size).layers[0].n_heads == 128
        assert width // paper_arch("transformer_pp", size).layers[0].n_heads == 64


def test_the_language_baseline_writes_with_beta_up_to_one() -> None:
    layer = paper_arch("deltanet_beta1", "340m").layers[0]
    assert isinstance(layer, FastWeight)
    assert layer.rule == Delta(beta_range=1)


def test_what_the_released_code_computed_stands_beside_what_the_text_says() -> None:
    published, true = (paper_arch(name, "parity").layers[0] for name in _pair("hqlt_delayed_chunk"))
    assert isinstance(published, Hybrid)
    assert isinstance(true, Hybrid)
    assert (published.blend, published.window) == (DelayedChunk(fw_chunk=64), 16)
    assert (true.blend, true.window) == (DelayedChunk(), 16)
    published, true = (paper_arch(name, "340m").layers[0] for name in _pair("hqlt_linear_attention"))
    assert isinstance(published, Hybrid)
    assert isinstance(true, Hybrid)
    assert published.rule == Additive(normaliser="heads")
    assert true.rule == Additive(normaliser="time")


def _pair(name: str) -> tuple[str, str]:
    return f"{name}_published", name


def test_at_a_window_of_64_both_readings_of_delayed_chunk_are_one_model() -> None:
    assert len({paper_arch(name, "340m").arch_id for name in _pair("hqlt_delayed_chunk")}) == 1


def test_transformer_attends_to_all_keys_with_rotary_positions() -> None:
    assert paper_arch("transformer_pp", "340m").layers[0] == Attention(n_heads=16)


def test_published_averages_are_the_means_of_their_rows() -> None:
    """A transcription error in one cell would show here."""
    for row in PUBLISHED:
        parts = [v for name, v in row.values.items() if not name.endswith("_ppl") and name != "average"]
        if row.table == "expressivity" or not parts:
            continue
        assert row.values["average"] == pytest.approx(sum(parts) / len(parts), abs=0.051), row


def test_published_rows_name_models_that_exist() -> None:
    assert {row.model for row in PUBLISHED} - {None} <= set(MODELS)


def test_an_unknown_model_or_size_is_named_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'deltanet'"):
        paper_arch("deltanets", "340m")
    with pytest.raises(UnknownNameError, match="no size '340M'; did you mean '340m'"):
        paper_arch("deltanet", "340M")


STUDY = Path(__file__).parents[2] / "search_space" / "studies" / "paper_expressivity.yaml"


def test_the_study_of_the_papers_table_has_its_nine_models_on_both_tasks_with_the_published_recipes() -> None:
    study = load_study(STUDY)
    cells = study.cells()
    nine = [
        "hqlt_synchronous",
        "transformer_pp",
        "deltanet_beta1",
        "deltanet",
        "hqlt_delayed_streaming",
        "hqlt_delayed_chunk_published",
        "hqlt_delayed_chunk",
        "hqlt_linear_attention_published",
        "hqlt_linear_attention",
    ]
    for task, of_task in (("parity", cells[:9]), ("modular_arithmetic", cells[9:])):
        assert [paper_model(cell.config) for cell in of_task] == nine
        assert [cell.config.arch for cell in of_task] == [paper_arch(name, task) for name in nine]
    assert study.seeds == (0, 1, 2)
    recipes = {cell.config.task.kind: cell.config.recipe for cell in cells}
    shared = {"learning_rate": 5e-3, "weight_decay": 0.1, "init_std": 0.006, "precision": "bfloat16"}
    assert recipes["parity"] == Recipe(steps=20_000, batch=1024, **shared)
    assert recipes["modular_arithmetic"] == Recipe(steps=100_000, batch=256, **shared)
    task = cells[0].config.task
    assert isinstance(task, Parity)
    assert (task.train_length, task.test_length) == (Lengths(low=3, high=40), Lengths(low=40, high=256))


def test_the_synthetic_hybrids_have_about_the_published_numbers_of_parameters() -> None:
    """0.6 and 0.9 million."""
    for cell in load_study(STUDY).cells():
        if cell.config.arch.layers[0].kind == "hybrid":
            published = 0.6e6 if cell.config.task.kind == "parity" else 0.9e6
            assert costs(cell.config)["parameters"] == pytest.approx(published, rel=0.02)


def test_a_model_of_the_paper_on_other_lengths_is_not_compared_with_it() -> None:
    config = Config(arch=paper_arch("deltanet", "parity"), recipe=Recipe(), task=Parity())
    assert paper_model(config) == "deltanet"
    assert paper_model(config.model_copy(update={"task": Parity(test_length=Lengths(low=40, high=64))})) is None
    assert paper_model(config.model_copy(update={"arch": paper_arch("deltanet", "modular_arithmetic")})) is None
