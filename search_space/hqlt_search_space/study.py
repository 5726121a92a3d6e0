"""A study: one YAML file. A search space or an ablation, a task, objectives, a budget.

Every key of the file is here, with its meaning and its default. `Study.resolve` turns choices of axes into a Config,
`Study.cells` lists an ablation. What can only be judged from several keys is checked once every key is well formed,
and every problem is reported at its own place in the file.
"""

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal, Self, assert_never

from pydantic import AfterValidator, Discriminator, Field, Tag, ValidationError, model_validator

from hqlt_search_space.ablation import Ablation, Cell, Seeds
from hqlt_search_space.axes import RECIPE_AXES, AxisDomain, AxisValue, Choices, IntegerRange, RealRange, check_value
from hqlt_search_space.build import build_arch, built_ratio
from hqlt_search_space.checks import STRUCTURE, problems
from hqlt_search_space.cost import COSTS, costs
from hqlt_search_space.errors import InvalidArchError, MatchError
from hqlt_search_space.match import COST_OF, matched
from hqlt_search_space.recipe import Recipe
from hqlt_search_space.space import ModelSettings, RecipeSettings, Space, domain_of, located_error
from hqlt_search_space.spec import Spec, canonical_json, short_hash
from hqlt_search_space.tasks import METRICS, Task
from hqlt_search_space.trial import Config, Objective, Seed
from hqlt_search_space.wording import advice, reasons

MAX_COMBINATIONS = 100_000
"""A finite space of more combinations than this is treated as an infinite one: not counted, only sampled."""

N_SAMPLED = 1_000
"""Configs drawn from such a space to see whether anything in it satisfies the constraints."""

COSTLESS_AXES = frozenset(RECIPE_AXES) - {"steps", "batch", "accumulation", "precision"}
"""Axes that change no cost and make no combination senseless."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
Positive = Annotated[float, Field(gt=0)]


def _known_cost(name: str) -> str:
    if name not in COSTS:
        raise ValueError(f"no cost of that name; {advice(name, COSTS)}")
    return name


ObjectiveName = Annotated[str, Field(json_schema_extra={"enum": [*METRICS, *COSTS]})]
CostName = Annotated[str, AfterValidator(_known_cost), Field(json_schema_extra={"enum": list(COSTS)})]


class Sampler(Spec):
    """How the next config is chosen."""

    kind: Literal["nsga2", "nsga3", "tpe", "gp", "random", "grid"] = Field(
        default="nsga2", description="NSGA-II and III (genetic), TPE, Gaussian process, random, or every config once."
    )
    seed: Seed = Field(default=0, description="Equal seeds give equal sequences of suggestions.")
    population: Annotated[int, Field(ge=2)] | None = Field(
        default=None, description="Of NSGA: configs a generation. Default: max(4, trials / 4)."
    )


class SearchMatch(Spec):
    """Every config of the search gets the same size, through the inner width of its MLP."""

    quantity: Literal["parameters", "flops"] = Field(description="What is made equal; flops are forward, a token.")
    target: Positive = Field(description="How much of it.")


class Search(Spec):
    """A sampler and the space it draws from."""

    sampler: Sampler = Field(default=Sampler(), description="How the next config is chosen.")
    space: Annotated[Space, Field(min_length=1, description="Axis -> list of choices, or range.")]
    seeds: Seeds = Field(default=(0,), description="Of the models trained in the search.")
    match: SearchMatch | None = Field(default=None, description="Makes all configs equally large.")


class Bounds(Spec):
    """What a cost must lie between; both ends are allowed."""

    min: float | None = Field(default=None, description="Smallest allowed.")
    max: float | None = Field(default=None, description="Largest allowed.")

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError("needs min, max, or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}")
        return self

    def allow(self, value: float) -> bool:
        return (self.min is None or value >= self.min) and (self.max is None or value <= self.max)

    def in_words(self) -> str:
        return " and ".join(
            f"{end} {bound:,.0f}" for end, bound in (("min", self.min), ("max", self.max)) if bound is not None
        )


class EarlyStopping(Spec):
    """Asynchronous successive halving for several objectives: at each rung, 1 in `eta` goes on."""

    kind: Literal["moasha"] = Field(default="moasha", description="The rule; there is one.")
    rungs: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = Field(
        description="Steps at which a trial may be stopped, increasing."
    )
    eta: Annotated[float, Field(gt=1, description="At each rung, one trial in eta goes on.")] = 3
    min_competitors: Annotated[int, Field(ge=1)] = Field(
        default=3, description="Trials that a rung must have seen before it stops any."
    )


class Replication(Spec):
    """The front of a search, trained again over fresh seeds."""

    seeds: Seeds = Field(description="None of the search's own.")
    what: Literal["front"] = Field(default="front", description="Which trials are trained again.")


class Budget(Spec):
    """How much is run."""

    trials: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        default=None, description="Of a search. A grid may leave it out: then every config is run."
    )
    parallel: Annotated[int, Field(ge=1, le=4096)] = Field(default=1, description="Trials at a time.")


class Resources(Spec):
    """What one trial gets."""

    cpu: Positive = Field(default=1, description="Cores.")
    gpu: Annotated[
        Annotated[Literal["auto"], Tag("word")] | Annotated[float, Field(ge=0), Tag("number")],
        Discriminator(lambda value: "word" if isinstance(value, str) else "number"),
    ] = Field(
        default="auto", description="GPUs; 0.25 puts four trials on one; auto: as many on one as its memory holds."
    )
    hang_after_s: Positive | None = Field(
        default=None,
        description="Seconds without a step after which a trial is ended and tried again; five times as long for its "
        "first steps. Null: ten times its slowest step, at least 120.",
    )


class Study(Spec):
    """One YAML file."""

    schema_version: Literal[1] = Field(description="Of this format.")
    name: Name = Field(description="Letters, digits, dot, underscore and hyphen, 1 to 128; first a letter or a digit.")
    task: Task = Field(description="What is learnt, and how it is judged.")
    model: ModelSettings = Field(default={}, description="Axes of the model that every config shares.")
    recipe: RecipeSettings = Field(default={}, description="Axes of the training that every config shares.")
    search: Search | None = Field(default=None, description="Either this or `ablation`.")
    ablation: Ablation | None = Field(default=None, description="Either this or `search`.")
    objectives: dict[ObjectiveName, Literal["minimize", "maximize"]] = Field(
        min_length=1, description="Validation metrics of the task, or costs, each to be minimised or maximised."
    )
    constraints: dict[CostName, Bounds] = Field(
        default={}, description="Cost -> bounds, checked before anything trains."
    )
    early_stopping: EarlyStopping | None = Field(default=None, description="Null: every trial is trained to the end.")
    replication: Replication | None = Field(default=None, description="Null: a front of the search's own seeds.")
    budget: Budget = Field(default=Budget(), description="How much is run.")
    resources: Resources = Field(default=Resources(), description="What one trial gets.")

    @property
    def objective_list(self) -> tuple[Objective, ...]:
        return tuple(Objective(name=name, direction=direction) for name, direction in self.objectives.items())

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds that every trial of the search, or every cell of the ablation, is trained with."""
        return (self.search or self._ablation).seeds

    @property
    def n_trials(self) -> int:
        """Trials until the study is done, at most: a space may hold fewer, and replication comes on top."""
        if self.ablation is not None:
            return sum(len(study._plan()) for study in self.by_task())
        return self.budget.trials or self.size() or 0

    @property
    def population(self) -> int:
        """Configs a generation of NSGA."""
        assert self.search is not None
        return self.search.sampler.population or max(4, self.n_trials // 4)

    @property
    def _ablation(self) -> Ablation:
        assert self.ablation is not None
        return self.ablation

    @property
    def n_combinations(self) -> float:
        """Combinations of all choices of a search, sensible or not; infinite with a range of real numbers."""
        return math.prod(_n_values(domain) for domain in self.domains().values())

    def domains(self) -> dict[str, AxisDomain]:
        """What a sampler draws from, by axis, in the order of `axes.AXES`. Empty for an ablation."""
        if self.search is None:
            return {}
        return {name: domain_of(name, domain) for name, domain in self.search.space.items()}

    def resolve(self, choices: Mapping[str, AxisValue]) -> tuple[Config, dict[str, AxisValue]]:
        """The config that `choices` make of this study, and those of the choices that have a meaning for it.

        A choice overrules `model`, `recipe` and a baseline, and may be of any axis. Equal models come out as equal
        configs; of two layers, the ratio 3:1 comes back as what it is, 1:1.

        Raises:
            UnknownNameError: no such axis.
            InvalidArchError: the combination makes no sense, or cannot have the size the search asks for.
        """
        checked = {name: check_value(name, value) for name, value in choices.items()}
        config, asked = self.build(checked)
        canonical = {name: value for name, value in checked.items() if name in asked or name in RECIPE_AXES}
        if "ratio" in canonical:
            canonical["ratio"] = built_ratio(config.arch, {**self._fixed(), **checked})
        if self.search is not None and self.search.match is not None:
            canonical.pop("mlp_ratio", None)
            try:
                config, _ = matched(config, self.search.match.quantity, self.search.match.target)
            except MatchError as error:
                raise InvalidArchError((str(error),)) from None
        return config, canonical

    def cells(self) -> tuple[Cell, ...]:
        """The models of an ablation, task by task, the baseline first; empty for a search.

        Raises:
            MatchError: a cell cannot be brought to the baseline's size.
        """
        if self.ablation is None:
            return ()
        return tuple(cell for study in self.by_task() for cell in study._cells_of_the_task())

    def by_task(self) -> tuple["Study", ...]:
        """This study on one task after the other. Only an ablation has more than one, each of another kind."""
        if self.ablation is None or not self.ablation.also_on:
            return (self,)
        alone = self.ablation.model_copy(update={"also_on": ()})
        others = (
            {"task": other.task, "model": {**self.model, **other.model}, "recipe": {**self.recipe, **other.recipe}}
            for other in self.ablation.also_on
        )
        return tuple(self.model_copy(update={"ablation": alone, **changes}) for changes in ({}, *others))

    def on(self, task: Task) -> "Study":
        """This study on that one of its tasks that is of the kind of `task`."""
        return next(study for study in self.by_task() if study.task.kind == task.kind)

    def _cells_of_the_task(self) -> Iterator[Cell]:
        quantity = self._ablation.match
        baseline, _ = self.resolve({})
        for name, changes in self._plan():
            choices = {**self._ablation.baseline, **changes}
            config, canonical = self.resolve(choices)
            residual = None
            if quantity != "none":
                target = costs(baseline)[COST_OF[quantity]]
                try:
                    config, residual = matched(config, quantity, target, fixed=frozenset(changes))
                except MatchError as error:
                    raise MatchError(f"ablation cell {name}: {error}") from None
            yield Cell(name, canonical, config, residual)

    def violations(self, costs: Mapping[str, float]) -> tuple[str, ...]:
        """A sentence for each constraint that `costs` break; empty if none."""
        broken = []
        for name, bounds in self.constraints.items():
            value = costs[name]
            if bounds.max is not None and value > bounds.max:
                broken.append(f"{name} {value:,.0f} is above max {bounds.max:,.0f}")
            if bounds.min is not None and value < bounds.min:
                broken.append(f"{name} {value:,.0f} is below min {bounds.min:,.0f}")
        return tuple(broken)

    def configs(self) -> Iterator[tuple[dict[str, AxisValue], Config]]:
        """Every distinct feasible config of a finite space once, with choices that make it, in a fixed order.

        Raises:
            ValueError: the space is not finite.
        """
        seen = set()
        for choices, outcome in self._listed({axis: _values(domain) for axis, domain in self.domains().items()}):
            if isinstance(outcome, Config) and outcome.config_id not in seen:
                seen.add(outcome.config_id)
                if not self._broken(outcome):
                    yield choices, outcome

    def size(self) -> int | None:
        """Distinct configs that satisfy the constraints; of an ablation, its cells.

        None for a space that is infinite, or has more than `MAX_COMBINATIONS` combinations.
        """
        if self.search is None:
            return self.n_trials
        if self.n_combinations > MAX_COMBINATIONS:
            return None
        return sum(1 for _ in self.configs())

    def why_empty(self) -> str | None:
        """Why no config of the space can be trained, naming the constraints at fault; None if one can.

        Axes that change no cost (a learning rate) are left aside. What remains is listed if it has at most
        `MAX_COMBINATIONS` combinations; otherwise `N_SAMPLED` random ones are judged, and the sentence says so.
        """
        refusals: Counter[str] = Counter()
        n_built, nearest = 0, dict[str, float]()
        outcomes, is_proof = self._looked_at()
        for outcome in outcomes:
            if not isinstance(outcome, Config):
                refusals.update(outcome)
                continue
            broken = self._broken(outcome)
            if not broken:
                return None
            n_built += 1
            for name, value in broken.items():
                bound = self.constraints[name].max
                closest = min if bound is not None and value > bound else max
                nearest[name] = closest(nearest.get(name, value), value)
            refusals.update(broken.keys())
        of_all = "no config of this space" if is_proof else f"none of {N_SAMPLED:,} random configs of this space"
        if not n_built:
            return f"{of_all} can be built: {refusals.most_common(1)[0][0]}"
        always = [name for name in nearest if refusals[name] == n_built]
        parts = [
            f"{name} {self.constraints[name].in_words()} (the nearest has {nearest[name]:,.0f}"
            + (")" if always else f"; {refusals[name]:,} of {n_built:,} break it)")
            for name in self.constraints
            if name in (always or nearest)
        ]
        return f"{of_all} satisfies {'' if always else 'all at once of '}{' and '.join(parts)}"

    @property
    def space_hash(self) -> str:
        """Sixteen hexadecimal digits of what makes two studies of one name the same.

        That is everything but the name, the replication, the budget and the resources.
        """
        return short_hash(canonical_json(self._identity()))

    def differences(self, stored: "Study") -> tuple[str, ...]:
        """Where this study and the `stored` one of its name differ in what `space_hash` covers, in the file's words."""
        here, there = _flat(self._identity()), _flat(stored._identity())
        return tuple(
            f"{path}: {here.get(path, 'nothing')} in the file, {there.get(path, 'nothing')} in the store"
            for path in dict.fromkeys([*here, *there])
            if here.get(path) != there.get(path)
        )

    def _identity(self) -> dict[str, object]:
        return self.model_dump(mode="json", exclude={"name", "replication", "budget", "resources"})

    def _fixed(self) -> dict[str, AxisValue]:
        return {**self.model, **self.recipe, **(self.ablation.baseline if self.ablation is not None else {})}

    def build(self, choices: Mapping[str, AxisValue]) -> tuple[Config, frozenset[str]]:
        """The config before matching, and the axes of the model that have a meaning for it."""
        settings = {**self._fixed(), **choices}
        arch, asked = build_arch(settings)
        try:
            recipe = Recipe.model_validate({name: settings[name] for name in RECIPE_AXES if name in settings})
        except ValidationError as error:
            raise InvalidArchError(reasons(error)) from None
        return Config(arch=arch, recipe=recipe, task=self.task), asked

    def _broken(self, config: Config) -> dict[str, float]:
        """The costs of `config` that are out of bounds."""
        if not self.constraints:
            return {}
        found = costs(config)
        return {name: found[name] for name, bounds in self.constraints.items() if not bounds.allow(found[name])}

    def _listed(
        self, values: Mapping[str, Sequence[AxisValue]]
    ) -> Iterator[tuple[dict[str, AxisValue], Config | tuple[str, ...]]]:
        """The combinations of `values`, each with its config or the reasons why it has none.

        Of those that differ only in axes without meaning, the first stands for all: which axes these are follows from
        the axes in `STRUCTURE`, so the others are passed over without building anything.
        """
        unread_by_structure: dict[tuple[AxisValue, ...], list[str]] = {}
        for combination in itertools.product(*values.values()):
            choices = dict(zip(values, combination, strict=True))
            structure = tuple(choices.get(axis) for axis in STRUCTURE)
            unread = unread_by_structure.get(structure)
            if unread is not None and any(choices[axis] != values[axis][0] for axis in unread):
                continue
            try:
                config, canonical = self.resolve(choices)
            except InvalidArchError as error:
                yield choices, error.reasons
            else:
                if unread is None:
                    unread_by_structure[structure] = [axis for axis in choices if axis not in canonical]
                yield choices, config

    def _looked_at(self) -> tuple[Iterator[Config | tuple[str, ...]], bool]:
        """Outcomes that decide whether the space is empty, and whether they are all there are."""
        domains = {axis: domain for axis, domain in self.domains().items() if axis not in COSTLESS_AXES}
        if math.prod(_n_values(domain) for domain in domains.values()) <= MAX_COMBINATIONS:
            listed = self._listed({axis: _values(domain) for axis, domain in domains.items()})
            return (outcome for _, outcome in listed), True
        return self._sampled(), False

    def _sampled(self) -> Iterator[Config | tuple[str, ...]]:
        draw = random.Random(0)  # noqa: S311 - a look around, always the same one
        for _ in range(N_SAMPLED):
            try:
                yield self.resolve({axis: _drawn(domain, draw) for axis, domain in self.domains().items()})[0]
            except InvalidArchError as error:
                yield error.reasons

    def _plan(self) -> tuple[tuple[str, dict[str, AxisValue]], ...]:
        """Label and changes of every distinct cell, the baseline first. A factorial's equal models are one cell."""
        distinct: dict[str, tuple[str, dict[str, AxisValue]]] = {}
        for name, changes in self._ablation.changes():
            config, _ = self.build(changes)
            distinct.setdefault(config.config_id, (name, changes))
        return tuple(distinct.values())

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        found = list(problems(self))
        if found:
            raise located_error(found)
        return self


def _values(domain: AxisDomain) -> Sequence[AxisValue]:
    """All values of a finite domain."""
    match domain:
        case Choices():
            return domain.values
        case IntegerRange():
            return range(domain.low, domain.high + 1, domain.step)
        case RealRange():
            raise ValueError("the space has a range of real numbers: it cannot be listed")
        case _:
            assert_never(domain)


def _n_values(domain: AxisDomain) -> float:
    return math.inf if isinstance(domain, RealRange) else len(_values(domain))


def _drawn(domain: AxisDomain, draw: random.Random) -> AxisValue:
    """A random value, spread as the domain says."""
    if isinstance(domain, Choices):
        return draw.choice(domain.values)
    if isinstance(domain, IntegerRange) and not domain.log:
        return draw.choice(_values(domain))
    if not domain.log:
        return draw.uniform(domain.low, domain.high)
    value = math.exp(draw.uniform(math.log(domain.low), math.log(domain.high)))
    value = min(max(value, domain.low), domain.high)
    return round(value) if isinstance(domain, IntegerRange) else value


def _flat(value: object, path: str = "") -> dict[str, str]:
    """The leaves of nested mappings as JSON, by dotted path; a list is a leaf."""
    if isinstance(value, dict) and value:
        nested = (_flat(part, f"{path}.{key}" if path else str(key)) for key, part in value.items())
        return {key: text for part in nested for key, text in part.items()}
    return {path: canonical_json(value)}
