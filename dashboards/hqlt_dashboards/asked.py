"""What was asked of a study, what it cost and what it ran on, as words and their meanings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from hqlt_search_space.space import Range
from hqlt_search_space.spec import Spec
from hqlt_search_space.study import Study
from hqlt_search_space.trial import Backend, Environment, StudyResults

from hqlt_dashboards.markup import Markup, bullets, join, table, tag, terms
from hqlt_dashboards.words import format_value, spoken


@dataclass(frozen=True, slots=True)
class Background:
    """What there is to tell of a study beside its results."""

    study: Study
    file_text: str
    """The study file as its author wrote it; empty if that was not kept."""
    state: str
    """`open`, `paused` or `complete`."""
    note: str | None
    """Why it ended early."""
    began: datetime
    made: datetime
    """When this was put together."""
    version: str
    environments: tuple[Environment, ...]
    backends: tuple[Backend, ...]
    notes: tuple[str, ...]
    """What the trainings had to say: fallbacks taken, and the like."""
    last_words: Mapping[int, str]
    """Trial number -> the last message of an attempt that came to no result."""
    options: str
    """What a command needs to find the study, as ` --data elsewhere`; mostly empty."""


def asked(results: StudyResults, background: Background) -> Markup:
    """The essentials of the study file, what was spent on it and where; the file itself, folded away."""
    study = background.study
    pairs = [("task", "; ".join(_task(part.task) for part in study.by_task()))]
    pairs += [(f"{name}, shared by all", _settings(fixed)) for name, fixed in _shared(study) if fixed]
    if study.search is not None:
        pairs.append(("sampler", _spec(study.search.sampler)))
        pairs += [("match", _spec(study.search.match))] if study.search.match else []
    if study.ablation is not None:
        pairs.append(("baseline", _settings(study.ablation.baseline) or "model and recipe as they are"))
        pairs.append(("matched to the baseline", study.ablation.match))
    pairs.append(("objectives", ", ".join(f"{o.direction} {spoken(o.name)}" for o in results.objectives)))
    pairs += [(f"limit on {spoken(name)}", bounds.in_words()) for name, bounds in study.constraints.items()]
    pairs += [("early stopping", _spec(study.early_stopping))] if study.early_stopping else []
    pairs.append(("seeds", _plain(study.seeds)))
    pairs += [("replicated with seeds", _plain(study.replication.seeds))] if study.replication else []
    pairs.append(("budget", f"{results.budget} trials, {study.budget.parallel} at a time"))
    pairs.append(("spent", _spent(results)))
    pairs.append(("begun", f"{background.began:%d %B %Y, %H:%M} UTC"))
    machines = dict.fromkeys(map(_machine, background.environments))
    pairs += [("ran on", machine) for machine in machines]
    ran = dict.fromkeys(f"{b.operator}: {b.backend} ({b.reason})" for b in background.backends)
    file = tag("pre", background.file_text) if background.file_text else Markup()
    return join(
        terms(pairs),
        _varied(study),
        _folded("The study file", file),
        _folded("Which implementation ran, and why", bullets(list(ran))),
        _folded("What the trainings noted", bullets(background.notes)),
    )


def _folded(title: str, content: Markup) -> Markup:
    return tag("details", tag("summary", title), content) if content else Markup()


def _shared(study: Study) -> Sequence[tuple[str, Mapping[str, Any]]]:
    return (("model", study.model), ("recipe", study.recipe))


def _varied(study: Study) -> Markup:
    """What differs from model to model: the space of a search, or what an ablation changes in its baseline."""
    if study.search is not None:
        rows = [(axis, _domain(domain)) for axis, domain in study.search.space.items()]
        return table("The space", ("axis", "choices"), rows, words={1})
    assert study.ablation is not None, "a study is a search or an ablation"
    rows = [(axis, _domain(values)) for axis, values in study.ablation.vary.items()]
    rows += [(f"cell {name}", _settings(changes)) for name, changes in study.ablation.cells.items()]
    return table("What is changed in the baseline", ("axis", "values"), rows, words={1})


def _spent(results: StudyResults) -> str:
    replicas = [replica for record in results.trials for replica in record.replicas + record.replication]
    seconds = sum(replica.wall_seconds or replica.train_seconds or 0.0 for replica in replicas)
    peak = max((replica.peak_memory_bytes or 0 for replica in replicas), default=0)
    memory = f", at most {format_value('bytes', peak, digits=3)} of memory each" if peak else ""
    return f"{len(replicas)} trainings, {_duration(seconds)} together{memory}"


def _duration(seconds: float) -> str:
    """
    >>> _duration(42), _duration(150), _duration(7200)
    ('42 s', '2.5 minutes', '2 hours')
    """
    for unit, name in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.3g} s"


def _machine(environment: Environment) -> str:
    threads = "1 thread" if environment.n_threads == 1 else f"{environment.n_threads} threads"
    source = f", source {environment.source_version[:12]}" if environment.source_version else ""
    return (
        f"{environment.device} ({environment.cpu}, {threads}); {environment.platform}; "
        f"Python {environment.python}, torch {environment.torch}, hqlt {environment.hqlt}{source}"
    )


def _task(task: Spec) -> str:
    said = task.model_dump(mode="json", exclude_defaults=True, exclude={"kind", "version"})
    kind = spoken(str(task.model_dump()["kind"]))
    return f"{kind}: {_settings(said)}" if said else kind


def _spec(spec: Spec) -> str:
    said = spec.model_dump(mode="json", exclude_none=True)
    kind = str(said.pop("kind", ""))
    return ", ".join(part for part in (kind, _settings(said)) if part)


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{spoken(name)} {_plain(value)}" for name, value in settings.items())


def _domain(domain: Range | Sequence[Any]) -> str:
    return _plain(domain.model_dump(exclude_none=True) if isinstance(domain, Range) else domain)


def _plain(value: Any) -> str:
    """A setting as a person writes it.

    >>> _plain({"low": 0.003, "high": 0.02, "scale": "log"}), _plain((2, None)), _plain(False)
    ('0.003 to 0.02, log scale', '2, null', 'false')
    """
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case {"low": low, "high": high, **more}:
            step = f", in steps of {more['step']}" if "step" in more else ""
            return f"{_plain(low)} to {_plain(high)}{step}" + (", log scale" if more.get("scale") == "log" else "")
        case dict():
            return f"({_settings(value)})"
        case list() | tuple():
            return ", ".join(_plain(part) for part in value)
        case float():
            return f"{value:g}"
        case _:
            return str(value)
