"""Compile for Hopper, without a GPU, what the operators launch, and print as JSON lines what each kernel needs.

    python tests/kernels/triton_launches.py [fast_weight|window|blend|surroundings] [bfloat16|float32|float16]

The operators run on CPU tensors with memory of no meaning; in place of a launch its kernel is compiled ahead of time,
for the very arguments, warps and stages of that launch. So nothing here repeats how a kernel is launched.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import triton
from hqlt_kernels.adamw.triton_kernels import run_adamw_
from hqlt_kernels.blend import triton_operator as blend
from hqlt_kernels.block_parts import triton_operator as block_parts
from hqlt_kernels.fast_weight import triton_operator as fast_weight
from hqlt_kernels.linear_cross_entropy.triton_kernels import run_softmax_gradient_
from hqlt_kernels.projections import triton_operator as projections
from hqlt_kernels.projections.triton_columns import copy_columns
from hqlt_kernels.window_attention import triton_operator as window_attention
from torch import Tensor, zeros
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

Job = tuple[str, Callable[[], object]]
RULES = ("additive", "decay", "delta", "gated_delta")
TIMINGS = (("synchronous", None), ("delayed_streaming", None), ("delayed_chunk", 8))


class Hopper:
    """The driver of a card that is not there: what is asked of it when a kernel is compiled."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compiled_by(run: Callable[[], object]) -> Iterator[tuple[str, Any]]:
    """The name of each kernel that `run` launches, and the kernel or the error of its compilation."""
    kernels: list[tuple[str, Any]] = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        try:
            kernels.append((self.__name__, launch(self, *args, grid=grid, warmup=True, **options)))
        except Exception as error:  # noqa: BLE001  # whatever a compiler raises is what is reported
            kernels.append((self.__name__, error))

    JITFunction.run = compile_only
    try:
        run()
    finally:
        JITFunction.run = launch
    yield from kernels


def needs(cubin: bytes) -> dict[str, int]:
    """Registers a thread, instructions that spill them, and those of the tensor core."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dump = [str(tool), "-res-usage", "-sass", file.name]
        text = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    return {
        "registers": int(re.search(r"REG:(\d+)", text)[1]),
        "spill_stores": len(re.findall(r"\bSTL\b", text)),
        "tensor_core_instructions": len(re.findall(r"\bHGMMA\b", text)),
    }


def backward(outputs: list[Tensor]) -> None:
    torch.autograd.backward(outputs, [torch.zeros_like(y) for y in outputs])


def memories(
    rule: str, dtype: torch.dtype, n_tokens: int, width: int, grad: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """q, k, v, beta and log_decay of one sequence with two heads."""
    q, k, v = (zeros(1, n_tokens, 2, width, dtype=dtype, requires_grad=grad) for _ in range(3))
    beta = zeros(1, n_tokens, 2, requires_grad=grad) if "delta" in rule else None
    log_decay = zeros(1, n_tokens, 2, requires_grad=grad) if rule in ("decay", "gated_delta") else None
    return q, k, v, beta, log_decay


def fast_weight_jobs(dtype: torch.dtype) -> Iterator[Job]:
    def job(
        rule: str, width: int, *, n_tokens: int = 100, carried: bool = True, feature_map: Any = "silu_l2",
        read_chunk: int | None = None, shift: int = 0, grad: bool = True,
    ) -> Job:  # fmt: skip
        def run() -> None:
            state = zeros(1, 2, width, width, requires_grad=grad) if carried else None
            options = {"feature_map": feature_map, "scale": 0.1, "read_chunk": read_chunk, "shift": shift}
            with torch.set_grad_enabled(grad):
                o, final = fast_weight.fast_weight(*memories(rule, dtype, n_tokens, width, grad), state, **options)
            if grad:
                backward([o, final] if carried else [o])

        what = f"T {n_tokens}, {feature_map}, read_chunk {read_chunk}, shift {shift}"
        return f"{rule}, D {width}, {what}{'' if carried else ', no state'}{'' if grad else ', no gradient'}", run

    for width in (16, 32, 64, 128) if dtype == torch.float32 else (16, 32, 64, 128, 256):
        for rule in RULES:
            yield job(rule, width)
        yield job("gated_delta", width, n_tokens=1, grad=False)
    for rule in ("delta", "gated_delta"):
        yield job(rule, 128, n_tokens=128, carried=False)
        yield job(rule, 128, grad=False)
        yield job(rule, 128, n_tokens=300, shift=64)
        for read_chunk in (16, 50, 100):
            yield job(rule, 128, n_tokens=300, read_chunk=read_chunk)
    for feature_map in ("identity", "elu_plus_one", "relu_l2"):
        yield job("decay", 128, feature_map=feature_map)


def window_jobs(dtype: torch.dtype) -> Iterator[Job]:
    def job(
        width: int, window: int | None, n_tokens: int, *, rope_base: float | None = 1e4, aligned: bool = False,
        packed: bool = False, n_keys: int | None = None, grad: bool = True,
    ) -> Job:  # fmt: skip
        def run() -> None:
            q, k, v = (
                zeros(1, n, 2, width, dtype=dtype, requires_grad=grad)
                for n in (n_tokens, n_keys or n_tokens, n_keys or n_tokens)
            )
            starts = zeros(1, n_tokens, dtype=torch.int32) if packed else None
            with torch.set_grad_enabled(grad):
                o = window_attention.window_attention(
                    q, k, v, window=window, rope_base=rope_base, chunk_aligned=aligned, position=0, scale=0.1,
                    starts=starts,
                )  # fmt: skip
            if grad:
                backward([o])

        what = [k for k, v in {"aligned": aligned, "packed": packed, "no gradient": not grad}.items() if v]
        return ", ".join([f"window {window}, D {width}, T {n_tokens}, rope {rope_base}", *what]), run

    for width in (32, 64, 128):
        for rope_base in (1e4, None):
            for window, n_tokens in ((64, 256), (128, 256), (1024, 2048)):
                yield job(width, window, n_tokens, rope_base=rope_base)
        yield job(width, None, 300)
        yield job(width, 16, 100, aligned=True)
        yield job(width, 100, 300, aligned=True)
        yield job(width, 64, 100, packed=True)
        yield job(width, 64, 1, n_keys=64, grad=False)


def blend_jobs(dtype: torch.dtype) -> Iterator[Job]:
    def job(
        rule: str, width: int, n_tokens: int, timing: Any = "synchronous", fw_chunk: int | None = None,
        gated: bool = True, normaliser: Any = "none", feature_map: Any = "silu_l2",
    ) -> Job:  # fmt: skip
        def run() -> None:
            gate = zeros(1, n_tokens, 2, width, dtype=dtype, requires_grad=True) if gated else None
            outputs = blend.blend(
                *memories(rule, dtype, n_tokens, width), gate, timing=timing, window=8, delay_beta=True,
                fw_chunk=fw_chunk, feature_map=feature_map, kv_rope_base=None if n_tokens <= blend.SHORT else 1e4,
                normaliser=normaliser,
            )  # fmt: skip
            backward([y for y in outputs if y is not None])

        what = f"{timing}, {rule}, D {width}, T {n_tokens}, {feature_map}, normaliser {normaliser}"
        return what if gated else f"{what}, not mixed", run

    for width in (32, 64):
        for rule in RULES:
            for timing, fw_chunk in TIMINGS:
                yield job(rule, width, 40, timing, fw_chunk)
            yield job(rule, width, 40, gated=False)
        if dtype != torch.float32:
            for normaliser in ("time", "heads"):
                yield job("additive", width, 40, normaliser=normaliser, feature_map="elu_plus_one")
    for width in (32, 64, 128):
        for rule in RULES:
            yield job(rule, width, 200)


def surroundings_jobs(dtype: torch.dtype) -> Iterator[Job]:
    def norms(width: int) -> None:
        x, weight = zeros(64, 2, width, dtype=dtype), zeros(width)
        for delta, gate in ((None, None), (x, None), (None, zeros(64, 2 * width, dtype=dtype))):
            block_parts.run_norm(x, delta, weight, gate, 1e-5, dtype)
            for again in (None, dtype):
                delta_dtype = None if delta is None else dtype
                block_parts.run_norm_gradient(x, weight, gate, x, delta, 1e-5, delta_dtype, again)
        block_parts.run_mix_norm(x, x, x, weight, 1e-5, dtype)
        block_parts.run_mix_norm_gradient(x, x, x, weight, x, 1e-5, dtype)

    def swiglu() -> None:
        gate, up, dy = (zeros(64, 128, dtype=dtype) for _ in range(3))
        block_parts.run_swiglu(gate, up)
        block_parts.run_swiglu_gradient(gate, up, dy)
        block_parts.run_swiglu_gradient_(gate, up, dy)

    def split(width: int, activate: bool) -> None:
        widths = (width, width, width, 4, 0, width, width)
        rows = zeros(2, 64, sum(widths) + 12, dtype=dtype, requires_grad=True)
        filters = zeros(3 * width, 4, requires_grad=True)
        backward(list(projections.split_projections(rows, filters, widths, activate)))

    def rows(width: int) -> None:
        backward([projections.take_rows(zeros(64, width, dtype=dtype, requires_grad=True), torch.arange(8))])
        for n_tokens in (3, 64):
            weight = zeros(n_tokens, width, dtype=dtype, requires_grad=True)
            backward([projections.embed(zeros(2, 64, dtype=torch.int64), weight)])
        source, target, before = zeros(128, 2 * width, dtype=dtype)[:, :width], *zeros(2, 128, width, dtype=dtype)
        copy_columns(source, target, before, "copy")
        copy_columns(source, target, before, "activate")
        copy_columns(source, target, before, "slope")

    for width in (64, 128, 1024):
        yield f"norms, {width}", lambda width=width: norms(width)
        yield f"split, {width}", lambda width=width: (split(width, False), split(width, True))
        yield f"rows and columns, {width}", lambda width=width: rows(width)
    yield "swiglu", swiglu
    for n_tokens in (20, 32000):
        logits, targets = zeros(4, n_tokens, dtype=dtype), zeros(4, dtype=torch.int64)
        yield f"cross entropy, {n_tokens}", lambda x=logits, y=targets: run_softmax_gradient_(x, y)
    whole, each = [zeros(2, 4096) for _ in range(4)], [zeros(2) for _ in range(3)]
    yield "adamw", lambda: run_adamw_(*whole, *each, torch.ones(2, dtype=torch.bool), zeros(2, 6), 100)


PARTS: dict[str, Callable[[torch.dtype], Iterator[Job]]] = {
    "fast_weight": fast_weight_jobs,
    "window": window_jobs,
    "blend": blend_jobs,
    "surroundings": surroundings_jobs,
}


def main(parts: list[str], dtypes: list[torch.dtype]) -> None:
    triton.runtime.driver.set_active(Hopper())
    seen = set()
    for part in parts:
        for dtype in dtypes:
            for name, run in PARTS[part](dtype):
                for kernel, compiled in compiled_by(run):
                    row = {"part": part, "dtype": str(dtype).removeprefix("torch."), "case": name, "kernel": kernel}
                    if isinstance(compiled, Exception):
                        print(json.dumps(row | {"error": str(compiled)[:300]}), flush=True)
                    elif compiled.hash not in seen:
                        seen.add(compiled.hash)
                        row |= {"shared_bytes": compiled.metadata.shared} | needs(compiled.asm["cubin"])
                        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    asked = sys.argv[1:]
    with suppress(BrokenPipeError):
        main(
            [x for x in asked if x in PARTS] or list(PARTS),
            [getattr(torch, x) for x in asked if x not in PARTS] or [torch.bfloat16, torch.float32],
        )
