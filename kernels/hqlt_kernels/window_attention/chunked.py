"""Window attention by blocks of queries: each block meets only the keys that one of its queries may see.

One block is three operations forward (scores with the mask as their bias, softmax, product with the values) and five
backward. The work is T (window + block) instead of T^2, half of T^2 for a full causal window, and no mask of T^2
entries exists.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hqlt_kernels.functions import fold_mapped_axis, quick_to_apply, unfold_mapped_axis
from hqlt_kernels.precision import compute_dtype

LARGEST_SAVED = 2**24  # attention weights (64 MiB in float32); more are computed again in the backward


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None, chunk_aligned: bool, position: int, scale: float
) -> Tensor:
    """The same as `definition.window_attention`, by blocks of queries."""
    dtype = compute_dtype(q, k, v)
    view = View(q.shape[1], k.shape[1], window, chunk_aligned, position)
    outputs = _Attention.apply(q.to(dtype), k.to(dtype), v.to(dtype), scale, view)  # type: ignore[no-untyped-call]
    o: Tensor = outputs[0]
    return o.to(v.dtype)


@dataclass(frozen=True)
class View:
    """Which keys each query sees. Queries and keys are counted from the first key."""

    n_queries: int
    n_keys: int
    window: int | None
    chunk_aligned: bool
    position: int

    def blocks(self) -> Iterator["Block"]:
        """The queries in blocks, with the span of keys that a block needs."""
        first_query = self.n_keys - self.n_queries
        size = self._block_size()
        query = first_query
        while query < self.n_keys:
            end = min(query + size, self.n_keys)
            if self.chunk_aligned:  # blocks end where chunks do
                end = min(end - (self.position + end) % size, self.n_keys) if end < self.n_keys else end
            yield Block(query - first_query, end - first_query, self._first_key(query), end)
            query = end

    def _block_size(self) -> int:
        if self.window is None or self.window >= self.n_keys: 
            return BLOCK
        if self.chunk_aligned:
            return self.window * max(1, BLOCK // self.window)
        return max(BLOCK, self.window//2)

    def _first_key(self, query: int) -> int:
        if self.window is None:
            return 0
        if self.chunk_aligned:
            return max(0, query - (self.position + query) % self.window)
        return max(0, query - self.window + 1)

    def bias(self, block: "Block", like: Tensor) -> Tensor:
        """0 where a query of the block sees a key, else -inf: [queries, keys]."""
        query = torch.arange(block.last_key - (block.end - block.start), block.last_key, device=like.device)[:, None]
        key = torch.arange(block.first_key, block.last_key, device=like.device)
        hidden = key > query
        if self.window is not None:
            oldest = query - (self.position + query) % self.window if self.chunk_aligned else query - self.window + 1
            hidden |= key < oldest
        return like.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)

BLOCK = 64

@dataclass(frozen=True)
class Block:
    start: int
    end: int
    first_key: int
    last_key: int


@quick_to_apply
class _Attention(torch.autograd.Function):
    """q, k, v, scale, view -> o, then what the backward needs; inside, [B H, T, width]."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, view: View) -> tuple[Tensor, ...]:
        batch, n_queries, n_heads, _ = q.shape
        Q, K, V = _by_head(q), _by_head(k), _by_head(v)
        answers, weights = [], []
        for block in view.blocks():
            p = _weights(Q, K, scale, view, block)
            answers.append(p @ V[:, block.first_key : block.last_key])
            weights.append(p)
        o = answers[0] if len(answers) == 1 else torch.cat(answers, 1)
        if sum(p.numel() for p in weights) > LARGEST_SAVED:
            weights = []
        return o.view(batch, n_heads, n_queries, -1).transpose(1, 2), Q, K, V, *weights

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *_, ctx.scale, ctx.view = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_o: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_o is None:
            return None, None, None, None, None
        Q, K, V, *weights = ctx.saved_tensors
        n_heads = grad_o.shape[2]
        grad_answers = _by_head(grad_o)
        blocks = list(ctx.view.blocks())
        grad_q = []
        grad_k = grad_v = None
        if len(blocks)>1: grad_k, grad_v = torch.zeros_like(K), torch.zeros_like(V)
        for n, block in enumerate(blocks):
            queries, keys = slice(block.start, block.end), slice(block.first_key, block.last_key)
            p = weights[n] if weights else _weights(Q, K, ctx.scale, ctx.view, block)
            grad_p = grad_answers[:, queries] @ V[:, keys].mT
            grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype).mul_(ctx.scale)
            grad_q.append(grad_scores @ K[:, keys])
            gv, gk = p.mT @ grad_answers[:, queries], grad_scores.mT @ Q[:, queries]
            if grad_k is None: grad_k,grad_v=gk,gv
            else:
                grad_v[:, keys] += gv
                grad_k[:, keys] += gk
        gq = grad_q[0] if len(grad_q)==1 else torch.cat(grad_q, 1)
        return _by_token(gq, n_heads), _by_token(grad_k, n_heads), _by_token(grad_v, n_heads), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        folded = fold_mapped_axis(info.batch_size, in_dims, inputs)
        o, *_ = _Attention.apply(*folded)  # type: ignore[no-untyped-call]
        return unfold_mapped_axis(info.batch_size, o)


def _weights(Q: Tensor, K: Tensor, scale: float, view: View, block: "Block") -> Tensor:
    keys = K[:, block.first_key : block.last_key]
    scores = torch.baddbmm(view.bias(block, Q), Q[:, block.start : block.end], keys.mT, alpha=scale)
    return scores.softmax(-1)


def _by_head(x: Tensor) -> Tensor:
    """[B, T, H, D] as contiguous [B H, T, D]."""
    batch, length, n_heads, width = x.shape
    return x.transpose(1, 2).reshape(batch * n_heads, length, width)


def _by_token(x: Tensor, n_heads: int) -> Tensor:
    return x.view(-1, n_heads, *x.shape[1:]).transpose(1, 2)
