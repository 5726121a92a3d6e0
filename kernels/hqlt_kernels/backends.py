"""Which implementation of an operator runs, and why.

    definition      the readable token loop; any device, any float, slow
    chunked         plain PyTorch on whole chunks of tokens; any device
    triton          our Triton kernels; a Hopper GPU

and for attention, in 16 bits on a GPU, other people's kernels:

    flash_attn_4    the package flash-attn-4
    flash_attn_2    the package flash-attn, where somebody built it
    torch_flash     FlashAttention 2 as it is built into torch
    flex_attention  torch's FlexAttention, compiled for each shape: seconds, so only when forced

A choice is a value with a reason: it is shown by `hqlt doctor` and stored with every result. A backend that was forced
and cannot run is an error, never a silent change to another.
"""

import importlib.metadata
import importlib.util
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch

Operator = Literal[
    "additive", "decay", "delta", "gated_delta", "delta_product", "window_attention", "blend"
]  # the first five are the rules of `fast_weight`
Library = Literal["flash_attn_4", "flash_attn_2", "torch_flash", "flex_attention"]
BackendName = Literal["definition", "chunked", "triton", Library]
Capability = tuple[int, int]
Forced = Literal["auto", BackendName]

OPERATORS: tuple[Operator, ...] = get_args(Operator)
LIBRARIES: tuple[Library, ...] = get_args(Library)
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)

SHORT_WINDOW = 256
"""Most keys for which our attention kernels are taken where flash-attn-4 is installed (kernels/README.md, Measured)."""


class BackendUnavailableError(RuntimeError):
    """A backend was forced that cannot run an operator here; the text says why and what would run."""


@dataclass(frozen=True)
class Choice:
    """`backend` runs `operator` because of `reason`, such as "cpu, float32, head_dim 64"."""

    operator: Operator
    backend: BackendName
    reason: str


def choose_backend(
    operator: Operator,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int | None = None,
    keys: int | None = None,
    libraries: Collection[Library] = LIBRARIES,
    capability: Capability | None = None,
    forced: Forced = "auto",
) -> Choice:
    """The implementation that runs `operator` on tensors of this device, dtype, key width and value width (the same).

    Two arguments concern attention: `keys`, the most keys that a query sees, None for all of a long sequence
    (`keys_seen`); and `libraries`, those that can do what is asked. With a `capability` the GPU asked about need not be
    here.

    `forced="auto"` takes Triton where it can run and the chunked form elsewhere; for attention in 16 bits on a GPU our
    kernels for few keys, flash-attn-4 (or torch's flash attention) for all, and for what lies between flash-attn-4 if
    it is there. A library that is forced runs the attention; a blend is then composed of its parts, and fast weights
    run as they would anyway.

    Raises:
        BackendUnavailableError: the forced backend cannot run here.
        ValueError: no such operator or backend.
    """
    if operator not in OPERATORS:
        raise ValueError(f"no operator {operator!r}; there is {', '.join(OPERATORS)}")
    if forced != "auto" and forced not in BACKENDS:
        raise ValueError(f"no backend {forced!r}; there is auto, {', '.join(BACKENDS)}")
    device = torch.device(device)
    value_dim = head_dim if value_dim is None else value_dim
    here = f"{device.type}, {str(dtype).removeprefix('torch.')}, head_dim {head_dim}"
    if forced in ("definition", "chunked"):
        return Choice(operator, forced, f"forced; {here}")
    if forced in LIBRARIES and operator == "blend":
        return Choice(operator, "chunked", f"of its parts, so that {forced} runs the attention; {here}")
    if forced == "triton" or (forced in LIBRARIES and operator == "window_attention"):
        refusal = _why_not(forced, operator, device, dtype, head_dim, value_dim, capability)
        if refusal is not None:
            raise BackendUnavailableError(
                f"the {forced} backend cannot run {operator} ({here}): {refusal}; use 'auto' or 'chunked'"
            )
        return Choice(operator, forced, f"forced; {here}")
    order: tuple[BackendName, ...] = ("triton",)
    if operator == "window_attention" and device.type == "cuda" and dtype != torch.float32:
        here += ", all keys" if keys is None else f", {keys} keys"
        order = tuple(b for b in _attention_order(keys) if b == "triton" or b in libraries)
    refusals: list[str] = []
    for backend in order:
        refusal = _why_not(backend, operator, device, dtype, head_dim, value_dim, capability)
        if refusal is None:
            return Choice(operator, backend, "; ".join([here, *refusals]))
        refusals.append(f"not {backend}: {refusal}")
    return Choice(operator, "chunked", here if device.type == "cpu" else "; ".join([here, *refusals]))


def keys_seen(window: int | None, n_keys: int) -> int | None:
    """`choose_backend`'s `keys` for a window (None: all) and a sequence."""
    keys = n_keys if window is None else min(window, n_keys)
    return None if keys == n_keys > SHORT_WINDOW else keys


def survey() -> list[Choice]:
    """What runs here by default, per operator: on the GPU if there is one, else on the CPU.

    Attention on a GPU has three lines: a short window, a long one, all keys.
    """
    if not torch.cuda.is_available():
        return [choose_backend(operator, device="cpu", dtype=torch.float32, head_dim=64) for operator in OPERATORS]
    return [
        choose_backend(operator, device="cuda", dtype=torch.bfloat16, head_dim=64, keys=keys)
        for operator in OPERATORS
        for keys in ((64, 1024, None) if operator == "window_attention" else (None,))
    ]


def _attention_order(keys: int | None) -> tuple[BackendName, ...]:
    if keys is None:
        return ("flash_attn_4", "flash_attn_2", "torch_flash", "triton")
    if keys <= SHORT_WINDOW:
        return ("triton", "flash_attn_4", "flash_attn_2", "torch_flash")
    return ("flash_attn_4", "triton", "flash_attn_2", "torch_flash")


# Head dims that tiles of the Triton kernels are made for; rotary halves of 16 columns are the narrowest a dot takes.
_TRITON_HEAD_DIMS = {"window_attention": (32, 64, 128), "blend": (32, 64, 128)}
_TRITON_RULE_HEAD_DIMS = (16, 32, 64, 128, 256)
_TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None
_OLDEST_CAPABILITY = {"flash_attn_4": 9, "flash_attn_2": 8, "torch_flash": 8, "flex_attention": 8}
_PACKAGE = {"flash_attn_4": "flash-attn-4", "flash_attn_2": "flash-attn"}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch.compile asks once and keeps the answer
def _why_not(
    backend: BackendName,
    operator: Operator,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    capability: Capability | None,
) -> str | None:
    """Why `backend` cannot run `operator` here; None if it can."""
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type}"
    if backend == "triton":
        return _why_not_triton(operator, device, dtype, head_dim, value_dim, capability)
    package = _PACKAGE.get(backend)
    if package is not None and not _is_installed(package):
        return f"the package {package} is not installed"
    major, minor = capability or torch.cuda.get_device_capability(device)
    if major < _OLDEST_CAPABILITY[backend]:
        return f"it needs compute capability {_OLDEST_CAPABILITY[backend]} or newer, not {major}.{minor}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    largest = 128 if backend == "flash_attn_4" else 256
    if head_dim != value_dim or head_dim % 16 or head_dim > largest:
        return f"keys and values have one width, a multiple of 16 up to {largest}, not {head_dim} and {value_dim}"
    return None


def _why_not_triton(
    operator: Operator,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    capability: Capability | None,
) -> str | None:
    if not _TRITON_IS_INSTALLED:
        return "the package triton is not installed"
    major, minor = capability or torch.cuda.get_device_capability(device)
    if major != 9:
        return f"the kernels are written and tested for Hopper (compute capability 9), not {major}.{minor}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"there is no kernel for {str(dtype).removeprefix('torch.')}"
    for width in (head_dim, value_dim):
        supported = _TRITON_HEAD_DIMS.get(operator, _TRITON_RULE_HEAD_DIMS)
        if width not in supported:
            return f"head dims are {', '.join(map(str, supported))}, not {width}"
        if width > 128 and dtype == torch.float32:
            return f"float32 tiles of head dim {width} do not fit on a multiprocessor; up to 128 they do"
    return None


@cache
def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
