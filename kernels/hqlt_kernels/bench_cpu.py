"""How much faster the chunked forms are than the plain ones on one CPU thread: `python -m hqlt_kernels.bench_cpu`.

Prints milliseconds of CPU time, the least of several calls taken in turns (other load on the machine makes a call
slower, never faster), forward and forward with backward, in float32. About a minute.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from hqlt_kernels.backends import Forced
from hqlt_kernels.fast_weight import fast_weight
from hqlt_kernels.feature_maps import map_features
from hqlt_kernels.window_attention import window_attention

SECONDS_EACH = 1.5


class Times(NamedTuple):
    forward_ms: float
    both_ms: float


def delta_rule(backend: Forced) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
        o, _ = fast_weight(q, k, v, beta=beta, feature_map="silu_l2", backend=backend)
        return o

    return run


def delta_rule_as_one_matrix(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """The delta rule as autograd sees it best: one triangular system and one masked product of T x T matrices."""
    q, k = map_features(q, "silu_l2").transpose(1, 2), map_features(k, "silu_l2").transpose(1, 2)
    strength = beta.transpose(1, 2).unsqueeze(-1)
    system = torch.eye(q.shape[2]) + (strength * (k @ k.mT)).tril(-1)
    writes: Tensor = torch.linalg.solve_triangular(
        system, strength * v.transpose(1, 2), upper=False, unitriangular=True
    )
    o: Tensor = (q @ k.mT).tril() @ writes * q.shape[-1] ** -0.5
    return o.transpose(1, 2)


def masked_attention(window: int) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        age = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=(age >= 0) & (age < window)).transpose(1, 2)

    return run


def blocked_attention(window: int) -> Callable[..., Tensor]:
    return lambda q, k, v, _: window_attention(q, k, v, window=window)


def measure(functions: Sequence[Callable[..., Tensor]], shape: tuple[int, int, int, int]) -> list[Times]:
    """The least CPU time of each function, called in turns on the same inputs."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, weight = (torch.randn(shape, generator=generator).requires_grad_() for _ in range(4))
    beta = (2 * torch.rand(shape[:3], generator=generator)).requires_grad_()
    times = [Times(float("inf"), float("inf"))] * len(functions)
    end = time.process_time() + SECONDS_EACH * len(functions)
    while time.process_time() < end:
        for i, function in enumerate(functions):
            with torch.no_grad():
                start = time.process_time()
                function(q, k, v, beta)
                forward = time.process_time() - start
            start = time.process_time()
            torch.autograd.grad(function(q, k, v, beta), (q, k, v), weight)
            both = time.process_time() - start
            times[i] = Times(min(times[i].forward_ms, forward * 1e3), min(times[i].both_ms, both * 1e3))
    return times


def report(
    title: str, plain: Callable[..., Tensor], chunked: Callable[..., Tensor], shapes: Sequence[Sequence[int]]
) -> None:
    print(f"\n{title}\n\n| B, T, H, D | plain, ms | chunked, ms | ratio |\n|---|---|---|---|")
    for batch, length, heads, width in shapes:
        slow, fast = measure([plain, chunked], (batch, length, heads, width))
        ratio = f"{slow.forward_ms / fast.forward_ms:.1f} / {slow.both_ms / fast.both_ms:.1f}"
        times = " | ".join(f"{t.forward_ms:.2f} / {t.both_ms:.2f}" for t in (slow, fast))
        print(f"| {batch}, {length}, {heads}, {width} | {times} | {ratio} |", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, float32; forward / forward and backward")
    chunked = delta_rule("chunked")
    report(
        "Delta rule: the token loop against chunks",
        delta_rule("definition"),
        chunked,
        [(2, 1024, 4, 64), (4, 512, 4, 32), (4, 1024, 8, 64)],
    )
    report(
        "Delta rule on short sequences: T x T matrices and autograd against chunks",
        delta_rule_as_one_matrix,
        chunked,
        [(64, 10, 2, 16), (64, 20, 2, 16), (64, 40, 2, 16), (64, 64, 2, 16), (128, 40, 4, 32)],
    )
    for window, shapes in ((8, [(64, 40, 2, 16), (16, 256, 4, 32)]), (64, [(4, 1024, 4, 64)])):
        report(
            f"Attention with a window of {window}: torch's attention under a mask against blocks",
            masked_attention(window),
            blocked_attention(window),
            shapes,
        )


if __name__ == "__main__":
    main()
