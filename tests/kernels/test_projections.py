"""Rows and columns moved in one pass: the plain forms are the textbook's, the kernels are the plain forms."""

from typing import Any

import pytest
import torch
from hqlt_kernels.projections import embed, operator, split_projections, take_rows
from torch import Tensor
from torch.nn import functional
from triton_cases import DEVICE, DTYPES, check, pairwise, parameter, random, results


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_the_short_convolution_is_a_causal_conv1d(taps: int) -> None:
    rows, filters = torch.randn(2, 7, 20, dtype=torch.float64), torch.randn(12, taps, dtype=torch.float64)
    padded = functional.pad(rows[..., :12].mT, (taps - 1, 0))
    expected = functional.conv1d(padded, filters[:, None], groups=12).mT
    q, k, v, *rest = split_projections(rows, filters, (3, 4, 5, 1, 0, 2, 3), True)
    torch.testing.assert_close(torch.cat([q, k], -1), expected[..., :7])
    torch.testing.assert_close(v, functional.silu(expected[..., 7:]))
    assert torch.equal(torch.cat(rest, -1), rows[..., 12:18])


def test_a_stack_is_its_replicas_one_after_the_other() -> None:
    rows, filters = torch.randn(6, 5, 9, dtype=torch.float64), torch.randn(2, 8, 3, dtype=torch.float64)
    tokens, weight = torch.randint(4, (6, 5)), torch.randn(2, 4, 8, dtype=torch.float64)
    together = split_projections(rows, filters, (2, 2, 4, 1, 0, 0, 0), True)
    apart = [
        split_projections(part, w, (2, 2, 4, 1, 0, 0, 0), True) for part, w in zip(rows.chunk(2), filters, strict=True)
    ]
    for whole, *halves in zip(together, *apart, strict=True):
        torch.testing.assert_close(whole, torch.cat(halves))
    halves = [embed(part, w) for part, w in zip(tokens.chunk(2), weight, strict=True)]
    assert torch.equal(embed(tokens, weight), torch.cat(halves))


CASES: list[dict[str, Any]] = list(
    pairwise(
        {
            "taps": [1, 3, 4],
            "tokens": [1, 2, 39],
            "widths": [(16, 16, 16, 0, 0, 0, 0), (16, 80, 80, 2, 0, 16, 16), (64, 64, 64, 4, 4, 0, 64)],
            "unused": [0, 12],
            "replicas": [1, 2],
            "activate": [False, True],
            "dtype": DTYPES,
        }
    )
)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_splitting_kernel_is_the_plain_form(case: dict[str, Any]) -> None:
    from hqlt_kernels.projections import triton_operator

    widths, activate = case["widths"], case["activate"]
    rows = random(2 * case["replicas"], case["tokens"], sum(widths) + case["unused"], dtype=case["dtype"])

    def kernel(rows: Tensor, filters: Tensor) -> tuple[Tensor, ...]:
        return triton_operator.split_projections(rows, filters, widths, activate)

    def plain(rows: Tensor, filters: Tensor) -> tuple[Tensor, ...]:
        return operator.split_projections(rows, filters.to(rows.dtype), widths, activate)

    check(kernel, plain, [rows, parameter(case["replicas"], sum(widths[:3]), case["taps"])])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("n_tokens", [3, 40])
@pytest.mark.parametrize("replicas", [1, 2])
def test_the_embeddings_kernel_is_the_plain_form(replicas: int, n_tokens: int) -> None:
    from hqlt_kernels.projections import triton_operator

    tokens = torch.randint(n_tokens, (3 * replicas, 39), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    check(
        lambda weight: (triton_operator.embed(tokens, weight),),
        lambda weight: (operator.embed(tokens, weight),),
        [parameter(replicas, n_tokens, 48)],
    )


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("n_tokens", [3, 20, 40, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_embeddings_gradient_adds_narrow_rows_in_float32(dtype: torch.dtype, n_tokens: int) -> None:
    from hqlt_kernels.projections import triton_operator

    tokens = torch.randint(n_tokens, (4, 50), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    dy = random(4, 50, 80, dtype=dtype)
    (ours,) = triton_operator.run_embed_gradient(tokens, dy, [n_tokens, 80], torch.float32)
    truth = torch.zeros(n_tokens, 80, dtype=torch.float64, device=DEVICE)
    truth.index_add_(0, tokens.flatten(), dy.flatten(0, 1).double())
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_that_takes_rows_is_the_plain_form(dtype: torch.dtype) -> None:
    from hqlt_kernels.projections import triton_operator

    at = torch.randperm(50, generator=torch.Generator().manual_seed(0)).to(DEVICE)[:14:2]
    check(
        lambda x: (triton_operator.take_rows(x, at),), lambda x: (take_rows(x, at),), [random(50, 3, 24, dtype=dtype)]
    )


def test_where_no_rows_are_taken_the_gradient_is_zero() -> None:
    from hqlt_kernels.projections import triton_operator

    x = random(5, 8, dtype=torch.float32).requires_grad_()
    y = triton_operator.take_rows(x, torch.arange(0, device=DEVICE))
    y.sum().backward()
    assert x.grad is not None
    assert not x.grad.any()


@pytest.mark.gpu
@pytest.mark.parametrize("replicas", [1, 3])
def test_the_kernels_give_the_same_bits_every_time(replicas: int) -> None:
    rows, filters = random(96, 39, 400, dtype=torch.bfloat16), parameter(replicas, 384, 4)
    weight = parameter(replicas, 5, 128)
    tokens = torch.randint(5, (96, 39), generator=torch.Generator().manual_seed(0)).cuda()
    at = torch.arange(5, 96 * 39, 39).cuda()

    def whole(rows: Tensor, filters: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        q, k, v, *_ = split_projections(rows, filters, (128, 128, 128, 4, 0, 0, 0), True)
        return q, k, take_rows(v.flatten(0, 1), at), embed(tokens, weight)

    first = results(whole, [rows, filters, weight])
    for _ in range(20):
        assert all(torch.equal(first[name], y) for name, y in results(whole, [rows, filters, weight]).items())
