"""Arch -> nn.Module: embedding, blocks, norm, head.

One set of weights, two forms. `Model.forward` reads whole sequences (training, evaluation); `Model.step` reads one
token and a state (decoding). They agree to rounding for every mixer.
"""

import math
from dataclasses import dataclass

import torch
from hqlt_kernels.backends import Forced
from hqlt_kernels.block_parts import swiglu_linear
from hqlt_kernels.projections import take_rows
from hqlt_search_space.arch import Arch
from torch import Tensor, nn

from hqlt_trainer.layers import Embedding, Linear, RMSNorm, ShortConvolution
from hqlt_trainer.mixers import LayerState, MixerLayer, build_mixer
from hqlt_trainer.precision import activation


class SwiGLU(nn.Module):
    """down(SiLU(gate x) * up x)."""

    def __init__(self, d_model: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = Linear(d_model, inner)
        self.up_proj = Linear(d_model, inner)
        self.down_proj = Linear(inner, d_model)

    @property
    def in_weights(self) -> tuple[Tensor, Tensor]:
        return self.gate_proj.weight, self.up_proj.weight

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """What `in_weights` made of x."""
        return swiglu_linear(gate, up, self.down_proj.weight)


class Block(nn.Module):
    """x + mixer(norm x), then x + MLP(norm x)."""

    def __init__(self, mixer: MixerLayer, d_model: int, mlp_inner: int) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(d_model)
        self.mixer = mixer
        self.mlp_norm = RMSNorm(d_model)
        self.mlp = SwiGLU(d_model, mlp_inner)

    def forward(
        self, x: Tensor, delta: Tensor | None, state: LayerState | None = None, at: Tensor | None = None
    ) -> tuple[Tensor, Tensor, LayerState | None]:
        """[B, T, d] -> [B, T, d], or [N, d] at the flat positions `at`, which are all that is computed of the MLP.

        Both come in two parts, the stream and what is still to be added to it: the next norm adds as it reads.
        """
        x, rows = self.mixer_norm.into(self.mixer.in_weights, x, delta)
        mixed, state = self.mixer(rows, state, at)
        if at is not None:
            x = take_rows(x.flatten(0, 1), at)
        x, (gate, up) = self.mlp_norm.into(self.mlp.in_weights, x, mixed)
        return x, self.mlp(gate, up), state


@dataclass(frozen=True)
class ModelState:
    """Everything that decoding keeps between tokens."""

    layers: tuple[LayerState, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors in it."""
        return sum(layer.bytes for layer in self.layers)


class Model(nn.Module):
    """A decoder over `vocab_size` tokens. Embedding and head are untied; no bias anywhere."""

    def __init__(self, arch: Arch, vocab_size: int, backend: Forced = "auto") -> None:
        super().__init__()
        d = arch.d_model
        self.embedding = Embedding(vocab_size, d)
        self.blocks = nn.ModuleList(Block(build_mixer(spec, d, backend), d, arch.mlp_inner) for spec in arch.layers)
        self.norm = RMSNorm(d)
        self.head = Linear(d, vocab_size)

    @property
    def mixers(self) -> tuple[MixerLayer, ...]:
        """The mixer of each layer, first to last."""
        return tuple(block.mixer for block in self.blocks)  # type: ignore[misc]  # ModuleList knows no element type

    def forward(self, tokens: Tensor, at: Tensor | None = None) -> Tensor:
        """Logits of the next token, [B, T, vocabulary] for tokens [B, T].

        With `at` (int64 [N], positions in the flattened B * T) only those, [N, vocabulary]. The last MLP and the head
        are computed nowhere else, which saves a third of a two-layer model with one scored position a sequence.
        """
        logits: Tensor = self.head(self.features(tokens, at))
        return logits

    def features(self, tokens: Tensor, at: Tensor | None = None) -> Tensor:
        """What the head reads, [B, T, d] or [N, d]: `forward` without the head."""
        x, delta = activation(self.embedding(tokens)), None
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            x, delta, _ = block(x, delta, None, at if i == last else None)
        return self.norm.after_adding(x, delta)[1]

    def step(self, tokens: Tensor, state: ModelState | None = None) -> tuple[Tensor, ModelState]:
        """Logits [B, vocabulary] after one more token each, tokens [B]; `state` is None before the first."""
        layers = state.layers if state is not None else (LayerState(),) * len(self.blocks)
        x, delta = activation(self.embedding(tokens[:, None])), None
        after = []
        for block, layer in zip(self.blocks, layers, strict=True):
            x, delta, layer_after = block(x, delta, layer)
            after.append(layer_after)
        return self.head(self.norm.after_adding(x, delta)[1])[:, 0], ModelState(tuple(after))


def build_model(
    arch: Arch,
    vocab_size: int,
    *,
    seed: int = 0,
    init_std: float = 0.02,
    device: torch.device | str = "cpu",
    backend: Forced = "auto",
) -> Model:
    """The model of `arch`, initialised from `seed` as `initialise` says; the same weights on every device.

    On the device `meta` nothing is allocated or initialised. `backend` is passed to every kernel. No global random
    generator is read or changed.
    """
    with torch.device("meta"):
        model = Model(arch, vocab_size, backend)
    if str(device) != "meta":
        model.to_empty(device="cpu")
        initialise(model, init_std, torch.Generator().manual_seed(seed))
        model.to(device)
    return model


@torch.no_grad()
def initialise(model: Model, init_std: float, generator: torch.Generator) -> None:
    """Fills every parameter, as the released code of arXiv:2506.00744 does.

    Projections, embedding and short convolutions N(0, init_std); `o_proj` and `down_proj` uniform within
    1 / sqrt(fan_in * 2 * n_layers); norms and mixing scalars 1; decays as in Mamba-2: A uniform in (0, 16) and
    softplus(dt_bias) log-uniform in (1e-3, 1e-1).
    """
    depth = math.sqrt(2 * len(model.blocks))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(("o_proj", "down_proj")):
            bound = 1 / math.sqrt(module.in_features) / depth
            module.weight.uniform_(-bound, bound, generator=generator)
        elif isinstance(module, nn.Linear | nn.Embedding | ShortConvolution):
            module.weight.normal_(0.0, init_std, generator=generator)
        elif isinstance(module, RMSNorm):
            module.weight.fill_(1.0)
        elif isinstance(module, MixerLayer):
            module.initialise_scalars(generator)
