"""`run_trial`: a trial in, its result out. Everything above it knows no torch; everything below it knows no study."""

import gc
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from hqlt_search_space.errors import DataError
from hqlt_search_space.tasks import Nothing, context_length
from hqlt_search_space.trial import ReplicaResult, Trial, TrialResult

from hqlt_trainer.backends import backends
from hqlt_trainer.environment import environment, forget_peak_memory, reproducible
from hqlt_trainer.loop import Callbacks, Cancelled, OnMetrics, OnProgress, OnRung, Replica, Training
from hqlt_trainer.stacking import stacking
from hqlt_trainer.tasks import build_task
from hqlt_trainer.tasks.batch import TaskData


def run_trial(
    trial: Trial,
    out: Path,
    on_rung: OnRung | None = None,
    *,
    on_metrics: OnMetrics | None = None,
    cancelled: Cancelled | None = None,
    on_progress: OnProgress | None = None,
) -> TrialResult:
    """Trains every seed of `trial`, together where that pays (`stacking`), and returns a result for each.

    `on_rung(seed, step, metrics)` is asked at each rung, with validation metrics; False stops that replica. At the last
    step its answer changes nothing, and at the rung where a trial was interrupted it may be asked twice.
    `on_metrics(seed, step, metrics)` is told the training loss about fifty times a run, at the same steps in every run,
    and whatever is evaluated. `cancelled()` is polled before every step.
    `on_progress(step)` is a sign of life: it is told of every step and of every batch that is evaluated.

    `out` belongs to this trial: `out/seed-S/checkpoints/step-N` and `out/seed-S/result.json`. Called again on the same
    `out` it keeps the replicas that ended and continues the others from their last whole checkpoint; on a CPU the
    weights and metrics then are what an unbroken run would have, to the bit.

    A replica that diverges, runs out of memory, disk or usable data is a result with status `failed`, not an exception.

    Raises:
        TrialPausedError: `cancelled` said so; a checkpoint is written.
        CheckpointError: `out` holds checkpoints of another config.
        BackendError, ResourceError: the runtime asks for what is not there.
    """
    callbacks = Callbacks(on_rung, on_metrics, cancelled, on_progress)
    if isinstance(trial.config.task, Nothing):
        return _nothing(trial)
    with reproducible(trial.runtime):
        ran_on = backends(trial.config, trial.runtime)
        replicas: list[ReplicaResult] = []
        notes: list[str] = []
        try:
            task_data = build_task(trial.config.task)
        except DataError as error:
            replicas = [
                ReplicaResult(seed=seed, status="failed", reason="bad_data", message=str(error), step=0)
                for seed in trial.seeds
            ]
        else:
            members = [Replica(trial, seed, out, callbacks) for seed in trial.seeds]
            accumulation = trial.runtime.accumulation
            found = stacking(trial.config, trial.seeds, trial.runtime.device)
            notes = [found.reason] if found.reason else []
            waiting = iter(members)
            for stack in found.stacks if accumulation is None else [(seed,) for seed in trial.seeds]:
                notes += _train(list(islice(waiting, len(stack))), task_data, accumulation)
            replicas = [member.result for member in members if member.result is not None]
            notes += [f"seed {member.seed}: {note}" for member in members for note in member.notes]
        return TrialResult(
            trial=trial,
            replicas=tuple(replicas),
            backends=ran_on,
            environment=environment(trial.runtime),
            notes=tuple(notes),
        )


def _train(members: Sequence[Replica], task_data: TaskData, accumulation: int | None) -> list[str]:
    """Trains `members` together until each has a result; returns what deserves a word.

    Where memory is too small for a stack its seeds train alone, and where it is too small for one of them it is tried
    once more with half the rows at a time: the same batches in the same order, the same gradients to rounding.
    """
    if all(member.has_ended for member in members):
        return []
    runtime = members[0].trial.runtime
    forget_peak_memory(runtime)
    training = Training(members, accumulation)
    too_large = ""
    try:
        training.run(task_data)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        too_large = _out_of_memory(members[0], error)
    notes, step, recipe = list(training.notes), training.step, training.recipe
    if not too_large:
        return notes
    del training
    _give_back_memory(members)
    if len(members) > 1:
        notes += [f"a stack of {len(members)} ran out of memory at step {step}; its seeds trained alone"]
        for member in members:
            notes += _train([member], task_data, accumulation)
        return notes
    (member,) = members
    was_spared = accumulation is not None or recipe.accumulation != member.trial.config.recipe.accumulation
    if was_spared or recipe.batch == recipe.accumulation:
        member.fail("out_of_memory", too_large)
        return notes
    member.notes += (f"{too_large}; trained with {2 * recipe.accumulation} micro-batches a step",)
    return notes + _train(members, task_data, 2 * recipe.accumulation)


def _give_back_memory(members: Sequence[Replica]) -> None:
    """Nothing of what was tried is left when it is tried again."""
    for member in members:
        member.forget_model()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _is_out_of_memory(error: BaseException) -> bool:
    # torch's CPU allocator has no exception of its own.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _out_of_memory(replica: Replica, error: BaseException) -> str:
    config = replica.trial.config
    asked = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
    parts = replica.progress.accumulation
    return (
        f"out of memory at step {replica.progress.step} (batch {config.recipe.batch}"
        + (f" in {parts} parts" if parts is not None else "")
        + f", context {context_length(config.task)})"
        + (f": {asked[1]} more were asked for" if asked else "")
    )


def _nothing(trial: Trial) -> TrialResult:
    """The result of the task that trains nothing: what is left is the cost of everything around a trial."""
    replicas = tuple(
        ReplicaResult(seed=seed, status="complete", step=0, metrics={"validation_loss_nats": 0.0})
        for seed in trial.seeds
    )
    return TrialResult(trial=trial, replicas=replicas, environment=environment(trial.runtime))
