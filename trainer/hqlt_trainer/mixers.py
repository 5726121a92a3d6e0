"""The mixers as modules: KV-memory, FW-memory, and both in one layer.

Each layer reads [B, T, d] and has one matrix for all of its projections. With H heads of width D = d / H and
n = `n_householder` (else 1), the rows of `in_proj` are

    q  d     k  n d     v  n d     beta  n H     decay  H     mixing  2 H, d or 2 d     gate  d

as far as the mixer has them (`hqlt_search_space.mixers` says when), and the short convolution runs over the channels
of q, k and v. A layer's tensors keep the order [B, T, H, D]. Parameters may have a replica axis in front
(`layers.py`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, assert_never

import torch
from hqlt_kernels.backends import Forced
from hqlt_kernels.blend import BlendState, blend
from hqlt_kernels.blend.choice import SHORT
from hqlt_kernels.block_parts import mix_norm_linear
from hqlt_kernels.fast_weight import fast_weight
from hqlt_kernels.projections import split_columns, take_rows
from hqlt_kernels.rotary import rotate
from hqlt_kernels.window_attention import window_attention
from hqlt_search_space import rules
from hqlt_search_space.mixers import Attention, DelayedChunk, DelayedStreaming, FastWeight, Hybrid, Mixer, Mixing
from torch import Tensor, nn
from torch.nn import functional

from hqlt_trainer.layers import NORM_EPSILON, Linear, RMSNorm, ShortConvolution, broadcast_to_rows
from hqlt_trainer.precision import at_least_float32

ALIGNED = 16
"""Columns between which the projections of a token begin on a GPU: 32 bytes in bfloat16."""
ROPE_BASE = 10_000.0

Memory = Literal["kv", "fw"]


@dataclass(frozen=True)
class LayerState:
    """What one layer keeps between tokens; the default is the start of a sequence."""

    position: int = 0
    conv: Tensor | None = None
    """The last taps - 1 inputs of the short convolution, [B, taps - 1, channels]."""
    kv: tuple[Tensor, Tensor] | None = None
    """KV-memory of an attention layer: the last keys and values, not rotated, [B, at most window, H, D] each."""
    fw: Tensor | None = None
    """FW-memory of a fast-weight layer."""
    blend: BlendState | None = None
    """Both memories of a hybrid."""

    @property
    def bytes(self) -> int:
        """Bytes of all tensors in it."""
        return _tensor_bytes(self)


def _tensor_bytes(value: object) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if is_dataclass(value) and not isinstance(value, type):
        return sum(_tensor_bytes(getattr(value, field.name)) for field in fields(value))
    if isinstance(value, tuple | list):
        return sum(_tensor_bytes(item) for item in value)
    return 0


@dataclass(frozen=True)
class Projected:
    """What a mixer makes of its input, split by purpose; a field the mixer has no use for is empty (width 0).

    Where there are fast weights, v has gone through SiLU.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    decay: Tensor
    mixing: Tensor
    gate: Tensor


@dataclass(frozen=True)
class Unmixed:
    """What both memories of a hybrid answer, [B, T, H, D], to be mixed by the kernel of the output norm."""

    kv: Tensor
    fw: Tensor


class MixerLayer(nn.Module):
    """What the three mixers share: projections, short convolution, output norm and gate, output projection."""

    def __init__(self, spec: Mixer, d_model: int, backend: Forced) -> None:
        super().__init__()
        self.n_heads = spec.n_heads
        self.head_dim = d_model // spec.n_heads
        self.backend = backend
        rule = self.rule = None if isinstance(spec, Attention) else spec.rule
        mixing = spec.mixing if isinstance(spec, Hybrid) else None
        self.n_writes = rule.n_householder if isinstance(rule, rules.DeltaProduct) else 1
        self.multiple_writes = isinstance(rule, rules.DeltaProduct)
        delta = isinstance(rule, rules.Delta | rules.GatedDelta | rules.DeltaProduct)
        decays = isinstance(rule, rules.GatedDelta) or (
            isinstance(rule, rules.Decay) and rule.decay == "data_dependent"
        )
        mixing_widths = {"dynamic_scalar": 2 * self.n_heads, "dynamic_vector": d_model, "separate_vector": 2 * d_model}
        self.qkv_width = d_model * (1 + 2 * self.n_writes)
        self.widths = (
            d_model,
            self.n_writes * d_model,
            self.n_writes * d_model,
            self.n_writes * self.n_heads if delta else 0,
            self.n_heads if decays else 0,
            mixing_widths.get(mixing or "", 0),
            d_model if spec.output_gate else 0,
        )
        self.in_proj = Linear(d_model, sum(self.widths))
        self.short_conv = ShortConvolution(self.qkv_width, spec.short_conv) if spec.short_conv else None
        if decays:
            self.A_log = nn.Parameter(torch.empty(self.n_heads))
            self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        elif isinstance(rule, rules.Decay):
            self.fixed_log_decay = nn.Buffer(torch.empty(self.n_heads), persistent=False)
        self.output_gate = spec.output_gate
        halves = 2 if mixing == "concat" else 1
        self.output_norm = None if rule is None else RMSNorm(halves * self.head_dim)
        self.o_proj = Linear(halves * d_model, d_model)

    def initialise_scalars(self, generator: torch.Generator) -> None:
        """Fills the parameters and buffers that are not the weight of a submodule; see `model.initialise`."""
        if hasattr(self, "A_log"):
            self.A_log.uniform_(0, 16, generator=generator).clamp_(min=1e-4).log_()
            dt = self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp_()
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus(dt_bias) = dt
        elif isinstance(self.rule, rules.Decay):
            heads = torch.arange(self.n_heads, dtype=torch.float32)
            self.fixed_log_decay.copy_(torch.log1p(-torch.exp2(-5 - heads)))

    def forward(
        self, rows: Sequence[Tensor], state: LayerState | None = None, at: Tensor | None = None
    ) -> tuple[Tensor, LayerState | None]:
        """What `in_weights` make of [B, T, d] -> [B, T, d] and, if a state was given, the state after it.

        `at` (int64 [N]) asks for these positions of the flattened B * T only: [N, d].
        """
        projected, conv = self._split(rows, state)
        # Operators compute in float32 whatever they are given; autocast would narrow the products inside them.
        with torch.autocast(projected.q.device.type, enabled=False):
            o, after = self.read(projected, state)
        if after is not None:
            after = LayerState(after.position + projected.q.shape[1], conv, after.kv, after.fw, after.blend)
        if isinstance(o, Unmixed):
            return self._mixed_output(o, projected.mixing, at), after
        gate = projected.gate
        if at is not None:
            o, gate = take_rows(o.flatten(0, 1), at), take_rows(gate.flatten(0, 1), at)
        if self.output_gate and o.shape[-1] > self.head_dim:  # in `concat`, whose two halves share the gate
            gate = torch.cat([self._heads(gate)] * 2, dim=-1).flatten(-2)
        if self.output_norm is not None:
            o = o if self.n_heads > 1 else o.flatten(-2)
            _, (mixed,) = self.output_norm.into((self.o_proj.weight,), o, gate=gate if self.output_gate else None)
            return mixed, after
        if self.output_gate:
            o = o * self._heads(functional.silu(gate))
        return self.o_proj(o.flatten(-2)), after

    def _mixed_output(self, o: "Unmixed", logits: Tensor, at: Tensor | None) -> Tensor:
        assert self.output_norm is not None
        parts = [o.kv, o.fw, self._heads(logits)]
        if at is not None:
            parts = [take_rows(part.flatten(0, 1), at) for part in parts]
        kv, fw, gates = parts
        return mix_norm_linear(kv, fw, gates, self.output_norm.weight, NORM_EPSILON, self.o_proj.weight)

    def read(self, projected: Projected, state: LayerState | None) -> "tuple[Tensor | Unmixed, LayerState | None]":
        """The memory's output [B, T, H, D] (2 D for `concat`) and, if a state was given, the state of the memory."""
        raise NotImplementedError

    @property
    def _products(self) -> Sequence[range]:
        """Which of the seven parts come out of one product.

        All at once on a CPU, where a small model's step is made of calls, and before a convolution, which moves them
        anyway. On a GPU a large part comes out of its own product, and is not copied out of a row with others.
        """
        if self.short_conv is not None or not on_gpu(self.in_proj.weight):
            return (range(7),)
        return [p for p in (range(1), range(1, 2), range(2, 5), range(5, 6), range(6, 7)) if sum(self._widths(p))]

    def _widths(self, parts: range) -> tuple[int, ...]:
        return self.widths[parts.start : parts.stop]

    @property
    def in_weights(self) -> tuple[Tensor, ...]:
        """The projections that the layer reads: parts of `in_proj`, on a GPU with some columns of zeros behind them."""
        weight = self.in_proj.weight
        sizes = [sum(self._widths(parts)) for parts in self._products]
        if not on_gpu(weight):
            return (weight,)
        # Rows that begin anywhere slow down whatever reads or writes them.
        unused = (-size % ALIGNED for size in sizes)
        parts = torch.split(weight, sizes, dim=-2)
        return tuple(functional.pad(x, (0, 0, 0, n)) if n else x for x, n in zip(parts, unused, strict=True))

    def _split(self, rows: Sequence[Tensor], state: LayerState | None) -> tuple[Projected, Tensor | None]:
        conv = None
        if self.short_conv is None:
            parts = [rows[0].new_empty(*rows[0].shape[:-1], 0)] * 7
            for which, columns in zip(self._products, rows, strict=True):
                activated = 2 - which.start if self.rule is not None and 2 in which else None
                parts[which.start : which.stop] = split_columns(columns, self._widths(which), activated)
        else:
            before = None
            if state is not None:
                pad = self.short_conv.weight.shape[1] - 1
                before = state.conv if state.conv is not None else rows[0].new_zeros(len(rows[0]), pad, self.qkv_width)
            filtered, conv = self.short_conv(rows[0], before, self.widths, self.rule is not None)
            parts = list(filtered)
        q, k, v, beta, decay, mixing, gate = parts
        return Projected(self._heads(q), self._writes(k), self._writes(v), beta, decay, mixing, gate), conv

    def _write_arguments(self, rule: rules.Rule, projected: Projected) -> dict[str, Any]:
        """What the kernels ask about a write: beta in (0, beta_range), [B, T, H] or [B, T, n, H]; log_decay at most 0,
        [B, T, H]; None for what the rule does not have. Never 16 bits: products of decays lose them quickly.
        """
        beta = log_decay = None
        if isinstance(rule, rules.Delta | rules.GatedDelta | rules.DeltaProduct):
            beta = rule.beta_range * torch.sigmoid(at_least_float32(projected.beta))
            if self.multiple_writes:
                beta = beta.view(*beta.shape[:-1], self.n_writes, self.n_heads)
        if hasattr(self, "A_log"):
            logits = at_least_float32(projected.decay)
            speed, bias = (broadcast_to_rows(p, 1, logits) for p in (self.A_log, self.dt_bias))
            log_decay = -speed.exp() * functional.softplus(logits + bias)
        elif isinstance(rule, rules.Decay):
            log_decay = self.fixed_log_decay.expand(*projected.q.shape[:2], -1)
        normaliser = rule.normaliser if isinstance(rule, rules.Additive) else "none"
        return {"beta": beta, "log_decay": log_decay, "normaliser": normaliser}

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, d] -> [B, T, H, D]."""
        return x.view(*x.shape[:-1], self.n_heads, self.head_dim)

    def _writes(self, x: Tensor) -> Tensor:
        """[B, T, n d] -> [B, T, n, H, D] where a token may write several times, else [B, T, H, D]."""
        return self._heads(x.view(*x.shape[:-1], self.n_writes, -1) if self.multiple_writes else x)


class AttentionLayer(MixerLayer):
    """Causal softmax attention over the last `window` keys, or all."""

    def __init__(self, spec: Attention, d_model: int, backend: Forced) -> None:
        super().__init__(spec, d_model, backend)
        self.window = spec.window
        self.rope_base = ROPE_BASE if spec.positions == "rope" else None

    def read(self, projected: Projected, state: LayerState | None) -> tuple[Tensor, LayerState | None]:
        q, k, v = projected.q, projected.k, projected.v
        position = 0
        after = None
        if state is not None:
            if state.kv is not None:
                k, v = torch.cat([state.kv[0], k], dim=1), torch.cat([state.kv[1], v], dim=1)
            n_keys = k.shape[1]
            position = state.position + q.shape[1] - n_keys
            keep = n_keys if self.window is None else min(self.window, n_keys)
            after = LayerState(state.position, kv=(k[:, n_keys - keep :], v[:, n_keys - keep :]))
        o = window_attention(
            q, k, v, window=self.window, rope_base=self.rope_base, position=position, backend=self.backend
        )
        return o, after


class FastWeightLayer(MixerLayer):
    """A matrix per head, written by the rule at every token."""

    def __init__(self, spec: FastWeight, d_model: int, backend: Forced) -> None:
        super().__init__(spec, d_model, backend)
        self.spec = spec
        self.rope_base = ROPE_BASE if spec.fw_positions == "rope" else None

    def read(self, projected: Projected, state: LayerState | None) -> tuple[Tensor, LayerState | None]:
        q, k = projected.q, projected.k
        if self.rope_base is not None:  # before the feature map, as in `blend`
            position = state.position if state is not None else 0
            q, k = rotate(q, self.rope_base, position), rotate(k, self.rope_base, position)
        o, fw = fast_weight(
            q,
            k,
            projected.v,
            feature_map=self.spec.rule.feature_map,
            initial_state=state.fw if state is not None else None,
            backend=self.backend,
            **self._write_arguments(self.spec.rule, projected),
        )
        return o, None if state is None else LayerState(state.position, fw=fw)


class HybridLayer(MixerLayer):
    """Both memories, fed by the same q, k and v; `blend` times them and `mixing` adds them."""

    def __init__(self, spec: Hybrid, d_model: int, backend: Forced) -> None:
        super().__init__(spec, d_model, backend)
        self.spec = spec
        if spec.mixing == "static_scalar":
            self.mixing_scalars = nn.Parameter(torch.empty(2, self.n_heads))
        self.kv_norm = RMSNorm(self.head_dim) if spec.branch_norm else None
        self.fw_norm = RMSNorm(self.head_dim) if spec.branch_norm else None
        self.silenced: Memory | None = None
        """The memory whose output is replaced by zeros: a knock-out, set by `evaluation.silence`."""
        self.observer: Callable[[Tensor, Tensor], None] | None = None
        """Given the factors of KV- and FW-memory at every forward pass, set by `evaluation.mean_gates`."""

    def initialise_scalars(self, generator: torch.Generator) -> None:
        super().initialise_scalars(generator)
        if self.spec.mixing == "static_scalar":
            self.mixing_scalars.fill_(1.0)

    def read(self, projected: Projected, state: LayerState | None) -> tuple[Tensor | Unmixed, LayerState | None]:
        spec = self.spec
        mixes_here = spec.branch_norm or self.silenced is not None or self.observer is not None
        fused = spec.mixing == "dynamic_vector" and not mixes_here
        late = fused and not spec.output_gate and mixes_late(projected.q)
        out = blend(
            projected.q,
            projected.k,
            projected.v,
            timing=spec.blend.kind,
            window=spec.window,
            delay_beta=isinstance(spec.blend, DelayedStreaming) and spec.blend.delay_beta,
            fw_chunk=_fw_chunk(spec),
            feature_map=spec.rule.feature_map,
            kv_rope_base=ROPE_BASE if spec.positions == "rope" else None,
            fw_rope_base=ROPE_BASE if spec.fw_positions == "rope" else None,
            gate=self._heads(projected.mixing) if fused and not late else None,
            state=state.blend if state is not None else None,
            return_state=state is not None,
            backend=self.backend,
            **self._write_arguments(spec.rule, projected),
        )
        after = None if state is None else LayerState(state.position, blend=out.state)
        if out.mixed is not None:
            return out.mixed, after
        assert out.kv is not None  # without a gate
        assert out.fw is not None
        if late:
            return Unmixed(out.kv, out.fw), after
        return self._mix(out.kv, out.fw, projected.mixing), after

    def _mix(self, kv: Tensor, fw: Tensor, logits: Tensor) -> Tensor:
        if self.kv_norm is not None and self.fw_norm is not None:
            kv, fw = self.kv_norm(kv), self.fw_norm(fw)
        if self.silenced == "kv":
            kv = torch.zeros_like(kv)
        elif self.silenced == "fw":
            fw = torch.zeros_like(fw)
        factors = self._factors(logits)
        if factors is not None:
            if self.observer is not None:
                self.observer(*factors)
            kv, fw = factors[0] * kv, factors[1] * fw
        match self.spec.mixing:
            case "concat":
                return torch.cat([kv, fw], dim=-1)
            case "difference":
                return kv - fw
            case _:
                return kv + fw

    def _factors(self, logits: Tensor) -> tuple[Tensor, Tensor] | None:
        """What KV- and FW-memory are multiplied by, broadcastable to [B, T, H, D]; None where nothing is learned."""
        mixing: Mixing = self.spec.mixing
        match mixing:
            case "sum" | "difference" | "concat":
                return None
            case "static_scalar":
                kv, fw = broadcast_to_rows(self.mixing_scalars, 2, logits).unsqueeze(-1).unbind(-3)
            case "dynamic_scalar":
                fw, kv = torch.sigmoid(logits).view(*logits.shape[:-1], 2, self.n_heads, 1).unbind(-3)
            case "dynamic_vector":
                fw = torch.sigmoid(self._heads(logits))
                kv = 1 - fw
            case "separate_vector":
                fw, kv = self._heads(torch.sigmoid(logits).view(*logits.shape[:-1], 2, -1)).unbind(-3)
            case _:
                assert_never(mixing)
        return kv, fw


def on_gpu(x: Tensor) -> bool:
    """Whether passes over memory cost more than calls do."""
    return x.is_cuda


def mixes_late(q: Tensor) -> bool:
    """Whether the output norm mixes the memories, which saves a pass; the blend has short ones in registers."""
    return on_gpu(q) and q.shape[1] > SHORT


def build_mixer(spec: Mixer, d_model: int, backend: Forced) -> MixerLayer:
    """The module of `spec`, uninitialised."""
    match spec:
        case Attention():
            return AttentionLayer(spec, d_model, backend)
        case FastWeight():
            return FastWeightLayer(spec, d_model, backend)
        case Hybrid():
            return HybridLayer(spec, d_model, backend)
        case _:
            assert_never(spec)


def _fw_chunk(spec: Hybrid) -> int | None:
    """Tokens between two states that FW-memory may read; None where it reads the newest."""
    if not isinstance(spec.blend, DelayedChunk):
        return None
    return spec.window if spec.blend.fw_chunk == "window" else spec.blend.fw_chunk
