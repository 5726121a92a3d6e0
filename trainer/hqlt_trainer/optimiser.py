"""AdamW with linear warm-up and cosine decay."""

import math
from collections.abc import Sequence

import torch
from hqlt_kernels.adamw import Settings, adamw_
from hqlt_search_space.recipe import Recipe
from torch import Tensor, nn

from hqlt_trainer.layers import ShortConvolution
from hqlt_trainer.model import Model


def build_optimiser(model: Model, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over all parameters; projections and short convolutions decay, norms, scalars and embedding do not.

    On a GPU its learning rate is a tensor there, so that a captured step can be told another.
    """
    decayed = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | ShortConvolution)}
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]
    on_gpu = parameters[0].is_cuda
    return torch.optim.AdamW(
        groups,
        lr=torch.tensor(recipe.learning_rate, device=parameters[0].device) if on_gpu else recipe.learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.epsilon,
        fused=True,
        capturable=on_gpu,
    )


def learning_rate(recipe: Recipe, step: int) -> float:
    """The learning rate of `step`, counted from 0: a line up to the peak over the warm-up, then half a cosine down to
    `min_learning_rate_fraction` of it at the last step.
    """
    warmup = round(recipe.warmup_fraction * recipe.steps)
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    after_warmup = (step - warmup + 1) / (recipe.steps - warmup)
    floor = recipe.min_learning_rate_fraction
    return recipe.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * after_warmup)))


def set_learning_rate(optimiser: torch.optim.AdamW, value: float) -> None:
    """Makes the next step take `value`."""
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def optimiser_tensors(model: Model, optimiser: torch.optim.AdamW) -> dict[str, Tensor]:
    """The optimiser's state as tensors named `<what>/<parameter>`; empty before the first step."""
    return {
        f"{what}/{name}": tensor
        for name, parameter in model.named_parameters()
        for what, tensor in optimiser.state.get(parameter, {}).items()
    }


def load_optimiser_tensors(model: Model, optimiser: torch.optim.AdamW, tensors: dict[str, Tensor]) -> None:
    """Puts back what `optimiser_tensors` gave. `step` stays float32, the rest takes its parameter's place."""
    parameters = dict(model.named_parameters())
    for key, tensor in tensors.items():
        what, _, name = key.partition("/")
        state = optimiser.state[parameters[name]]
        if what in state:
            state[what].copy_(tensor)
        else:
            state[what] = tensor.to(parameters[name].device)


def set_parameter(model: Model, name: str, value: Tensor) -> None:
    """Makes the parameter `name` of `model` a view of `value`, which has its shape."""
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, nn.Parameter(value))


class JointAdamW:
    """AdamW of all members of a stack in a few launches: what their optimisers would do one parameter at a time.

    Weights lie in one buffer [replicas, parameters], those that decay first, and so do both moments. The parameters of
    the stack and of its members become views of it, and the states of the members' optimisers too; those optimisers
    are never asked to step, they only name what is saved.
    """

    def __init__(self, stack: Model, members: Sequence[Model], recipes: Sequence[Recipe]) -> None:
        """`stack` is made of `members`; a single member is its own stack. Optimisers built before lose their hold."""
        decayed = {id(p) for p in build_optimiser(members[0], recipes[0]).param_groups[0]["params"]}
        own = dict(members[0].named_parameters())
        names = sorted(own, key=lambda name: id(own[name]) not in decayed)
        shapes = [own[name].shape for name in names]
        sizes = [shape.numel() for shape in shapes]
        self._n_decayed = sum(parameter.numel() for parameter in own.values() if id(parameter) in decayed)
        rows = [[member.get_parameter(name).detach().flatten() for name in names] for member in members]
        self._weights = torch.stack([torch.cat(row) for row in rows])
        self._means, self._squares = torch.zeros_like(self._weights), torch.zeros_like(self._weights)
        n = len(members)
        self._steps, self._rates = self._weights.new_zeros(n), self._weights.new_zeros(n)
        self._no_clip = self._weights.new_ones(n)
        settings = [Settings(r.beta1, r.beta2, r.epsilon, r.weight_decay) for r in recipes]
        self._settings = Settings.table(settings, self._weights)

        def views(buffer: Tensor) -> list[Tensor]:
            parts = torch.split(buffer, sizes, dim=-1)
            return [part.view(*part.shape[:-1], *shape) for part, shape in zip(parts, shapes, strict=True)]

        for i, member in enumerate(members):
            for name, view in zip(names, views(self._weights[i]), strict=True):
                set_parameter(member, name, view)
        if n > 1:
            for name, view in zip(names, views(self._weights), strict=True):
                set_parameter(stack, name, view)
        self._parameters = [stack.get_parameter(name) for name in names]
        self.optimisers = tuple(build_optimiser(m, r) for m, r in zip(members, recipes, strict=True))
        for i, (member, optimiser) in enumerate(zip(members, self.optimisers, strict=True)):
            for name, mean, square in zip(names, views(self._means[i]), views(self._squares[i]), strict=True):
                state = {"step": self._steps[i], "exp_avg": mean, "exp_avg_sq": square}
                optimiser.state[member.get_parameter(name)].update(state)

    def set_learning_rates(self, rates: Sequence[float]) -> None:
        """Makes the next step take these, one a replica."""
        self._rates.copy_(torch.tensor(rates, dtype=self._rates.dtype), non_blocking=True)

    def gradients(self) -> Tensor:
        """The gradients that autograd left, [replicas, parameters]; zero where there is none."""
        n = len(self._rates)
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        return torch.cat([part.reshape(n, -1) for part in parts], dim=1)

    def step(self, gradients: Tensor, norms: Tensor, takes: Tensor, clip: float | None) -> None:
        """One step of the replicas in `takes` (bool [replicas]), with gradients of at most the norm `clip`."""
        factors = self._no_clip if clip is None else (clip / (norms + 1e-6)).clamp(max=1.0)
        adamw_(
            self._weights, gradients, self._means, self._squares, self._steps, self._rates, factors, takes,
            self._settings, self._n_decayed,
        )  # fmt: skip
