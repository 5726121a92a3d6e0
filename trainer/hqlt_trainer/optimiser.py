"""AdamW with linear warm-up and cosine decay."""

import math

import torch
from hqlt_search_space.recipe import Recipe
from torch import Tensor, nn

from hqlt_trainer.mixers import ShortConvolution
from hqlt_trainer.model import Model


def build_optimiser(model: Model, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over all parameters; projections and short convolutions decay, norms, scalars and embedding do not."""
    decayed = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | ShortConvolution)}
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=recipe.learning_rate, betas=(recipe.beta1, recipe.beta2), eps=recipe.epsilon, fused=True
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
        optimiser.state[parameters[name]][what] = tensor.to(parameters[name].device)
