"""What a study would do and cost, before anything trains."""

import math
import os
import random
import statistics
from collections.abc import Iterator
from pathlib import Path

from hqlt_dashboards.ablation import BASELINE
from hqlt_dashboards.words import counted, describe, duration, format_value, spoken
from hqlt_search_space.axes import AxisDomain, AxisValue, Choices, IntegerRange, RealRange
from hqlt_search_space.cost import costs
from hqlt_search_space.errors import InvalidArchError, StudyFileError
from hqlt_search_space.study import Study
from hqlt_search_space.study_file import load_study
from hqlt_search_space.tasks import LanguageModelling, Task
from hqlt_search_space.trial import Config

from hqlt_orchestration.records.results import study_results
from hqlt_orchestration.records.store import Store

N_SAMPLED = 200  # configs whose costs stand for a space that is not listed
SHOWN = ("parameters", "flops_per_token", "training_flops", "state_bytes", "decode_flops", "training_bytes")


def checked_study(file: Path) -> Study:
    """The study in `file`, if something in it can be trained.

    Raises:
        StudyFileError: it has problems, nothing satisfies its constraints, or its corpus is not there.
    """
    study = load_study(file)
    why = study.why_empty() if study.search is not None else None
    if why is not None:
        raise StudyFileError(str(file), (f"constraints: {why}" if study.constraints else f"search.space: {why}",))
    places = [corpus_place(part.task, file.parent) for part in study.by_task()]
    missing = tuple(
        f"task.corpus: there is no {place}; give a file or a folder, from the folder of the study's file on, or stdlib"
        for place in places
        if place is not None and not os.path.exists(place)  # noqa: PTH110 - Path.exists raises where it may not look
    )
    if missing:
        raise StudyFileError(str(file), missing)
    return study


def corpus_place(task: Task, folder: Path) -> Path | None:
    """Where the corpus of `task` is; None if it reads none that the user has. A relative path is taken from `folder`,
    that of the study's file: it means the same wherever the study is started and resumed from."""
    if not isinstance(task, LanguageModelling):
        return None
    from hqlt_trainer.corpus import STDLIB

    if task.corpus == STDLIB:
        return None
    return Path(os.path.normpath((folder / Path(task.corpus).expanduser()).absolute()))


def validate(file: Path) -> None:
    """Say that a study file is good, and how large its space is."""
    study = checked_study(file)
    print(f"{file}: no problems\n{_summary(study)}")


def print_plan(file: Path, store: Store) -> None:
    """What `hqlt study run` would do."""
    validate(file)
    print_cost(file, store)


def _summary(study: Study) -> str:
    seeds = f"{counted(len(study.seeds), 'seed')} each"
    if study.search is None:
        tasks = [spoken(part.task.kind) for part in study.by_task()]
        return f"ablation {study.name}: {counted(study.n_trials, 'cell')}, {seeds}, on {' and '.join(tasks)}"
    size = study.size()
    space = "infinitely many, or too many to count" if size is None else f"{size:,}"
    replicated = (
        f", then the front over {counted(len(study.replication.seeds), 'fresh seed')}" if study.replication else ""
    )
    trials = counted(min(study.n_trials, size or study.n_trials), "trial")
    return (
        f"search {study.name}: {trials} ({study.search.sampler.kind}), "
        f"{seeds}{replicated}\ndistinct configs within the constraints: {space}"
    )


def print_cost(file: Path, store: Store) -> None:
    """Parameters, FLOPs and bytes of the study's models, and the time that training them takes."""
    study = checked_study(file)
    if study.ablation is not None:
        found = [cell.config for cell in study.cells()]
        for cell in study.cells():
            if len(study.by_task()) > 1 and cell.label == BASELINE:
                print(f"{spoken(cell.config.task.kind)}:")
            cost = costs(cell.config)
            left = "" if cell.residual is None else f"   {cell.residual:+.2%} off the baseline's {study.ablation.match}"
            print(f"{cell.label:<36} {format_value('parameters', cost['parameters']):>9} parameters{left}")
        print()
    else:
        found = list(some_configs(study))
    table = [costs(config) for config in found]
    print(f"{'':<18}{'smallest':>12}{'median':>12}{'largest':>12}   of {counted(len(table), 'config')}")
    for name in SHOWN:
        values = sorted(cost[name] for cost in table)
        cells = (values[0], statistics.median(values), values[-1])
        print(f"{name.replace('_', ' '):<18}" + "".join(f"{format_value(name, value):>12}" for value in cells))
    largest = max(zip(table, found, strict=True), key=lambda pair: pair[0]["parameters"])[1]
    print(f"largest model: {describe(largest.arch)}")
    print(_time(study, statistics.fmean(cost["training_flops"] for cost in table), store))


def _time(study: Study, mean_flops: float, store: Store) -> str:
    n_models = study.n_trials * len(study.seeds)
    total = mean_flops * n_models
    speed = _speed(store)
    stopped = "; early stopping makes it less" if study.early_stopping else ""
    after = "; replication comes on top" if study.replication else ""
    lead = f"{counted(n_models, 'model')}, {format_value('training_flops', total)} FLOP in training"
    if speed is None:
        return f"{lead}{stopped}{after}. How long: not known until a study has run with this data folder"
    seconds = total / speed / study.budget.parallel
    return (
        f"{lead}: about {duration(seconds)} with {study.budget.parallel} at a time, "
        f"at the {format_value('flops', speed)} FLOP/s seen here{stopped}{after}"
    )


def _speed(store: Store) -> float | None:
    """Training FLOP a second that earlier trials in the store reached, in the median; None if there are none."""
    if store.database is None and not (store.data / "hqlt.db").exists():
        return None
    ledger = store.open()
    speeds = [
        record.costs["training_flops"] / replica.train_seconds
        for row in ledger.studies()
        for record in study_results(ledger, row.name).trials
        for replica in record.replicas
        if replica.status == "complete" and replica.train_seconds
    ]
    return statistics.median(speeds) if speeds else None


def some_configs(study: Study) -> Iterator[Config]:
    """Feasible configs drawn at random, always the same ones."""
    draw = random.Random(0)  # noqa: S311  a sample, not a secret
    seen: set[str] = set()
    for _ in range(N_SAMPLED * 20):
        try:
            config, _ = study.resolve({name: _drawn(domain, draw) for name, domain in study.domains().items()})
        except InvalidArchError:
            continue
        if config.config_id not in seen and not study.violations(costs(config)):
            seen.add(config.config_id)
            yield config
        if len(seen) == N_SAMPLED:
            return


def _drawn(domain: AxisDomain, draw: random.Random) -> AxisValue:
    match domain:
        case Choices(values):
            return draw.choice(values)
        case IntegerRange(low, high, _, True):
            return round(math.exp(draw.uniform(math.log(low), math.log(high))))
        case IntegerRange(low, high, step, _):
            return draw.randrange(low, high + 1, step)
        case RealRange(low, high, True):
            return math.exp(draw.uniform(math.log(low), math.log(high)))
        case RealRange(low, high, _):
            return draw.uniform(low, high)
