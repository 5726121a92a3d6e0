"""What can stand in a layer's token-mixing place: attention, fast weights, or a hybrid of both.

The layout of parameters, which the cost arithmetic counts and the trainer builds (d = model width, H = heads,
D = d / H, every projection without bias):

    all          q_proj, k_proj, v_proj, o_proj   d x d        short convolutions on q, k, v: one filter a channel
                 gate_proj                        d x d        if `output_gate`
    fast_weight  beta_proj                        d x H        delta and gated_delta; d x (n H) for delta_product,
    and hybrid                                                 whose k_proj and v_proj are d x (n d)
                 decay_proj, A_log, dt_bias       d x H, H, H  if the decay is data-dependent
                 output_norm                      D            RMSNorm per head, weight shared by the heads
    hybrid       mixing parameters                             see `Mixing`
                 kv_norm, fw_norm                 D, D         if `branch_norm`

v = SiLU(v_proj x) wherever a fast-weight memory is written (shared by both memories of a hybrid), plain in pure
attention. Source: Irie, Yau, Gershman 2025, arXiv:2506.00744, section 3 and its released code.
"""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from hqlt_search_space.rules import Delta, Rule
from hqlt_search_space.spec import Spec

Positions = Literal["rope", "none"]
"""Rotary position embedding (base 10000, full head width) on query and key of a branch, or none."""

ShortConv = Annotated[int, Field(ge=2, le=8, description="Taps of the causal depthwise convolution on q, k and v.")]
Window = Annotated[int, Field(ge=1, description="Keys KV-memory sees, the current one included.")]

Mixing = Literal["sum", "static_scalar", "dynamic_scalar", "dynamic_vector", "separate_vector", "difference", "concat"]
"""How a hybrid adds its outputs, per head, before the output norm:

    sum              o = o_kv + o_fw
    static_scalar    o = a_kv o_kv + a_fw o_fw        learned, one pair a head, both start at 1        2 H
    dynamic_scalar   o = a_kv o_kv + a_fw o_fw        [a_fw, a_kv] = sigmoid(W x), not convex          d x 2 H
    dynamic_vector   o = g o_fw + (1 - g) o_kv        g = sigmoid(W x), one entry a channel            d x d
    separate_vector  o = g_fw o_fw + g_kv o_kv        two independent gates                            d x 2 d
    difference       o = o_kv - o_fw
    concat           o = [o_kv, o_fw]                 o_proj is 2 d x d, output_norm 2 D wide
"""


class Attention(Spec):
    """KV-memory alone: causal softmax attention over the last `window` keys, or all of them."""

    kind: Literal["attention"] = "attention"
    n_heads: PositiveInt
    window: Window | None = None
    positions: Positions = "rope"
    short_conv: ShortConv | None = None
    output_gate: bool = False


class FastWeight(Spec):
    """FW-memory alone."""

    kind: Literal["fast_weight"] = "fast_weight"
    n_heads: PositiveInt
    rule: Rule = Delta()
    fw_positions: Positions = "none"
    short_conv: ShortConv | None = None
    output_gate: bool = False


class Synchronous(Spec):
    """Both memories take every token at once: KV sees (t - window, t], FW all j <= t."""

    kind: Literal["synchronous"] = "synchronous"


class DelayedStreaming(Spec):
    """FW-memory takes the token that leaves the window: KV sees (t - window, t], FW all j <= t - window.

    `delay_beta: false` is the published model: the key and value are delayed, but the write strength beta (and a
    data-dependent decay) is that of the current token. With `true` they travel with their token.
    """

    kind: Literal["delayed_streaming"] = "delayed_streaming"
    delay_beta: bool = False


class DelayedChunk(Spec):
    """KV-memory sees the current chunk of `window` tokens, FW-memory all chunks before.

    `fw_chunk: window` is the true model: KV sees [chunk start, t], FW reads the state at the start of the chunk, so
    every earlier token is in exactly one memory. A number is what the released code computed (64): FW reads the state
    at the start of its own chunk of that many tokens, and tokens between the two starts are in neither memory.
    """

    kind: Literal["delayed_chunk"] = "delayed_chunk"
    fw_chunk: Literal["window"] | PositiveInt = "window"


Blend = Annotated[Synchronous | DelayedStreaming | DelayedChunk, Field(discriminator="kind")]
BlendName = Literal["synchronous", "delayed_streaming", "delayed_chunk"]


class Hybrid(Spec):
    """Both memories in one layer, fed by the same q, k and v. `window: null` (all keys) needs a synchronous blend."""

    kind: Literal["hybrid"] = "hybrid"
    n_heads: PositiveInt
    blend: Blend = Synchronous()
    window: Window | None = 64
    positions: Positions = "rope"
    fw_positions: Positions = "none"
    rule: Rule = Delta()
    mixing: Mixing = "dynamic_vector"
    branch_norm: bool = False
    short_conv: ShortConv | None = None
    output_gate: bool = False


Mixer = Annotated[Attention | FastWeight | Hybrid, Field(discriminator="kind")]
