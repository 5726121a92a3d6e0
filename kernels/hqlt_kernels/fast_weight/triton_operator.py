"""The fast-weight rules on Triton kernels, as custom operators with autograd and vmap. See triton_kernels.py.

`hqlt::fast_weight_forward` also returns what the backward needs; `hqlt::fast_weight_backward` is its gradient. Both are
opaque to `torch.compile`, which sees their fake rules; under `torch.vmap` the replica axis is folded into the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from hqlt_kernels.fast_weight import triton_kernels as kernels
from hqlt_kernels.fast_weight.triton_gradient import gradient_kernel
from hqlt_kernels.feature_maps import FEATURE_MAPS, FeatureMap
from hqlt_kernels.triton_device import on_its_device
from hqlt_kernels.triton_eager import eager_operator, nobody_looks_on
from hqlt_kernels.triton_replicas import fold_replicas


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched: columns of V (or K) worked on at a time, warps, and stages of the load pipeline."""

    block: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Launches:
    """One launch for each kernel, and the rows of a tile.

    16-bit inputs at D = 128 (H200, B8 T4096 H8; kernels/README.md): the scan needs three stages, as it is bound by the
    latency of its loads; the reverse scan holds more and fits two with half the columns. The gradient kernel fits twice
    on a multiprocessor; where it also has decay or gradients to add, with narrower slices. Wider heads take eight warps
    where whole rows are held. float32 takes short tiles and narrow slices: it multiplies in three tf32 parts, from
    registers.
    """

    tile: int
    prepare: Launch
    scan: Launch
    reverse_scan: Launch
    gradient: Launch
    gradient_and_more: Launch


def launches(dtype: torch.dtype, key_dim: int, value_dim: int) -> Launches:
    """The launches for inputs of `dtype` with these head dims."""
    if dtype == torch.float32:
        return Launches(
            tile=32,
            prepare=Launch(key_dim, 4, 1),
            scan=Launch(16, 4, 2 if key_dim < 128 else 1),
            reverse_scan=Launch(16, 4, 1),
            gradient=Launch(16, 4, 1),
            gradient_and_more=Launch(16, 4, 1),
        )
    if max(key_dim, value_dim) > 128:
        return Launches(
            tile=64,
            prepare=Launch(key_dim, 8, 1),
            scan=Launch(min(value_dim, 32), 4, 2),
            reverse_scan=Launch(min(value_dim, 32), 4, 2),
            gradient=Launch(min(key_dim, 32), 8, 2),
            gradient_and_more=Launch(min(key_dim, 32), 8, 2),
        )
    return Launches(
        tile=64,
        prepare=Launch(key_dim, 4, 1),
        scan=Launch(min(value_dim, 64), 4, 3),
        reverse_scan=Launch(min(value_dim, 32), 4, 2),
        gradient=Launch(min(key_dim, 32), 4, 2),
        gradient_and_more=Launch(16, 4, 3),
    )


@dataclass(frozen=True)
class Tiling:
    """How T tokens are cut into tiles; the words are those of triton_kernels.py."""

    n_tiles: int
    stride: int
    parts: int

    @classmethod
    def of(cls, n_tokens: int, tile: int, read: int) -> "Tiling":
        """Tiles of at most `tile` tokens whose borders are also borders of the blocks of `read` tokens (0: none)."""
        if read == 0:
            return cls(triton.cdiv(n_tokens, tile), tile, 1)
        if read <= tile:
            stride = tile // read * read
            return cls(triton.cdiv(n_tokens, stride), stride, 1)
        parts = triton.cdiv(read, tile)
        return cls(triton.cdiv(n_tokens, read) * parts, read, parts)


def fast_weight(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    *,
    feature_map: FeatureMap,
    scale: float,
    read_chunk: int | None,
    shift: int = 0,
) -> tuple[Tensor, Tensor]:
    """The recurrence of `definition.fast_weight`. With `shift`, o_t has seen the keys and values up to t - shift only,
    each written with beta and log_decay of the token `shift` later.

    Dots take operands in the dtype of the inputs and add in float32; float32 inputs are multiplied in three tf32 parts.
    The state is float32. One token without gradients takes a kernel of its own, in float32 throughout. Raises nothing:
    `choose_backend` has refused what does not fit.
    """
    if q.shape[1] == 1 and not torch.is_grad_enabled() and not shift:
        o, final = fast_weight_step(
            q.contiguous(),
            (k if k.dim() == 5 else k.unsqueeze(2)).contiguous(),
            (v if v.dim() == 5 else v.unsqueeze(2)).contiguous(),
            None if beta is None else beta.contiguous(),
            None if log_decay is None else log_decay.contiguous(),
            None if initial_state is None else initial_state.float().contiguous(),
            FEATURE_MAPS.index(feature_map),
            scale,
            read_chunk is not None,
        )
        return o, final
    out_dtype = v.dtype
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
    if k.dim() == 5:  # a delta product is a delta rule with n writes a token, read after the last, decayed at the first
        n_writes = k.shape[2]
        q = torch.nn.functional.pad(q.unsqueeze(2), (0, 0, 0, 0, n_writes - 1, 0)).flatten(1, 2)
        k, v = k.flatten(1, 2), v.flatten(1, 2)
        beta = None if beta is None else beta.flatten(1, 2)
        if log_decay is not None:
            log_decay = torch.nn.functional.pad(log_decay.unsqueeze(2), (0, 0, 0, n_writes - 1)).flatten(1, 2)
        read_chunk = None if read_chunk is None else read_chunk * n_writes
        shift *= n_writes
    else:
        n_writes = 1
    forward = eager_forward if nobody_looks_on(q) else fast_weight_forward
    o, final, *_ = forward(
        q.to(dtype).contiguous(),
        k.to(dtype).contiguous(),
        v.to(dtype).contiguous(),
        None if beta is None else beta.contiguous(),
        None if log_decay is None else log_decay.contiguous(),
        None if initial_state is None else initial_state.float().contiguous(),
        FEATURE_MAPS.index(feature_map),
        scale,
        0 if read_chunk is None else read_chunk,
        shift,
        torch.is_grad_enabled(),
    )
    return o[:, n_writes - 1 :: n_writes].to(out_dtype), final


@on_its_device
def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    feature: int,
    scale: float,
    read: int,
    shift: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, final state, and for the backward: features of q and k, T, gates, states, writes (empty where not needed)."""
    out = _forward_outputs(q, k, v, beta, log_decay, read, save)
    o, final, q_features, k_features, transfer, gates, norms, states, writes = out
    batch, n_tokens, n_heads, key_dim = q.shape
    launch = launches(q.dtype, key_dim, v.shape[-1])
    tiling = Tiling.of(n_tokens, launch.tile, read)
    q_scaled = q_features if save else torch.empty_like(q)
    k_mapped = k_features if save else torch.empty_like(k)
    if not save:
        transfer, gates, norms = _intermediates(q, beta, log_decay, launch, tiling)
    shape = _constants(q, beta, log_decay, launch, tiling, read, shift)
    stored = log_decay is not None and tiling.parts == 1 and tiling.stride > read
    local = q.new_empty(batch * n_heads if stored else 0, tiling.n_tiles, launch.tile, launch.tile)
    kernels.prepare_kernel[(tiling.n_tiles * batch * n_heads,)](
        q, k, beta, log_decay, q_scaled, k_mapped, transfer, local, gates, norms, n_tokens, tiling.n_tiles, scale,
        K=key_dim, FEATURE=feature, TINY=_tiny(q.dtype), STORED=stored, **shape,
        num_warps=launch.prepare.warps, num_stages=launch.prepare.stages,
    )  # fmt: skip
    kernels.scan_kernel[(v.shape[-1] // launch.scan.block * batch * n_heads,)](
        q_scaled, k_mapped, v, transfer, local, gates, o, states, writes, initial_state, final,
        n_tokens, tiling.n_tiles,
        K=key_dim, V=v.shape[-1], BV=launch.scan.block, OUTPUT=True, SAVE=save, STORED=stored,
        INITIAL=initial_state is not None,
        **shape, num_warps=launch.scan.warps, num_stages=launch.scan.stages,
    )  # fmt: skip
    return out


fast_weight_forward = torch.library.custom_op("hqlt::fast_weight_forward", run_forward, mutates_args=())


def run_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    q_features: Tensor,
    k_features: Tensor,
    transfer: Tensor,
    gates: Tensor,
    norms: Tensor,
    states: Tensor,
    writes: Tensor,
    o: Tensor,
    do: Tensor,
    dfinal: Tensor | None,
    feature: int,
    scale: float,
    read: int,
    shift: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta, log_decay and the initial state (empty where there is none)."""
    dv, dstates, dinitial = run_reverse_scan(
        q, v, beta, log_decay, q_features, k_features, transfer, gates, do, dfinal, read, shift
    )
    dq, dk, dbeta, dlog_decay = run_gradients(
        q, k, v, beta, log_decay, q_features, k_features, gates, norms, states, writes, o,
        do, dv, dstates, None, feature, scale, read, shift,
    )  # fmt: skip
    if shift:  # the last tokens are never written
        dk[:, -shift:].zero_()
        dv[:, -shift:].zero_()
    return dq, dk, dv, dbeta, dlog_decay, dinitial


fast_weight_backward = torch.library.custom_op("hqlt::fast_weight_backward", run_backward, mutates_args=())


def run_reverse_scan(
    q: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    q_features: Tensor,
    k_features: Tensor,
    transfer: Tensor,
    gates: Tensor,
    do: Tensor,
    dfinal: Tensor | None,
    read: int,
    shift: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dv (the last `shift` tokens are not set), the gradients of the states after each tile, and dinitial."""
    batch, n_tokens, n_heads, key_dim = q.shape
    value_dim = v.shape[-1]
    launch = launches(q.dtype, key_dim, value_dim)
    tiling = Tiling.of(n_tokens, launch.tile, read)
    dv = torch.empty_like(v)
    dstates = q.new_empty(batch * n_heads, tiling.n_tiles, key_dim, value_dim)
    dinitial = q.new_empty(batch, n_heads, key_dim, value_dim, dtype=torch.float32)
    kernels.reverse_scan_kernel[(value_dim // launch.reverse_scan.block * batch * n_heads,)](
        q_features, k_features, transfer, gates, do, dfinal, dv, dstates, dinitial, n_tokens, tiling.n_tiles,
        K=key_dim, V=value_dim, BV=launch.reverse_scan.block, FINAL=dfinal is not None,
        **_constants(q, beta, log_decay, launch, tiling, read, shift),
        num_warps=launch.reverse_scan.warps, num_stages=launch.reverse_scan.stages,
    )  # fmt: skip
    return dv, dstates, dinitial


def run_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    q_features: Tensor,
    k_features: Tensor,
    gates: Tensor,
    norms: Tensor,
    states: Tensor,
    writes: Tensor,
    o: Tensor,
    do: Tensor,
    dv: Tensor,
    dstates: Tensor,
    add_to: tuple[Tensor, Tensor, Tensor] | None,
    feature: int,
    scale: float,
    read: int,
    shift: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dbeta and dlog_decay. `add_to`: gradients of q, k and v that these (and dv) are added to, in place."""
    batch, n_tokens, n_heads, key_dim = q.shape
    value_dim = v.shape[-1]
    launch = launches(q.dtype, key_dim, value_dim)
    tiling = Tiling.of(n_tokens, launch.tile, read)
    dq, dk, dv_sum = (torch.empty_like(q), torch.empty_like(k), dv) if add_to is None else add_to
    dbeta = q.new_empty(0) if beta is None else torch.empty_like(beta)
    dlog_decay = q.new_empty(0) if log_decay is None else torch.empty_like(log_decay)
    how = launch.gradient if log_decay is None and add_to is None else launch.gradient_and_more
    gradient_kernel[(tiling.n_tiles * batch * n_heads,)](
        q, k, q_features, k_features, v, beta, gates, norms, o, do, dv, writes, states, dstates,
        dq, dk, dv_sum, dbeta, dlog_decay, n_tokens, tiling.n_tiles, scale,
        K=key_dim, V=value_dim, BK=how.block, STAGES=how.stages,
        FEATURE=feature, TINY=_tiny(q.dtype), ADD=add_to is not None,
        **_constants(q, beta, log_decay, launch, tiling, read, shift),
        num_warps=how.warps,
    )  # fmt: skip
    return dq, dk, dbeta, dlog_decay


@torch.library.custom_op("hqlt::fast_weight_step", mutates_args=())
@on_its_device
def fast_weight_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor | None,
    feature: int,
    scale: float,
    old: bool,
) -> tuple[Tensor, Tensor]:
    """o [B, 1, H, V] and the next state. q [B, 1, H, K]; k, v [B, 1, n, H, ...]. `old`: o reads the state before."""
    batch, _, n_heads, key_dim = q.shape
    value_dim = v.shape[-1]
    o = v.new_empty(batch, 1, n_heads, value_dim)
    final = q.new_empty(batch, n_heads, key_dim, value_dim, dtype=torch.float32)
    block = min(value_dim, 32)
    kernels.step_kernel[(value_dim // block * batch * n_heads,)](
        q, k, v, beta, log_decay, state, o, final, scale,
        N=k.shape[2], H=n_heads, K=key_dim, V=value_dim, BV=block, FEATURE=feature, DELTA=beta is not None,
        DECAY=log_decay is not None, INITIAL=state is not None, OLD=old, num_warps=4, num_stages=1,
    )  # fmt: skip
    return o, final


@fast_weight_step.register_fake
def _(q, k, v, *_rest):  # type: ignore[no-untyped-def]  # torch calls it
    return (
        v.new_empty(*q.shape[:3], v.shape[-1]),
        q.new_empty(q.shape[0], q.shape[2], q.shape[3], v.shape[-1], dtype=torch.float32),
    )


def _constants(
    q: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    launch: Launches,
    tiling: Tiling,
    read: int,
    shift: int,
) -> dict[str, Any]:
    """The constexpr arguments that all four kernels take."""
    return {
        "H": q.shape[2],
        "BT": launch.tile,
        "STRIDE": tiling.stride,
        "PARTS": tiling.parts,
        "READ": read,
        "SHIFT": shift,
        "MASKED": shift > 0 or launch.tile * tiling.n_tiles != q.shape[1],
        "DELTA": beta is not None,
        "DECAY": log_decay is not None,
        "PREC": "tf32x3" if q.dtype == torch.float32 else "tf32",
    }


def _tiny(dtype: torch.dtype) -> float:
    """What stands for a beta of zero: far below rounding, yet its square is a normal number. float16 is too narrow for
    that: a quarter of its rounding, times values that it still holds to three digits."""
    return 2.5e-4 if dtype == torch.float16 else 1e-15


def _intermediates(
    q: Tensor, beta: Tensor | None, log_decay: Tensor | None, launch: Launches, tiling: Tiling
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for T, for the gates and for the norms."""
    n, tile = q.shape[0] * q.shape[2], launch.tile
    gate_dtype = torch.float64 if q.dtype == torch.float32 else torch.float32
    return (
        q.new_empty(0 if beta is None else n, tiling.n_tiles, tile, tile),
        q.new_empty(0 if log_decay is None else n, tiling.n_tiles, 2, tile, dtype=gate_dtype),
        q.new_empty(n, tiling.n_tiles, 2, tile, dtype=torch.float32),
    )


def _forward_outputs(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, log_decay: Tensor | None, read: int, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, n_tokens, n_heads, key_dim = q.shape
    value_dim = v.shape[-1]
    o = torch.empty_like(v)
    final = q.new_empty(batch, n_heads, key_dim, value_dim, dtype=torch.float32)
    if not save:
        n, f = q.new_empty, torch.float32
        return o, final, n(0), n(0), n(0), n(0, dtype=f), n(0, dtype=f), n(0), n(0)
    launch = launches(q.dtype, key_dim, value_dim)
    tiling = Tiling.of(n_tokens, launch.tile, read)
    return (
        o,
        final,
        torch.empty_like(q),
        torch.empty_like(k),
        *_intermediates(q, beta, log_decay, launch, tiling),
        q.new_empty(batch * n_heads, tiling.n_tiles, key_dim, value_dim),
        q.new_empty(0) if beta is None else torch.empty_like(v),
    )


def _backward_outputs(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, log_decay: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, _, n_heads, key_dim = q.shape
    return (
        torch.empty_like(q),
        torch.empty_like(k),
        torch.empty_like(v),
        q.new_empty(0) if beta is None else torch.empty_like(beta),
        q.new_empty(0) if log_decay is None else torch.empty_like(log_decay),
        q.new_empty(batch, n_heads, key_dim, v.shape[-1], dtype=torch.float32),
    )


@fast_weight_forward.register_fake
def _(q, k, v, beta, log_decay, initial_state, feature, scale, read, shift, save):  # type: ignore[no-untyped-def]  # torch calls it
    return _forward_outputs(q, k, v, beta, log_decay, read, save)


@fast_weight_backward.register_fake
def _(q, k, v, beta, log_decay, *_rest):  # type: ignore[no-untyped-def]  # torch calls it
    return _backward_outputs(q, k, v, beta, log_decay)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, beta, log_decay, initial_state, feature, scale, read, shift, _save = inputs
    ctx.save_for_backward(q, k, v, beta, log_decay, initial_state, *output[2:], output[0])
    ctx.options = (feature, scale, read, shift)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any,
    do: Tensor | None,
    dfinal: Tensor | None,
    *_unused: None,
    run: Callable[..., tuple[Tensor, ...]] = fast_weight_backward,
) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    v, beta, log_decay, initial_state = tensors[2:6]
    do = torch.zeros_like(v) if do is None else do.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    dq, dk, dv, dbeta, dlog_decay, dinitial = run(*tensors, do, dfinal, *ctx.options)
    return (
        dq,
        dk,
        dv,
        None if beta is None else dbeta,
        None if log_decay is None else dlog_decay,
        None if initial_state is None else dinitial,
        *(None,) * 5,
    )


eager_forward = eager_operator(run_forward, _setup_context, partial(_backward, run=run_backward), 2)
fast_weight_forward.register_autograd(_backward, setup_context=_setup_context)
fold_replicas(fast_weight_forward)
fold_replicas(fast_weight_backward)
fold_replicas(fast_weight_step)
