"""What a worker is to train for one lease: with which other seeds, up to which rungs, in how many parts."""

from hqlt_search_space.study import Study
from hqlt_search_space.trial import Runtime, Trial
from hqlt_trainer.stacking import stacking

from hqlt_orchestration.driving.executor import Device
from hqlt_orchestration.records.attempts import AttemptKey
from hqlt_orchestration.records.ledger import Ledger
from hqlt_orchestration.records.tables import Phase, TrialRow


def trial_of(study: Study, ledger: Ledger, phase: Phase, row: TrialRow, key: AttemptKey, device: Device) -> Trial:
    """The trial `row` as the attempt `key` trains it: that seed, and those that train together with it."""
    accumulation = _spared(ledger, study, row, key)
    seeds = _stack(ledger, study, phase, row, key.seed, device) if accumulation is None else (key.seed,)
    rungs = study.early_stopping.rungs if study.early_stopping is not None and phase == "search" else ()
    return Trial(
        config=row.config,
        seeds=seeds,
        rungs=tuple(rung for rung in rungs if rung < row.config.recipe.steps),
        runtime=Runtime(device=device, n_threads=max(1, int(study.resources.cpu)), accumulation=accumulation),
        study=study.name,
        number=row.number,
    )


def _spared(ledger: Ledger, study: Study, row: TrialRow, key: AttemptKey) -> int | None:
    """Micro-batches a step for a replica whose process was ended because the machine had no more memory."""
    if key.attempt == 1:
        return None
    earlier = [attempt for attempt in ledger.attempts(study.name, row.number) if attempt.seed == key.seed]
    recipe = row.config.recipe
    ran_out = any(attempt.state == "out_of_memory" for attempt in earlier)
    return min(recipe.batch, 2 * recipe.accumulation) if ran_out else None


def _stack(ledger: Ledger, study: Study, phase: Phase, row: TrialRow, seed: int, device: Device) -> tuple[int, ...]:
    """The seeds that train together with `seed`, itself included; the same after every kind of stop."""
    seeds = study.seeds
    if phase == "replicate":
        replicas = ledger.replicas(study.name, row.number)
        seeds = tuple(replica.seed for replica in replicas if replica.phase == phase)
    return next(stack for stack in stacking(row.config, seeds, device).stacks if seed in stack)
