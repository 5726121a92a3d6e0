"""The kernels beside what a user would take instead, on one CUDA device: `python -m hqlt_kernels.bench_gpu`.

Prints one table as it goes and writes it to measured/<card>.json: median milliseconds forward and forward with
backward, peak memory above the inputs, and how near each comes to the bytes that must move and the operations that must
be done. All implementations of an operator are measured in one run, one after the other, on the same random inputs.
Options: `--only WORD` takes the operators whose name contains WORD; `--out FILE`.

A baseline that is not installed, or refuses, is printed with its reason and not written.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hqlt_kernels.blend import blend
from hqlt_kernels.fast_weight import fast_weight
from hqlt_kernels.rotary import rotate
from hqlt_kernels.window_attention import window_attention

ROPE_BASE = 10_000.0
TILE = 64
# What one H200 reached on large problems (README.md): a copy's bytes, read and written, and a product of 8192^3.
COPY_TB_PER_S = 4.28
BFLOAT16_TFLOP_PER_S = 740.0

Implementation = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """Shapes of one operator: all inputs [B, T, H, D], except beta and log_decay [B, T, H]."""

    op: str
    B: int
    T: int
    H: int
    D: int
    window: int | None = None

    def __str__(self) -> str:
        window = "" if self.window is None else f" window {self.window}"
        return f"{self.op} B{self.B} T{self.T} H{self.H} D{self.D}{window}"

    def work(self) -> tuple[float, float, float, float]:
        """Bytes and operations that cannot be avoided: forward, and forward with backward. 16-bit inputs.

        Bytes: each input read and each output written once. Operations: by tiles of 64 tokens, without recomputation.
        """
        tokens = self.B * self.T * self.H
        vector = 2 * self.D
        state, local = 2 * self.D**2, 2 * TILE * self.D  # one product with the state, one inside a tile, per token
        if self.op == "window_attention":
            keys = min(self.T if self.window is None else self.window, self.T)
            seen = 2 * self.D * (TILE * (1 + -(-(keys - 1) // TILE)) if self.window else keys / 2)
            return 4 * vector * tokens, 12 * vector * tokens, 2 * seen * tokens, 7 * seen * tokens
        fast = {"delta": (4 * local + 3 * state, 12 * local + 9 * state)}
        fast["gated_delta"] = fast["delta"]
        fast["additive"] = fast["decay"] = (2 * local + 2 * state, 7 * local + 7 * state)
        if self.op != "blend":
            forward, both = fast[self.op]
            return 4 * vector * tokens, 11 * vector * tokens, forward * tokens, both * tokens
        window = Case("window_attention", self.B, self.T, self.H, self.D, self.window).work()
        forward, both = fast["delta"]
        return 5 * vector * tokens, 14 * vector * tokens, forward * tokens + window[2], both * tokens + window[3]


CASES = (
    Case("delta", 8, 4096, 8, 128),
    Case("delta", 16, 2048, 8, 128),
    Case("delta", 1, 65536, 8, 128),
    Case("delta", 8, 4096, 16, 64),
    Case("gated_delta", 8, 4096, 8, 128),
    Case("gated_delta", 8, 4096, 16, 64),
    Case("additive", 8, 4096, 8, 128),
    Case("decay", 8, 4096, 8, 128),
    Case("window_attention", 8, 4096, 8, 128, 64),
    Case("window_attention", 16, 2048, 8, 128, 64),
    Case("window_attention", 1, 65536, 8, 128, 64),
    Case("window_attention", 8, 4096, 16, 64, 64),
    Case("window_attention", 8, 4096, 8, 128, 128),
    Case("window_attention", 8, 4096, 8, 128, 1024),
    Case("blend", 8, 4096, 8, 128, 64),
    Case("blend", 16, 2048, 8, 128, 64),
    Case("blend", 1, 65536, 8, 128, 64),
    Case("blend", 8, 4096, 16, 64, 64),
)


def inputs(case: Case) -> dict[str, Tensor]:
    """Random bfloat16 inputs; every vector-valued one needs a gradient, so that the backward is whole."""
    torch.manual_seed(0)
    shape = (case.B, case.T, case.H)
    names = ("q", "k", "v", *(("gate",) if case.op == "blend" else ()))
    tensors = {n: torch.randn(*shape, case.D, device="cuda", dtype=torch.bfloat16) for n in names}
    if case.op in ("delta", "gated_delta", "blend"):
        tensors["beta"] = torch.rand(shape, device="cuda")
    if case.op in ("decay", "gated_delta"):
        tensors["log_decay"] = -0.1 * torch.rand(shape, device="cuda")
    return {n: x.requires_grad_() for n, x in tensors.items()}


def implementations(case: Case) -> Iterator[tuple[str, Implementation]]:
    """Ours first, then the baselines; a baseline imports what it needs when it is called."""
    if case.op == "window_attention":
        yield (
            "hqlt",
            lambda q, k, v: window_attention(q, k, v, window=case.window, rope_base=ROPE_BASE, backend="triton"),
        )
        yield "rotary + flash-attn-4", lambda q, k, v: flash_attention_4(case, *turned(q, k), v)
        yield "rotary + torch varlen_attn", lambda q, k, v: varlen_attention(case, *turned(q, k), v)
        yield "rotary + FlexAttention", lambda q, k, v: flex_attention(case, *turned(q, k), v)
        yield "torch varlen_attn, no rotary", lambda q, k, v: varlen_attention(case, q, k, v)
    elif case.op == "blend":
        yield "hqlt", lambda q, k, v, gate, beta: mixed(case, q, k, v, gate, beta)
        yield "composed, fla + flash-attn-4", lambda **x: composed(case, flash_attention_4, fla_delta, **x)
        yield "composed, fla + torch varlen_attn", lambda **x: composed(case, varlen_attention, fla_delta, **x)
        yield "composed, our delta + varlen_attn", lambda **x: composed(case, varlen_attention, our_delta, **x)
    else:
        yield "hqlt", lambda q, k, v, **rest: fast_weight(q, k, v, feature_map="silu_l2", backend="triton", **rest)[0]
        if case.op == "delta":
            yield "SiLU + fla chunk_delta_rule", lambda q, k, v, beta: fla_delta(q, k, v, beta)
        if case.op == "additive":
            yield "fla chunk_linear_attn", lambda q, k, v: fla_linear(q, k, v)
        if case.op == "gated_delta":
            yield "SiLU + fla chunk_gated_delta_rule", fla_gated


def mixed(case: Case, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, beta: Tensor) -> Tensor:
    out = blend(
        q, k, v, timing="synchronous", window=case.window, beta=beta, gate=gate, feature_map="silu_l2",
        kv_rope_base=ROPE_BASE, backend="triton",
    )  # fmt: skip
    assert out.mixed is not None
    return out.mixed


def composed(
    case: Case, attend: Callable[..., Tensor], rule: Callable[..., Tensor],
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, beta: Tensor,
) -> Tensor:  # fmt: skip
    """The synchronous blend from parts, with the mix in eager PyTorch."""
    return torch.lerp(attend(case, *turned(q, k), v), rule(q, k, v, beta), gate.sigmoid())


def turned(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return rotate(q, ROPE_BASE), rotate(k, ROPE_BASE)


def our_delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    return fast_weight(q, k, v, beta=beta, feature_map="silu_l2", backend="triton")[0]


def fla_delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    from fla.ops.delta_rule import chunk_delta_rule

    q, k = functional.silu(q), functional.silu(k)
    o: Tensor = chunk_delta_rule(q, k, v, beta.to(q.dtype), use_qk_l2norm_in_kernel=True)[0]
    return o


def fla_gated(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    q, k = functional.silu(q), functional.silu(k)
    o: Tensor = chunk_gated_delta_rule(q, k, v, g=log_decay, beta=beta.to(q.dtype), use_qk_l2norm_in_kernel=True)[0]
    return o


def fla_linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from fla.ops.linear_attn import chunk_linear_attn

    o: Tensor = chunk_linear_attn(q, k, v, normalize=False)[0]
    return o


def flash_attention_4(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn.cute import flash_attn_func

    window = (None, None) if case.window is None else (case.window - 1, 0)
    out = flash_attn_func(q, k, v, causal=True, window_size=window)
    o: Tensor = out[0] if isinstance(out, tuple) else out
    return o


def varlen_attention(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention 2 as it is built into torch."""
    from torch.nn.attention.varlen import varlen_attn

    batch, n_tokens = q.shape[:2]
    starts = torch.arange(0, (batch + 1) * n_tokens, n_tokens, device=q.device, dtype=torch.int32)
    window = (-1, 0) if case.window is None else (case.window - 1, 0)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    out = varlen_attn(q, k, v, starts, starts, n_tokens, n_tokens, window_size=window)
    assert isinstance(out, Tensor)
    return out.reshape(batch, n_tokens, *out.shape[1:])


def flex_attention(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return compiled_flex(case)(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


_COMPILED: dict[Case, Callable[..., Tensor]] = {}


def compiled_flex(case: Case) -> Callable[..., Tensor]:
    """FlexAttention compiled for this case, with its block mask; kept, as both take seconds to make."""
    if case not in _COMPILED:
        from torch.nn.attention.flex_attention import create_block_mask
        from torch.nn.attention.flex_attention import flex_attention as flex

        window = case.T if case.window is None else case.window
        mask = create_block_mask(
            lambda b, h, query, key: (key <= query) & (query - key < window), None, None, case.T, case.T, device="cuda"
        )
        call = torch.compile(flex, dynamic=False)
        _COMPILED[case] = lambda q, k, v: call(q, k, v, block_mask=mask)
    return _COMPILED[case]


@dataclass(frozen=True)
class Row:
    """One line of measured/<card>.json."""

    op: str
    implementation: str
    B: int
    T: int
    H: int
    D: int
    window: int | None
    dtype: str
    fwd_ms: float
    fwdbwd_ms: float
    peak_mib: float
    card: str
    versions: dict[str, str]
    date: str


def measure(run: Implementation, tensors: dict[str, Tensor]) -> tuple[float, float, float]:
    """Median milliseconds forward and forward with backward, and peak MiB above the inputs, after a warm-up."""
    from triton.testing import do_bench

    def both() -> None:
        for x in tensors.values():
            x.grad = None
        torch.autograd.backward(run(**tensors), upstream)

    upstream = torch.randn_like(run(**tensors))
    both()
    for x in tensors.values():
        x.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    forward_ms = do_bench(lambda: run(**tensors), warmup=20, rep=100, return_mode="median")
    both_ms = do_bench(both, warmup=20, rep=200, return_mode="median")
    return forward_ms, both_ms, peak


def line(case: Case, name: str, forward_ms: float, both_ms: float, peak: float, ours_ms: float) -> str:
    _, bytes_both, _, flops_both = case.work()
    bound_ms = max(bytes_both / COPY_TB_PER_S, flops_both / BFLOAT16_TFLOP_PER_S) / 1e9
    rates = f"{bytes_both / both_ms / 1e9:6.2f} {flops_both / both_ms / 1e9:7.0f} {100 * bound_ms / both_ms:5.0f}%"
    return f"  {name:38s} {forward_ms:8.3f} {both_ms:8.3f} {both_ms / ours_ms:6.2f}x {peak:8.0f} {rates}"


def versions() -> dict[str, str]:
    import triton

    found = {"torch": torch.__version__, "triton": triton.__version__}
    for package in ("fla", "flash_attn"):
        if importlib.util.find_spec(package) is not None:
            found[package] = str(getattr(importlib.import_module(package), "__version__", "unknown"))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The kernels beside their baselines on this CUDA device.")
    parser.add_argument("--only", default="", metavar="WORD", help="operators whose name contains WORD")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the table goes, as JSON")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: there is no CUDA device here; `python -m hqlt_kernels.bench_cpu` measures the chunked forms")
        return 2
    card = torch.cuda.get_device_name()
    fixed: dict[str, Any] = {"card": card, "versions": versions(), "date": datetime.now(UTC).date().isoformat()}
    print(card, fixed["versions"], fixed["date"], "median ms of forward and of forward with backward, bfloat16")
    print(f"  {'':38s} {'fwd':>8s} {'fwd+bwd':>8s} {'ratio':>7s} {'peak MiB':>8s} {'TB/s':>6s} {'TFLOP/s':>7s} bound")
    rows: list[Row] = []
    for case in CASES:
        if options.only not in case.op:
            continue
        print(case, flush=True)
        tensors = inputs(case)
        ours_ms = float("nan")
        for name, run in implementations(case):
            try:
                forward_ms, both_ms, peak = measure(run, tensors)
            except Exception as reason:  # a baseline may refuse in any way; ours may not
                if name == "hqlt":
                    raise
                print(f"  {name:38s} refused: {type(reason).__name__}: {str(reason).splitlines()[0][:90]}", flush=True)
                continue
            ours_ms = both_ms if name == "hqlt" else ours_ms
            print(line(case, name, forward_ms, both_ms, peak, ours_ms), flush=True)
            rows.append(Row(**asdict(case), implementation=name, dtype="bfloat16", fwd_ms=forward_ms,
                            fwdbwd_ms=both_ms, peak_mib=peak, **fixed))  # fmt: skip
        del tensors
        torch.cuda.empty_cache()
    name = card.lower().replace("nvidia", "").strip().replace(" ", "-")
    out = options.out or Path(__file__).parents[1] / "measured" / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print(f"{len(rows)} rows in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
