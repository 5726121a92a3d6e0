"""Which implementation of an operator runs, and why.

    definition   the readable token loop; any device, any float, slow
    chunked      plain PyTorch on whole chunks of tokens; any device
    triton       Triton kernels; a CUDA device

A choice is a value with a reason: it is shown by `hqlt doctor` and stored with every result. A backend that was forced
and cannot run is an error, never a silent change to another.
"""

import importlib.util
from dataclasses import dataclass
from typing import Literal, get_args

import torch

Operator = Literal[
    "additive", "decay", "delta", "gated_delta", "delta_product", "window_attention", "blend"
]  # the first five are the rules of `fast_weight`
BackendName = Literal["definition", "chunked", "triton"]
Forced = Literal["auto", "definition", "chunked", "triton"]

OPERATORS: tuple[Operator, ...] = get_args(Operator)
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)


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
    forced: Forced = "auto",
) -> Choice:
    """The implementation that runs `operator` on tensors of this device, dtype, key width and value width (the same).

    `forced="auto"` takes Triton where it can run and the chunked form elsewhere.

    Raises:
        BackendUnavailableError: the forced backend cannot run here.
        ValueError: no such operator or backend.
    """
    if operator not in OPERATORS:
        raise ValueError(f"no operator {operator!r}; there is {', '.join(OPERATORS)}")
    device = torch.device(device)
    here = f"{device.type}, {str(dtype).removeprefix('torch.')}, head_dim {head_dim}"
    if forced in ("definition", "chunked"):
        return Choice(operator, forced, f"forced; {here}")
    refusal = _why_not_triton(operator, device, dtype, head_dim, head_dim if value_dim is None else value_dim)
    if forced == "triton":
        if refusal is not None:
            raise BackendUnavailableError(
                f"the triton backend cannot run {operator} ({here}): {refusal}; use 'auto' or 'chunked'"
            )
        return Choice(operator, "triton", f"forced; {here}")
    if forced != "auto":
        raise ValueError(f"no backend {forced!r}; there is auto, {', '.join(BACKENDS)}")
    if refusal is None:
        if operator == "window_attention" and dtype != torch.float32:
            here += "; where every query sees all keys, PyTorch's flash attention"
        return Choice(operator, "triton", here)
    return Choice(operator, "chunked", here if device.type == "cpu" else f"{here}; not triton: {refusal}")


def survey() -> list[Choice]:
    """What runs here by default, per operator: on the GPU if there is one, else on the CPU."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    return [choose_backend(operator, device=device, dtype=dtype, head_dim=64) for operator in OPERATORS]


# Head dims that tiles of the Triton kernels are made for; rotary halves of 16 columns are the narrowest a dot takes.
_TRITON_HEAD_DIMS = {"window_attention": (32, 64, 128), "blend": (32, 64, 128)}
_TRITON_RULE_HEAD_DIMS = (16, 32, 64, 128)
_TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch.compile asks once and keeps the answer
def _why_not_triton(
    operator: Operator, device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int
) -> str | None:
    """Why no Triton kernel can run `operator` here; None if one can."""
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type}"
    if not _TRITON_IS_INSTALLED:
        return "the package triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != 9:
        return (
            f"the kernels are written and tested for Hopper (compute capability 9), not {capability[0]}.{capability[1]}"
        )
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"there is no kernel for {str(dtype).removeprefix('torch.')}"
    for width in (head_dim, value_dim):
        supported = _TRITON_HEAD_DIMS.get(operator, _TRITON_RULE_HEAD_DIMS)
        if width not in supported:
            return f"head dims are {', '.join(map(str, supported))}, not {width}"
    return None
