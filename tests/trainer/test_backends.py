"""Which implementations a config runs on, and on which a card would run it."""

from pathlib import Path

import pytest
from hqlt_kernels import backends as kernel_backends
from hqlt_search_space.study_file import load_study
from hqlt_search_space.trial import Config, Runtime
from hqlt_trainer.backends import HOPPER, backends, backends_at, main

STUDY = Path(__file__).parents[2] / "search_space/studies/paper_expressivity.yaml"
ON_A_GPU = Runtime(device="cuda")


@pytest.fixture(autouse=True)
def _triton_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_backends, "_TRITON_IS_INSTALLED", True)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"kind": "delta"}, {"blend": "triton"}),
        (
            {"kind": "delta_product", "n_householder": 2},
            {"blend": "chunked", "window_attention": "triton", "delta_product": "triton"},
        ),
    ],
    ids=["one operator", "of its parts"],
)
def test_what_runs_on_a_gpu_is_named_and_not_what_is_inside_it(
    rule: dict[str, object], expected: dict[str, str]
) -> None:
    layer = {"kind": "hybrid", "n_heads": 1, "window": 8, "rule": rule}
    config = Config.model_validate(
        {"arch": {"d_model": 32, "mlp_inner": 8, "layers": [layer]}, "recipe": {"steps": 1}, "task": {"kind": "parity"}}
    )
    assert {b.operator: b.backend for b in backends(config, ON_A_GPU, HOPPER)} == expected


def test_every_model_of_the_papers_table_trains_by_kernels_and_every_blend_as_one_program_a_head() -> None:
    cells = load_study(STUDY).cells()
    assert len(cells) == 18
    for cell in cells:
        (one,) = backends_at(cell.config, ON_A_GPU, 40, HOPPER)
        assert one.backend == "triton", cell.label
        is_hybrid = cell.config.arch.layers[0].kind == "hybrid"
        assert ("one program a head" in one.reason) == is_hybrid, cell.label


def test_evaluation_is_named_beside_training_where_its_longer_sequences_run_otherwise() -> None:
    by_label = {cell.label: cell.config for cell in load_study(STUDY).cells()}
    training, *evaluation = backends(by_label["linear_attention"], ON_A_GPU, HOPPER)
    assert (training.operator, training.backend) == ("blend", "triton")
    assert [(b.operator, b.backend) for b in evaluation] == [
        ("blend", "chunked"),
        ("window_attention", "triton"),
        ("additive", "triton"),
    ]
    assert "normaliser time" in evaluation[0].reason


def test_the_command_says_of_every_model_what_runs_it(capsys: pytest.CaptureFixture[str]) -> None:
    main([str(STUDY), "--hopper"])
    said = capsys.readouterr().out
    assert "parity, training, 40 tokens" in said
    assert "modular_arithmetic, evaluation, 256 tokens" in said
    labels = {cell.label for cell in load_study(STUDY).cells()}
    assert all(said.count(label) >= 4 for label in labels)
