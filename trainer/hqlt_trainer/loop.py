"""Training one replica: one seed of one config, from its last checkpoint to its result."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from hqlt_search_space.errors import TrialPausedError
from hqlt_search_space.recipe import Recipe
from hqlt_search_space.tasks import context_length
from hqlt_search_space.trial import CurvePoint, FailureReason, ReplicaResult, Trial
from torch.nn import functional

from hqlt_trainer.checkpoint import latest_checkpoint, save_checkpoint, weights_sha256
from hqlt_trainer.environment import peak_memory_bytes
from hqlt_trainer.evaluation import EvaluationData, evaluate, knock_outs, mean_gates, scored_logits
from hqlt_trainer.model import Model, build_model
from hqlt_trainer.optimiser import (
    build_optimiser,
    learning_rate,
    load_optimiser_tensors,
    optimiser_tensors,
    set_learning_rate,
)
from hqlt_trainer.precision import autocast
from hqlt_trainer.tasks.batch import IGNORED, Batch, TaskData

MAX_BAD_STEPS = 10
"""Non-finite steps in a row that are skipped; one more fails the replica."""
CURVE_POINTS = 50
"""Readings of the training loss in a run, evenly spaced."""
CHECKPOINT_SECONDS = 30.0
"""Longest time between checkpoints. By the clock, which is safe: a checkpoint changes nothing in what is trained."""


OnRung = Callable[[int, int, dict[str, float]], bool]
OnMetrics = Callable[[int, int, dict[str, float]], None]
Cancelled = Callable[[], bool]


@dataclass(frozen=True)
class Callbacks:
    """Whom the loop tells, and whom it asks; see `run.run_trial`."""

    on_rung: OnRung | None = None
    on_metrics: OnMetrics | None = None
    cancelled: Cancelled | None = None


@dataclass
class Progress:
    """What a resumed run needs beside tensors. It is saved as JSON, which gives every float back to the bit."""

    step: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    bad_steps_in_a_row: int = 0
    skipped_steps: int = 0
    tokens: int = 0
    train_seconds: float = 0.0
    wall_seconds: float = 0.0
    curve: list[tuple[int, dict[str, float]]] = field(default_factory=list)


class ReplicaFailedError(Exception):
    """Ends a replica with a reason that becomes its result."""

    def __init__(self, reason: FailureReason, message: str) -> None:
        super().__init__(reason, message)
        self.reason: FailureReason = reason
        self.message = message


class Replica:
    """One seed in training. `progress` stays readable when `train` raises, so that a failure has a step."""

    def __init__(self, trial: Trial, seed: int, out: Path, callbacks: Callbacks) -> None:
        self.trial = trial
        self.seed = seed
        self.out = out
        self.callbacks = callbacks
        self.folder = out / f"seed-{seed}" / "checkpoints"
        self.progress = Progress()
        self.notes: tuple[str, ...] = ()
        self.checkpoint: Path | None = None
        self.started = self.last_save = time.monotonic()

    def train(self, task_data: TaskData) -> ReplicaResult:
        """Trains from the last checkpoint, if there is one, to the end or until a rung stops it.

        Raises:
            ReplicaFailedError: it diverged.
            TrialPausedError: it was cancelled; a checkpoint is written.
            CheckpointError: the folder holds another config's checkpoints.
        """
        recipe, runtime, progress = self.trial.config.recipe, self.trial.runtime, self.progress
        self._build(task_data.vocab_size)
        context = context_length(self.trial.config.task)
        validation = EvaluationData(task_data, "validation", context, runtime.device)
        rungs = {rung for rung in self.trial.rungs if rung < recipe.steps}
        curve_every = math.ceil(recipe.steps / CURVE_POINTS)
        if progress.step in rungs and not self._goes_on(progress.curve[-1][1]):
            return self._result("stopped", progress.curve[-1][1])
        while progress.step < recipe.steps:
            if self.callbacks.cancelled is not None and self.callbacks.cancelled():
                self._save()
                raise TrialPausedError(self.seed, progress.step)
            self._step(task_data)
            if progress.step == recipe.steps:
                break
            if progress.step in rungs:
                metrics = self._train_loss() | self._finite(evaluate(self.model, validation, recipe.precision))
                self._record(metrics)
                self._save()
                if not self._goes_on(metrics):
                    return self._result("stopped", metrics)
            elif progress.step % curve_every == 0:
                self._record(self._train_loss())
            if time.monotonic() - self.last_save > CHECKPOINT_SECONDS:
                self._save()
        return self._finish(task_data, validation)

    def _build(self, vocab_size: int) -> None:
        """Model and optimiser as they start, or as the last whole checkpoint has them."""
        config, runtime = self.trial.config, self.trial.runtime
        torch.manual_seed(self.seed)  # nothing draws from it today; a layer with dropout would
        self.model: Model = build_model(
            config.arch,
            vocab_size,
            seed=self.seed,
            init_std=config.recipe.init_std,
            device=runtime.device,
            backend=runtime.backend,
        )
        self.optimiser = build_optimiser(self.model, config.recipe)
        found, self.notes = latest_checkpoint(self.folder, config.config_id)
        if found is not None:
            self.model.load_state_dict(found.model)
            load_optimiser_tensors(self.model, self.optimiser, found.optimiser)
            for name, value in found.state["progress"].items():
                setattr(self.progress, name, value)
            _set_random_states(found.state["random"])
            self.checkpoint = found.path
            self.started -= self.progress.wall_seconds

    def _step(self, task_data: TaskData) -> None:
        """One optimiser step. A step whose loss or gradient is not finite leaves the weights as they are."""
        recipe, progress = self.trial.config.recipe, self.progress
        started = time.perf_counter()
        batch = task_data.train_batch(progress.step, recipe.batch, self.seed, "cpu")
        set_learning_rate(self.optimiser, learning_rate(recipe, progress.step))
        loss_nats = train_step(self.model, self.optimiser, batch, recipe, torch.device(self.trial.runtime.device))
        progress.step += 1
        progress.tokens += int(batch.lengths.sum())
        progress.train_seconds += time.perf_counter() - started
        if loss_nats is not None:
            progress.loss_sum += loss_nats
            progress.loss_count += 1
            progress.bad_steps_in_a_row = 0
            return
        progress.skipped_steps += 1
        progress.bad_steps_in_a_row += 1
        if progress.bad_steps_in_a_row > MAX_BAD_STEPS:
            raise ReplicaFailedError(
                "diverged",
                f"diverged: loss or gradient not finite in {progress.bad_steps_in_a_row} steps in a row, the last one "
                f"step {progress.step} of {recipe.steps} (learning_rate {recipe.learning_rate:g})",
            )

    def _finish(self, task_data: TaskData, validation: EvaluationData) -> ReplicaResult:
        """Saves, then judges; a run that is interrupted here judges again what it saved."""
        recipe, runtime = self.trial.config.recipe, self.trial.runtime
        self._save()
        test = EvaluationData(task_data, "test", context_length(self.trial.config.task), runtime.device)
        metrics = self._train_loss()
        metrics |= self._finite(evaluate(self.model, validation, recipe.precision))
        metrics |= self._finite(evaluate(self.model, test, recipe.precision))
        self._record(metrics)
        if recipe.steps in self.trial.rungs:
            self._goes_on(metrics)
        result = self._result("complete", {**metrics, **task_data.reference_metrics})
        silenced = knock_outs(self.model, validation, recipe.precision) if runtime.knock_outs else ()
        gates = mean_gates(self.model, validation, recipe.precision)
        return result.model_copy(update={"knock_outs": silenced, "gates": gates})

    def _train_loss(self) -> dict[str, float]:
        """The mean training loss since the last time it was asked for."""
        progress = self.progress
        if not progress.loss_count:
            return {}
        metrics = {"train_loss_nats": progress.loss_sum / progress.loss_count}
        progress.loss_sum, progress.loss_count = 0.0, 0
        return metrics

    def _record(self, metrics: dict[str, float]) -> None:
        if not metrics:  # every step since the last reading was skipped
            return
        self.progress.curve.append((self.progress.step, metrics))
        if self.callbacks.on_metrics is not None:
            self.callbacks.on_metrics(self.seed, self.progress.step, metrics)

    def _goes_on(self, metrics: dict[str, float]) -> bool:
        return self.callbacks.on_rung is None or self.callbacks.on_rung(self.seed, self.progress.step, metrics)

    def _finite(self, metrics: dict[str, float]) -> dict[str, float]:
        for name, value in metrics.items():
            if not math.isfinite(value):
                step = self.progress.step
                raise ReplicaFailedError("diverged", f"diverged: {name} is not finite at step {step}")
        return metrics

    def _save(self) -> None:
        self.last_save = time.monotonic()
        self.progress.wall_seconds = self.last_save - self.started
        self.checkpoint = save_checkpoint(
            self.folder,
            self.progress.step,
            config_id=self.trial.config.config_id,
            model=dict(self.model.named_parameters()),
            optimiser=optimiser_tensors(self.model, self.optimiser),
            state={"seed": self.seed, "progress": asdict(self.progress), "random": _random_states()},
        )

    def _result(self, status: Any, metrics: dict[str, float]) -> ReplicaResult:
        return self.outcome(
            status=status, metrics=metrics, weights_sha256=weights_sha256(dict(self.model.named_parameters()))
        )

    def outcome(self, **what: Any) -> ReplicaResult:
        """The result as far as it is known at this moment, with `what` added."""
        progress = self.progress
        return ReplicaResult(
            seed=self.seed,
            step=progress.step,
            curve=tuple(CurvePoint(step=step, metrics=metrics) for step, metrics in progress.curve),
            skipped_steps=progress.skipped_steps,
            tokens_per_second=progress.tokens / progress.train_seconds if progress.train_seconds else None,
            train_seconds=progress.train_seconds,
            wall_seconds=time.monotonic() - self.started,
            peak_memory_bytes=peak_memory_bytes(self.trial.runtime),
            checkpoint=self.checkpoint.relative_to(self.out).as_posix() if self.checkpoint is not None else None,
            **what,
        )


def train_step(
    model: Model, optimiser: torch.optim.AdamW, batch: Batch, recipe: Recipe, device: torch.device
) -> float | None:
    """One step on the mean loss over the scored positions of `batch`: that loss, or None if it or its gradient is not
    finite, and then nothing is changed.
    """
    n_scored = int((batch.targets != IGNORED).sum())
    loss = torch.zeros((), device=device)
    micro_batches = zip(batch.inputs.chunk(recipe.accumulation), batch.targets.chunk(recipe.accumulation), strict=True)
    for inputs, targets in micro_batches:
        with autocast(device, recipe.precision):
            logits, scored = scored_logits(model, inputs, targets)
        part = functional.cross_entropy(logits.float(), scored, reduction="sum") / n_scored
        torch.autograd.backward(part)
        loss += part.detach()
    # From the optimiser, whose list is flat: walking the modules takes a tenth of a small model's step.
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    taken = bool(torch.isfinite(loss + norm))
    if taken:
        if recipe.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, recipe.clip, norm)
        optimiser.step()
    optimiser.zero_grad()
    return loss.item() if taken else None


def _random_states() -> dict[str, str]:
    """The states of torch's generators, as hexadecimal text by device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {device: bytes(state.tolist()).hex() for device, state in states.items()}


def _set_random_states(states: dict[str, str]) -> None:
    for device, state in states.items():
        tensor = torch.tensor(list(bytes.fromhex(state)), dtype=torch.uint8)
        if device == "cpu":
            torch.set_rng_state(tensor)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(tensor)
