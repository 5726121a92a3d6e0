"""What an ablation compares: a baseline, the cells that differ from it, and the tasks they are compared on."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from hqlt_search_space.axes import AxisValue, label
from hqlt_search_space.space import ModelSettings, RecipeSettings, Settings, Varied, check_distinct
from hqlt_search_space.spec import Spec
from hqlt_search_space.tasks import Task
from hqlt_search_space.trial import Config, Seed

Seeds = Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(check_distinct)]
CellName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}$")]


class FurtherTask(Spec):
    """A task that the cells are trained on as well, and what this changes in every config."""

    task: Task = Field(description="What is learnt, and how it is judged. Of another kind than the study's `task`.")
    model: ModelSettings = Field(default={}, description="Axes that differ from the study's `model`.")
    recipe: RecipeSettings = Field(default={}, description="Axes that differ from the study's `recipe`.")


class Ablation(Spec):
    """A baseline and what varies, every cell with the same seeds."""

    baseline: Settings = Field(default={}, description="Axis -> value; what is not named is as in model and recipe.")
    vary: Varied = Field(default={}, description="Axis -> values other than the baseline's.")
    cells: dict[CellName, Settings] = Field(
        default={}, description="Name -> settings: cells that change several axes of the baseline at once."
    )
    also_on: tuple[FurtherTask, ...] = Field(
        default=(), description="Further tasks that every cell is trained on, each compared with its own baseline."
    )
    design: Literal["one_factor", "factorial"] = Field(
        default="one_factor", description="Of `vary`: one change at a time, or every combination."
    )
    match: Literal["parameters", "flops", "state", "none"] = Field(
        default="parameters", description="What every cell has as much of as the baseline."
    )
    seeds: Seeds = Field(default=(0, 1, 2), description="Every cell is trained once with each.")

    @property
    def n_cells(self) -> int:
        """Cells of one task, the baseline included, before equal models are counted as one."""
        sizes = [len(values) for values in self.vary.values()]
        varied = sum(sizes) if self.design == "one_factor" else math.prod(size + 1 for size in sizes) - 1
        return 1 + varied + len(self.cells)

    def changes(self) -> Iterator[tuple[str, dict[str, AxisValue]]]:
        """The label of each cell and what it changes in the baseline, which comes first."""
        if self.design == "one_factor":
            yield label({}), {}
            for axis, values in self.vary.items():
                yield from ((label({axis: value}), {axis: value}) for value in values)
        else:
            options = [[{}, *({axis: value} for value in values)] for axis, values in self.vary.items()]
            for parts in itertools.product(*options):
                together = {axis: value for part in parts for axis, value in part.items()}
                yield label(together), together
        yield from self.cells.items()


@dataclass(frozen=True)
class Cell:
    """One model of an ablation on one of its tasks.

    `label` is `baseline`, what differs (`mixing=sum`), or the name that the study gives it. `residual` is what matching
    left over, relative to the baseline; None where nothing was matched.
    """

    label: str
    choices: dict[str, AxisValue]
    config: Config
    residual: float | None
