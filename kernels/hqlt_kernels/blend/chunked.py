"""A blend composed of the two operators on whole sequences: the delay is a shift, not a loop."""

import torch
from torch import Tensor
from torch.nn import functional

from hqlt_kernels.backends import Forced
from hqlt_kernels.blend.state import BlendState, Timing, Tokens
from hqlt_kernels.fast_weight import fast_weight
from hqlt_kernels.fast_weight.operator import Normaliser
from hqlt_kernels.feature_maps import FeatureMap
from hqlt_kernels.rotary import rotate
from hqlt_kernels.window_attention import window_attention


def blend(
    q: Tensor,
    new: Tokens,
    state: BlendState | None,
    *,
    timing: Timing,
    window: int | None,
    delay_beta: bool,
    fw_chunk: int | None,
    feature_map: FeatureMap,
    normaliser: Normaliser,
    kv_rope_base: float | None,
    fw_rope_base: float | None,
    return_state: bool,
    backend: Forced,
) -> tuple[Tensor, Tensor, BlendState | None]:
    """Both answers [B, T, H, V] for all T tokens at once, and the next state. `backend` runs the two parts."""
    n_tokens = q.shape[1]
    position = 0 if state is None else state.position
    carried = None if state is None else state.recent
    fw_state = None if state is None else state.fw

    recent = new.last_writes() if timing == "synchronous" else new
    if timing == "delayed_streaming" and not delay_beta:
        recent = Tokens(new.k, new.v)
    recent = recent.after(carried)
    first_position = position + n_tokens - len(recent)
    seen = recent.last_writes()
    kv = window_attention(
        q,
        seen.k,
        seen.v,
        window=window,
        rope_base=kv_rope_base,
        chunk_aligned=timing == "delayed_chunk",
        position=first_position,
        backend=backend,
    )

    def fw_memory(
        queries: Tensor, query_position: int, written: Tokens, written_position: int, read_chunk: int | None
    ) -> tuple[Tensor, Tensor]:
        keys = written.k
        if fw_rope_base is not None:
            queries = rotate(queries, fw_rope_base, query_position)
            keys = rotate(keys, fw_rope_base, written_position)
        return fast_weight(
            queries,
            keys,
            written.v,
            beta=written.beta,
            log_decay=written.log_decay,
            feature_map=feature_map,
            normaliser=normaliser,
            read_chunk=read_chunk,
            initial_state=fw_state,
            backend=backend,
        )

    if timing == "synchronous":
        fw, fw_state = fw_memory(q, position, new, position, None)
        if window is not None:
            recent = recent[-window:]
    elif timing == "delayed_streaming":
        assert window is not None
        # The first n_idle new tokens push nothing out of the window: there the memory answers as it stands, empty.
        n_idle = min(n_tokens, max(0, window - len(recent) + n_tokens))
        leaving = recent[: n_tokens - n_idle]
        if not delay_beta:
            arriving = new[n_idle:]
            leaving = Tokens(leaving.k, leaving.v, arriving.beta, arriving.log_decay)
        fw, fw_state = fw_memory(q[:, n_idle:], position + n_idle, leaving, first_position, None)
        if n_idle:
            fw = functional.pad(fw, (0, 0, 0, 0, n_idle, 0))
        recent = recent[-window:]
    else:
        assert fw_chunk is not None
        n_waiting = len(recent) - n_tokens
        n_full = len(recent) // fw_chunk * fw_chunk if return_state or n_waiting else 0
        answers = []
        if n_full:  # every chunk that is full is read and then written
            queries = functional.pad(q, (0, 0, 0, 0, n_waiting, 0))[:, :n_full] if n_waiting else q[:, :n_full]
            answer, fw_state = fw_memory(queries, first_position, recent[:n_full], first_position, fw_chunk)
            answers.append(answer[:, n_waiting:])
        n_read = max(0, n_full - n_waiting)
        if n_read < n_tokens:  # the rest reads the memory at the start of its chunk, and waits
            rest = position + n_read
            answer, after_rest = fw_memory(q[:, n_read:], rest, new[n_read:], rest, fw_chunk)
            answers.append(answer)
            if fw_state is None:
                fw_state = torch.zeros_like(after_rest)
        fw = answers[0] if len(answers) == 1 else torch.cat(answers, 1)
        recent = recent[n_full:]
    if not return_state:
        return kv, fw, None
    assert fw_state is not None
    return kv, fw, BlendState(fw_state, recent.copy(), position + n_tokens)
