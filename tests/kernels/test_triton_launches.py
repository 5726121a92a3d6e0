"""Every launch that the operators make for 16-bit inputs compiles for Hopper, without a GPU. See triton_launches.py."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import hqlt_kernels
import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

SHARED_MEMORY_OF_HOPPER = 227 * 1024

# Registers stored to local memory, the most of any launch of a kernel; the larger of Triton 3.6.0 and 3.7.1, and a few.
MOST_SPILL_STORES = {
    "scan_kernel": 32,
    "reverse_scan_kernel": 14,
    "gradient_kernel": 75,
    "forward_kernel": 25,
    "query_gradient_kernel": 20,
    "key_value_gradient_kernel": 70,
    "short_forward_kernel": 160,
    "short_backward_kernel": 500,
    "split_gradient_kernel": 90,
}


@pytest.fixture(scope="module")
def launches(tmp_path_factory) -> list[dict[str, Any]]:
    """What the compiler says of each launch, in a process of its own: here kernels may be the interpreter's."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    script = [sys.executable, str(Path(__file__).with_name("triton_launches.py")), "bfloat16"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_launch_compiles_for_hopper(launches):
    assert [x for x in launches if "error" in x] == []


def test_every_launch_fits_the_shared_memory_of_a_multiprocessor(launches):
    assert [x for x in launches if x.get("shared_bytes", 0) > SHARED_MEMORY_OF_HOPPER] == []


def test_no_launch_spills_more_registers_than_is_known(launches):
    assert [x for x in launches if x.get("spill_stores", 0) > MOST_SPILL_STORES.get(x["kernel"], 0)] == []


def test_no_kernel_of_the_package_is_left_out(launches):
    modules = [m.name for m in pkgutil.walk_packages(hqlt_kernels.__path__, "hqlt_kernels.") if "triton_" in m.name]
    kernels = {name for m in modules for name in vars(importlib.import_module(m)) if name.endswith("_kernel")}
    assert kernels - {x["kernel"] for x in launches} == set()
