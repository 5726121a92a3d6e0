"""Compile the kernels for compute capability 9.0 and print, as JSON, what they need; for test_triton_compilation.py."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from hqlt_kernels.blend import triton_short_kernels as short
from hqlt_kernels.fast_weight import triton_kernels as fast_weight
from hqlt_kernels.fast_weight.triton_gradient import gradient_kernel
from hqlt_kernels.fast_weight.triton_operator import launches
from hqlt_kernels.window_attention import triton_kernels as window
from hqlt_kernels.window_attention import triton_near_kernels as near
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

FLOAT32 = ("gates", "norms", "initial", "final", "dfinal", "dinitial", "log_decay", "dlog_decay", "lse", "delta")
INTEGERS = ("T", "NT", "n_queries", "n_keys", "n_tokens", "window", "phase")


def report(
    kernel: Any, constants: dict[str, Any], warps: int, stages: int, maxnreg: int | None = None
) -> dict[str, int]:
    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in INTEGERS:
            return "i32"
        if name == "scale":
            return "fp32"
        if name in ("cos", "sin"):
            return "*fp16"
        return "*fp32" if name in FLOAT32 else "*bf16"

    signature = {name: kind(name) for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(signature.values()) if t.startswith("*")}
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": warps, "num_stages": stages, "maxnreg": maxnreg}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = [str(tools / "cuobjdump"), "-res-usage", "-sass", file.name]
        text = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    return {
        "registers": int(re.search(r"REG:(\d+)", text)[1]),
        "spill_stores": len(re.findall(r"\bSTL\b", text)),
        "shared_bytes": compiled.metadata.shared,
        "tensor_core_instructions": len(re.findall(r"\bHGMMA\b", text)),
    }


def main() -> None:
    launch = launches(torch.bfloat16, 128, 128, decay=False)
    tile = {"H": 8, "BT": launch.tile, "STRIDE": launch.tile, "PARTS": 1, "READ": 0, "SHIFT": 0, "MASKED": False}
    delta = tile | {"K": 128, "DELTA": True, "DECAY": False, "PREC": "tf32"}
    mapped = {"FEATURE": 1, "TINY": 1e-15}
    gradient = {"V": 128, "BK": launch.gradient.block, "STAGES": launch.gradient.stages, "ADD": False} | mapped
    gated = launches(torch.bfloat16, 128, 128, decay=True).gradient
    gated_gradient = gradient | {"BK": gated.block, "STAGES": gated.stages, "DECAY": True}
    scan = {"V": 128, "BV": launch.scan.block, "OUTPUT": True, "SAVE": True, "STORED": False}
    scan |= {"INITIAL": False, "initial": None}
    reverse = {"V": 128, "BV": launch.reverse_scan.block, "FINAL": False, "dfinal": None}
    jobs = {
        "prepare delta": (fast_weight.prepare_kernel, delta | mapped | {"STORED": False}, launch.prepare),
        "scan delta": (fast_weight.scan_kernel, delta | scan, launch.scan),
        "reverse_scan delta": (fast_weight.reverse_scan_kernel, delta | reverse, launch.reverse_scan),
        "gradient delta": (gradient_kernel, delta | gradient, launch.gradient),
        "gradient gated_delta": (gradient_kernel, delta | gated_gradient, gated),
    }
    out: dict[str, Any] = {"triton": triton.__version__}
    for name, (kernel, constants, how) in jobs.items():
        out[name] = report(kernel, constants, how.warps, how.stages)
    tiles = {"H": 8, "D": 128, "V": 128, "BT": 64, "ROPE": True, "PREC": "tf32"}
    full = tiles | {"MASKED": False}
    out["near forward"] = report(near.forward_kernel, full | {"ALIGNED": False, "SAVE": True}, 4, 1)
    out["near query_gradient"] = report(near.query_gradient_kernel, full, 4, 1)
    out["near key_value_gradient"] = report(near.key_value_gradient_kernel, full, 4, 1, 168)
    blocks = tiles | {"BN": 64, "N_BLOCKS": 3, "ALIGNED": False}
    out["forward window 128"] = report(window.forward_kernel, blocks, 4, 1, 168)
    for kernel in (window.query_gradient_kernel, window.key_value_gradient_kernel):
        out[kernel.__name__.removesuffix("_kernel") + " window 128"] = report(kernel, blocks, 4, 2)
    heads = {"H": 4, "K": 32, "V": 32, "BT": 64, "READ": 0, "SHIFT": 0, "ALIGNED": False, "MIX": True, "PREC": "tf32"}
    heads |= mapped | {"DELTA": True, "DECAY": False, "log_decay": None}
    out["short forward"] = report(short.short_forward_kernel, heads | {"kv": None, "fw": None}, 4, 1, 168)
    gone = {"dkv": None, "dfw": None, "dlog_decay": None}
    out["short backward"] = report(short.short_backward_kernel, heads | gone, 4, 1)
    json.dump(out, sys.stdout)


if __name__ == "__main__":
    main()
