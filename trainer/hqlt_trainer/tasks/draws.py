"""Random integers that are the same on every device, and that a captured step can make by itself.

The generator is SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014): its n-th
number is a mix of key + n * GAMMA, so any of them can be had without those before, in a dozen integer operations on
whole tensors. int64 in torch wraps around as uint64 does, on a CPU and on a GPU.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def stream_key(*name: str | int) -> int:
    """Where a stream starts: 64 bits that depend on `name` alone.

    All streams lie on one cycle of 2^64 numbers. Two that take 2^30 each, as 20,000 steps at batch 1024 do, overlap
    with probability 2^-33.
    """
    return int.from_bytes(hashlib.sha256("/".join(map(str, name)).encode()).digest()[:8], "little")


def int64(bits: int) -> int:
    """The low 64 bits of `bits`, as the signed number that torch calls them."""
    return (bits + 2**63) % 2**64 - 2**63


def upper_bits(counters: Tensor) -> Tensor:
    """The upper 31 of the 64 bits that SplitMix64 mixes of `counters` (int64), as numbers from 0 to 2^31 - 1.

    The mix ends by adding its upper bits to the lower 33, which are not asked for.
    """
    x = counters
    for shift, factor in zip((30, 27), _MIX, strict=True):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * int64(factor)  # >> copies the sign, hence the mask
    return (x >> 33) & (2**31 - 1)


class Draws:
    """Tables of independent integers, each column uniform on a range of its own: one table a stream, then the next.

    `draws()` is [streams, rows, columns], and moves on: the place in each stream is a tensor on the device, so a graph
    that has captured the call draws anew whenever it is replayed. Of a range of n numbers some are likelier than
    others by n / 2^31 of their share.
    """

    def __init__(
        self,
        keys: Sequence[int],
        ranges: Sequence[tuple[int, int]],
        rows: int,
        n_before: int,
        device: torch.device | str,
    ) -> None:
        """`ranges`: lowest number and how many, for each column. `n_before`: tables that are left out."""
        n = rows * len(ranges)
        self._lowest, self._count = torch.tensor(ranges, device=device).unbind(1)
        self._places = (torch.arange(1, n + 1, device=device) * int64(GAMMA)).view(rows, len(ranges))
        first = [int64(key + GAMMA * n * n_before) for key in keys]
        self._states = torch.tensor(first, device=device).view(-1, 1, 1)
        self._stride = int64(GAMMA * n)

    def __call__(self) -> Tensor:
        counters = self._states + self._places
        self._states += self._stride
        return self._lowest + (upper_bits(counters) * self._count >> 31)
