"""Batches of sequences of different lengths, packed one after the other into [1, total, ...]."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """Where the tokens of packed sequences stand in a batch [n, longest, ...] of equal lengths."""

    token: Tensor
    """[n, longest]: index of the packed token that stands here; any where there is none."""
    present: Tensor
    """[n, longest]: whether there is one."""
    place: Tensor
    """[total]: index of a packed token in the flattened batch."""

    @classmethod
    def of(cls, cu_seqlens: Tensor, total: int, longest: int | None) -> "Packed":
        """From the sequences' borders [n + 1], 0 first and `total` last. `longest` is read from the device if None.

        Raises:
            ValueError: `cu_seqlens` is no vector of at least two integers.
        """
        sequence = _sequence_of(cu_seqlens, total)
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        if longest is None:
            longest = int(lengths.max())
        offset = torch.arange(longest, device=cu_seqlens.device)
        tokens = torch.arange(total, device=cu_seqlens.device)
        return cls(
            token=(starts[:, None] + offset).clamp(max=max(total - 1, 0)),
            present=offset < lengths[:, None],
            place=sequence * longest + tokens - starts[sequence],
        )

    def padded(self, x: Tensor) -> Tensor:
        """[1, total, ...] as [n, longest, ...], with zeros behind the end of each sequence."""
        present = self.present.reshape(*self.present.shape, *(1 for _ in x.shape[2:]))
        return torch.where(present, x[0][self.token], 0)

    def packed(self, y: Tensor) -> Tensor:
        """[n, longest, ...] as [1, total, ...]."""
        return y.flatten(0, 1)[self.place].unsqueeze(0)


def first_tokens(cu_seqlens: Tensor, total: int) -> Tensor:
    """[total] int32: the packed index of the first token of each token's sequence. Raises as `Packed.of`."""
    return cu_seqlens[_sequence_of(cu_seqlens, total)].int()


def _sequence_of(cu_seqlens: Tensor, total: int) -> Tensor:
    """[total]: which sequence a token is of."""
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.is_floating_point():
        raise ValueError(f"cu_seqlens are borders of sequences, n + 1 integers; got {tuple(cu_seqlens.shape)}")
    tokens = torch.arange(total, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens.long(), tokens, right=True) - 1
