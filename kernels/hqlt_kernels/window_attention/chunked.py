"""Window attention by blocks of queries: each block meets only the keys that one of its queries may see.

One block is three operations forward (scores with the mask as their bias, softmax, product with the values) and five
backward. The work is T (window + block) instead of T^2, or half of T^2 where all keys are seen.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hqlt_kernels.functions import GRADIENT_INSIDE_VMAP, fold_mapped_axis, quick_to_apply, unfold_mapped_axis
from hqlt_kernels.precision import compute_dtype, outside_autocast

BLOCK = 40  # queries; 24 to 48 are within 5 % of each other on one CPU thread (README.md)
LARGEST_SAVED = 2**24  # attention weights, 64 MiB in float32: what is more is computed again in the backward


@outside_autocast
def window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None, chunk_aligned: bool, position: int, scale: float
) -> Tensor:
    """The same as `definition.window_attention`, by blocks of queries."""
    dtype = compute_dtype(q, k, v)
    view = View(q.shape[1], k.shape[1], window, chunk_aligned, position)
    inputs = q.to(dtype), k.to(dtype), v.to(dtype)
    outputs = _Attention.apply(*inputs, scale, view, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    o: Tensor = outputs[0]
    return o.to(v.dtype)


@dataclass(frozen=True)
class View:
    """Which keys each query sees. The queries belong to the last keys."""

    n_queries: int
    n_keys: int
    window: int | None
    chunk_aligned: bool
    position: int

    def blocks(self) -> list[tuple[slice, slice]]:
        """Blocks of queries of about equal size, each with the span of keys that it needs."""
        n_blocks = max(1, round(self.n_queries / BLOCK))
        size = -(-self.n_queries // n_blocks)
        before = self.n_keys - self.n_queries
        return [
            (slice(start, end), slice(max(0, self._oldest(before + start)), before + end))
            for start in range(0, self.n_queries, size)
            for end in (min(start + size, self.n_queries),)
        ]

    def hidden(self, queries: slice, keys: slice, device: torch.device) -> Tensor:
        """[queries, keys]: whether the key is out of the query's sight."""
        before = self.n_keys - self.n_queries
        query = torch.arange(before + queries.start, before + queries.stop, device=device).unsqueeze(1)
        key = torch.arange(keys.start, keys.stop, device=device)
        later = key > query
        return later if self.window is None else later | (key < self._oldest(query))

    def _oldest(self, query: Any) -> Any:
        """The first key that the query at this index, or these indices, would see if keys began early enough."""
        if self.window is None:
            return 0
        if self.chunk_aligned:
            return query - (self.position + query) % self.window
        return query - self.window + 1


@quick_to_apply
class _Attention(torch.autograd.Function):
    """q, k, v, scale, view, saves -> o, then if `saves` what the backward needs. Inside, [B H, T, width]."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, view: View, saves: bool) -> tuple[Tensor, ...]:
        n_heads = q.shape[2]
        Q, K, V = _by_head(q), _by_head(k), _by_head(v)
        blocks = view.blocks()
        n_weights = sum((queries.stop - queries.start) * (keys.stop - keys.start) for queries, keys in blocks)
        keeps_weights = saves and n_weights * Q.shape[0] <= LARGEST_SAVED
        kept, answers = [], []
        for queries, keys in blocks:
            weights = _weights(Q, K, scale, view, queries, keys)
            answers.append(weights @ V[:, keys])
            if keeps_weights:
                kept.append(weights)
        o = _by_token(answers[0] if len(answers) == 1 else torch.cat(answers, 1), n_heads)
        return (o, Q, K, V, *kept) if saves else (o,)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *_, ctx.scale, ctx.view, saves = inputs
        if saves and len(output) == 1:
            raise NotImplementedError(GRADIENT_INSIDE_VMAP)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_o: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_o is None:
            return None, None, None, None, None, None
        Q, K, V, *weights = ctx.saved_tensors
        view: View = ctx.view
        n_heads = grad_o.shape[2]
        grad_answers = _by_head(grad_o)
        blocks = view.blocks()
        grads_q, grads_k, grads_v = [], [], []
        for n, (queries, keys) in enumerate(blocks):
            w = weights[n] if weights else _weights(Q, K, ctx.scale, view, queries, keys)
            grad_w = grad_answers[:, queries] @ V[:, keys].mT
            grad_scores = torch.ops.aten._softmax_backward_data(grad_w, w, -1, w.dtype).mul_(ctx.scale)
            grads_q.append(grad_scores @ K[:, keys])
            grads_k.append(grad_scores.mT @ Q[:, queries])
            grads_v.append(w.mT @ grad_answers[:, queries])
        spans = [keys for _, keys in blocks]
        grad_q = grads_q[0] if len(blocks) == 1 else torch.cat(grads_q, 1)
        grad_k, grad_v = _sum_of_spans(grads_k, spans, K), _sum_of_spans(grads_v, spans, V)
        return _by_token(grad_q, n_heads), _by_token(grad_k, n_heads), _by_token(grad_v, n_heads), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        folded = fold_mapped_axis(info.batch_size, in_dims, inputs)
        o, *_ = _Attention.apply(*folded)  # type: ignore[no-untyped-call]
        return unfold_mapped_axis(info.batch_size, o)


def _weights(Q: Tensor, K: Tensor, scale: float, view: View, queries: slice, keys: slice) -> Tensor:
    hidden = view.hidden(queries, keys, Q.device)
    mask = Q.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
    return torch.baddbmm(mask, Q[:, queries], K[:, keys].mT, alpha=scale).softmax(-1)


def _sum_of_spans(parts: list[Tensor], spans: list[slice], like: Tensor) -> Tensor:
    """Parts that lie at `spans` of axis 1, added up in the shape of `like`."""
    if parts[0].shape == like.shape:
        total = parts.pop(0)
        spans = spans[1:]
    else:
        total = torch.zeros_like(like)
    for part, span in zip(parts, spans, strict=True):
        total[:, span] += part
    return total


def _by_head(x: Tensor) -> Tensor:
    """[B, T, H, D] as contiguous [B H, T, D]."""
    batch, length, n_heads, width = x.shape
    return x.transpose(1, 2).reshape(batch * n_heads, length, width)


def _by_token(x: Tensor, n_heads: int) -> Tensor:
    """The reverse, as a view."""
    return x.view(-1, n_heads, *x.shape[1:]).transpose(1, 2)
