"""A blend as one custom operator: both memories at once, and their mix.

The fast weights' scan is serial in time and leaves most of the card idle; the window's kernel is not and fills it. So
in the forward the two run on two CUDA streams, the scan's with priority (else it waits until the window's kernel has
ended), and join before the mix. In the backward that gains nothing and keeps more in memory. Its last kernel adds the
two branches' gradients of q, k and v. A delay is a shift of the pointers to keys and values: nothing is copied.

Sequences that fit one tile have no scan. Each head is one program forward and one backward (triton_short_kernels.py).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional

from hqlt_kernels.blend import triton_kernels as kernels
from hqlt_kernels.blend import triton_short_kernels as short_kernels
from hqlt_kernels.blend.choice import SHORT, is_short, kernel_dtype
from hqlt_kernels.blend.state import Timing
from hqlt_kernels.fast_weight import triton_operator as fast_weight
from hqlt_kernels.fast_weight.operator import NORMALISERS, Normaliser
from hqlt_kernels.feature_maps import FEATURE_MAPS, FeatureMap
from hqlt_kernels.triton_device import on_its_device
from hqlt_kernels.triton_eager import eager_operator, nobody_looks_on
from hqlt_kernels.triton_replicas import fold_replicas
from hqlt_kernels.window_attention import triton_operator as window_attention


def blend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    gate: Tensor | None,
    *,
    timing: Timing,
    window: int | None,
    delay_beta: bool,
    fw_chunk: int | None,
    feature_map: FeatureMap,
    kv_rope_base: float | None,
    normaliser: Normaliser = "none",
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """kv and fw, or with a gate mixed alone, [B, T, H, V]; whole sequences from position 0, one write a token. Only
    short ones may have a normaliser."""
    out_dtype = v.dtype
    dtype = kernel_dtype(q, k, v)
    n_tokens = q.shape[1]
    shift = 0
    if timing == "delayed_streaming":
        assert window is not None
        shift = min(window, n_tokens)
        if delay_beta:
            beta = None if beta is None else functional.pad(beta, (0, 0, shift, 0))[:, :n_tokens]
            log_decay = None if log_decay is None else functional.pad(log_decay, (0, 0, shift, 0))[:, :n_tokens]
    aligned = timing == "delayed_chunk"
    forward = eager_forward if nobody_looks_on(q) else blend_forward
    kv, fw, mixed, *_ = forward(
        q.to(dtype).contiguous(),
        k.to(dtype).contiguous(),
        v.to(dtype).contiguous(),
        None if beta is None else beta.contiguous(),
        None if log_decay is None else log_decay.contiguous(),
        None if gate is None else gate.to(dtype).contiguous(),
        window_attention.span(window, n_tokens, aligned),
        0.0 if kv_rope_base is None else kv_rope_base,
        aligned,
        FEATURE_MAPS.index(feature_map),
        NORMALISERS.index(normaliser),
        q.shape[-1] ** -0.5,
        fw_chunk or 0 if aligned else 0,
        shift,
        torch.is_grad_enabled(),
    )
    return (kv.to(out_dtype), fw.to(out_dtype), None) if gate is None else (None, None, mixed.to(out_dtype))


@on_its_device
def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    gate: Tensor | None,
    window: int,
    rope_base: float,
    aligned: bool,
    feature: int,
    normaliser: int,
    scale: float,
    read: int,
    shift: int,
    save: bool,
) -> list[Tensor]:
    """kv, fw, mixed (those that are not asked for may be empty); then, unless the sequence is short, what the backward
    needs: what `window_forward` and what `fast_weight_forward` return after their first output."""
    if _is_short(q, v, rope_base):
        return _short_forward(q, k, v, beta, log_decay, gate, window, aligned, feature, normaliser, scale, read, shift)
    assert normaliser == 0, "the scans have no normaliser"
    with _beside(q.device) as join:
        fw, *saved = fast_weight.run_forward(q, k, v, beta, log_decay, None, feature, scale, read, shift, save)
    kv, weights = window_attention.run_forward(q, k, v, None, window, rope_base, aligned, 0, scale, save)
    join()
    mixed = q.new_empty(0)
    if gate is not None:
        mixed = torch.empty_like(kv)
        n = kv.numel()
        kernels.mix_kernel[(triton.cdiv(n, BLOCK),)](kv, fw, gate, mixed, n, BLOCK=BLOCK)
    return [kv, fw, mixed, weights, *saved]


blend_forward = torch.library.custom_op("hqlt::blend_forward", run_forward, mutates_args=())


def run_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    gate: Tensor | None,
    saved: list[Tensor],
    dkv: Tensor | None,
    dfw: Tensor | None,
    dmixed: Tensor | None,
    window: int,
    rope_base: float,
    aligned: bool,
    feature: int,
    normaliser: int,
    scale: float,
    read: int,
    shift: int,
) -> list[Tensor]:
    """Gradients of q, k, v, beta, log_decay and gate (empty where there is none). `saved`: the outputs of
    `blend_forward` but mixed, or nothing if the sequence is short."""
    if not saved:
        return _short_backward(
            q, k, v, beta, log_decay, gate, dkv, dfw, dmixed, window, aligned, feature, normaliser, scale, read, shift
        )
    kv, fw, weights, _final, q_features, k_features, transfer, gates, norms, states, writes = saved
    dgate = q.new_empty(0)
    if gate is not None:
        dkv, dfw, dgate = (torch.empty_like(fw) for _ in range(3))
        n = fw.numel()
        kernels.mix_gradient_kernel[(triton.cdiv(n, BLOCK),)](
            kv, fw, gate, torch.zeros_like(fw) if dmixed is None else dmixed, dkv, dfw, dgate, n, BLOCK=BLOCK
        )
    dkv = torch.zeros_like(fw) if dkv is None else dkv
    dfw = torch.zeros_like(fw) if dfw is None else dfw
    gradients = window_attention.run_backward(q, k, v, kv, weights, dkv, window, rope_base, aligned, 0, scale)
    del dkv  # before the most memory is needed
    dv, dstates, _ = fast_weight.run_reverse_scan(
        q, v, beta, log_decay, q_features, k_features, transfer, gates, dfw, None, read, shift
    )
    _, _, dbeta, dlog_decay = fast_weight.run_gradients(
        q, k, v, beta, log_decay, q_features, k_features, gates, norms, states, writes, fw,
        dfw, dv, dstates, gradients, feature, scale, read, shift,
    )  # fmt: skip
    return [*gradients, dbeta, dlog_decay, dgate]


blend_backward = torch.library.custom_op("hqlt::blend_backward", run_backward, mutates_args=())


BLOCK = 2048
HEADS_ROWS = 64
"""Tokens of a program that adds the gradient of the normaliser over heads."""


def _is_short(q: Tensor, v: Tensor, rope_base: float) -> bool:
    return is_short(q.shape[1], max(q.shape[-1], v.shape[-1]), q.dtype, rope_base > 0)


def _short_constants(
    q: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    aligned: bool,
    feature: int,
    normaliser: int,
    read: int,
    shift: int,
) -> dict[str, Any]:
    return {
        "H": q.shape[2],
        "K": q.shape[-1],
        "V": v.shape[-1],
        "BT": SHORT,  # shorter tiles leave the Hopper tensor core, and are slower
        "READ": read,
        "SHIFT": shift,
        "ALIGNED": aligned,
        "FEATURE": feature,
        "NORMALISER": normaliser,
        "DELTA": beta is not None,
        "DECAY": log_decay is not None,
        "TINY": fast_weight._tiny(q.dtype),
        "PREC": "tf32",
        "num_warps": 4,
        "num_stages": 1,
    }


def _short_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    gate: Tensor | None,
    window: int,
    aligned: bool,
    feature: int,
    normaliser: int,
    scale: float,
    read: int,
    shift: int,
) -> list[Tensor]:
    kv, fw, mixed = outputs = _answers(v, gate)
    short_kernels.short_forward_kernel[(q.shape[0] * q.shape[2],)](
        q, k, v, beta, log_decay, gate, kv, fw, mixed, q.shape[1], window, scale,
        MIX=gate is not None, **_short_constants(q, v, beta, log_decay, aligned, feature, normaliser, read, shift),
        **window_attention.at_most_168_registers(q),
    )  # fmt: skip
    return outputs


def _answers(v: Tensor, gate: Tensor | None) -> list[Tensor]:
    """Room for kv and fw, or for mixed; the others are empty."""
    nothing = [v.new_empty(0) for _ in range(2)]
    if gate is not None:
        return [*nothing, torch.empty_like(v)]
    return [torch.empty_like(v), torch.empty_like(v), v.new_empty(0)]


def _short_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    gate: Tensor | None,
    dkv: Tensor | None,
    dfw: Tensor | None,
    dmixed: Tensor | None,
    window: int,
    aligned: bool,
    feature: int,
    normaliser: int,
    scale: float,
    read: int,
    shift: int,
) -> list[Tensor]:
    gradients = [q.new_empty(0) if x is None else torch.empty_like(x) for x in (q, k, v, beta, log_decay, gate)]
    if gate is None:
        dkv = torch.zeros_like(v) if dkv is None else dkv
        dfw = torch.zeros_like(v) if dfw is None else dfw
    over_heads = normaliser == NORMALISERS.index("heads")
    dnorm = q.new_empty(q.shape[:3], dtype=torch.float32) if over_heads else None
    short_kernels.short_backward_kernel[(q.shape[0] * q.shape[2],)](
        q, k, v, beta, log_decay, gate, dkv, dfw, dmixed, *gradients, dnorm, q.shape[1], window, scale,
        MIX=gate is not None, **_short_constants(q, v, beta, log_decay, aligned, feature, normaliser, read, shift),
    )  # fmt: skip
    if over_heads:
        n_rows = q.shape[0] * q.shape[1]
        short_kernels.heads_gradient_kernel[(triton.cdiv(n_rows, HEADS_ROWS),)](
            q, k, dnorm, gradients[1], q.shape[1], n_rows,
            H=q.shape[2], K=q.shape[-1], ROWS=HEADS_ROWS, SHIFT=shift, FEATURE=feature, num_warps=4,
        )  # fmt: skip
    return gradients


@contextmanager
def _beside(device: torch.device) -> Iterator[Any]:
    """Work launched inside runs beside what is launched after it, until the yielded function is called.

    Tensors made inside may be freed only after that: then the main stream has waited, and order is as if on one stream.
    """
    if device.type != "cuda":
        yield lambda: None
        return
    main = torch.cuda.current_stream(device)
    side = _side_stream(main)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        yield lambda: main.wait_stream(side)


@lru_cache(maxsize=16)
def _side_stream(main: torch.cuda.Stream) -> torch.cuda.Stream:
    """One for each: what was made on it is freed while `main` may still read, and only `main` is waited for."""
    return torch.cuda.Stream(main.device, priority=-1)  # type: ignore[no-untyped-call]  # torch has no types here


@blend_forward.register_fake
def _(q, k, v, beta, log_decay, gate, window, rope_base, aligned, feature, normaliser, scale, read, shift, save):  # type: ignore[no-untyped-def]  # torch calls it
    if _is_short(q, v, rope_base):
        return _answers(v, gate)
    kv, weights = window_attention.window_forward(q, k, v, None, window, rope_base, aligned, 0, scale, save)
    fw, *saved = fast_weight.fast_weight_forward(q, k, v, beta, log_decay, None, feature, scale, read, shift, save)
    return [kv, fw, q.new_empty(0) if gate is None else torch.empty_like(kv), weights, *saved]


@blend_backward.register_fake
def _(q, k, v, beta, log_decay, gate, *_rest):  # type: ignore[no-untyped-def]  # torch calls it
    return [q.new_empty(0) if x is None else torch.empty_like(x) for x in (q, k, v, beta, log_decay, gate)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    kv, fw, _mixed, *saved = output
    ctx.save_for_backward(*inputs[:6], *([kv, fw, *saved] if saved else ()))
    ctx.options = inputs[6:-1]
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grads: Sequence[Tensor | None], run: Callable[..., list[Tensor]] = blend_backward
) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    inputs, saved = tensors[:6], list(tensors[6:])
    given = (None if g is None else g.contiguous() for g in grads[:3])
    out = run(*inputs, saved, *given, *ctx.options)
    return (*(None if x is None else g for x, g in zip(inputs, out, strict=True)), *(None,) * 9)


eager_forward = eager_operator(run_forward, _setup_context, lambda ctx, *grads: _backward(ctx, grads, run_backward), 3)
blend_forward.register_autograd(_backward, setup_context=_setup_context)
fold_replicas(blend_forward)
