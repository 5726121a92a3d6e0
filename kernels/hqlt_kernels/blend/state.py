"""What a blend returns and what it carries from one call to the next."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Timing = Literal["synchronous", "delayed_streaming", "delayed_chunk"]
TIMINGS: tuple[Timing, ...] = get_args(Timing)


@dataclass(frozen=True)
class Tokens:
    """Keys and values of L consecutive tokens as they came in, without rotation or feature map."""

    k: Tensor
    """[B, L, H, K], or [B, L, n, H, K] with n writes a token."""
    v: Tensor
    """[B, L, H, V] or [B, L, n, H, V]."""
    beta: Tensor | None = None
    """[B, L, H] or [B, L, n, H]; None if the rule has none, or if it does not travel with its token."""
    log_decay: Tensor | None = None
    """[B, L, H], or None likewise."""

    def __len__(self) -> int:
        return self.k.shape[1]

    def __getitem__(self, span: slice) -> "Tokens":
        beta = None if self.beta is None else self.beta[:, span]
        log_decay = None if self.log_decay is None else self.log_decay[:, span]
        return Tokens(self.k[:, span], self.v[:, span], beta, log_decay)

    def after(self, earlier: "Tokens | None") -> "Tokens":
        """`earlier` and these, in the order of time. Both have strengths, or neither."""
        if earlier is None:
            return self
        beta = None if self.beta is None or earlier.beta is None else torch.cat([earlier.beta, self.beta], 1)
        log_decay = None
        if self.log_decay is not None and earlier.log_decay is not None:
            log_decay = torch.cat([earlier.log_decay, self.log_decay], 1)
        return Tokens(torch.cat([earlier.k, self.k], 1), torch.cat([earlier.v, self.v], 1), beta, log_decay)

    def copy(self) -> "Tokens":
        """The same in memory of its own: a slice would keep the whole sequence alive that it was cut from."""
        beta = None if self.beta is None else self.beta.clone()
        return Tokens(self.k.clone(), self.v.clone(), beta, None if self.log_decay is None else self.log_decay.clone())

    def last_writes(self) -> "Tokens":
        """What KV-memory sees: the key and value of each token's last write, without strengths."""
        if self.k.dim() == 4:
            return Tokens(self.k, self.v)
        return Tokens(self.k[:, :, -1], self.v[:, :, -1])


@dataclass(frozen=True)
class BlendState:
    """Everything a decoder keeps between tokens: the fast weights and the recent tokens.

    synchronous        the last writes of the last `window` tokens (of all, if the window is None): the KV cache
    delayed_streaming  the last `window` tokens; the oldest is the next that FW-memory takes
    delayed_chunk      the tokens since the start of FW-memory's chunk, which takes them all when it is full
    """

    fw: Tensor
    """[B, H, K, V], or [B, H, K, V + 1] with normaliser "time"."""
    recent: Tokens
    position: int
    """Tokens seen so far."""


class BlendOutput(NamedTuple):
    """The answers [B, T, H, V] of both memories, or with a gate their mix alone; `state` if it was asked for."""

    kv: Tensor | None
    fw: Tensor | None
    mixed: Tensor | None
    state: BlendState | None
