"""What must be equal for a rerun to be equal to the bit, and the process settings that make it so."""

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hqlt_kernels
import hqlt_search_space
import torch
from hqlt_search_space.errors import ResourceError
from hqlt_search_space.trial import Environment, Runtime

import hqlt_trainer
from hqlt_trainer.memory import CUDA_BYTES


def environment(runtime: Runtime) -> Environment:
    """This process, as it is recorded with a result."""
    return Environment(
        python=platform.python_version(),
        torch=torch.__version__,
        hqlt=importlib.metadata.version("hqlt"),
        source_version=source_version(),
        platform=platform.platform(),
        cpu=_cpu_model(),
        instruction_set=torch.backends.cpu.get_cpu_capability(),
        n_threads=runtime.n_threads,
        device=torch.cuda.get_device_name() if runtime.device == "cuda" else "cpu",
    )


@functools.cache
def source_version() -> str:
    """Sixteen hexadecimal digits of the source files that decide a result: search space, kernels and trainer."""
    digest = hashlib.sha256()
    for package in (hqlt_search_space, hqlt_kernels, hqlt_trainer):
        root = Path(package.__path__[0])
        for path in sorted(root.rglob("*.py")):
            content = path.read_bytes()
            digest.update(f"{root.name}/{path.relative_to(root).as_posix()} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()[:16]


@functools.cache
def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@contextlib.contextmanager
def reproducible(runtime: Runtime) -> Iterator[None]:
    """Sets threads and deterministic algorithms for a trial and restores them afterwards.

    On a GPU an operation without a deterministic form only warns: bit-equality is promised on a CPU.

    Raises:
        ResourceError: the runtime asks for a GPU and there is none.
    """
    if runtime.device == "cuda" and not torch.cuda.is_available():
        raise ResourceError(
            f"device 'cuda' was asked for, but torch {torch.__version__} finds no GPU; use device 'cpu'"
        )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    _keep_freed_memory()
    if runtime.device == "cuda":
        _take_no_more_than(runtime.gpu_share)
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic_options: Any = torch.utils.deterministic  # a module whose attribute is a property
    fill = deterministic_options.fill_uninitialized_memory
    torch.set_num_threads(runtime.n_threads)
    torch.use_deterministic_algorithms(True, warn_only=runtime.device == "cuda")
    deterministic_options.fill_uninitialized_memory = False  # it finds bugs in tests, at the price of every empty()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        deterministic_options.fill_uninitialized_memory = fill


def _take_no_more_than(share: float | None) -> None:
    """Bounds what torch takes of the GPU; beyond it this trial is out of memory, and not its neighbour."""
    total: int = torch.cuda.get_device_properties(0).total_memory
    fraction = 1.0 if share is None else max(0.0, share - CUDA_BYTES / total)
    torch.cuda.set_per_process_memory_fraction(fraction)


@functools.cache
def _keep_freed_memory() -> None:
    """Makes glibc keep what a training step frees, for the next step.

    By default blocks above some size go back to the system at once, and getting them again costs a page fault per
    4 KiB: a third of a step of a small model.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent on musl
        if mallopt is not None:
            mmap_threshold, trim_threshold = -3, -1
            mallopt(mmap_threshold, 32 * 2**20)  # the largest that glibc accepts
            mallopt(trim_threshold, 2**31 - 1)


def forget_peak_memory(runtime: Runtime) -> None:
    """Starts a new measurement for `peak_memory_bytes`."""
    if runtime.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(
            OSError
        ):  # not Linux, or /proc is not ours to write: then the peak of the whole process
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(runtime: Runtime) -> int | None:
    """The most memory in use since `forget_peak_memory`.

    On a GPU what torch had allocated. On a CPU the resident set of this process, Python and torch included, so a
    worker that has run a larger trial before does not start at zero. None where the system does not tell.
    """
    if runtime.device == "cuda":
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None
