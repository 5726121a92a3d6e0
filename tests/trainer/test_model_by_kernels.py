"""The kernels around the memories where a model calls them, in Triton's interpreter: the model stays the model."""

import pytest
import torch
from hqlt_search_space.arch import Arch
from hqlt_trainer import mixers
from hqlt_trainer.model import Model, build_model
from hqlt_trainer.replicas import stack_models
from torch import Tensor
from torch.nn import functional

pytest.importorskip("triton")

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
    for module in (parts, products, columns):
        monkeypatch.setattr(module, "has_kernel", lambda *_: True)
    monkeypatch.setattr(projections, "_has_kernel", lambda *_: True)
    monkeypatch.setattr(mixers, "on_gpu", lambda _: True)
    monkeypatch.setattr(mixers, "SHORT", 0)
    by_kernels = logits_and_gradients(model, at)
    assert plain.keys() == by_kernels.keys()
    for key, expected in plain.items():
        torch.testing.assert_close(by_kernels[key], expected, rtol=2e-4, atol=2e-6, msg=lambda m, k=key: f"{k}: {m}")
