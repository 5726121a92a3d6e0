"""What the tests of the kernels share."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent))  # for triton_cases.py


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Makes `torch.empty` return NaN, so that a kernel which forgets to write an element it reads fails."""
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def assert_no_worse_than_torch() -> Callable[..., None]:
    def check(fast: Tensor, same_dtype: Tensor, truth: Tensor, *, name: str) -> None:
        """`fast` may be at most twice as far from the float64 `truth` as PyTorch is at the same precision."""
        error = (fast.double() - truth).abs().max()
        allowed = 2 * (same_dtype.double() - truth).abs().max() + 1e-6 * truth.abs().max() + 1e-12
        assert error <= allowed, f"{name}: off by {error:.2e}, allowed is {allowed:.2e}"

    return check
