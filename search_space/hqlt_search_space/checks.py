"""What is wrong with a study whose keys are each well formed: every problem, with its place in the file."""

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from hqlt_search_space.axes import AXES, MODEL_AXES, RECIPE_AXES, AxisValue, Choices, RealRange
from hqlt_search_space.build import build_arch
from hqlt_search_space.cost import COSTS
from hqlt_search_space.errors import InvalidArchError
from hqlt_search_space.recipe import Recipe
from hqlt_search_space.space import Place, Problem, Range
from hqlt_search_space.tasks import metric_names
from hqlt_search_space.wording import advice

if TYPE_CHECKING:
    from hqlt_search_space.ablation import Ablation
    from hqlt_search_space.study import Search, Study

MAX_CELLS = 1_000
MAX_GRID = 100_000
"""Combinations that a grid may have without a budget."""

STRUCTURE = ("first", "second", "ratio", "rule", "decay", "blend", "attention_window", "n_layers")
"""The axes that decide which other axes have a meaning."""


def problems(study: "Study") -> Iterator[Problem]:
    """Everything that is wrong between the keys of `study`."""
    if study.search is None and study.ablation is None:
        yield (), "a study needs a search or an ablation", None
        return
    if study.search is not None and study.ablation is not None:
        yield ("ablation",), "a study has a search or an ablation, not both", None
        return
    yield from _names(study)
    yield from _early_stopping(study)
    if study.search is not None:
        yield from _search(study, study.search)
    if study.ablation is not None:
        yield from _ablation(study, study.ablation)


def _names(study: "Study") -> Iterator[Problem]:
    metrics = metric_names(study.task)
    for name in study.objectives:
        if name.startswith("test_"):
            yield ("objectives", name), "test metrics are only reported; use the validation metric", name
        elif name not in (*metrics, *COSTS):
            yield ("objectives", name), f"no metric or cost of that name; {advice(name, (*metrics, *COSTS))}", name


def _early_stopping(study: "Study") -> Iterator[Problem]:
    if study.early_stopping is None:
        return
    if study.ablation is not None:
        yield ("early_stopping",), "the cells of an ablation are trained to the end, else they do not compare", None
        return
    rungs, steps = study.early_stopping.rungs, _largest(study, "steps", Recipe().steps)
    for i in range(1, len(rungs)):
        if rungs[i] <= rungs[i - 1]:
            yield ("early_stopping", "rungs", i), f"rungs increase: {rungs[i]} is not above {rungs[i - 1]}", rungs[i]
    if max(rungs) > steps:
        i = rungs.index(max(rungs))
        yield ("early_stopping", "rungs", i), f"rung {max(rungs)} is beyond the last of {steps} steps", rungs[i]


def _search(study: "Study", search: "Search") -> Iterator[Problem]:
    space = search.space
    for axis in space:
        if axis in study.model or axis in study.recipe:
            yield ("search", "space", axis), f"{axis} is fixed in {AXES[axis].of} as well", None
    yield from _sampler(study, search)
    if search.match is not None:
        for place in (("model",), ("search", "space")):
            if "mlp_ratio" in (study.model if place == ("model",) else space):
                yield (*place, "mlp_ratio"), f"match: {search.match.quantity} sets the width of the MLP", None
    if study.replication is not None:
        for i, seed in enumerate(study.replication.seeds):
            if seed in search.seeds:
                sentence = f"seed {seed} is a seed of the search; a replication needs fresh ones"
                yield ("replication", "seeds", i), sentence, seed
    if any(axis in study.model or axis in study.recipe for axis in space):
        return
    structures = list(_structures(study, space))
    asked, reasons = set[str](), dict[str, None]()
    for settings in structures:
        try:
            asked |= build_arch(settings)[1]
        except InvalidArchError as error:
            reasons.update(dict.fromkeys(error.reasons))
    if not asked:
        yield ("search", "space"), f"no model of this space can be built: {next(iter(reasons))}", None
        return
    for place, names in ((("model",), study.model), (("search", "space"), space)):
        for axis in names:
            if axis in MODEL_AXES and axis not in asked:
                yield (*place, axis), _meaningless(axis), None


def _meaningless(axis: str) -> str:
    return f"{axis} has no meaning for any model of this study ({AXES[axis].without_meaning})"


def _sampler(study: "Study", search: "Search") -> Iterator[Problem]:
    sampler, trials = search.sampler, study.budget.trials
    place = ("search", "sampler")
    if sampler.kind == "grid":
        for axis, domain in study.domains().items():
            if isinstance(domain, RealRange):
                yield (
                    ("search", "space", axis),
                    "a grid needs a list of choices here, not a range of real numbers",
                    None,
                )
        if trials is None and study.n_combinations > MAX_GRID:
            yield ("budget",), f"a grid of {study.n_combinations:,.0f} combinations needs budget.trials", None
    elif trials is None:
        yield ("budget",), "a search needs budget.trials, the number of trials to run", None
    if sampler.population is not None:
        if sampler.kind not in ("nsga2", "nsga3"):
            yield (*place, "population"), f"{sampler.kind} has no population; nsga2 and nsga3 have", sampler.population
        elif trials is not None and sampler.population > trials:
            sentence = f"population {sampler.population} is above the budget of {trials} trials: a random search"
            yield (*place, "population"), sentence, sampler.population


def _structures(study: "Study", space: Mapping[str, object]) -> Iterator[dict[str, AxisValue]]:
    """Settings that together ask for every axis that has a meaning somewhere in the space."""
    options: dict[str, tuple[AxisValue, ...]] = {}
    for axis in STRUCTURE:
        if axis in study.model:
            options[axis] = (study.model[axis],)
        elif axis in space:
            domain = study.domains()[axis]
            options[axis] = domain.values if isinstance(domain, Choices) else (1,)
    options["n_layers"] = (_largest(study, "n_layers", 2),)
    if "ratio" in options:
        kinds = {tuple(part.strip("0") == "" for part in str(ratio).split(":")): ratio for ratio in options["ratio"]}
        options["ratio"] = tuple(kinds.values())
    if "attention_window" in options:
        options["attention_window"] = tuple(
            {value == "window": value for value in options["attention_window"]}.values()
        )
    for values in itertools.product(*options.values()):
        yield dict(zip(options, values, strict=True))


def _largest(study: "Study", axis: str, default: int) -> int:
    """The largest value that a whole-number axis takes in a search."""
    fixed = {**study.model, **study.recipe}
    if axis in fixed:
        return int(fixed[axis] or 0)
    domain = study.search.space.get(axis) if study.search is not None else None
    if domain is None:
        return default
    return int(domain.high) if isinstance(domain, Range) else max(int(value or 0) for value in domain)


def _ablation(study: "Study", ablation: "Ablation") -> Iterator[Problem]:
    if study.replication is not None:
        yield ("replication",), "an ablation has its seeds in ablation.seeds", None
    if study.constraints:
        yield ("constraints",), "an ablation runs every cell; only a search has constraints", None
    if study.budget.trials is not None:
        yield ("budget", "trials"), "an ablation runs every cell; only a search has a number of trials", None
    if ablation.match in ("parameters", "flops") and "mlp_ratio" in ablation.vary:
        yield ("ablation", "vary", "mlp_ratio"), f"match: {ablation.match} sets the width of the MLP", None
    if not ablation.vary and not ablation.cells:
        yield ("ablation",), "an ablation needs vary, cells, or both", None
        return
    if ablation.n_cells > MAX_CELLS:
        yield ("ablation", "vary"), f"{ablation.n_cells} cells are too many; at most {MAX_CELLS}", None
        return
    yield from _further_tasks(study, ablation)
    seen = set[Place]()
    for alone in study.by_task():
        for axis in ablation.baseline:
            if axis in alone.model or axis in alone.recipe:
                yield ("ablation", "baseline", axis), f"{axis} is fixed in {AXES[axis].of} as well", None
        for problem in _cells(alone, ablation):
            if problem[0] not in seen:  # what is wrong on one task is mostly wrong on every one
                seen.add(problem[0])
                yield problem


def _further_tasks(study: "Study", ablation: "Ablation") -> Iterator[Problem]:
    kinds = [study.task.kind]
    for i, other in enumerate(ablation.also_on):
        place = ("ablation", "also_on", i)
        if other.task.kind in kinds:
            yield (*place, "task"), f"{other.task.kind} is a task of this study already", None
        kinds.append(other.task.kind)
        for name in study.objectives:
            if name not in (*metric_names(other.task), *COSTS):
                yield ("objectives", name), f"{other.task.kind} has no such metric", name


def _cells(study: "Study", ablation: "Ablation") -> Iterator[Problem]:
    """Cells that cannot be built or repeat another, and axes without meaning."""
    asked = set(RECIPE_AXES)
    first_with: dict[str, str] = {}
    for name, changes in ablation.changes():
        place: Place = ("ablation", "baseline" if not changes else "vary")
        if name in ablation.cells:
            place = ("ablation", "cells", name)
        elif ablation.design == "one_factor":
            for axis, value in changes.items():
                place = ("ablation", "vary", axis, ablation.vary[axis].index(value))
        try:
            config, used = study.build(changes)
        except InvalidArchError as error:
            yield place, f"cell {name}: {error}", None
            if not changes:
                return
            asked |= set(AXES)
            continue
        asked |= used
        is_repeated = config.config_id in first_with
        if is_repeated and (ablation.design == "one_factor" or name in ablation.cells):
            yield place, f"cell {name} is the same model as {first_with[config.config_id]}", None
        first_with.setdefault(config.config_id, name)
        if name in ablation.cells:
            for axis in changes:
                if axis not in used and axis not in RECIPE_AXES:
                    yield (*place, axis), f"{axis} has no meaning for this model ({AXES[axis].without_meaning})", None
    for where, names in (
        (("model",), study.model),
        (("ablation", "baseline"), ablation.baseline),
        (("ablation", "vary"), ablation.vary),
    ):
        for axis in names:
            if axis not in asked:
                yield (*where, axis), _meaningless(axis), None
