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
from hqlt_kernels.adamw.triton_kernels import adamw_kernel
from hqlt_kernels.blend import triton_short_kernels as short
from hqlt_kernels.blend.triton_operator import HEADS_ROWS
from hqlt_kernels.block_parts import triton_kernels as block_parts
from hqlt_kernels.fast_weight import triton_kernels as fast_weight
from hqlt_kernels.fast_weight.triton_gradient import gradient_kernel
from hqlt_kernels.fast_weight.triton_operator import launches
from hqlt_kernels.projections import triton_kernels as projections
from hqlt_kernels.projections import triton_operator as projections_operator
from hqlt_kernels.window_attention import triton_kernels as window
from hqlt_kernels.window_attention import triton_near_kernels as near
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

FLOAT32 = ("gates", "norms", "initial", "final", "dfinal", "dinitial", "log_decay", "dlog_decay", "lse", "delta")
INTEGERS = ("T", "NT", "n_queries", "n_keys", "n_tokens", "window", "phase")


def report(
    kernel: Any,
    constants: dict[str, Any],
    warps: int,
    stages: int,
    maxnreg: int | None = None,
    kinds: dict[str, str] | None = None,
) -> dict[str, int]:
    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if kinds is not None and name in kinds:
            return kinds[name]
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
        "overwritten_operands": overwritten_operands(text),
    }


def overwritten_operands(sass: str) -> int:
    """Instructions that write a register which a product, begun and not yet waited for, still reads as an operand.

    Such code has been wrong on Hopper (triton pull requests 11781 and 11854). In the order in which it stands.
    """
    found, read = 0, set()
    for line in re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?(\S.*?) *;", sass, re.MULTILINE):
        operation, *operands = re.split(r",? +", line)
        registers = [int(x[1]) if (x := re.match(r"R(\d+)", operand)) else None for operand in operands]
        if operation == "WARPGROUP.DEPBAR.LE" and operands[-1] == "0x0":
            read = set()
        elif operation.startswith("HGMMA"):
            if registers[1] is not None:
                read |= set(range(registers[1], registers[1] + 4))
        elif registers and registers[0] is not None:  # what is written stands first; stores and waits write none
            width = 4 if re.search(r"128|x4|\.M88\.4|^HMMA", operation) else 2 if re.search("64|WIDE", operation) else 1
            found += not read.isdisjoint(range(registers[0], registers[0] + width))
    return found


def main() -> None:
    launch = launches(torch.bfloat16, 128, 128)
    tile = {"H": 8, "BT": launch.tile, "STRIDE": launch.tile, "PARTS": 1, "READ": 0, "SHIFT": 0, "MASKED": False}
    delta = tile | {"K": 128, "DELTA": True, "DECAY": False, "PREC": "tf32"}
    mapped = {"FEATURE": 1, "TINY": 1e-15}
    gradient = {"V": 128, "BK": launch.gradient.block, "STAGES": launch.gradient.stages, "ADD": False} | mapped
    more = gradient | {"BK": launch.gradient_and_more.block, "STAGES": launch.gradient_and_more.stages}
    scan = {"V": 128, "BV": launch.scan.block, "OUTPUT": True, "SAVE": True, "STORED": False}
    scan |= {"INITIAL": False, "initial": None}
    reverse = {"V": 128, "BV": launch.reverse_scan.block, "FINAL": False, "dfinal": None}
    jobs = {
        "prepare delta": (fast_weight.prepare_kernel, delta | mapped | {"STORED": False}, launch.prepare),
        "scan delta": (fast_weight.scan_kernel, delta | scan, launch.scan),
        "reverse_scan delta": (fast_weight.reverse_scan_kernel, delta | reverse, launch.reverse_scan),
        "gradient delta": (gradient_kernel, delta | gradient, launch.gradient),
        "gradient delta, added": (gradient_kernel, delta | more | {"ADD": True}, launch.gradient_and_more),
        "gradient gated_delta": (gradient_kernel, delta | more | {"DECAY": True}, launch.gradient_and_more),
    }
    out: dict[str, Any] = {"triton": triton.__version__}
    for name, (kernel, constants, how) in jobs.items():
        out[name] = report(kernel, constants, how.warps, how.stages)
    tiles = {"H": 8, "D": 128, "V": 128, "BT": 64, "ROPE": True, "PREC": "tf32"}
    full = tiles | {"MASKED": False}
    seen = {"ALIGNED": False, "PACKED": False, "starts": None, "SAVE": True}
    out["near forward"] = report(near.forward_kernel, full | seen, 4, 1, 168)
    out["near query_gradient"] = report(near.query_gradient_kernel, full, 4, 1, 168)
    out["near key_value_gradient"] = report(near.key_value_gradient_kernel, full, 4, 1, 168)
    blocks = tiles | {"BN": 64, "N_BLOCKS": 3, "ALIGNED": False}
    out["forward window 128"] = report(window.forward_kernel, blocks, 4, 1, 168)
    for kernel in (window.query_gradient_kernel, window.key_value_gradient_kernel):
        out[kernel.__name__.removesuffix("_kernel") + " window 128"] = report(kernel, blocks, 4, 2)
    heads = {"H": 4, "K": 32, "V": 32, "BT": 64, "READ": 0, "SHIFT": 0, "ALIGNED": False, "MIX": True, "PREC": "tf32"}
    heads |= mapped | {"DECAY": False, "log_decay": None}
    gone = {"dkv": None, "dfw": None, "dlog_decay": None}
    delta = {"DELTA": True, "NORMALISER": 0}
    out["short forward"] = report(short.short_forward_kernel, heads | delta | {"kv": None, "fw": None}, 4, 1, 168)
    out["short backward"] = report(short.short_backward_kernel, heads | delta | gone | {"dnorm": None}, 4, 1)
    linear = {"DELTA": False, "beta": None, "FEATURE": 2}
    for name, normaliser, unused in (("time", 1, {"dnorm": None}), ("heads", 2, {})):
        over = heads | linear | {"NORMALISER": normaliser}
        out[f"short forward, {name}"] = report(short.short_forward_kernel, over | {"kv": None, "fw": None}, 4, 1, 168)
        over |= gone | unused | {"dbeta": None}
        out[f"short backward, {name}"] = report(short.short_backward_kernel, over, 4, 1, kinds={"dnorm": "*fp32"})
    json.dump(out | passes(), sys.stdout)


def passes() -> dict[str, Any]:
    """The kernels that only move bytes."""
    strides = ("per_replica", "stride", "filter_stride", "weight_stride", "gate_stride", "n_decayed", "n")
    parameters = ("filters", "dfilters", "weight", "dweight")
    kinds = dict.fromkeys(strides, "i32") | dict.fromkeys(parameters, "*fp32") | {"tokens": "*i64"}
    parts = {"W0": 128, "W1": 128, "W2": 128, "W3": 4, "W4": 0, "W5": 128, "W6": 128, "TAPS": 4, "ACTIVATE": True}
    parts |= {"BLOCK": projections_operator.BLOCK, "FILTERED": 384 // projections_operator.BLOCK}
    tile = {"EPSILON": 1e-5, "D": 128, "H": 1, "ROWS": 16, "BLOCK": 128, "ADD": True, "GATE": False, "gate": None}
    tile_gradient = tile | {"HAS_DTOTAL": True, "AGAIN": True, "dgate": None}
    embedding = {"D": 128, "BLOCK": 64, "ROWS": 32}
    table = dict.fromkeys(adamw_kernel.arg_names, "*fp32") | {"n": "i32", "n_decayed": "i32", "takes": "*i1"}
    of_keys = {"H": 4, "K": 32, "ROWS": HEADS_ROWS, "SHIFT": 0, "FEATURE": 2}
    jobs: dict[str, tuple[Any, dict[str, Any], dict[str, str]]] = {
        "heads gradient": (short.heads_gradient_kernel, of_keys, {"n_rows": "i32", "dnorm": "*fp32"}),
        "split": (projections.split_kernel, parts | {"ROWS": projections_operator.SPLIT_ROWS, "SAVE": True}, kinds),
        "split gradient": (
            projections.split_gradient_kernel,
            parts | {"ROWS": projections_operator.GRADIENT_ROWS, "UNUSED": 12},
            kinds,
        ),
        "norm": (block_parts.norm_kernel, tile, kinds),
        "norm gradient": (block_parts.norm_gradient_kernel, tile_gradient, kinds),
        "embed": (projections.embed_kernel, embedding | {"BLOCK": 128}, kinds),
        "embed gradient": (projections.embed_gradient_kernel, embedding | {"V": 3, "V_PADDED": 16}, kinds),
        "embed gradient, 64": (projections.embed_gradient_kernel, embedding | {"V": 64, "V_PADDED": 64}, kinds),
        "adamw": (adamw_kernel, {"BLOCK": 1024}, table),
    }
    return {name: report(kernel, sizes, 4, 3, kinds=kinds) for name, (kernel, sizes, kinds) in jobs.items()}


if __name__ == "__main__":
    main()
