"""The loss without logits is the loss with them."""

import pytest
import torch
from hqlt_kernels.linear_cross_entropy import definition, linear_cross_entropy, operator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_cases import CUDA, DEVICE, assert_as_good_as_torch


def problem(replicas: int, positions: int, tokens: int, dtype: torch.dtype, width: int = 16) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(replicas, positions, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(replicas, tokens, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(tokens, (replicas, positions), generator=generator)
    weight_dtype = torch.promote_types(dtype, torch.float32)
    return x.to(DEVICE, dtype), weight.to(DEVICE, weight_dtype), targets.to(DEVICE)


def results(loss, x: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    losses = loss(x, weight, targets)
    factors = torch.arange(1, len(losses) + 1, device=losses.device)  # a gradient of its own for each replica
    (losses * factors).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    return {"loss": losses.detach(), "dx": x.grad, "dweight": weight.grad}


@settings(max_examples=30, deadline=None)
@given(
    replicas=st.integers(1, 3),
    positions=st.integers(1, 9),
    tokens=st.integers(1, 7),
    block=st.sampled_from([1, 8, 2**27]),
)
def test_it_is_the_definition_however_it_is_cut_into_blocks(replicas, positions, tokens, block):
    problem_ = problem(replicas, positions, tokens, torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operator, "BLOCK_LOGITS", block)
        found = results(linear_cross_entropy, *problem_)
    for name, truth in results(definition.linear_cross_entropy, *problem_).items():
        torch.testing.assert_close(found[name], truth, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_as_good_as_torch_at_the_same_precision(dtype):
    x, weight, targets = problem(1, 300, 1000, dtype, width=64)
    found = results(linear_cross_entropy, x, weight, targets)
    same = results(definition.linear_cross_entropy, x, weight, targets)
    truth = results(definition.linear_cross_entropy, x.double(), weight.double(), targets)
    assert_as_good_as_torch(found, same, truth, factor=2)


@pytest.mark.parametrize("tokens", [3, 128, 129, 5000], ids="{} tokens".format)
def test_the_kernel_is_the_plain_form(tokens):
    from hqlt_kernels.linear_cross_entropy.triton_kernels import run_softmax_gradient_

    _, _, targets = problem(1, 5, tokens, torch.float32)
    logits = 20 * torch.randn(1, 5, tokens, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    by_kernel, plain = logits.clone(), logits.double()
    losses = run_softmax_gradient_(by_kernel, targets)
    torch.testing.assert_close(losses, operator.softmax_gradient_(plain, targets).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(by_kernel, plain.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_a_logit_that_is_not_finite_makes_the_loss_not_finite(bad):
    x, weight, targets = problem(1, 4, 50, torch.float32)
    weight[0, 7] = bad
    assert not torch.isfinite(linear_cross_entropy(x, weight, targets)).any()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_a_language_models_loss_keeps_no_logits():
    x, weight, targets = problem(1, 32_768, 32_000, torch.bfloat16, width=256)
    x.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(x, weight.requires_grad_(), targets).sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 32_768 * 32_000 * 2 / 3, f"{peak / 2**20:.0f} MiB above the inputs"
