"""Norm and SwiGLU: the plain forms are the textbook's, the kernels are the plain forms."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hqlt_kernels.block_parts import add_rms_norm, linear, operator, products, rms_norm, swiglu
from torch import Tensor
from torch.nn import functional
from triton_cases import DTYPES, Parts, check, pairwise, parameter, random, results

EPSILON = 1e-5


def test_a_stack_is_its_replicas_one_after_the_other() -> None:
    x, delta, gate = torch.randn(3, 6, 5, 8, dtype=torch.float64).unbind()
    norms = torch.randn(2, 8, dtype=torch.float64)

    def halves(part: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        return torch.cat([part(*(t[i * len(t) // 2 :][: len(t) // 2] for t in inputs)) for i in range(2)])

    apart = halves(lambda x, gate, w: rms_norm(x, w[0], EPSILON, gate), x, gate, norms)
    torch.testing.assert_close(rms_norm(x, norms, EPSILON, gate), apart)
    apart = halves(lambda x, delta, w: add_rms_norm(x, delta, w[0], EPSILON)[1], x, delta, norms)
    torch.testing.assert_close(add_rms_norm(x, delta, norms, EPSILON)[1], apart)


NORMS = list(
    pairwise(
        {
            "width": [8, 48, 128],
            "heads": [1, 3],
            "replicas": [1, 2],
            "rows": [1, 5, 40],
            "what": ["alone", "added", "gated"],
            "dtype": DTYPES,
        }
    )
)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", NORMS, ids=str)
def test_the_norms_kernel_is_the_plain_form(case: dict[str, object]) -> None:
    from hqlt_kernels.block_parts import triton_operator

    width, heads, replicas, rows, what, dtype = case.values()
    assert isinstance(width, int)
    assert isinstance(heads, int)
    assert isinstance(replicas, int)
    assert isinstance(rows, int)
    assert isinstance(dtype, torch.dtype)
    x, weight = random(replicas * rows, heads, width, dtype=dtype), parameter(replicas, width)
    if what == "added":
        inputs = [x, random(replicas * rows, heads, width, dtype=DTYPES[1]), weight]

        def kernel(x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            return triton_operator.rms_norm(x, delta, weight, None, EPSILON)

        def plain(x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            total = x + delta.to(x.dtype)
            return operator.rms_norm(total, weight, EPSILON), total
    else:
        gates = random(replicas * rows, heads * width + 3, dtype=dtype)
        inputs = [x, gates, weight]

        def gate(gates: Tensor) -> Tensor | None:
            return gates[:, 3:] if what == "gated" else None

        def kernel(x: Tensor, gates: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            return triton_operator.rms_norm(x, None, weight, gate(gates), EPSILON)[:1]

        def plain(x: Tensor, gates: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            return (operator.rms_norm(x, weight, EPSILON, gate(gates)),)

    check(kernel, plain, inputs)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglus_kernel_is_the_plain_form(dtype: torch.dtype) -> None:
    from hqlt_kernels.block_parts import triton_operator

    def kernel(gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        return (triton_operator.swiglu(gate, up),)

    def plain(gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        return (operator.swiglu(gate, up),)

    check(kernel, plain, list(random(2, 9, 300, dtype=dtype).unbind()))


PRODUCTS = list(
    pairwise(
        {
            "replicas": [1, 3],
            "what": ["alone", "added", "gated heads"],
            "outputs": [(24,), (16, 40)],
            "dtype": DTYPES,
        }
    )
)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_a_product_that_does_not_keep_its_input_is_the_plain_form(case: dict[str, Any]) -> None:
    replicas, what, outputs, dtype = case.values()
    heads = 2 if what == "gated heads" else 1
    x = random(replicas * 5, 7, heads, 16, dtype=dtype)
    other = random(replicas * 5, 7, heads * 16, dtype=dtype)
    norm = parameter(replicas, 16)
    weights = [parameter(replicas, n, heads * 16) for n in outputs]

    def run(product: Parts, x: Tensor, other: Tensor, norm: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        x = x if what == "gated heads" else x.flatten(-2)
        total, outs = product(
            x,
            other if what == "added" else None,
            norm,
            EPSILON,
            [w.to(x.dtype) for w in weights],
            other if what == "gated heads" else None,
        )
        return (total, *outs)

    def by_kernel(x: Tensor, delta: Any, norm: Tensor, epsilon: float, weights: list[Tensor], gate: Any) -> Any:
        total, *outs = products._NormLinear.apply(x, delta, norm, gate, epsilon, *weights)
        return x if delta is None else total, outs

    def plain(x: Tensor, delta: Any, norm: Tensor, epsilon: float, weights: list[Tensor], gate: Any) -> Any:
        total = x if delta is None else x + delta
        y = operator.rms_norm(total, norm, epsilon, gate)
        return total, [linear(y.flatten(2), w) for w in weights]

    check(partial(run, by_kernel), partial(run, plain), [x, other, norm, *weights])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mix_of_two_memories_its_norm_and_its_product_are_the_plain_form(dtype: torch.dtype, replicas: int) -> None:
    inputs = list(random(3, replicas * 5, 7, 2, 24, dtype=dtype).unbind())

    def kernel(kv: Tensor, fw: Tensor, logits: Tensor, norm: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (products._MixNormLinear.apply(kv, fw, logits, norm, EPSILON, weight.to(kv.dtype)),)

    def plain(kv: Tensor, fw: Tensor, logits: Tensor, norm: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        mixed = torch.lerp(kv, fw, logits.sigmoid())
        return (linear(operator.rms_norm(mixed, norm, EPSILON).flatten(2), weight.to(kv.dtype)),)

    check(kernel, plain, [*inputs, parameter(replicas, 24), parameter(replicas, 16, 48)])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_and_its_product_is_the_plain_form(dtype: torch.dtype, replicas: int) -> None:
    gate, up = random(2, replicas * 5, 7, 48, dtype=dtype).unbind()
    weight = parameter(replicas, 16, 48)

    def kernel(gate: Tensor, up: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (products._SwiGLULinear.apply(gate, up, weight.to(gate.dtype)),)

    def plain(gate: Tensor, up: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (linear(functional.silu(gate) * up, weight.to(gate.dtype)),)

    check(kernel, plain, [gate, up, weight])


@pytest.mark.gpu
@pytest.mark.parametrize("replicas", [1, 3])
def test_the_kernels_give_the_same_bits_every_time(replicas: int) -> None:
    x, norm = random(96, 39, 384, dtype=torch.bfloat16), parameter(replicas, 128)

    def whole(x: Tensor, norm: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (part.contiguous() for part in x.chunk(3, -1))
        total, normed = add_rms_norm(q, k, norm, EPSILON)
        return total, swiglu(rms_norm(v, norm, EPSILON, normed), normed)

    first = results(whole, [x, norm])
    for _ in range(20):
        assert all(torch.equal(first[name], y) for name, y in results(whole, [x, norm]).items())
