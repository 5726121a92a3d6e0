"""What to try next: a study's axes as Optuna distributions, and Optuna's samplers behind one `Proposer`.

Every axis is suggested every time, because Optuna's samplers learn from the parameters that all trials share. The
sampler is rebuilt for every suggestion with a seed made of the study's seed and the trial's number, so a study that was
interrupted continues the sequence of an unbroken one. A suggestion that makes no sense, breaks a constraint or repeats
a config is dropped before Optuna counts it.
"""

import hashlib
import logging
import math
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import optuna
from hqlt_search_space.axes import AxisDomain, AxisValue, Choices, IntegerRange, RealRange
from hqlt_search_space.cost import costs
from hqlt_search_space.errors import InvalidArchError
from hqlt_search_space.study import Study
from hqlt_search_space.trial import Config, TrialRecord
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from hqlt_orchestration.driving.holding import Holding, new_trial
from hqlt_orchestration.records.database import patiently, store_errors
from hqlt_orchestration.records.history import NUMBER, find_start, open_optuna, write_end, write_start
from hqlt_orchestration.records.ledger import Ledger, NewTrial

REASKS = 200  # suggestions of the study's own sampler for one trial, then
RANDOM_REASKS = 2000  # uniform ones, which a sampler that has narrowed in cannot starve
COUNT_AFTER = 20  # refusals in a row before a finite space is counted, to see whether anything is left

optuna.logging.set_verbosity(logging.WARNING)


@dataclass(frozen=True)
class Proposal:
    """A suggestion that was accepted: a config that makes sense, is within the constraints and is new."""

    config: Config
    choices: dict[str, AxisValue]
    costs: dict[str, float]
    params: dict[str, AxisValue]
    attributes: dict[str, Any]

    def new_trial(self, seeds: tuple[int, ...]) -> NewTrial:
        """For the ledger, which keeps what Optuna must know of the trial even after a crash."""
        stored = {"params": self.params, "attributes": self.attributes}
        return NewTrial("search", self.config, self.choices, self.costs, seeds, proposal=stored)


class Exhausted(Exception):  # noqa: N818  the end of a space is no error
    """There is nothing left to propose, with the reason."""


class Proposer:
    """Proposes configs for one study, and tells Optuna what came of them."""

    def __init__(self, study: Study, ledger: Ledger) -> None:
        """Open the study's sampling history in the ledger's database, making it if it is new."""
        assert study.search is not None, "an ablation lists its trials; it has no sampler"
        self._study = study
        self._ledger = ledger
        self._search = study.search
        self._domains = study.domains()
        self._distributions = {name: distribution(domain) for name, domain in self._domains.items()}
        self._space = {name: found for name, found in sorted(self._distributions.items()) if not found.single()}
        with store_errors(ledger.url):
            self._storage = Holding(open_optuna(ledger.url), ledger.url)
            self._optuna = patiently(ledger.url, self._open_study)
            self._study_id = self._storage.study_id = self._storage.get_study_id_from_name(study.name)
        self._grid: optuna.samplers.GridSampler | None = None
        self._refusals: Counter[str] = Counter()
        self._n_asked = 0
        self._size: int | None = None
        self._places: dict[int, tuple[int, int]] = {}  # ledger number -> Optuna's id and number
        self.alone = False  # whether the history changes only here; else it is read again for every proposal

    def _open_study(self) -> optuna.Study:
        return optuna.create_study(
            storage=self._storage,
            study_name=self._study.name,
            directions=list(self._study.objectives.values()),
            load_if_exists=True,
        )

    def propose(self, taken: Collection[str]) -> Proposal:
        """A config for the next trial of the study, which has those of the ids `taken`, one a trial.

        Raises:
            Exhausted: every feasible config is taken, or none was found in `REASKS + RANDOM_REASKS` suggestions.
        """
        if not self.alone:
            self._storage.look()
        for ask in range(REASKS + RANDOM_REASKS):
            if ask == COUNT_AFTER and taken and len(taken) == self._count():
                raise Exhausted(f"all {len(taken)} configs of the space are taken")
            params, attributes = self._suggest(len(taken), ask)
            self._n_asked += 1
            accepted = self._judge(params, taken)
            if accepted is not None:
                config, choices, cost = accepted
                return Proposal(config, choices, cost, params, attributes)
        raise Exhausted(self._why_nothing())

    def _count(self) -> int | None:
        """Distinct feasible configs; None if they cannot be counted."""
        if self._size is None:
            self._size = self._study.size()
        return self._size

    def _judge(
        self, params: Mapping[str, AxisValue], taken: Collection[str]
    ) -> tuple[Config, dict[str, AxisValue], dict[str, float]] | None:
        try:
            config, choices = self._study.resolve(params)
        except InvalidArchError as error:
            self._refusals.update(error.reasons)
            return None
        if config.config_id in taken:
            self._refusals["it is in the study already"] += 1
            return None
        cost = costs(config)
        violations = self._study.violations(cost)
        if violations:
            self._refusals.update(_constraint_of(violation) for violation in violations)
            return None
        return config, choices, cost

    def _why_nothing(self) -> str:
        reasons = "; ".join(f"{reason} ({count} times)" for reason, count in self._refusals.most_common(3))
        return f"no new config in {self._n_asked} suggestions: {reasons}"

    def _suggest(self, number: int, ask: int) -> tuple[dict[str, AxisValue], dict[str, Any]]:
        kind = self._search.sampler.kind
        if kind == "grid":
            self._optuna.sampler, self._storage.next_number = self._grid_sampler(), self._next_cell(ask)
        else:
            seed = seed_of(self._search.sampler.seed, number, ask)
            own = ask < REASKS
            self._optuna.sampler = self._sampler(seed) if own else optuna.samplers.RandomSampler(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._optuna.ask(self._distributions)
        held = self._storage.let_go()
        return dict(held.params), dict(held.system_attrs)

    def _sampler(self, seed: int) -> BaseSampler:
        match self._search.sampler.kind:
            case "random":
                return optuna.samplers.RandomSampler(seed)
            case "tpe":
                return optuna.samplers.TPESampler(seed=seed)
            case "gp":
                return optuna.samplers.GPSampler(seed=seed)
            case "nsga2":
                return _Nsga2(self._space, self._study.population, seed)
            case "nsga3":
                return _Nsga3(self._space, self._study.population, seed)
            case "grid":
                raise AssertionError("the grid keeps its sampler")

    def _grid_sampler(self) -> optuna.samplers.GridSampler:
        if self._grid is None:
            points = {name: list(_points(name, domain)) for name, domain in self._domains.items()}
            self._grid = optuna.samplers.GridSampler(points, seed=self._search.sampler.seed)
        return self._grid

    def _next_cell(self, ask: int) -> int:
        """Optuna's grid goes by trial number; ours by how far the grid has come, refused cells included."""
        done = [trial.system_attrs.get("grid_id", -1) for trial in self._storage.history]
        cell = max(done, default=-1) + 1 + ask
        n_cells = math.prod(len(_points(name, domain)) for name, domain in self._domains.items())
        if cell >= n_cells:
            raise Exhausted(f"all {n_cells} cells of the grid are done")
        return cell

    def accept(self, number: int, proposal: Mapping[str, Any]) -> None:
        """Write a trial that the ledger took into Optuna's history, as RUNNING; if it is there, nothing happens.

        Whoever claimed it may have died before this, or be just about to: so any driver may come first.
        """
        if number in self._places:
            return
        params, attributes = proposal["params"], proposal["attributes"]
        distributions = {name: self._distributions[name] for name in params}
        with self._ledger.write() as tx:
            there = find_start(tx, self._study_id, number)
            place = there or write_start(tx, self._study_id, params, distributions, {NUMBER: number}, attributes)
        self._places[number] = place
        if there is not None:
            self._storage.look()
            return
        trial = new_trial(*place)
        trial.params, trial.distributions = dict(params), distributions
        trial.user_attrs, trial.system_attrs = {NUMBER: number}, dict(attributes)
        if place[1] == len(self._storage.history):
            self._storage.history.append(trial)
        else:  # another driver has written too
            self._storage.look()

    def tell(self, number: int, values: Sequence[float] | None, *, stopped: bool = False) -> None:
        """Tell Optuna what came of a trial: values, or none because it was stopped early or failed.

        Telling twice is harmless: the first stands.
        """
        if number not in self._places:  # another driver proposed it
            self.known()
        trial_id, position = self._places[number]
        # An infinite value would be accepted as complete and spoil every hypervolume.
        complete = values is not None and all(math.isfinite(value) for value in values)
        state = TrialState.COMPLETE if complete else TrialState.PRUNED if stopped else TrialState.FAIL
        with self._ledger.write() as tx:
            told = write_end(tx, trial_id, state, values if complete else None)
        if not told:
            self._storage.look()
            return
        # Samplers keep references to finished trials only, so a running one may be completed in place.
        trial = self._storage.history[position]
        trial.state = state
        trial.values = [float(value) for value in values] if complete and values is not None else None
        trial.datetime_complete = datetime.now()

    def tell_of(self, record: TrialRecord) -> None:
        """Tell Optuna of a trial that has ended: COMPLETE with its objectives, PRUNED at a rung, else FAIL."""
        values = [record.objectives[name] for name in self._study.objectives] if record.objectives else None
        stopped = record.state == "stopped" and any(replica.status == "stopped" for replica in record.replicas)
        self.tell(record.number, values, stopped=stopped)

    def known(self) -> dict[int, bool]:
        """The trials in Optuna's history by ledger number, and whether each has been told."""
        trials = self._storage.look()
        ids = self._storage.stored.get_trial_id_from_study_id_trial_number
        self._places = {t.user_attrs[NUMBER]: (ids(self._study_id, t.number), t.number) for t in trials}
        return {trial.user_attrs[NUMBER]: trial.state.is_finished() for trial in trials}


def seed_of(study_seed: int, number: int, ask: int) -> int:
    """The sampler's seed for one suggestion. Not the study's seed itself: a sampler rebuilt with it repeats itself."""
    digest = hashlib.sha256(f"{study_seed}/{number}/{ask}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def distribution(domain: AxisDomain) -> BaseDistribution:
    """The Optuna distribution of an axis."""
    match domain:
        case Choices(values):
            return CategoricalDistribution(values)
        case IntegerRange(low, high, step, log):
            return IntDistribution(low, high, log=log, step=1 if log else step)
        case RealRange(low, high, log):
            return FloatDistribution(low, high, log=log)


def _points(name: str, domain: AxisDomain) -> Sequence[AxisValue]:
    match domain:
        case Choices(values):
            return values
        case IntegerRange(low, high, step, _):
            return range(low, high + 1, step)
        case RealRange():
            raise AssertionError(f"the study schema refuses a grid over the real axis {name}")


class _Nsga2(optuna.samplers.NSGAIISampler):
    """NSGA-II that knows its space: every trial has every axis, so it need not be found out from all of them."""

    def __init__(self, space: dict[str, BaseDistribution], population: int, seed: int) -> None:
        super().__init__(population_size=population, seed=seed)
        self._space = space

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._space


class _Nsga3(optuna.samplers.NSGAIIISampler):
    """NSGA-III that knows its space."""

    def __init__(self, space: dict[str, BaseDistribution], population: int, seed: int) -> None:
        super().__init__(population_size=population, seed=seed)
        self._space = space

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._space


def _constraint_of(violation: str) -> str:
    """A violation without the value that broke it, so that equal reasons add up."""
    name, _, limit = violation.split(" ", 2)
    return f"{name} {limit}"
