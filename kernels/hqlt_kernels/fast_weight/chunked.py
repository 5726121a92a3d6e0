"""Fast weights on whole tiles of tokens: batched matrix products, a short scan over tiles, a hand-written backward.

For one head and one tile of c tokens with w = c n writes (n a token), S [K, V] being the state at the tile's start:

    B = beta K                            what is written at each key; B = K without beta
    R = X (V - d K S)                     what each write adds, its residual; R = V without beta
    O = scale (d Q S + P R)               d: what is left of the state when a token asks or writes, 1 without decay
    S' = d S + (d B)^T R                  likewise until the end of the tile

with A = strictly lower (K B^T), X = (I + A)^-1 and P = Q B^T where a query reads a write of its own tile, both times
the decay in between. README.md derives this and its gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from hqlt_kernels.fast_weight import definition
from hqlt_kernels.feature_maps import FeatureMap, map_features
from hqlt_kernels.functions import GRADIENT_INSIDE_VMAP, fold_mapped_axis, quick_to_apply, unfold_mapped_axis
from hqlt_kernels.precision import compute_dtype, outside_autocast

STRONGEST_LOG_DECAY = -1e4  # its exp is 0 in float64 too, and sums of it stay finite where -inf - -inf would give NaN
LARGEST_SOLVE = 48  # beyond it, inverting by halves is faster than one LAPACK solve: 64 x 64 takes 2.8 us, not 5


@outside_autocast
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
) -> tuple[Tensor, Tensor]:
    """The same as `definition.fast_weight`, on tiles of tokens. Any T >= 1 and any `read_chunk`."""
    n_tokens, n_writes = k.shape[1], k.shape[2] if k.dim() == 5 else 1
    if n_tokens * n_writes == 1:  # one write is what the definition's loop body does, without a tile's overhead
        return definition.fast_weight(
            q, k, v, beta, log_decay, initial_state, feature_map=feature_map, scale=scale, read_chunk=read_chunk
        )
    dtype = compute_dtype(q, k, v)
    q, k = map_features(q.to(dtype), feature_map), map_features(k.to(dtype), feature_map)
    values = v.to(dtype)
    strengths, decays, state = (None if x is None else x.to(dtype) for x in (beta, log_decay, initial_state))
    if k.dim() == 5:  # the writes of a token follow each other in time
        k, values = k.flatten(1, 2), values.flatten(1, 2)
        strengths = None if strengths is None else strengths.flatten(1, 2)
    tiling = Tiling.of(n_tokens, n_writes, k.shape[-1], read_chunk)
    saves = torch.is_grad_enabled()
    outputs = _Recurrence.apply(q, k, values, strengths, decays, state, scale, tiling, saves)  # type: ignore[no-untyped-call]
    return outputs[0].to(v.dtype), outputs[1]


def writes_in_a_tile(key_width: int) -> int:
    """Near the fastest on one CPU thread, forward and backward (README.md): products with the state cost K V a token,
    products inside a tile grow with its length."""
    return 16 if key_width <= 32 else 32 if key_width < 128 else 64


@dataclass(frozen=True)
class Tiling:
    """How a sequence is cut into `n_tiles` tiles of `n_tokens` tokens, each writing `n_writes` times."""

    n_tiles: int
    n_tokens: int
    n_writes: int
    read_chunk: int | None

    @staticmethod
    @lru_cache(maxsize=256)
    def of(length: int, n_writes: int, key_width: int, read_chunk: int | None) -> "Tiling":
        """Tiles of about the best size; they divide the chunk that is read, or are multiples of it."""
        best = max(1, writes_in_a_tile(key_width) // n_writes)
        if read_chunk is None or read_chunk >= length:
            n_tiles = max(1, round(length / best))
            return Tiling(n_tiles, -(-length // n_tiles), n_writes, read_chunk)
        # Chunks must start where tiles do, or a tile hold whole chunks.
        sizes = [size for size in range(1, read_chunk + 1) if read_chunk % size == 0]
        sizes += [*range(2 * read_chunk, min(length, 2 * best), read_chunk), *([length] if length <= 3 * best else [])]
        candidates = [Tiling(-(-length // size), size, n_writes, read_chunk) for size in sizes]
        return min(candidates, key=lambda tiling: tiling.work(best))

    def work(self, best: int) -> float:
        """Time in proportion: all tokens, padding included, times the state's share, the tile's and the calls'."""
        return self.n_tiles * self.n_tokens * (1 + self.n_tokens / (4 * best) + (best / (4 * self.n_tokens)) ** 2)

    @property
    def writes(self) -> int:
        return self.n_tokens * self.n_writes

    @property
    def tokens_read(self) -> Sequence[int]:
        """For each token of a tile, how many of the tile's tokens its query reads."""
        if self.read_chunk is None:
            return range(1, self.n_tokens + 1)
        return [i // self.read_chunk * self.read_chunk for i in range(self.n_tokens)]

    @property
    def reads_itself(self) -> bool:
        """Whether any query reads a write of its own tile."""
        return self.read_chunk is None or self.read_chunk < self.n_tokens

    @property
    def tiles_read(self) -> list[int] | None:
        """For each tile, the tile whose first state its queries read; None if each reads its own."""
        if self.read_chunk is None or self.read_chunk <= self.n_tokens:
            return None
        starts = (n * self.n_tokens // self.read_chunk * self.read_chunk for n in range(self.n_tiles))
        return [start // self.n_tokens for start in starts]


@quick_to_apply
class _Recurrence(torch.autograd.Function):
    """q, k, v, beta, log_decay, initial_state, scale, tiling, saves -> o, final state, then what the backward needs.

    The writes of a token lie on the time axis: k [B, T n, H, K], v [B, T n, H, V], beta [B, T n, H]. Inside, tiles lie
    [tile B H, token, width], so that a step of the scan is one product of contiguous batches of B H matrices. Writing
    a product into a slice that is not contiguous takes twice as long; nothing here does.
    """

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor | None,
        log_decay: Tensor | None,
        initial_state: Tensor | None,
        scale: float,
        tiling: Tiling,
        saves: bool,
    ) -> tuple[Tensor | None, ...]:
        batch, length, n_heads, key_width = q.shape
        m, n_tiles = batch * n_heads, tiling.n_tiles
        Q = _to_tiles(q, n_tiles, tiling.n_tokens)
        K, V = _to_tiles(k, n_tiles, tiling.writes), _to_tiles(v, n_tiles, tiling.writes)
        strengths = None if beta is None else _to_tiles(beta, n_tiles, tiling.writes).unsqueeze(-1)
        written = K if strengths is None else K * strengths
        decay = None if log_decay is None else _Decay.of(log_decay, tiling, scale)

        A = inverse = None
        if strengths is not None:
            A = K @ written.mT  # its upper triangle is never read
            if decay is not None:
                A *= decay.between_writes
            inverse = _unit_lower_inverse(A)
            if decay is None or not saves:
                A = None  # its memory serves what follows
        states, residuals = _scan(V, inverse, K, written, decay, initial_state, tiling)
        if not saves:
            inverse = None
        P = None
        if tiling.reads_itself:
            P = Q @ written.mT
            P *= _read_mask(tiling, scale, q.dtype, q.device) if decay is None else decay.between_read
            answers = P @ residuals
        else:
            answers = q.new_zeros(*Q.shape[:2], v.shape[-1])
        start = m if initial_state is None else 0  # where tiles begin that find something from before
        if start < n_tiles * m:
            queries = Q if decay is None else Q * decay.until_read
            found = _read_states(states, m, tiling)
            answers[start:].baddbmm_(queries[start:], found[start:], alpha=scale)
        final_state = states[n_tiles * m :].reshape(batch, n_heads, key_width, -1).clone()
        o = _from_tiles(answers, n_tiles, n_heads, length)
        if not saves:
            return o, final_state
        return (
            o,
            final_state,
            Q,
            K,
            strengths,
            written,
            residuals,
            P,
            inverse,
            states,
            *((A, *decay) if decay is not None else ()),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        q, _, _, _, _, initial_state, ctx.scale, ctx.tiling, saves = inputs
        if saves and len(output) == 2:
            raise NotImplementedError(GRADIENT_INSIDE_VMAP)
        ctx.batch, ctx.length, ctx.n_heads, _ = q.shape
        ctx.starts_empty = initial_state is None
        ctx.mark_non_differentiable(*(x for x in output[2:] if x is not None))
        ctx.save_for_backward(*output[2:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_o: Tensor | None, grad_final_state: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        Q, K, strengths, written, residuals, P, inverse, states, *decays = ctx.saved_tensors
        tiling: Tiling = ctx.tiling
        scale: float = ctx.scale
        n_tiles, n_heads, length, m = tiling.n_tiles, ctx.n_heads, ctx.length, ctx.batch * ctx.n_heads
        A, decay = (decays[0], _Decay(*decays[1:])) if decays else (None, None)
        start = m if ctx.starts_empty else 0
        # With respect to the last tile's end there is a gradient only if the final state was used.
        end = n_tiles * m if grad_final_state is not None else (n_tiles - 1) * m
        if grad_o is None:
            grad_answers = residuals.new_zeros(*Q.shape[:2], residuals.shape[-1])
        else:
            grad_answers = _to_tiles(grad_o, n_tiles, tiling.n_tokens)
        grad_states = torch.empty_like(states)  # what lies before start, or behind end, is never read
        if grad_final_state is not None:
            grad_states[n_tiles * m :] = grad_final_state.flatten(0, 1)
        if start < n_tiles * m:
            _collect_reads(grad_states, Q, grad_answers, decay, start, scale, tiling)
        grad_residuals = torch.zeros_like(residuals) if P is None else P.mT @ grad_answers
        grad_values = _scan_back(grad_states, grad_residuals, inverse, K, written, decay, start, end, tiling)

        links_read = links_write = None  # gradients of log decays between a write and what follows it in its tile
        if P is None:
            grad_q, grad_written = torch.zeros_like(Q), torch.zeros_like(written)
        else:
            grad_P = grad_answers @ residuals.mT
            if decay is None:
                grad_P *= _read_mask(tiling, scale, Q.dtype, Q.device)
            else:
                links_read = grad_P * P
                grad_P *= decay.between_read
            grad_q, grad_written = grad_P @ written, grad_P.mT @ Q
        grad_k = grad_written
        if inverse is not None:
            grad_A = grad_values @ residuals.mT
            grad_A *= _minus_below_diagonal(tiling.writes, K.dtype, K.device)
            if decay is not None:
                links_write = grad_A * A
                grad_A *= decay.between_writes
            grad_k = grad_A @ written
            grad_written.baddbmm_(grad_A.mT, K)

        # What went through a state: its part in a gradient is the product of that state, times what was left of it.
        before, after = slice(start, n_tiles * m), slice(None, end)
        found = _read_states(states, m, tiling)[before].mT
        grad_log_decay = None
        if decay is None:
            if start < n_tiles * m:
                grad_q[before].baddbmm_(grad_answers[before], found, alpha=scale)
                if inverse is not None:
                    grad_k[before].baddbmm_(grad_values[before], states[before].mT, alpha=-1)
            if end:
                grad_written[after].baddbmm_(residuals[after], grad_states[m : end + m].mT)
        else:
            part = (grad_answers[before] @ found).mul_(scale)
            until_read = _add_part(grad_q, Q, part, decay.until_read, before)
            until_write = None
            if inverse is not None:
                part = (grad_values[before] @ states[before].mT).neg_()
                until_write = _add_part(grad_k, K, part, decay.until_write, before)
            part = residuals[after] @ grad_states[m : end + m].mT
            after_write = _add_part(grad_written, written, part, decay.after_write, after)
            over_tile = torch.zeros_like(decay.over_tile)
            kept = (states[start:end] * grad_states[start + m : end + m]).sum((1, 2), keepdim=True)
            over_tile[start:end] = kept * decay.over_tile[start:end]
            grad_log_decay = _grad_log_decay(
                tiling, links_read, links_write, until_read, until_write, after_write, over_tile
            )
        grad_beta = None
        if strengths is not None:
            grad_beta = (grad_written * K).sum(-1)
            grad_k.addcmul_(grad_written, strengths)
        n_writes = length * tiling.n_writes
        return (
            _from_tiles(grad_q, n_tiles, n_heads, length),
            _from_tiles(grad_k, n_tiles, n_heads, n_writes),
            _from_tiles(grad_values, n_tiles, n_heads, n_writes),
            None if grad_beta is None else _from_tiles(grad_beta, n_tiles, n_heads, n_writes),
            None if grad_log_decay is None else _from_tiles(grad_log_decay, n_tiles, n_heads, length),
            grad_states[:m].view(ctx.batch, n_heads, *states.shape[1:]) if start == 0 else None,
            None,
            None,
            None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        folded = fold_mapped_axis(info.batch_size, in_dims, inputs)
        o, final_state, *_ = _Recurrence.apply(*folded)  # type: ignore[no-untyped-call]
        return unfold_mapped_axis(info.batch_size, o, final_state)


def _scan(
    V: Tensor,
    inverse: Tensor | None,
    K: Tensor,
    written: Tensor,
    decay: "_Decay | None",
    initial_state: Tensor | None,
    tiling: Tiling,
) -> tuple[Tensor, Tensor]:
    """The state at every tile's start, and after them the final one, [tile B H, K, V]; and the residuals of all writes.

    An empty initial state is not written down unless later tiles read it: nobody else does.
    """
    n_tiles = tiling.n_tiles
    m = V.shape[0] // n_tiles
    residuals = V if inverse is None else torch.empty_like(V)
    states = V.new_empty((n_tiles + 1) * m, K.shape[-1], V.shape[-1])
    if initial_state is not None:
        states[:m] = initial_state.flatten(0, 1)
    elif tiling.tiles_read is not None:
        states[:m] = 0
    if decay is not None:
        K, written = K * decay.until_write, written * decay.after_write
    for n in range(n_tiles):
        tile, next_tile = slice(n * m, (n + 1) * m), slice((n + 1) * m, (n + 2) * m)
        state, next_state, residual = states[tile], states[next_tile], residuals[tile]
        is_empty = n == 0 and initial_state is None
        if inverse is not None:
            missing = V[tile] if is_empty else torch.baddbmm(V[tile], K[tile], state, alpha=-1)
            torch.bmm(inverse[tile], missing, out=residual)
        if is_empty:
            torch.bmm(written[tile].mT, residual, out=next_state)
        elif decay is None:
            torch.baddbmm(state, written[tile].mT, residual, out=next_state)
        else:
            torch.mul(state, decay.over_tile[tile], out=next_state)
            next_state.baddbmm_(written[tile].mT, residual)
    return states, residuals


def _collect_reads(
    grad_states: Tensor,
    Q: Tensor,
    grad_answers: Tensor,
    decay: "_Decay | None",
    start: int,
    scale: float,
    tiling: Tiling,
) -> None:
    """Sets the gradients of the states that tiles from `start` on begin with to what their readers contribute."""
    n_tiles = tiling.n_tiles
    m = Q.shape[0] // n_tiles
    inside = grad_states[start : n_tiles * m]
    queries = Q if decay is None else Q * decay.until_read
    if tiling.tiles_read is None:
        torch.baddbmm(inside, queries[start:].mT, grad_answers[start:], beta=0, alpha=scale, out=inside)
        return
    inside.zero_()
    by_tile = torch.bmm(queries.mT, grad_answers).view(n_tiles, m, *grad_states.shape[1:])
    read = _numbers(tuple(tiling.tiles_read), Q.device)
    grad_states.view(n_tiles + 1, *by_tile.shape[1:]).index_add_(0, read, by_tile, alpha=scale)


def _scan_back(
    grad_states: Tensor,
    grad_residuals: Tensor,
    inverse: Tensor | None,
    K: Tensor,
    written: Tensor,
    decay: "_Decay | None",
    start: int,
    end: int,
    tiling: Tiling,
) -> Tensor:
    """Completes `grad_states` and `grad_residuals` from the last tile to the first; returns the gradient of V."""
    n_tiles = tiling.n_tiles
    m = K.shape[0] // n_tiles
    grad_values = grad_residuals if inverse is None else torch.empty_like(grad_residuals)
    if decay is not None:
        K, written = K * decay.until_write, written * decay.after_write
    for n in reversed(range(n_tiles)):
        tile, next_tile = slice(n * m, (n + 1) * m), slice((n + 1) * m, (n + 2) * m)
        if n * m < end:
            grad_residuals[tile].baddbmm_(written[tile], grad_states[next_tile])
        if inverse is not None:
            torch.bmm(inverse[tile].mT, grad_residuals[tile], out=grad_values[tile])
        if n * m >= start:
            grad_state = grad_states[tile]
            if inverse is not None:
                grad_state.baddbmm_(K[tile].mT, grad_values[tile], alpha=-1)
            if n * m < end:
                later = grad_states[next_tile]
                grad_state += later if decay is None else later * decay.over_tile[tile]
    return grad_values


class _Decay(NamedTuple):
    """What is left of a write after the decay between two points of a tile, [tile B H, ...]."""

    between_read: Tensor
    """[c, w]: from a write to a query that reads it, times the scale; 0 where it does not."""
    between_writes: Tensor
    """[w, w]: from a write to a later one; 1 on the diagonal, 0 above."""
    until_read: Tensor
    """[c, 1]: from the tile's start to what a query reads."""
    until_write: Tensor
    """[w, 1]: from the tile's start to a write."""
    after_write: Tensor
    """[w, 1]: from a write to the tile's end."""
    over_tile: Tensor
    """[1, 1]: from start to end."""

    @staticmethod
    def of(log_decay: Tensor, tiling: Tiling, scale: float) -> "_Decay":
        """`log_decay` [B, T, H]. Summed in float64: differences of float32 sums would lose what a small decay does
        after a large one."""
        tiles = _to_tiles(log_decay, tiling.n_tiles, tiling.n_tokens)
        total = tiles.double().clamp_(min=STRONGEST_LOG_DECAY).cumsum(-1)
        at_write = total if tiling.n_writes == 1 else total.repeat_interleave(tiling.n_writes, -1)
        at_read = total
        if tiling.read_chunk is not None:
            at_read = functional.pad(total, (1, 0))[:, _numbers(tuple(tiling.tokens_read), total.device)]

        def left(log: Tensor) -> Tensor:
            return log.to(log_decay.dtype, copy=True).exp_()

        def between(later: Tensor, mask: Tensor) -> Tensor:
            """Masked before the exponential: above the diagonal it would overflow, and infinity times 0 is NaN."""
            log = (later[:, :, None] - at_write[:, None, :]).to(log_decay.dtype)
            return log.masked_fill_(mask == 0, -torch.inf).exp_()

        lower = log_decay.new_ones(tiling.writes, tiling.writes).tril_()
        between_writes = between(at_write, lower)
        if tiling.read_chunk is None and tiling.n_writes == 1:
            between_read = between_writes * scale
        else:
            between_read = between(at_read, _read_mask(tiling, 1.0, log_decay.dtype, log_decay.device)).mul_(scale)
        return _Decay(
            between_read,
            between_writes,
            left(at_read).unsqueeze(-1),
            left(at_write).unsqueeze(-1),
            left(total[:, -1:] - at_write).unsqueeze(-1),
            left(total[:, -1:]).unsqueeze(-1),
        )


# These are remembered for CUDA graphs as well: a step that is captured may copy nothing from Python's memory.


@lru_cache(maxsize=64)
def _numbers(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, device=device)


@lru_cache(maxsize=64)
def _read_mask(tiling: Tiling, value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[c, w]: `value` where a query reads a write of its own tile, else 0."""
    rows = [
        [value * (write < n_read * tiling.n_writes) for write in range(tiling.writes)] for n_read in tiling.tokens_read
    ]
    return torch.tensor(rows, dtype=dtype, device=device)


@lru_cache(maxsize=64)
def _minus_below_diagonal(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor([[-float(j < i) for j in range(size)] for i in range(size)], dtype=dtype, device=device)


@lru_cache(maxsize=64)
def _reaches(tiling: Tiling, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """[c, c] and [c, w]: 1 where a token's decay lies before what a query reads, or before a write, else 0."""
    tokens, writes = range(tiling.n_tokens), range(tiling.writes)
    read = [[n_read > token for n_read in tiling.tokens_read] for token in tokens]
    write = [[place // tiling.n_writes >= token for place in writes] for token in tokens]
    return torch.tensor(read, dtype=dtype, device=device), torch.tensor(write, dtype=dtype, device=device)


def _read_states(states: Tensor, m: int, tiling: Tiling) -> Tensor:
    """For each tile, the states [B H, K, V] that its queries read."""
    if tiling.tiles_read is None:
        return states[: tiling.n_tiles * m]
    by_tile = states.view(tiling.n_tiles + 1, m, *states.shape[1:])
    return by_tile[_numbers(tuple(tiling.tiles_read), states.device)].flatten(0, 1)


def _add_part(target: Tensor, x: Tensor, part: Tensor, left: Tensor, where: slice) -> Tensor:
    """Adds `part` times `left` to the gradient `target` of `x`; returns the gradient of log(left)."""
    part *= left[where]
    target[where] += part
    grad_log = torch.zeros_like(left)
    grad_log[where] = (x[where] * part).sum(-1, keepdim=True)
    return grad_log


def _grad_log_decay(
    tiling: Tiling,
    links_read: Tensor | None,
    links_write: Tensor | None,
    until_read: Tensor,
    until_write: Tensor | None,
    after_write: Tensor,
    over_tile: Tensor,
) -> Tensor:
    """From the gradients of the logarithms of what `_Decay` holds to that of log_decay, [tile B H, c].

    The log_decay of a token is part of the sum between two points if it lies between them, so its gradient is a sum
    over exactly those pairs. To sum up the gradients of all cumulative sums would be cheaper, but what cancels there
    leaves its rounding behind: where decay is strong, nothing else.
    """

    reaches_read, reaches_write = _reaches(tiling, over_tile.dtype, over_tile.device)
    follows_write = 1 - reaches_write
    total = over_tile + reaches_read @ until_read + follows_write @ after_write
    if until_write is not None:
        total += reaches_write @ until_write
    for reaches, links in ((reaches_read, links_read), (reaches_write, links_write)):
        if links is not None:
            total += (reaches @ links).mul_(follows_write).sum(-1, keepdim=True)
    return total.squeeze(-1)


def _to_tiles(x: Tensor, n_tiles: int, size: int) -> Tensor:
    """[B, L, H, ...] as contiguous [tile B H, size, ...], the last tile padded with zeros."""
    batch, length, n_heads, *rest = x.shape
    if n_tiles == 1:
        return x.transpose(1, 2).reshape(batch * n_heads, size, *rest)
    if length < n_tiles * size:
        x = functional.pad(x, (0, 0) * (1 + len(rest)) + (0, n_tiles * size - length))
    tiles = x.reshape(batch, n_tiles, size, n_heads, *rest).transpose(0, 1).transpose(2, 3)
    return tiles.reshape(n_tiles * batch * n_heads, size, *rest)


def _from_tiles(x: Tensor, n_tiles: int, n_heads: int, length: int) -> Tensor:
    """The reverse: [tile B H, size, ...] to [B, length, H, ...]."""
    _, size, *rest = x.shape
    tiles = x.view(n_tiles, -1, n_heads, size, *rest).transpose(2, 3).transpose(0, 1)
    return tiles.reshape(-1, n_tiles * size, n_heads, *rest)[:, :length]


def _unit_lower_inverse(links: Tensor) -> Tensor:
    """(I + A)^-1 [M, w, w] for A the part of `links` below the diagonal; the rest is not read.

    By substitution, never by a Neumann series: with repeated keys its terms grow like binomial coefficients.
    """
    w = links.shape[-1]
    if w <= LARGEST_SOLVE:
        identity = torch.eye(w, dtype=links.dtype, device=links.device).expand_as(links)
        # X (I + A) = I: solving from the right reads row-major matrices as they lie and takes half the time.
        X: Tensor = torch.linalg.solve_triangular(links, identity, upper=False, left=False, unitriangular=True)
        return X
    h = w // 2
    first, second = _unit_lower_inverse(links[:, :h, :h]), _unit_lower_inverse(links[:, h:, h:])
    inverse = torch.zeros_like(links)
    inverse[:, :h, :h] = first
    inverse[:, h:, h:] = second
    inverse[:, h:, :h] = (second @ links[:, h:, :h] @ first).neg_()
    return inverse
