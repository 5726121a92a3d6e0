"""Replicas of one arch that train together: one set of operations a step for all of them.

    model       parameters [replicas, ...]; activations are one batch, a replica's rows after the other's
    members     an ordinary `Model` a replica, whose parameters are slices of those above: what is saved and judged
    optimisers  an ordinary AdamW a replica, on the slices, with a learning rate of its own

Autograd runs through the stack; norms, clipping and updates run on the slices. Nothing of one replica enters another's
arithmetic, so a replica that leaves is only no longer updated: its place stays, and the others go on to the bit as if
it had stayed. The weights are those of a replica alone to rounding, not to the bit.

`torch.func.vmap` over the model would do the same. Repeating the batching rules of every operation at every step took
it 7 to 13 ms a step of a small model on a CPU, where the batch that is a stack costs nothing.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hqlt_search_space.recipe import Recipe
from torch import Tensor, nn
from torch.nn import functional

from hqlt_trainer.model import Model
from hqlt_trainer.optimiser import build_optimiser, learning_rate, set_learning_rate
from hqlt_trainer.precision import autocast
from hqlt_trainer.tasks.batch import IGNORED, Batch

MAX_BAD_STEPS = 10
"""Non-finite steps in a row that are skipped; one more fails the replica."""


def stack_models(members: Sequence[Model]) -> Model:
    """One model whose parameters are those of `members` along a new first axis; theirs become slices of it.

    A single member is its own stack: nothing is changed.
    """
    if len(members) == 1:
        return members[0]
    together = copy.deepcopy(members[0])
    for name, _ in members[0].named_parameters():
        stacked = torch.stack([member.get_parameter(name).detach() for member in members])
        _set_parameter(together, name, stacked)
        for member, part in zip(members, stacked.unbind(), strict=True):
            _set_parameter(member, name, part)
    return together


def _set_parameter(model: Model, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, nn.Parameter(value))


@dataclass(frozen=True)
class MicroBatch:
    """Part of a step's data for all replicas, the rows of the first before those of the second."""

    inputs: Tensor
    """Tokens [replicas * rows, T]."""
    at: Tensor | None
    """Where something is scored, in the flattened inputs [N]; None: everywhere."""
    targets: Tensor
    """What is to be predicted there [N]; every replica has N / replicas of them."""

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.inputs, self.targets) if self.at is None else (self.inputs, self.targets, self.at)


def micro_batches(batches: Sequence[Batch], count: int) -> tuple[MicroBatch, ...]:
    """The step's data of each replica, cut into `count` parts and joined over the replicas."""
    parts = zip(*(zip(b.inputs.chunk(count), b.targets.chunk(count), strict=True) for b in batches), strict=True)
    found = []
    for part in parts:
        inputs = torch.cat([inputs for inputs, _ in part])
        targets = torch.cat([targets for _, targets in part])
        is_scored = targets.flatten() != IGNORED
        if bool(is_scored.all()):
            found.append(MicroBatch(inputs, None, targets.flatten()))
            continue
        by_replica = is_scored.view(len(batches), -1).sum(1)
        assert bool((by_replica == by_replica[0]).all()), "replicas score equally many positions a step"
        at = is_scored.nonzero().squeeze(-1)
        found.append(MicroBatch(inputs, at, targets.flatten()[at]))
    return tuple(found)


@dataclass
class Tally:
    """What has happened to one replica, as numbers; see `Stack.tallies`."""

    loss_sum: float
    loss_count: int
    bad_in_a_row: int
    skipped: int
    steps: int

    @property
    def has_diverged(self) -> bool:
        return self.bad_in_a_row > MAX_BAD_STEPS


class Stack:
    """The models of some replicas, and the step they take together.

    A step reads nothing back from the device. What happens is counted there: sum and number of the finite losses,
    non-finite steps in a row and in all, steps taken. A replica leaves by `leave`, or by itself after more than
    `MAX_BAD_STEPS` non-finite steps in a row; its weights, moments and counts then stay as they are.
    """

    def __init__(self, members: Sequence[Model], recipes: Sequence[Recipe], device: torch.device) -> None:
        """`recipes` may differ in what the optimiser reads; batch, steps, clip, precision and accumulation are one."""
        self.members = tuple(members)
        self.recipes = tuple(recipes)
        self.device = device
        self.model = stack_models(members)
        self.optimisers = tuple(build_optimiser(m, r) for m, r in zip(members, recipes, strict=True))
        self._parameters = [list(member.parameters()) for member in members]
        n = len(members)
        self._counts = torch.zeros(5, n, dtype=torch.float64, device=device)  # the rows are Tally's fields
        self._is_in = torch.ones(n, dtype=torch.bool, device=device)
        self._skips = torch.zeros(n, device=device)
        for optimiser, skip in zip(self.optimisers, self._skips, strict=True):
            optimiser.found_inf = skip  # type: ignore[attr-defined]  # the protocol of torch.amp.GradScaler

    def take_step(self, step: int, data: Sequence[MicroBatch]) -> None:
        """One step of every replica that has not left, on the mean loss over its scored positions.

        A step whose loss or gradient is not finite changes neither weights nor moments of that replica.
        """
        for optimiser, recipe in zip(self.optimisers, self.recipes, strict=True):
            set_learning_rate(optimiser, learning_rate(recipe, step))
        self._update(self._backward(data))

    def _backward(self, data: Sequence[MicroBatch]) -> Tensor:
        """The losses [replicas]; gradients are left where they belong."""
        recipe, n = self.recipes[0], len(self.members)
        n_scored = sum(part.targets.numel() for part in data) // n
        losses = torch.zeros(n, device=self.device)
        for part in data:
            with autocast(self.device, recipe.precision):
                logits = self.model(part.inputs, part.at)
            each = functional.cross_entropy(logits.float().flatten(0, -2), part.targets, reduction="none")
            mean = each.view(n, -1).sum(1) / n_scored
            torch.autograd.backward(mean.sum())
            losses += mean.detach()
        return losses

    @torch.no_grad()
    def _update(self, losses: Tensor) -> None:
        clip = self.recipes[0].clip
        if len(self.members) > 1:
            for stacked, *parts in zip(self.model.parameters(), *self._parameters, strict=True):
                if stacked.grad is not None:
                    for part, gradient in zip(parts, stacked.grad.unbind(), strict=True):
                        part.grad = gradient
        norms = torch.stack(
            [
                torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
                for parameters in self._parameters
            ]
        )
        is_finite = torch.isfinite(losses + norms)
        self._skips.copy_(~(is_finite & self._is_in))
        for parameters, norm, optimiser in zip(self._parameters, norms, self.optimisers, strict=True):
            if clip is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
            optimiser.step()
            optimiser.zero_grad()
        self.model.zero_grad()
        self._count(losses, is_finite)

    def _count(self, losses: Tensor, is_finite: Tensor) -> None:
        loss_sum, loss_count, bad_in_a_row, skipped, steps = self._counts
        taken = is_finite & self._is_in
        lost = ~is_finite & self._is_in
        loss_sum += torch.where(taken, losses, 0)
        loss_count += taken
        bad_in_a_row += lost
        bad_in_a_row.masked_fill_(taken, 0)
        skipped += lost
        steps += self._is_in
        self._is_in &= bad_in_a_row <= MAX_BAD_STEPS

    def tallies(self) -> list[Tally]:
        """What has been counted, for each replica. Waits for the device."""
        return [Tally(loss, *map(int, counts)) for loss, *counts in self._counts.T.tolist()]

    def set_tally(self, index: int, tally: Tally) -> None:
        """Goes on counting from `tally`."""
        values = [tally.loss_sum, tally.loss_count, tally.bad_in_a_row, tally.skipped, tally.steps]
        self._counts[:, index] = torch.tensor(values, dtype=torch.float64)

    def forget_losses(self) -> None:
        """Starts the sum and number of the losses anew."""
        self._counts[:2] = 0

    def leave(self, index: int) -> None:
        """This replica is not trained any further."""
        self._is_in[index] = False
