"""AdamW with linear warm-up and cosine decay."""

import math

import torch
from hqlt_search_space.recipe import Recipe
from torch import Tensor, nn

from hqlt_trainer.mixers import ShortConvolution
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
        optimiser.state[parameters[name]][what] = tensor.to(parameters[name].device)
