"""The kernels beside what a user would take instead, on one CUDA device: `python -m hqlt_kernels.bench_gpu`.

Prints one table as it goes and writes it to measured/<card>.json: median milliseconds forward, forward with backward,
and the latter as a CUDA graph; peak memory above the inputs; and how near each comes to the bytes that must move and
the operations that must be done. All implementations of an operator are measured in one run, one after the other, on
the same random inputs. Ratios and rates are of the better of the two times.
Options: `--only WORD` takes the operators whose name contains WORD; `--out FILE`.

A baseline that is not installed, or refuses, is printed with its reason and not written.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hqlt_kernels.backends import Forced
from hqlt_kernels.bench_baselines import (
    ROPE_BASE,
    Elementwise,
    attention,
    composed,
    fla_delta,
    fla_gated,
    fla_linear,
    turned,
)
from hqlt_kernels.blend import blend
from hqlt_kernels.fast_weight import fast_weight
from hqlt_kernels.window_attention import window_attention

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
    Case("gated_delta", 8, 4096, 8, 128),
    Case("additive", 8, 4096, 8, 128),
    Case("decay", 8, 4096, 8, 128),
    Case("window_attention", 8, 4096, 8, 128, 64),
    Case("window_attention", 8, 4096, 8, 128, 1024),
    Case("blend", 8, 4096, 8, 128, 64),
    Case("delta", 16, 2048, 8, 128),
    Case("window_attention", 16, 2048, 8, 128, 64),
    Case("blend", 16, 2048, 8, 128, 64),
    Case("window_attention", 8, 4096, 8, 128, 128),
    Case("window_attention", 8, 4096, 8, 128, 256),
    Case("window_attention", 8, 4096, 8, 128, None),
    Case("delta", 8, 4096, 16, 64),
    Case("gated_delta", 8, 4096, 16, 64),
    Case("window_attention", 8, 4096, 16, 64, 64),
    Case("blend", 8, 4096, 16, 64, 64),
    Case("delta", 1, 65536, 8, 128),
    Case("window_attention", 1, 65536, 8, 128, 64),
    Case("blend", 1, 65536, 8, 128, 64),
)
"""The shapes that are compared with others first."""


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
    """Ours first, then the baselines; a baseline imports what it needs when it is called.

    fla's kernels are tuned for each head width, minutes of compiling, so only at the first.
    """
    w = case.window
    eager, compiled = Elementwise(compiled=False), Elementwise(compiled=True)
    flash_attn_4, torch_flash, flex = attention("flash_attn_4"), attention("torch_flash"), attention("flex_attention")
    if case.op == "window_attention":
        ours: Forced = "auto" if w is None else "triton"
        yield "hqlt", lambda q, k, v: window_attention(q, k, v, window=w, rope_base=ROPE_BASE, backend=ours)
        yield "compiled rotary + flash-attn-4", lambda q, k, v: turned(flash_attn_4, compiled)(q, k, v, w)
        yield "flash-attn-4, no rotary", lambda q, k, v: flash_attn_4(q, k, v, w)
        yield "torch flash, no rotary", lambda q, k, v: torch_flash(q, k, v, w)
        if w in (64, 1024) and case.B == 8 and case.D == 128:  # seconds to compile for each shape
            yield "FlexAttention, no rotary", lambda q, k, v: flex(q, k, v, w)
    elif case.op == "blend":
        yield "hqlt", lambda **x: mixed(case, **x)
        if case.D == 128:
            yield "RoPE + flash-attn-4 + fla, eager mix", composed(flash_attn_4, fla_delta, eager, w)
            yield "RoPE + flash-attn-4 + fla, compiled mix", composed(flash_attn_4, fla_delta, compiled, w)
        yield "RoPE + torch flash + our delta, eager mix", composed(torch_flash, our_fast_weight, eager, w)
    else:
        yield "hqlt", our_fast_weight
        if case.op == "delta" and case.D == 128:
            yield "fla chunk_delta_rule, without SiLU", fla_delta
        if case.op == "additive":
            yield "fla chunk_linear_attn, no feature map", fla_linear
        if case.op == "gated_delta":
            yield "fla chunk_gated_delta_rule, without SiLU", fla_gated


def our_fast_weight(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None = None, log_decay: Tensor | None = None
) -> Tensor:
    return fast_weight(q, k, v, beta=beta, log_decay=log_decay, feature_map="silu_l2", backend="triton")[0]


def mixed(case: Case, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, beta: Tensor) -> Tensor:
    out = blend(
        q, k, v, timing="synchronous", window=case.window, beta=beta, gate=gate, feature_map="silu_l2",
        kv_rope_base=ROPE_BASE, backend="triton",
    )  # fmt: skip
    assert out.mixed is not None
    return out.mixed


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
    graph_ms: float | None
    peak_mib: float
    card: str
    versions: dict[str, str]
    date: str


@dataclass(frozen=True)
class Measured:
    """Medians in milliseconds, and MiB above the inputs."""

    fwd_ms: float
    fwdbwd_ms: float
    graph_ms: float | None
    """fwdbwd_ms as a CUDA graph, which no busy Python can hold up; None where it cannot be captured."""
    peak_mib: float


def measure(run: Implementation, tensors: dict[str, Tensor]) -> Measured:
    """Launched from Python and captured, after a warm-up."""
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
    forward_ms = do_bench(lambda: run(**tensors), warmup=10, rep=60, return_mode="median")
    both_ms = do_bench(both, warmup=10, rep=100, return_mode="median")
    graph = captured(both)
    graph_ms = None if graph is None else do_bench(graph.replay, warmup=10, rep=100, return_mode="median")
    return Measured(forward_ms, both_ms, graph_ms, peak)


def captured(run: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except Exception:  # noqa: BLE001  # a baseline may refuse that too in any way
        torch.cuda.synchronize()
        return None
    return graph


def why_not(reason: Exception) -> str:
    if isinstance(reason, ModuleNotFoundError):
        return f"not installed ({reason.name})"
    return f"refused: {type(reason).__name__}: {str(reason).strip().partition(chr(10))[0][:90]}"


def line(case: Case, name: str, m: Measured, ours_ms: float) -> str:
    _, bytes_both, _, flops_both = case.work()
    ms = best(m)
    bound_ms = max(bytes_both / COPY_TB_PER_S, flops_both / BFLOAT16_TFLOP_PER_S) / 1e9
    rates = f"{bytes_both / ms / 1e9:6.2f} {flops_both / ms / 1e9:7.0f} {100 * bound_ms / ms:5.0f}%"
    graph = "" if m.graph_ms is None else f"{m.graph_ms:.3f}"
    return f"  {name:40s} {m.fwd_ms:8.3f} {m.fwdbwd_ms:8.3f} {graph:>8s} {ms / ours_ms:6.2f}x {m.peak_mib:8.0f} {rates}"


def best(m: Measured) -> float:
    return m.fwdbwd_ms if m.graph_ms is None else min(m.fwdbwd_ms, m.graph_ms)


def versions() -> dict[str, str]:
    """What was measured, and against what; a package that is absent is left out."""
    found = {}
    for package in ("torch", "triton", "fla-core", "flash-attn-4", "nvidia-cutlass-dsl"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return {**found, "source": source_version()}


def source_version() -> str:
    """Sixteen hexadecimal digits of this package's source files."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


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
    print(card, fixed["versions"], fixed["date"], "bfloat16, median ms")
    columns = (
        f"{'fwd':>8s} {'fwd+bwd':>8s} {'graph':>8s} {'ratio':>7s} {'peak MiB':>8s} {'TB/s':>6s} {'TFLOP/s':>7s} bound"
    )
    print(f"  {'':40s} {columns}")
    name = card.lower().replace("nvidia", "").strip().replace(" ", "-")
    out = options.out or Path(__file__).parents[1] / "measured" / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for case in CASES:
        if options.only not in case.op:
            continue
        print(case, flush=True)
        tensors = inputs(case)
        ours_ms = float("nan")
        for name, run in implementations(case):
            try:
                measured = measure(run, tensors)
            except Exception as reason:  # a baseline may refuse in any way; ours may not
                if name == "hqlt":
                    raise
                print(f"  {name:40s} {why_not(reason)}", flush=True)
                continue
            ours_ms = best(measured) if name == "hqlt" else ours_ms
            print(line(case, name, measured, ours_ms), flush=True)
            rows.append(Row(**asdict(case), **asdict(measured), implementation=name, dtype="bfloat16", **fixed))
        out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        del tensors
        torch.cuda.empty_cache()
    print(f"{len(rows)} rows in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
