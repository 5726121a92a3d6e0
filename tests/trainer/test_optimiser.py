"""The schedule and what decays."""

import pytest
import torch
from hqlt_search_space.arch import Arch
from hqlt_search_space.mixers import Hybrid
from hqlt_search_space.recipe import Recipe
from hqlt_trainer.model import build_model
from hqlt_trainer.optimiser import (
    JointAdamW,
    build_optimiser,
    learning_rate,
    load_optimiser_tensors,
    optimiser_tensors,
)
from hqlt_trainer.replicas import stack_models
from hypothesis import given
from hypothesis import strategies as st


@given(
    steps=st.integers(1, 500),
    warmup_fraction=st.floats(0, 1),
    floor=st.floats(0, 1),
)
def test_learning_rate_climbs_to_the_peak_and_falls_to_the_floor(
    steps: int, warmup_fraction: float, floor: float
) -> None:
    recipe = Recipe(steps=steps, learning_rate=2.0, warmup_fraction=warmup_fraction, min_learning_rate_fraction=floor)
    rates = [learning_rate(recipe, step) for step in range(steps)]
    warmup = round(warmup_fraction * steps)
    assert all(0 <= rate <= 2.0 for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert rates[-1] == pytest.approx(2.0 if warmup == steps else 2.0 * floor, abs=1e-12)
    if warmup:
        assert rates[warmup - 1] == 2.0


def test_only_projections_and_short_convolutions_decay() -> None:
    spec = Hybrid(n_heads=2, mixing="static_scalar", branch_norm=True, short_conv=4, rule={"kind": "gated_delta"})  # type: ignore[arg-type]
    model = build_model(Arch(d_model=8, mlp_inner=8, layers=(spec,)), 5)
    optimiser = build_optimiser(model, Recipe(weight_decay=0.5, learning_rate=0.1))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    shrunk = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    mixer = {f"blocks.0.mixer.{name}.weight" for name in ("in_proj", "o_proj", "short_conv")}
    mlp = {f"blocks.0.mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")}
    assert shrunk == mixer | mlp | {"head.weight"}


def test_optimiser_tensors_restore_the_next_step_to_the_bit() -> None:
    def train(model: torch.nn.Module, optimiser: torch.optim.AdamW, steps: range) -> None:
        for step in steps:
            for i, parameter in enumerate(model.parameters()):
                parameter.grad = torch.sin(parameter.detach() * (step + i + 1))
            optimiser.step()

    arch, recipe = Arch(d_model=8, mlp_inner=8, layers=(Hybrid(n_heads=2),)), Recipe()
    model = build_model(arch, 5)
    optimiser = build_optimiser(model, recipe)
    train(model, optimiser, range(3))
    other = build_model(arch, 5, seed=1)
    other.load_state_dict(model.state_dict())
    other_optimiser = build_optimiser(other, recipe)
    saved = {name: tensor.clone() for name, tensor in optimiser_tensors(model, optimiser).items()}
    load_optimiser_tensors(other, other_optimiser, saved)
    train(model, optimiser, range(3, 6))
    train(other, other_optimiser, range(3, 6))
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("count", [1, 2])
def test_joined_members_take_the_steps_of_their_own_optimisers(count: int) -> None:
    arch = Arch(d_model=8, mlp_inner=8, layers=(Hybrid(n_heads=2, branch_norm=True, short_conv=3),))
    recipes = [Recipe(weight_decay=0.5, learning_rate=rate, clip=0.3) for rate in (0.01, 0.1)][:count]
    alone, members = ([build_model(arch, 5, seed=seed).double() for seed in range(count)] for _ in range(2))
    optimisers = [build_optimiser(model, recipe) for model, recipe in zip(alone, recipes, strict=True)]
    stack = stack_models(members)
    joint = JointAdamW(stack, members, recipes)
    for step in range(4):
        joint.set_learning_rates([recipe.learning_rate for recipe in recipes])
        for name, parameter in stack.named_parameters():
            gradients = [torch.cos(model.get_parameter(name).detach() * (step + 1)) for model in alone]
            parameter.grad = torch.stack(gradients).view(parameter.shape)
            for model, gradient in zip(alone, gradients, strict=True):
                model.get_parameter(name).grad = gradient
        for model, optimiser in zip(alone, optimisers, strict=True):
            torch.nn.utils.clip_grads_with_norm_(
                model.parameters(), 0.3, torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            )
            optimiser.step()
        joined = joint.gradients()
        joint.step(joined, joined.norm(dim=1), torch.ones(count, dtype=torch.bool), 0.3)
    for model, member, optimiser, other in zip(alone, members, optimisers, joint.optimisers, strict=True):
        for name, weight in model.state_dict().items():
            torch.testing.assert_close(member.state_dict()[name], weight, rtol=1e-10, atol=1e-12)
        expected = optimiser_tensors(model, optimiser)
        kept = optimiser_tensors(member, other)
        assert kept.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(kept[name].to(tensor.dtype), tensor, rtol=1e-10, atol=1e-12)
        load_optimiser_tensors(member, other, {name: torch.zeros_like(t) for name, t in kept.items()})
    assert all(not tensor.any() for tensor in (joint._means, joint._squares, joint._steps))
