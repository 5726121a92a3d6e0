"""Replicas of one arch that train together: one set of operations a step for all of them.

    model       parameters [replicas, ...]; activations are one batch, a replica's rows after the other's
    members     an ordinary `Model` a replica, whose parameters are slices of those above: what is saved and judged
    optimisers  an ordinary AdamW a replica, on the slices, with a learning rate of its own

Autograd runs through the stack; norms, clipping and updates run on the slices. Nothing of one replica enters another's
arithmetic, so a replica that leaves is only no longer updated: its place stays, and the others go on to the bit as if
it had stayed. The weights are those of a replica alone to rounding, not to the bit.

`torch.func.vmap` over the model would do the same, 2 to 3 ms a step later on a CPU, because it looks for the batching
rule of every operation; and it has none for our convolution. One batch for all replicas costs nothing of the kind.
"""

import copy
import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass

import torch
from hqlt_kernels.linear_cross_entropy import linear_cross_entropy
from hqlt_search_space.recipe import Recipe
from torch import Tensor

from hqlt_trainer.model import Model
from hqlt_trainer.optimiser import JointAdamW, build_optimiser, learning_rate, set_learning_rate, set_parameter
from hqlt_trainer.precision import autocast
from hqlt_trainer.tasks.batch import IGNORED, Batch, Rows, TaskData

MAX_BAD_STEPS = 10
"""Non-finite steps in a row that are skipped; one more fails the replica."""
STEPS_AHEAD = 8
JOINT_PARAMETERS = 2**24
"""Most parameters of a stack that a GPU updates as one tensor: beyond, launches no longer matter and the copy of all
gradients does."""
EAGER_STEPS = 3
"""Steps before the one that is captured: libraries allocate their workspaces and the optimisers their moments."""


def updates_jointly(stack: Model, device: torch.device) -> bool:
    """Whether `JointAdamW` updates the replicas, or each its own AdamW."""
    return device.type == "cuda" and sum(p.numel() for p in stack.parameters()) <= JOINT_PARAMETERS


def stack_models(members: Sequence[Model]) -> Model:
    """One model whose parameters are those of `members` along a new first axis; theirs become slices of it.

    A single member is its own stack: nothing is changed.
    """
    if len(members) == 1:
        return members[0]
    together = copy.deepcopy(members[0])
    for name, _ in members[0].named_parameters():
        stacked = torch.stack([member.get_parameter(name).detach() for member in members])
        set_parameter(together, name, stacked)
        for member, part in zip(members, stacked.unbind(), strict=True):
            set_parameter(member, name, part)
    return together


@dataclass(frozen=True)
class MicroBatch:
    """Part of a step's data for all replicas, the rows of the first before those of the second."""

    inputs: Tensor
    """Tokens [replicas * rows, T]."""
    targets: Tensor
    """What is to be predicted, at the N scored positions; every replica has N / replicas of them."""
    at: Tensor | None
    """Where those are in the flattened inputs [N]; None: everywhere."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.inputs, self.targets) if self.at is None else (self.inputs, self.targets, self.at)

    def map(self, f: Callable[[Tensor], Tensor]) -> "MicroBatch":
        return MicroBatch(f(self.inputs), f(self.targets), None if self.at is None else f(self.at))


@dataclass(frozen=True)
class StepData:
    """The data of one step."""

    parts: tuple[MicroBatch, ...]
    tokens: Tensor
    """How many tokens of each replica are no padding, int64 [replicas]."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*(x for part in self.parts for x in part.tensors), self.tokens)

    def map(self, f: Callable[[Tensor], Tensor]) -> "StepData":
        return StepData(tuple(part.map(f) for part in self.parts), f(self.tokens))


DataOrSource = StepData | Callable[[], StepData]
"""The data of a step, or what makes them as part of the step: of the next one whenever it is called."""


def step_data(batches: Sequence[Batch], accumulation: int) -> StepData:
    """The batches of all replicas cut into `accumulation` parts, each joined over the replicas."""
    chunks = [zip(b.inputs.chunk(accumulation), b.targets.chunk(accumulation), strict=True) for b in batches]
    parts = []
    for part in zip(*chunks, strict=True):
        inputs = torch.cat([inputs for inputs, _ in part])
        targets = torch.cat([targets for _, targets in part])
        is_scored = targets.flatten() != IGNORED
        by_replica = is_scored.view(len(batches), -1).sum(1)
        assert bool((by_replica == by_replica[0]).all()), "replicas score equally many positions a step"
        at = None if bool(is_scored.all()) else is_scored.nonzero().squeeze(-1)
        parts.append(MicroBatch(inputs, targets.flatten() if at is None else targets.flatten()[at], at))
    return StepData(tuple(parts), torch.stack([b.lengths.sum() for b in batches]))


def step_data_of_rows(rows: Rows, accumulation: int) -> StepData:
    """The same of `rows`, a stream for each replica, without a look at them."""
    parts = []
    for inputs, answers, lengths in zip(*(x.chunk(accumulation, dim=1) for x in rows), strict=True):
        n, width = lengths.numel(), inputs.shape[-1]
        before = torch.arange(-1, n * width - 1, width, device=inputs.device)  # each row's first token
        parts.append(MicroBatch(inputs.flatten(0, 1), answers.flatten(), before + lengths.flatten()))
    return StepData(tuple(parts), rows.lengths.sum(1))


@contextmanager
def feed(
    task_data: TaskData, recipe: Recipe, seeds: Sequence[int], first_step: int, device: str
) -> Iterator[tuple[Iterator[DataOrSource], str | None]]:
    """What `Stack.take_step` takes at `first_step` and at every step after it, for the replicas of `seeds`.

    A step makes its data itself, or, where the task cannot do that, they are made beforehand on the CPU: then the
    second value says why, and for a GPU they are made in a thread, some steps ahead, in memory that can be copied from
    without waiting.
    """
    source = task_data.row_source(seeds, recipe.batch, first_step, device)
    steps = range(first_step, recipe.steps)
    if not isinstance(source, str):
        make_rows = source
        yield itertools.repeat(lambda: step_data_of_rows(make_rows(), recipe.accumulation), len(steps)), None
        return

    def make(step: int) -> StepData:
        made = step_data(
            [task_data.train_batch(step, recipe.batch, seed, "cpu") for seed in seeds], recipe.accumulation
        )
        return made if device == "cpu" else made.map(Tensor.pin_memory)

    if device == "cpu":
        yield map(make, steps), source
        return
    with ThreadPoolExecutor(1) as thread:
        waiting: deque[Future[StepData]] = deque()

        def ahead() -> Iterator[StepData]:
            for step in steps:
                waiting.append(thread.submit(make, step))
                if len(waiting) > STEPS_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

        try:
            yield ahead(), source
        finally:
            thread.shutdown(cancel_futures=True)


@dataclass
class Tally:
    """What has happened to one replica, as numbers; see `Stack.tallies`."""

    loss_sum: float
    loss_count: int
    bad_in_a_row: int
    skipped: int
    steps: int
    tokens: int

    @property
    def has_diverged(self) -> bool:
        return self.bad_in_a_row > MAX_BAD_STEPS


class Stack:
    """The models of some replicas, and the step they take together.

    A step reads nothing back from the device. What happens is counted there: sum and number of the finite losses,
    non-finite steps in a row and in all, steps and tokens taken. A replica leaves by `leave`, or by itself after more
    than `MAX_BAD_STEPS` non-finite steps in a row; its weights, moments and counts then stay as they are.
    """

    def __init__(self, members: Sequence[Model], recipes: Sequence[Recipe], device: torch.device) -> None:
        """`recipes` may differ in what the optimiser reads; batch, steps, clip, precision and accumulation are one."""
        self.members = tuple(members)
        self.recipes = tuple(recipes)
        self.device = device
        self.model = stack_models(members)
        self._joint: JointAdamW | None = None
        if updates_jointly(self.model, device):
            self._joint = JointAdamW(self.model, members, recipes)
            self.optimisers = self._joint.optimisers
        else:
            self.optimisers = tuple(build_optimiser(m, r) for m, r in zip(members, recipes, strict=True))
        self._stacked = list(self.model.parameters())
        self._parameters = [list(member.parameters()) for member in members]
        n = len(members)
        self._counts = torch.zeros(6, n, dtype=torch.float64, device=device)  # the rows are Tally's fields
        self._is_in = torch.ones(n, dtype=torch.bool, device=device)
        self._skips = torch.zeros(n, device=device)
        for optimiser, skip in zip(self.optimisers, self._skips, strict=True):
            optimiser.found_inf = skip  # type: ignore[attr-defined]  # the protocol of torch.amp.GradScaler
        self.not_captured: str | None = None
        """Why the step is launched from Python on a GPU; None: it is captured, or will be after `EAGER_STEPS`."""
        self._captured: _Captured | None = None
        self._eager_steps = 0
        self._side_stream: torch.cuda.Stream | None = None
        """Where steps run before the capture, as `torch.cuda.graph` wants it; None on a CPU."""
        if device.type == "cuda":
            self._side_stream = _side_stream(device)

    def take_step(self, step: int, data: DataOrSource) -> None:
        """One step of every replica that has not left, on the mean loss over its scored positions.

        A step that is captured makes its data as the first one did, or copies them to where those lay.

        A step whose loss or gradient is not finite changes neither weights nor moments of that replica.
        """
        rates = [learning_rate(recipe, step) for recipe in self.recipes]
        if self._joint is not None:
            self._joint.set_learning_rates(rates)
        else:
            for optimiser, rate in zip(self.optimisers, rates, strict=True):
                set_learning_rate(optimiser, rate)
        if self._side_stream is None:
            self._compute(data)
        elif self._captured is not None:
            self._captured.replay(data)
        elif self._eager_steps < EAGER_STEPS or self.not_captured is not None:
            self._eager_steps += 1
            self._side_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._side_stream):
                self._compute(self._on_device(data))
            torch.cuda.current_stream().wait_stream(self._side_stream)
        else:
            self._capture(data)
            self.take_step(step, data)

    def _capture(self, data: DataOrSource) -> None:
        try:
            self._captured = _Captured(self._compute, self._on_device(data))
        except RuntimeError as error:  # torch's own, of which CUDA's errors are a kind
            torch.cuda.synchronize()
            cause = error.__context__ or error  # to end a capture that has failed fails too, and says less
            self.not_captured = str(cause).partition("\n")[0]
            self._forget_gradients()

    def _on_device(self, data: DataOrSource) -> DataOrSource:
        return data.map(lambda x: x.to(self.device, non_blocking=True)) if isinstance(data, StepData) else data

    def _compute(self, data: DataOrSource) -> None:
        if not isinstance(data, StepData):
            data = data()
        losses = self._backward(data.parts)
        self._update(losses, data.tokens)

    def _backward(self, data: Sequence[MicroBatch]) -> Tensor:
        """The losses [replicas]; gradients are left where they belong."""
        recipe, n = self.recipes[0], len(self.members)
        n_scored = sum(part.targets.numel() for part in data) // n
        losses = []
        for part in data:
            with autocast(self.device, recipe.precision):
                x = self.model.features(part.inputs, part.at)
            head = self.model.head.weight
            x, head = x.view(n, -1, x.shape[-1]), head.view(n, -1, x.shape[-1])
            mean = linear_cross_entropy(x, head, part.targets.view(n, -1)) / n_scored
            torch.autograd.backward(mean.sum())
            losses.append(mean.detach())
        return torch.stack(losses).sum(0)

    @torch.no_grad()
    def _update(self, losses: Tensor, tokens: Tensor) -> None:
        clip = self.recipes[0].clip
        if self._joint is not None:
            joined = self._joint.gradients()
            lengths = torch.linalg.vector_norm(joined, dim=1)
            is_finite = torch.isfinite(losses + lengths)
            self._joint.step(joined, lengths, is_finite & self._is_in, clip)
            self._forget_gradients()
            self._count(losses, is_finite, tokens)
            return
        if len(self.members) > 1:
            for stacked, *slices in zip(self._stacked, *self._parameters, strict=True):
                if stacked.grad is not None:
                    for parameter, gradient in zip(slices, stacked.grad.unbind(), strict=True):
                        parameter.grad = gradient
        gradients = [[p.grad for p in parameters if p.grad is not None] for parameters in self._parameters]
        norms = torch.stack([torch.nn.utils.get_total_norm(each) for each in gradients])
        is_finite = torch.isfinite(losses + norms)
        self._skips.copy_(~(is_finite & self._is_in))
        for parameters, norm, optimiser in zip(self._parameters, norms, self.optimisers, strict=True):
            if clip is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
            optimiser.step()
        self._forget_gradients()
        self._count(losses, is_finite, tokens)

    def _forget_gradients(self) -> None:
        for parameters in (self._stacked, *self._parameters):
            for parameter in parameters:
                parameter.grad = None

    def _count(self, losses: Tensor, is_finite: Tensor, tokens: Tensor) -> None:
        loss_sum, loss_count, bad_in_a_row, skipped, steps, tokens_taken = self._counts
        taken = is_finite & self._is_in
        lost = ~is_finite & self._is_in
        loss_sum += torch.where(taken, losses, 0)
        loss_count += taken
        bad_in_a_row += lost
        bad_in_a_row.masked_fill_(taken, 0)
        skipped += lost
        steps += self._is_in
        tokens_taken += self._is_in * tokens
        self._is_in &= bad_in_a_row <= MAX_BAD_STEPS

    def tallies(self) -> list[Tally]:
        """What has been counted, for each replica. Waits for the device."""
        return [Tally(loss, *map(int, counts)) for loss, *counts in self._counts.T.tolist()]

    def set_tally(self, index: int, tally: Tally) -> None:
        """Goes on counting from `tally`."""
        self._counts[:, index] = torch.tensor(astuple(tally), dtype=torch.float64)

    def forget_losses(self) -> None:
        """Starts the sum and number of the losses anew."""
        self._counts[:2] = 0

    def leave(self, index: int) -> None:
        """This replica is not trained any further."""
        self._is_in[index] = False


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all trainings of a process: cuBLAS keeps a workspace for every stream, 64 MiB a training on an H200."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped


class _Captured:
    """A step as a CUDA graph: one launch, whatever it consists of."""

    def __init__(self, compute: Callable[[DataOrSource], None], data: DataOrSource) -> None:
        """Data on the device are where the graph will read, a source becomes part of it. Capturing computes nothing."""
        self._data = data
        self._graph = torch.cuda.CUDAGraph()
        # Of this thread alone: the one that makes data allocates pinned memory meanwhile. A capture that cannot even be
        # ended would leave its stream the current one, but for the outer context.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(self._graph, capture_error_mode="thread_local"),
        ):
            compute(data)

    def replay(self, data: DataOrSource) -> None:
        if isinstance(self._data, StepData) and isinstance(data, StepData):
            for to, source in zip(self._data.tensors, data.tensors, strict=True):
                to.copy_(source, non_blocking=True)
        self._graph.replay()
