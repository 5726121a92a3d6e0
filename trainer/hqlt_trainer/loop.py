"""Training replicas: seeds of one config, from their last checkpoints to their results."""

import errno
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from hqlt_search_space.errors import CheckpointError, TrialPausedError
from hqlt_search_space.spec import canonical_json
from hqlt_search_space.tasks import context_length
from hqlt_search_space.trial import CurvePoint, FailureReason, ReplicaResult, Trial

from hqlt_trainer.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    remove_newer,
    save_checkpoint,
    weights_sha256,
    write_whole,
)
from hqlt_trainer.environment import peak_memory_bytes
from hqlt_trainer.evaluation import EvaluationData, evaluate, knock_outs, mean_gates
from hqlt_trainer.model import Model, build_model
from hqlt_trainer.optimiser import load_optimiser_tensors, optimiser_tensors
from hqlt_trainer.replicas import DataOrSource, Stack, Tally, feed
from hqlt_trainer.tasks.batch import TaskData

CURVE_POINTS = 50
"""Readings of the training loss in a run, evenly spaced."""
CHECKPOINT_SECONDS = 30.0
"""Longest time between checkpoints. By the clock, which is safe: a checkpoint changes nothing in what is trained."""


ReplicaStatus = Literal["complete", "stopped", "failed"]
OnRung = Callable[[int, int, dict[str, float]], bool]
OnMetrics = Callable[[int, int, dict[str, float]], None]
Cancelled = Callable[[], bool]
OnProgress = Callable[[int], None]


@dataclass(frozen=True)
class Callbacks:
    """Whom the loop tells, and whom it asks; see `run.run_trial`."""

    on_rung: OnRung | None = None
    on_metrics: OnMetrics | None = None
    cancelled: Cancelled | None = None
    on_progress: OnProgress | None = None


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
    accumulation: int | None = None
    """Micro-batches a step since memory ran out with the recipe's."""
    curve: list[tuple[int, dict[str, float]]] = field(default_factory=list)


class ReplicaFailedError(Exception):
    """Ends a replica with a reason that becomes its result."""

    def __init__(self, reason: FailureReason, message: str) -> None:
        super().__init__(reason, message)
        self.reason: FailureReason = reason
        self.message = message


class Replica:
    """One seed of a trial: its model, its progress, and its result once it has ended.

    `model` is an ordinary model of its own or, in a stack, slices of the stack's.
    """

    def __init__(self, trial: Trial, seed: int, out: Path, callbacks: Callbacks) -> None:
        """Takes over the result of an earlier call on the same `out`, if it ended there.

        Raises:
            CheckpointError: the folder holds the result of another config.
        """
        self.trial = trial
        self.seed = seed
        self.out = out
        self.callbacks = callbacks
        self.folder = out / f"seed-{seed}" / "checkpoints"
        self.progress = Progress()
        self.checkpoint: Path | None = None
        self.started = self.last_save = time.monotonic()
        self.result = self._read_result()
        self.notes: tuple[str, ...] = ("kept the result of an earlier call",) if self.has_ended else ()
        self.model: Model

    @property
    def has_ended(self) -> bool:
        return self.result is not None

    def build(self, vocab_size: int) -> Model:
        """The model as it starts, with no progress yet."""
        config, runtime = self.trial.config, self.trial.runtime
        self.progress = Progress()
        self.model = build_model(
            config.arch,
            vocab_size,
            seed=self.seed,
            init_std=config.recipe.init_std,
            device=runtime.device,
            backend=runtime.backend,
        )
        return self.model

    def forget_model(self) -> None:
        """Lets its memory go, until `build` makes it anew."""
        if hasattr(self, "model"):
            del self.model

    def newest_checkpoint(self, at_most: int | None = None) -> Checkpoint | None:
        """The newest whole checkpoint up to a step; what was damaged is noted."""
        found, notes = latest_checkpoint(self.folder, self.trial.config.config_id, at_most)
        self.notes = tuple(dict.fromkeys(self.notes + notes))
        return found

    def load(self, found: Checkpoint, optimiser: torch.optim.AdamW) -> None:
        """Continues from `found`."""
        self.model.load_state_dict(found.model)
        load_optimiser_tensors(self.model, optimiser, found.optimiser)
        for name, value in found.state["progress"].items():
            setattr(self.progress, name, value)
        _set_random_states(found.state["random"])
        self.checkpoint = found.path
        self.started -= self.progress.wall_seconds

    @property
    def tally(self) -> Tally:
        """The counts of `progress`, to go on from."""
        p = self.progress
        return Tally(p.loss_sum, p.loss_count, p.bad_steps_in_a_row, p.skipped_steps, p.step, p.tokens)

    def read(self, tally: Tally) -> None:
        """Takes over what the stack has counted.

        Raises:
            ReplicaFailedError: it diverged.
        """
        recipe, progress = self.trial.config.recipe, self.progress
        progress.loss_sum, progress.loss_count = tally.loss_sum, tally.loss_count
        progress.bad_steps_in_a_row, progress.skipped_steps = tally.bad_in_a_row, tally.skipped
        progress.step, progress.tokens = tally.steps, tally.tokens
        if tally.has_diverged:
            raise ReplicaFailedError(
                "diverged",
                f"diverged: loss or gradient not finite in {tally.bad_in_a_row} steps in a row, the last one "
                f"step {tally.steps} of {recipe.steps} (learning_rate {recipe.learning_rate:g})",
            )

    def record_loss(self) -> None:
        """A point of the curve."""
        self._record(self._train_loss())

    def judge(self, validation: EvaluationData, optimiser: torch.optim.AdamW) -> None:
        """Evaluates at a rung, saves, and ends here if the rung says so.

        Raises:
            ReplicaFailedError: a score is not finite.
        """
        metrics = self._train_loss() | self._finite(self._evaluate(validation))
        self._record(metrics)
        self.save(optimiser)
        self.ask_to_go_on()

    def ask_to_go_on(self) -> None:
        """Asks the rung where the replica stands, whose metrics are the last of its curve."""
        metrics = self.progress.curve[-1][1]
        if not self._goes_on(metrics):
            self._end("stopped", metrics=metrics, weights_sha256=self._weights_sha256())

    def finish(
        self,
        task_data: TaskData,
        validation: EvaluationData,
        test: EvaluationData,
        optimiser: torch.optim.AdamW,
    ) -> None:
        """Saves, then judges; a run that is interrupted here judges again what it saved.

        Raises:
            ReplicaFailedError: a score is not finite.
        """
        recipe, runtime = self.trial.config.recipe, self.trial.runtime
        self.save(optimiser)
        metrics = self._train_loss()
        metrics |= self._finite(self._evaluate(validation))
        metrics |= self._finite(self._evaluate(test))
        self._record(metrics)
        if recipe.steps in self.trial.rungs:
            self._goes_on(metrics)
        self._end(
            "complete",
            metrics={**metrics, **task_data.reference_metrics},
            weights_sha256=self._weights_sha256(),
            knock_outs=knock_outs(self.model, validation, recipe.precision) if runtime.knock_outs else (),
            gates=mean_gates(self.model, validation, recipe.precision),
        )

    @contextmanager
    def ends_if_it_fails(self) -> Iterator[None]:
        """Turns a failure of this replica into its result; the others of a stack go on."""
        try:
            yield
        except ReplicaFailedError as failure:
            self.fail(failure.reason, failure.message)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            message = f"disk full at step {self.progress.step}: no room for a checkpoint in {self.folder}"
            self.fail("disk_full", message)

    def fail(self, reason: FailureReason, message: str) -> None:
        """Ends with a reason and a sentence."""
        self._end("failed", reason=reason, message=message)

    def _end(self, status: ReplicaStatus, **what: Any) -> None:
        """Sets the result and keeps it, unless more memory or disk may mend it."""
        progress = self.progress
        self.result = ReplicaResult(
            seed=self.seed,
            status=status,
            step=progress.step,
            curve=tuple(CurvePoint(step=step, metrics=metrics) for step, metrics in progress.curve),
            skipped_steps=progress.skipped_steps,
            accumulation=progress.accumulation,
            tokens_per_second=progress.tokens / progress.train_seconds if progress.train_seconds else None,
            train_seconds=progress.train_seconds,
            wall_seconds=time.monotonic() - self.started,
            peak_memory_bytes=peak_memory_bytes(self.trial.runtime),
            checkpoint=self.checkpoint.relative_to(self.out).as_posix() if self.checkpoint is not None else None,
            **what,
        )
        if self.result.reason in (None, "diverged"):
            path = self._result_path
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = {"config_id": self.trial.config.config_id, "replica": self.result.model_dump(mode="json")}
            write_whole(path, canonical_json(kept))

    @property
    def _result_path(self) -> Path:
        return self.out / f"seed-{self.seed}" / "result.json"

    def _read_result(self) -> ReplicaResult | None:
        try:
            stored = json.loads(self._result_path.read_bytes())
        except FileNotFoundError:
            return None
        if stored["config_id"] != self.trial.config.config_id:
            raise CheckpointError(
                f"{self._result_path} belongs to config {stored['config_id']}, not {self.trial.config.config_id}; "
                f"give each trial a folder of its own"
            )
        return ReplicaResult.model_validate(stored["replica"])

    def _evaluate(self, data: EvaluationData) -> dict[str, float]:
        return evaluate(self.model, data, self.trial.config.recipe.precision)

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

    def save(self, optimiser: torch.optim.AdamW) -> None:
        """Writes a checkpoint."""
        self.last_save = time.monotonic()
        self.progress.wall_seconds = self.last_save - self.started
        self.checkpoint = save_checkpoint(
            self.folder,
            self.progress.step,
            config_id=self.trial.config.config_id,
            model=dict(self.model.named_parameters()),
            optimiser=optimiser_tensors(self.model, optimiser),
            state={"seed": self.seed, "progress": asdict(self.progress), "random": _random_states()},
        )

    def _weights_sha256(self) -> str:
        return weights_sha256(dict(self.model.named_parameters()))


class Training:
    """Replicas of one arch in one loop, from their last checkpoints to their results.

    All of them stand at the same step. One that has ended keeps its place in the stack, untouched, also when the
    training is continued in another process: so the others do not notice.
    """

    def __init__(self, replicas: Sequence[Replica], accumulation: int | None = None) -> None:
        """`replicas` differ in seed and, if in anything, in learning rate, weight decay or AdamW's averages.

        `accumulation`: micro-batches a step, instead of the recipe's, because memory is short.
        """
        self.replicas = tuple(replicas)
        first = self.replicas[0]
        self.recipe, self.runtime = first.trial.config.recipe, first.trial.runtime
        self.callbacks = first.callbacks
        self.accumulation = accumulation
        self.context = context_length(first.trial.config.task)
        self.step = 0
        self.notes: tuple[str, ...] = ()

    @property
    def running(self) -> list[tuple[int, Replica]]:
        """The replicas that have not ended, and their places."""
        return [(i, replica) for i, replica in enumerate(self.replicas) if not replica.has_ended]

    def run(self, task_data: TaskData) -> None:
        """Trains until every replica has a result.

        Raises:
            TrialPausedError: it was cancelled; checkpoints are written.
            CheckpointError: a folder holds another config's checkpoints.
        """
        steps, device = self.recipe.steps, self.runtime.device
        self._build(task_data.vocab_size)
        validation = EvaluationData(task_data, "validation", self.context, device, self._show_life)
        rungs = {rung for rung in self.replicas[0].trial.rungs if rung < steps}
        curve_every = math.ceil(steps / CURVE_POINTS)
        if self.step in rungs:
            self._each(lambda _, replica: replica.ask_to_go_on())
        with feed(task_data, self.recipe, [r.seed for r in self.replicas], self.step, device) as (data, why_copied):
            while self.running and self.step < steps:
                if self.callbacks.cancelled is not None and self.callbacks.cancelled():
                    self._save()
                    if not self.running:  # there was no room for their checkpoints, which is a result
                        break
                    raise TrialPausedError(self.running[0][1].seed, self.step)
                self._take_step(next(data))
                if self.step == steps:
                    break
                if self.step in rungs:
                    self._read()
                    self._each(lambda i, replica: replica.judge(validation, self.stack.optimisers[i]))
                    self.stack.forget_losses()
                elif self.step % curve_every == 0:
                    self._read()
                    self._each(lambda _, replica: replica.record_loss())
                    self.stack.forget_losses()
                if time.monotonic() - self._last_save > CHECKPOINT_SECONDS:
                    self._save()
        if self.stack.not_captured is not None:
            self.notes += (f"a step is launched from Python, not as a CUDA graph: {self.stack.not_captured}",)
        if device == "cuda" and why_copied is not None:
            self.notes += (f"training data is made on the CPU and copied to the GPU: {why_copied}",)
        if not self.running:
            return
        self._read()
        test = EvaluationData(task_data, "test", self.context, device, self._show_life)
        self._each(lambda i, replica: replica.finish(task_data, validation, test, self.stack.optimisers[i]))

    def _build(self, vocab_size: int) -> None:
        """The stack as it starts, or as the newest checkpoints that stand at one step have it."""
        torch.manual_seed(self.replicas[0].seed)  # no layer draws from it yet; one with dropout would
        models = [replica.build(vocab_size) for replica in self.replicas]
        recipes = [replica.trial.config.recipe for replica in self.replicas]
        self.stack = Stack(models, recipes, torch.device(self.runtime.device))
        at_most = None
        while True:  # a crash may have come between the checkpoints of two replicas, or damaged one
            found = {i: replica.newest_checkpoint(at_most) for i, replica in self.running}
            steps = [0 if checkpoint is None else checkpoint.step for checkpoint in found.values()]
            if len(set(steps)) <= 1:
                break
            at_most = min(steps)
        for i, checkpoint in found.items():
            if checkpoint is not None:
                self.replicas[i].load(checkpoint, self.stack.optimisers[i])
                self.step = checkpoint.step
                remove_newer(self.replicas[i].folder, self.step)  # else a crash could leave none that all have
            self.stack.set_tally(i, self.replicas[i].tally)
        for i, replica in enumerate(self.replicas):
            if replica.has_ended:
                self.stack.leave(i)
        self._spare_memory()
        self._last_save = time.monotonic()

    def _spare_memory(self) -> None:
        """Smaller micro-batches, if they were asked for now or before a pause."""
        asked = [self.accumulation, *(replica.progress.accumulation for _, replica in self.running)]
        accumulation = max((n for n in asked if n is not None), default=None)
        if accumulation is not None:
            self.recipe = self.recipe.model_copy(update={"accumulation": accumulation})
        for _, replica in self.running:
            replica.progress.accumulation = accumulation

    def _take_step(self, data: DataOrSource) -> None:
        started = time.perf_counter()
        self.stack.take_step(self.step, data)
        self.step += 1
        self._show_life()
        running = self.running
        seconds = (time.perf_counter() - started) / len(running)  # shared, so that seconds of replicas can be added
        for _, replica in running:
            replica.progress.step = self.step
            replica.progress.train_seconds += seconds

    def _show_life(self) -> None:
        if self.callbacks.on_progress is not None:
            self.callbacks.on_progress(self.step)

    def _read(self) -> None:
        """What the stack has counted reaches the replicas."""
        started = time.perf_counter()
        tallies = self.stack.tallies()
        running = self.running
        seconds = (time.perf_counter() - started) / len(running)  # a GPU is waited for here
        for _, replica in running:
            replica.progress.train_seconds += seconds
        self._each(lambda i, replica: replica.read(tallies[i]))

    def _save(self) -> None:
        self._last_save = time.monotonic()
        self._read()
        self._each(lambda i, replica: replica.save(self.stack.optimisers[i]))

    def _each(self, act: Callable[[int, Replica], None]) -> None:
        """Does something with every replica that has not ended; one that ends by it leaves the stack."""
        for i, replica in self.running:
            with replica.ends_if_it_fails():
                act(i, replica)
            if replica.has_ended:
                self.stack.leave(i)


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
