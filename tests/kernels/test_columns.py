"""Columns as tensors of their own: the kernel is `torch.split`."""

import pytest
import torch
from hqlt_kernels.projections import columns
from torch import Tensor
from triton_cases import CUDA, DEVICE, assert_as_good_as_torch

WIDTHS = (16, 40, 16, 3, 0, 600)
ACTIVATED = 2


def results(split, rows: Tensor, activated: int | None) -> dict[str, Tensor]:
    rows = rows.detach().requires_grad_()
    parts = split(rows, activated, *WIDTHS)
    weights = torch.arange(1, 1 + sum(WIDTHS), dtype=torch.float64, device=DEVICE).sqrt().split(WIDTHS)
    sum((part.double() * w).sum() for part, w in zip(parts, weights, strict=True)).backward()  # type: ignore[union-attr]
    assert rows.grad is not None
    return {f"part {i}": part.detach() for i, part in enumerate(parts) if part.numel()} | {"gradient": rows.grad}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("activated", [None, ACTIVATED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16 if CUDA else torch.float16], ids=str)
@pytest.mark.filterwarnings("ignore:.*deterministic")
def test_the_kernel_is_a_split_and_its_gradient(dtype: torch.dtype, activated: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 7, sum(WIDTHS) + 5, generator=generator).to(DEVICE, dtype)

    def plain(rows: Tensor, activated: int | None, *widths: int) -> list[Tensor]:
        parts = list(rows[..., : sum(widths)].split(widths, -1))
        if activated is not None:
            parts[activated] = torch.nn.functional.silu(parts[activated])
        return parts

    assert_as_good_as_torch(
        results(columns._SplitColumns.apply, rows, activated),
        results(plain, rows, activated),
        results(plain, rows.double(), activated),
        factor=2,
    )


def test_columns_that_nobody_asked_for_get_a_gradient_of_zero() -> None:
    rows = torch.randn(2, 9, device=DEVICE, requires_grad=True)
    sum(part.sum() for part in columns._SplitColumns.apply(rows, None, 4, 3)).backward()
    assert rows.grad is not None
    assert rows.grad.tolist() == [[1.0] * 7 + [0.0] * 2] * 2
