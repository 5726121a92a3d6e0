"""Which seeds of a config train together. No torch here: whoever hands out the work asks too."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from hqlt_search_space.tasks import training_length
from hqlt_search_space.trial import Config

STACKED_VALUES = {"cpu": 2**16, "cuda": 2**23}
"""Most values in an activation of one replica for which a stack pays."""
STACK_VALUES = {"cpu": 2**19, "cuda": 2**25}
"""Most values in an activation of a whole stack: beyond it caches lose what launches gain, or nobody has measured."""


@dataclass(frozen=True)
class Stacking:
    """The seeds of each stack, and why; no reason where there is only one seed."""

    stacks: tuple[tuple[int, ...], ...]
    reason: str


def stacking(config: Config, seeds: Sequence[int], device: Literal["cpu", "cuda"]) -> Stacking:
    """How `seeds` of `config` are trained: a function of these three alone, so a rerun does the same.

    Measured in values of an activation of one replica, batch * tokens * d_model. What is shared is the launches of a
    step, so above some size nothing is gained, while a stack pays for a replica that has left until the last one ends.
    Milliseconds of a step for each replica, two layers:

        one CPU thread, delta rule    5 k values     6.5 alone, 3.5 of four, 2.7 of eight
                                      40 k           13.3, 9.7, 8.2
                                      160 k          35, 33, 34
        H200, captured, bfloat16,     320 k          0.53 alone, 0.18 of eight, 0.15 of sixteen
        synchronous                   1.3 million    0.93 of three, 0.81 of six (three layers)
                                      5.1 million    2.26 alone, 1.99 of three, 1.86 of six
    """
    if len(seeds) == 1:
        return Stacking((tuple(seeds),), "")
    recipe = config.recipe
    rows, length, width = recipe.batch // recipe.accumulation, training_length(config.task), config.arch.d_model
    values = rows * length * width
    what = f"{rows} x {length} x {width} values each on {device}"
    if values > STACKED_VALUES[device]:
        reason = f"seeds trained one after the other: {what}, and stacks pay up to {STACKED_VALUES[device]}"
        return Stacking(tuple((seed,) for seed in seeds), reason)
    largest = max(1, STACK_VALUES[device] // values)
    n_stacks = -(-len(seeds) // largest)
    edges = [len(seeds) * i // n_stacks for i in range(n_stacks + 1)]
    stacks = tuple(tuple(seeds[low:high]) for low, high in pairwise(edges))
    return Stacking(stacks, f"seeds trained in stacks of {', '.join(str(len(stack)) for stack in stacks)}: {what}")
