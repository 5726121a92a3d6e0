"""Logits to losses and gradients, a row a program: read twice, the second time from cache, and written once."""

# What is inside @triton.jit is not Python to a type checker.
# mypy: ignore-errors

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqlt_kernels.triton_device import on_its_device

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e38)  # finite, so that a lane which has seen no logit yet does not subtract infinities


@triton.jit
def softmax_gradient_kernel(logits, targets, losses, V, BLOCK: tl.constexpr):
    """logits [rows, V] -> softmax - one-hot, in place; losses [rows]. Sums are kept lane by lane until the end."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    target = tl.load(targets + row)
    at_target = tl.load(logits + target).to(tl.float32)
    columns = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(logits + start + columns, mask=start + columns < V, other=float("-inf")).to(tl.float32)
        new = tl.maximum(largest, x)
        total = total * tl.exp2((largest - new) * LOG2_E) + tl.exp2((x - new) * LOG2_E)
        largest = new
    peak = tl.max(largest, 0)
    log_total = peak + tl.log2(tl.sum(total * tl.exp2((largest - peak) * LOG2_E), 0)) / LOG2_E
    tl.store(losses + row, log_total - at_target)
    for start in range(0, V, BLOCK):
        here = start + columns
        x = tl.load(logits + here, mask=here < V, other=float("-inf")).to(tl.float32)
        p = tl.exp2((x - log_total) * LOG2_E)
        tl.store(logits + here, tl.where(here == target, p - 1, p).to(logits.dtype.element_ty), mask=here < V)


@on_its_device
def run_softmax_gradient_(logits: Tensor, targets: Tensor) -> Tensor:
    """See `operator.softmax_gradient_`; logits are contiguous."""
    losses = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    n_tokens = logits.shape[-1]
    block = min(4096, max(128, triton.next_power_of_2(n_tokens)))
    softmax_gradient_kernel[(targets.numel(),)](
        logits, targets.contiguous(), losses, n_tokens, BLOCK=block, num_warps=min(8, block // 128)
    )
    return losses
