"""How many trials share a GPU: what one of them takes, as measured or by arithmetic, over what the GPU has."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hqlt_dashboards.words import describe, format_value
from hqlt_search_space.spec import canonical_json
from hqlt_search_space.trial import Config, Trial, TrialResult
from hqlt_trainer.memory import gpu_bytes, gpu_bytes_measured
from hqlt_trainer.stacking import stacking


@dataclass(frozen=True)
class Need:
    """What the largest trial of a study takes of a GPU's memory, with CUDA's own, and how that is known."""

    bytes: int
    why: str


@dataclass(frozen=True)
class Placement:
    """How trials are placed: the share of a GPU that each has (0: none has one), how many run at a time, and why."""

    share: float
    slots: int
    why: str = ""


def place(parallel: int, n_gpus: float, memory_bytes: int | None, need: Need | None) -> Placement:
    """At most `parallel` trials at a time on `n_gpus` GPUs of `memory_bytes` each.

    Those that run share the GPUs evenly, and as few share one as `need` allows: the others wait. A need beyond a whole
    GPU gets a whole GPU, which it may run out of.

    >>> place(8, 1, 100, Need(20, "20 B")).share, place(8, 1, 100, Need(20, "20 B")).slots
    (0.2, 5)
    >>> place(2, 1, 100, Need(20, "20 B")).share
    0.5
    """
    whole_gpus = int(n_gpus)
    if not whole_gpus:
        return Placement(0.0, parallel)
    together = math.ceil(parallel / whole_gpus)
    if need is None or memory_bytes is None:
        why = "shared evenly: how much memory a GPU here has cannot be read" if together > 1 else ""
    else:
        fitting = max(1, memory_bytes // need.bytes)
        few = f", of {parallel} that were asked for" if fitting * whole_gpus < parallel else ""
        together = min(together, fitting)
        n, has = min(parallel, together * whole_gpus), format_value("bytes", memory_bytes)
        why = f"{n} trials at a time{few}, {together} on a GPU of {has}: one takes up to {need.why}"
        if need.bytes > memory_bytes:
            why += ", which may be too much"
    # Ray counts ten-thousandths; rounded down, so that all of them fit.
    return Placement(math.floor(10_000 / together) / 10_000, min(parallel, together * whole_gpus), why)


def placed(trial: Trial, placement: Placement) -> Trial:
    """`trial` with its share of a GPU, which bounds what its process may take: its neighbours lose no memory to it."""
    runtime = trial.runtime.model_copy(update={"gpu_share": placement.share, "gpu_share_reason": placement.why})
    return trial.model_copy(update={"runtime": runtime})


def need_of(configs: Iterable[Config], seeds: tuple[int, ...], outcomes: Iterable[TrialResult]) -> Need | None:
    """What the largest trial takes that trains `seeds` of one of `configs`; None if there is none.

    `outcomes` are results of earlier trials. One of the same shape (arch, task, batch, precision and seeds in a stack)
    that ran on a GPU overrules the arithmetic.
    """
    measured = _measured(outcomes)
    needs = (_need(config, seeds, measured) for config in configs)
    return max(needs, key=lambda need: need.bytes, default=None)


def _need(config: Config, seeds: tuple[int, ...], measured: Mapping[str, int]) -> Need:
    stacked = max(len(stack) for stack in stacking(config, seeds, "cuda").stacks)
    peak = measured.get(_shape(config, stacked))
    size = gpu_bytes(config, seeds) if peak is None else gpu_bytes_measured(peak)
    how = "by arithmetic" if peak is None else "by a measured peak"
    return Need(size, f"{format_value('bytes', size)} ({how}; {describe(config.arch)})")


def _measured(outcomes: Iterable[TrialResult]) -> dict[str, int]:
    """Shape -> the largest peak of allocated memory seen on a GPU."""
    found: dict[str, int] = {}
    for outcome in outcomes:
        trial, peaks = outcome.trial, [replica.peak_memory_bytes or 0 for replica in outcome.replicas]
        if trial.runtime.device == "cuda" and trial.runtime.accumulation is None and any(peaks):
            shape = _shape(trial.config, len(trial.seeds))
            found[shape] = max(found.get(shape, 0), *peaks)
    return found


def _shape(config: Config, stacked: int) -> str:
    """What decides how much memory a training takes."""
    recipe = config.recipe
    return canonical_json(
        [
            config.arch.model_dump(mode="json"),
            config.task.model_dump(mode="json"),
            recipe.batch // recipe.accumulation,
            recipe.precision,
            stacked,
        ]
    )
