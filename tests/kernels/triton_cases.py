"""What the tests of the Triton kernels share.

On a machine without a CUDA device the kernels run in Triton's interpreter: their logic, in float32 and float16
(bfloat16 is silently wrong there). On a CUDA device the same tests run the compiled kernels; those marked `gpu` are
there only, in bfloat16 and at sizes that fill the card.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.bfloat16 if CUDA else torch.float16]  # the interpreter gets bfloat16 wrong
Parts = Callable[..., tuple[Tensor, ...]]

if CUDA:  # read when a kernel is decorated, and again when it runs
    os.environ.pop("TRITON_INTERPRET", None)
else:
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from hqlt_kernels.blend import triton_operator as blend_operator  # noqa: E402  # after the variable above
from hqlt_kernels.fast_weight import triton_operator as fast_weight_operator  # noqa: E402
from hqlt_kernels.window_attention import triton_operator as window_operator  # noqa: E402

__all__ = ["CUDA", "DEVICE", "blend_operator", "fast_weight_operator", "window_operator"]


def pairwise(axes: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Few cases in which every two values of different axes meet at least once; the same on every call."""
    names = list(axes)
    missing = {
        (a, x, b, y)
        for a, b in itertools.combinations(range(len(names)), 2)
        for x in range(len(axes[names[a]]))
        for y in range(len(axes[names[b]]))
    }
    while missing:
        case: dict[int, int] = {}
        a, x, b, y = min(missing)
        case[a], case[b] = x, y
        for axis in range(len(names)):
            if axis not in case:
                case[axis] = max(
                    range(len(axes[names[axis]])),
                    key=lambda value: sum(
                        ((o, case[o], axis, value) if o < axis else (axis, value, o, case[o])) in missing for o in case
                    ),
                )
        missing -= {(a, case[a], b, case[b]) for a, b in itertools.combinations(range(len(names)), 2)}
        yield {name: axes[name][case[axis]] for axis, name in enumerate(names)}


def relative_error(x: Tensor, truth: Tensor) -> float:
    """|x - truth| / |truth| in the Frobenius norm; where the truth is zero, |x|."""
    x, truth = x.detach().double(), truth.detach().double()
    size = truth.norm().item()
    return ((x - truth).norm() / (size or 1.0)).item()


def assert_as_good_as_torch(
    results: Mapping[str, Tensor], same_dtype: Mapping[str, Tensor], truth: Mapping[str, Tensor], *, factor: float
) -> None:
    """Each result may be `factor` times as wrong as PyTorch at the same precision; NaN never passes.

    And by two roundings where PyTorch makes none: float32 dots in three tf32 parts drop the smallest product. Where the
    truth is zero (one key has no gradient), what is left over is a rounding of each term.
    """
    wrong = []
    for name, exact in truth.items():
        dtype = results[name].dtype
        rounding = torch.finfo(dtype).eps * (2 if dtype == torch.float32 else 0.25)
        if not exact.any():
            rounding *= 8 * exact.numel() ** 0.5
        error, allowed = relative_error(results[name], exact), relative_error(same_dtype[name], exact)
        if not error <= factor * allowed + rounding:
            wrong.append(f"{name}: off by {error:.1e}, PyTorch by {allowed:.1e}")
    assert not wrong, "; ".join(wrong)


def results(part: Parts, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Outputs of `part` and its gradients, each output with a weight of its own at every element."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = [y for y in part(*inputs) if y.numel()]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(DEVICE) for y in outputs]
    sum((y.double() * w).sum() for y, w in zip(outputs, weights, strict=True)).backward()  # type: ignore[union-attr]
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return found | {f"gradient {i}": x.grad for i, x in enumerate(inputs) if x.grad is not None}


def check(kernel: Parts, plain: Parts, inputs: Sequence[Tensor]) -> None:
    """PyTorch at the same precision is given the same numbers in the types it would be given."""
    truth = results(plain, [x.double() for x in inputs])
    assert_as_good_as_torch(results(kernel, inputs), results(plain, inputs), truth, factor=2)


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def parameter(replicas: int, *shape: int) -> Tensor:
    """Replicas with a gap between them, as slices of a buffer of all parameters have."""
    if replicas == 1:
        return random(*shape, dtype=torch.float32)
    return random(replicas, shape[0] + 1, *shape[1:], dtype=torch.float32)[:, :-1]
