"""Heads of 256: fast weights alone, in 16 bits, compiled only (the interpreter would take minutes)."""

import pytest
import torch
from hqlt_kernels.fast_weight import definition
from torch import Tensor
from triton_cases import CUDA, fast_weight_operator, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]
WIDTH = 256


def results(function, tensors: list[Tensor | None], dtype: torch.dtype) -> dict[str, Tensor]:
    leaves = [
        None if x is None else x.detach().to(dtype if x.dim() == 4 else x.dtype).requires_grad_() for x in tensors
    ]
    o, state = function(*leaves, None, feature_map="silu_l2", scale=WIDTH**-0.5, read_chunk=None)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (o, state)]
    torch.autograd.backward((o, state), weights)
    named = zip(("dq", "dk", "dv", "dbeta", "dlog_decay"), leaves, strict=True)
    return {"o": o.detach(), "state": state.detach(), **{n: x.grad for n, x in named if x is not None}}


@pytest.mark.parametrize("n_tokens", [64, 200])
@pytest.mark.parametrize("rule", ["additive", "decay", "delta", "gated_delta"])
def test_heads_of_256_are_right_twice_to_the_bit(rule: str, n_tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n_tokens, 2, WIDTH, generator=generator).bfloat16().cuda() for _ in range(3))
    beta = 2 * torch.rand(2, n_tokens, 2, generator=generator).cuda() if "delta" in rule else None
    log_decay = (
        -0.3 * torch.rand(2, n_tokens, 2, generator=generator).cuda() if "decay" in rule or "gated" in rule else None
    )
    tensors = [q, k, v, beta, log_decay]
    first = results(fast_weight_operator.fast_weight, tensors, torch.bfloat16)
    second = results(fast_weight_operator.fast_weight, tensors, torch.bfloat16)
    wide = [None if x is None else x.double() for x in tensors]
    truth = results(definition.fast_weight, wide, torch.float64)
    for name, x in first.items():
        assert torch.equal(x, second[name]), name
    errors = {name: relative_error(first[name], exact) for name, exact in truth.items()}
    assert max(errors.values()) < 1.5e-2, errors
