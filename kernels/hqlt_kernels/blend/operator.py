"""The public function: arguments are checked, a backend is chosen, the two answers are mixed."""

import torch
from torch import Tensor

from hqlt_kernels.backends import Forced
from hqlt_kernels.blend import chunked, definition
from hqlt_kernels.blend.choice import choose_blend, kernel_dtype
from hqlt_kernels.blend.state import TIMINGS, BlendOutput, BlendState, Timing, Tokens
from hqlt_kernels.fast_weight.operator import Normaliser, check_normaliser
from hqlt_kernels.feature_maps import FeatureMap


def blend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    timing: Timing,
    window: int | None,
    beta: Tensor | None = None,
    log_decay: Tensor | None = None,
    delay_beta: bool = False,
    fw_chunk: int | None = None,
    feature_map: FeatureMap = "identity",
    normaliser: Normaliser = "none",
    kv_rope_base: float | None = None,
    fw_rope_base: float | None = None,
    gate: Tensor | None = None,
    state: BlendState | None = None,
    return_state: bool = False,
    backend: Forced = "auto",
) -> BlendOutput:
    """The answers of KV-memory and FW-memory, fed by the same q, k and v, and their gated mix.

        synchronous        KV sees t - window < j <= t           FW reads the state with every j <= t
        delayed_streaming  KV sees t - window < j <= t           FW reads the state with every j <= t - window
        delayed_chunk      KV sees from the start of t's chunk   FW reads the state at the start of its own chunk
                           of `window` tokens up to t            of `fw_chunk` tokens (default: `window`)

    Arguments are those of `fast_weight` and `window_attention`; both scales are K^-0.5. In a delta product KV-memory
    takes the key and value of a token's last write. `window=None` (all keys) needs "synchronous"; `fw_chunk` must be a
    multiple of `window`.

    In delayed_streaming a token is written when it leaves the window: before the first one leaves, nothing is written
    and nothing decays. The write uses beta and log_decay of the token that arrives at that moment, as in the released
    code of arXiv:2506.00744, or its own with `delay_beta`.

    `kv_rope_base` and `fw_rope_base` turn queries and keys by their positions as they enter a branch, in FW-memory
    before the feature map.

    `gate` [B, T, H, V] are logits: mixed = sigmoid(gate) fw + (1 - sigmoid(gate)) kv. Then `mixed` is all that is
    returned, and a fused kernel need not write the two answers.

    `state` is what an earlier call returned for `return_state=True`; any split of a sequence, down to one token at a
    time, gives what the whole gives. Without it the sequence starts at position 0. Works under `torch.func.vmap`.

    Raises:
        ValueError: shapes or options that do not fit together.
        BackendUnavailableError: a forced backend cannot run here.
    """
    _check(timing, window, fw_chunk)
    check_normaliser(normaliser, beta, log_decay)
    chosen = choose_blend(
        n_tokens=q.shape[1],
        window=window,
        device=q.device,
        dtype=kernel_dtype(q, k, v),
        head_dim=q.shape[-1],
        value_dim=v.shape[-1],
        normaliser=normaliser,
        several_writes=k.dim() == 5,
        kv_positions=kv_rope_base is not None,
        fw_positions=fw_rope_base is not None,
        carries_state=state is not None or return_state,
        forced=backend,
    ).backend
    fw_chunk = window if fw_chunk is None else fw_chunk
    if chosen == "triton" and q.shape[1] > 0 and (gate is None or gate.shape == v.shape):
        from hqlt_kernels.blend import triton_operator  # triton is there only where it can run

        kv, fw, mixed = triton_operator.blend(
            q,
            k,
            v,
            beta,
            log_decay,
            gate,
            timing=timing,
            window=window,
            delay_beta=delay_beta,
            fw_chunk=fw_chunk,
            feature_map=feature_map,
            normaliser=normaliser,
            kv_rope_base=kv_rope_base,
        )
        return BlendOutput(kv, fw, mixed, None)
    compose = definition.blend if chosen == "definition" else chunked.blend  # "chunked" with its parts on Triton
    kv, fw, next_state = compose(
        q,
        Tokens(k, v, beta, log_decay),
        state,
        timing=timing,
        window=window,
        delay_beta=delay_beta,
        fw_chunk=fw_chunk,
        feature_map=feature_map,
        normaliser=normaliser,
        kv_rope_base=kv_rope_base,
        fw_rope_base=fw_rope_base,
        return_state=return_state,
        backend=backend,
    )
    if gate is None:
        return BlendOutput(kv, fw, None, next_state)
    return BlendOutput(None, None, torch.lerp(kv, fw, gate.sigmoid().to(kv.dtype)), next_state)


def _check(timing: Timing, window: int | None, fw_chunk: int | None) -> None:
    if timing not in TIMINGS:
        raise ValueError(f"no timing {timing!r}; there is {', '.join(TIMINGS)}")
    if window is None and timing != "synchronous":
        raise ValueError(f"{timing} needs a window; with all keys in KV-memory nothing ever reaches FW-memory")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; a query sees at least its own key")
    if fw_chunk is not None and timing != "delayed_chunk":
        raise ValueError(f"fw_chunk belongs to delayed_chunk, not to {timing}")
    if fw_chunk is not None and window is not None and (fw_chunk < 1 or fw_chunk % window):
        raise ValueError(f"fw_chunk {fw_chunk} is not a multiple of window {window}")
