"""What a blend computes, one token at a time: what every faster form is compared with."""

import torch
from torch import Tensor

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
    """Token after token: KV-memory reads its window, then FW-memory takes what is due and answers.

    Source: Irie, Yau, Gershman 2025, arXiv:2506.00744, section 3.
    """
    recent = None if state is None else state.recent
    fw_state = None if state is None else state.fw
    position = 0 if state is None else state.position

    def fw_memory(query_position: int, token: Tokens, token_position: int, read_before: bool) -> tuple[Tensor, Tensor]:
        """The answer to the current query by a memory that takes `token`, read before or after; and that memory."""
        query, key = q_t, token.k
        if fw_rope_base is not None:
            query = rotate(query, fw_rope_base, query_position)
            key = rotate(key, fw_rope_base, token_position)
        return fast_weight(
            query,
            key,
            token.v,
            beta=token.beta,
            log_decay=token.log_decay,
            feature_map=feature_map,
            normaliser=normaliser,
            read_chunk=1 if read_before else None,
            initial_state=fw_state,
            backend="definition",
        )

    kv_answers, fw_answers = [], []
    for t in range(q.shape[1]):
        q_t, token = q[:, t : t + 1], new[t : t + 1]

        waiting = token.last_writes() if timing == "synchronous" else token
        if timing == "delayed_streaming" and not delay_beta:
            waiting = Tokens(token.k, token.v)
        recent = waiting.after(recent)  # the current token is its last
        seen = recent.last_writes()
        kv_answers.append(
            window_attention(
                q_t,
                seen.k,
                seen.v,
                window=window,
                rope_base=kv_rope_base,
                chunk_aligned=timing == "delayed_chunk",
                position=position + 1 - len(seen),
                backend="definition",
            )
        )

        if timing == "synchronous":
            answer, fw_state = fw_memory(position, token, position, read_before=False)
            if window is not None:
                recent = recent[-window:]
        elif timing == "delayed_streaming":
            assert window is not None
            if len(recent) > window:
                leaving, recent = recent[:1], recent[1:]
                if not delay_beta:
                    leaving = Tokens(leaving.k, leaving.v, token.beta, token.log_decay)
                answer, fw_state = fw_memory(position, leaving, position - window, read_before=False)
            else:
                answer, _ = fw_memory(position, token, position, read_before=True)
        else:
            assert fw_chunk is not None
            answer, _ = fw_memory(position, token, position, read_before=True)
            if len(recent) == fw_chunk:
                for j in range(fw_chunk):
                    _, fw_state = fw_memory(position, recent[j : j + 1], position + 1 - fw_chunk + j, read_before=False)
                recent = recent[:0]
        fw_answers.append(answer)
        position += 1

    if fw_state is None:
        _, written = fw_memory(position, new[:1], position, read_before=True)
        fw_state = torch.zeros_like(written)
    assert recent is not None
    next_state = BlendState(fw_state, recent.copy(), position) if return_state else None
    return torch.cat(kv_answers, 1), torch.cat(fw_answers, 1), next_state
