"""The kernels around the memories where a model calls them, in Triton's interpreter: the model stays the model."""

from pathlib import Path

import pytest
import torch
from hqlt_search_space.arch import Arch
from hqlt_search_space.study_file import load_study
from hqlt_trainer import mixers
from hqlt_trainer.model import Model, build_model
from hqlt_trainer.replicas import stack_models
from torch import Tensor
from torch.nn import functional

pytest.importorskip("triton")

from hqlt_kernels.backends import Choice
from hqlt_kernels.blend import operator as blends
from hqlt_kernels.blend import triton_operator as blend_kernels
from hqlt_kernels.block_parts import operator as parts
from hqlt_kernels.block_parts import products
from hqlt_kernels.projections import columns
from hqlt_kernels.projections import operator as projections

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_model_on_gpu.py runs the compiled kernels")

HYBRID = {"kind": "hybrid", "n_heads": 2, "mixing": "dynamic_vector", "window": 4}
LAYERS = {
    "plain": [HYBRID, {"kind": "attention", "n_heads": 2}],
    "convolution and gate": [{**HYBRID, "short_conv": 4, "output_gate": True}] * 2,
    "two halves": [{**HYBRID, "mixing": "concat", "output_gate": True}],
}


STUDY = Path(__file__).parents[2] / "search_space/studies/paper_expressivity.yaml"


def logits_and_gradients(model: Model, at: Tensor | None) -> dict[str, Tensor]:
    model.zero_grad()
    tokens = torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(0))
    logits = model(tokens, at)
    functional.cross_entropy(logits.flatten(0, -2), torch.arange(logits.flatten(0, -2).shape[0]) % 11).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


@pytest.mark.parametrize("at", [None, torch.tensor([3, 8, 20, 35])], ids=["everywhere", "somewhere"])
@pytest.mark.parametrize("n_replicas", [1, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_a_model_on_the_kernels_is_the_model(
    name: str, n_replicas: int, at: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch = Arch.model_validate({"d_model": 32, "mlp_inner": 48, "layers": LAYERS[name]})
    model = stack_models([build_model(arch, 11, init_std=0.2, seed=seed) for seed in range(n_replicas)])
    plain = logits_and_gradients(model, at)
    take_the_kernels(monkeypatch)
    monkeypatch.setattr(mixers, "SHORT", 0)
    assert_close(logits_and_gradients(model, at), plain)


@pytest.mark.parametrize("n_replicas", [1, 2])
@pytest.mark.parametrize("label", ["baseline", "linear_published", "linear_attention"])
def test_a_model_of_the_paper_with_its_blends_as_one_program_a_head_is_the_model(
    label: str, n_replicas: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = next(cell.config.arch for cell in load_study(STUDY).cells() if cell.label == label)
    layers = tuple(layer.model_copy(update={"n_heads": 2}) for layer in published.layers)
    arch = published.model_copy(update={"d_model": 32, "mlp_inner": 48, "layers": layers})
    model = stack_models([build_model(arch, 11, init_std=0.2, seed=seed) for seed in range(n_replicas)])
    at = torch.tensor([3, 8, 20, 35])
    plain = logits_and_gradients(model, at)
    take_the_kernels(monkeypatch)
    # In float32, which is not one program by choice: its rounding is too small to hide a term that is missing.
    monkeypatch.setattr(blend_kernels, "is_short", lambda *_: True)
    monkeypatch.setattr(blends, "choose_blend", lambda **_: Choice("blend", "triton", "in the interpreter"))
    assert_close(logits_and_gradients(model, at), plain)


def take_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (parts, products, columns):
        monkeypatch.setattr(module, "has_kernel", lambda *_: True)
    monkeypatch.setattr(projections, "_has_kernel", lambda *_: True)
    monkeypatch.setattr(mixers, "on_gpu", lambda _: True)


def assert_close(by_kernels: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    assert plain.keys() == by_kernels.keys()
    for key, expected in plain.items():
        torch.testing.assert_close(by_kernels[key], expected, rtol=2e-4, atol=2e-6, msg=lambda m, k=key: f"{k}: {m}")
