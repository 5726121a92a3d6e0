"""A study on one page: what was asked, what came out, how sure that is, and how to run it again.

The page is one file without scripts that fetches nothing; it reads on paper, on a phone, by day and by night. Sections
that a study has nothing for are left out. No statistics are made here: they come from `front`, `ablation` and `seeds`.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from hqlt_search_space.errors import NoResultError
from hqlt_search_space.trial import Importances, ReplicaResult, StudyResults, TrialRecord

from hqlt_dashboards.ablation import ABSENT, TITLES, AblationTable, ablation_table, by_task
from hqlt_dashboards.answer import answer, is_ablation, measured_objectives, verdict, with_interval
from hqlt_dashboards.asked import Background, asked
from hqlt_dashboards.curves import curve_metric, curves_figure
from hqlt_dashboards.front import FrontMember, fresh_replicas, front_members
from hqlt_dashboards.markup import Markup, bar, bullets, interval, join, page, paragraph, picture, table, tag
from hqlt_dashboards.plots import front_figure
from hqlt_dashboards.published import TITLES as PUBLISHED_TITLES
from hqlt_dashboards.published import published_tables
from hqlt_dashboards.seeds import Estimate, estimate, readings
from hqlt_dashboards.tables import INTERVAL, front_remarks, id_length
from hqlt_dashboards.words import axis_label, describe, format_value, spoken

SHOWN_FAILURES = 20
SHOWN_RERUNS = 20


def report(results: StudyResults, background: Background) -> str:
    """The page of a study, whole or as it stands.

    Raises:
        NoResultError: no trial has ended, so there is nothing to report.
    """
    failures = _failures(results, background)
    if not failures and not any(record.replicas for record in results.trials):
        raise NoResultError(f"study {results.name!r} has no finished trial yet, so there is nothing to report")
    sections = [
        ("asked", "What was asked", asked(results, background)),
        ("answer", "The answer", tag("div", paragraph(answer(results)), class_="answer")),
        ("front", "The front", _front(results)),
        ("ablation", "What each change does", _ablation(results)),
        ("importances", "Which axes decide", _importances(results)),
        ("curves", "Learning curves", _curves(results)),
        ("memories", "Which memory did it?", _memories(results)),
        ("failures", "What failed", failures),
        ("again", "Run it again", _again(results, background)),
    ]
    filled = [section for section in sections if section[2]]
    made = f"{background.made:%d %B %Y, %H:%M} UTC, by hqlt {background.version}"
    return page(
        f"{results.name}: report",
        tag("h1", results.name),
        tag("p", f"{_standing(results, background)} Made {made}.", class_="soft"),
        tag("nav", *(tag("a", title, href=f"#{anchor}") for anchor, title, _ in filled), aria_label="Contents"),
        *(tag("section", tag("h2", title), content, id=anchor) for anchor, title, content in filled),
    )


def _standing(results: StudyResults, background: Background) -> str:
    counts = Counter(str(record.state) for record in results.trials)
    ended = sum(counts[state] for state in ("complete", "stopped", "failed", "quarantined"))
    found = f"{ended} of {results.budget} trials ({', '.join(f'{count} {state}' for state, count in counts.items())})"
    note = f" {background.note[:1].upper()}{background.note[1:]}." if background.note else ""
    if background.state == "complete":
        return f"Finished: {found}.{note}"
    return f"Not finished: {found}. This is how it stood.{note}"


def _front(results: StudyResults) -> Markup:
    """Of an ablation only with several objectives, because for one its table says all; none across several tasks."""
    members = front_members(results)
    if not members or len(by_task(results)) > 1 or (is_ablation(results) and len(results.objectives) == 1):
        return Markup()
    digits = id_length(results)
    objectives = [f"{spoken(o.name)} ({'max' if o.direction == 'maximize' else 'min'})" for o in results.objectives]
    titles = ["trial", "mixers, first layer to last", *objectives, "parameters", "seeds", "id"]
    rows = [
        [
            str(member.record.number),
            member.record.cell or describe(member.record.config.arch),
            *(_measured(member, objective.name) for objective in results.objectives),
            _cost(member.record, "parameters"),
            str(member.n_seeds) + (f", {member.n_failed} failed" if member.n_failed else ""),
            member.record.trial_id[:digits],
        ]
        for member in members
    ]
    return join(
        picture(front_figure(results), "All trials with a result; those on the front are outlined and numbered."),
        table("The front, the best in the first objective first", titles, rows, words={1, len(titles) - 1}),
        bullets(front_remarks(results, members)),
    )


def _cost(record: TrialRecord, name: str) -> str:
    return format_value(name, record.costs[name]) if name in record.costs else ABSENT


def _measured(member: FrontMember, name: str) -> Markup:
    found = member.estimates.get(name)
    return _two_lines(format_value(name, member.values[name]) if found is None else with_interval(name, found))


def _two_lines(text: str) -> Markup:
    """A mean, and its interval below it."""
    mean, bracket, rest = text.partition("[")
    return join(mean, tag("span", bracket + rest, class_="range")) if bracket else join(text)


def _ablation(results: StudyResults) -> Markup:
    if not is_ablation(results):
        return Markup()
    tables = [ablation_table(part, o.name) for part in by_task(results) for o in measured_objectives(results)]
    parts = [part for found in tables for part in (_cells(found), bullets((INTERVAL, *found.remarks)))]
    for beside in published_tables(results):
        rows = [line.texts() for line in beside.lines]
        parts += [tag("h3", "Beside the published numbers"), table(beside.study, PUBLISHED_TITLES, rows)]
        parts.append(bullets(beside.remarks))
    return join(*parts)


def _cells(found: AblationTable) -> Markup:
    """The table with each difference drawn on a common scale, 0 in its middle, and in a word."""
    reach = max((abs(end) for row in found.rows for end in _ends(row.difference)), default=0.0)
    rows = []
    for row, (*texts, seeds) in zip(found.rows, found.cells(), strict=True):
        ends = _ends(row.difference)
        drawn = interval(min(ends), ends[0], max(ends), reach) if ends else Markup()
        rows.append([*map(_two_lines, texts), drawn, verdict(row, found.direction) if ends else "", seeds])
    titles = (*TITLES[:-1], "drawn, 0 in the middle", "than the baseline", TITLES[-1])
    return table(f"{found.study}: {spoken(found.metric)}", titles, rows, words={4, 5})


def _ends(found: Estimate | None) -> list[float]:
    """The mean and, where there is an interval, its ends."""
    return [] if found is None else [end for end in (found.mean, found.low, found.high) if end is not None]


def _cell(results: StudyResults, record: TrialRecord) -> str:
    """The name of a cell, with its task where there are several."""
    task = f", {spoken(record.config.task.kind)}" if len(by_task(results)) > 1 else ""
    return f"{record.cell}{task}"


def _importances(results: StudyResults) -> Markup:
    if not results.importances:
        return Markup()
    explained = (
        "PED-ANOVA (arXiv:2304.10255): how much the values of an axis among the best trials differ from its values "
        "among all. The stroke is what chance gives the axis: 95 of 100 shuffles of the objective's values stay below "
        "it, so one axis in twenty passes it by luck. It describes the trials that the sampler chose; to be sure of an "
        "axis, vary it in an ablation."
    )
    says = any(found.axes for found in results.importances)
    parts = [_importance(found) for found in results.importances]
    return join(*parts, tag("p", explained, class_="soft") if says else Markup())


def _importance(found: Importances) -> Markup:
    heading = tag("h3", spoken(found.objective))
    if found.silent is not None:
        return join(heading, tag("p", f"Nothing can be said: {found.silent}."))
    widest = max(max(axis.share, axis.chance) for axis in found.axes)
    rows = [
        [
            axis.axis,
            bar(axis.share / widest, axis.chance / widest),
            f"{axis.share:.0%}",
            f"{axis.chance:.0%}",
            "stands out" if axis.share > axis.chance else "chance",
        ]
        for axis in found.axes
    ]
    caption = f"What decides who is among the best {found.n_best} of {found.n_trials} complete trials"
    return join(heading, table(caption, ("axis", "drawn", "share", "by chance", "verdict"), rows, words={1, 4}))


def _curves(results: StudyResults) -> Markup:
    whose = "the baseline's" if is_ablation(results) else "the front's"
    pictures = []
    for part in by_task(results):
        metric = curve_metric(part)
        if metric is not None:
            what = f"{axis_label(metric)} during training, a line for each seed"
            pictures.append(picture(curves_figure(part, metric), f"{what}: {whose} in colour, the others grey."))
    return join(*pictures)


def _memories(results: StudyResults) -> Markup:
    """Hybrids with one memory silenced, beside themselves whole: an ablation's cells, or the front's, or the best."""
    knock_outs = [k for record in results.trials for replica in record.replicas for k in replica.knock_outs]
    wanted = (*(objective.name for objective in results.objectives), "validation_loss_nats")
    metric = next((name for name in wanted if any(name in k.metrics for k in knock_outs)), None)
    if metric is None:
        return Markup()
    rows = [
        [
            name,
            describe(record.config.arch),
            _over_seeds(metric, list(readings(replicas, metric).values())),
            *(_over_seeds(metric, _silenced(replicas, memory, metric)) for memory in ("kv", "fw")),
            *(_factors(replicas, memory) for memory in ("kv", "fw")),
        ]
        for name, record, replicas in _hybrids(results, metric)
    ]
    titles = ("model", "mixers", "whole", "KV silenced", "FW silenced", "mean factor of KV", "mean factor of FW")
    explained = (
        "A silenced memory gives zeros in every hybrid layer, without training again: what is left is what the model "
        "can do without it. It says which memory this model came to lean on, not which memory the task needs; for "
        "that, see models trained without it. Factors are what a layer multiplies each memory by, averaged over "
        "validation tokens and channels, from the lowest layer to the highest where they differ; a mixing that learns "
        "none has none."
    )
    return join(table(spoken(metric), titles, rows, words={1}), tag("p", explained, class_="soft"))


def _hybrids(results: StudyResults, metric: str) -> list[tuple[str, TrialRecord, tuple[ReplicaResult, ...]]]:
    """Name, record and counting seeds of the models with both memories that a reader wants to see into."""
    if is_ablation(results):
        subjects = [(_cell(results, record), record, record.replicas) for record in results.trials]
    else:
        subjects = [
            (f"trial {m.record.number}", m.record, fresh_replicas(m.record) if m.replicated else m.record.replicas)
            for m in front_members(results)
        ]
    found = [subject for subject in subjects if any(replica.knock_outs for replica in subject[2])]
    if found:
        return found
    others = [(estimate(list(values)).mean, r) for r in results.trials if (values := _seen(r, metric))]
    maximised = any(o.name == metric and o.direction == "maximize" for o in results.objectives)
    others.sort(key=lambda pair: (-pair[0] if maximised else pair[0], pair[1].number))
    return [(f"trial {r.number} (not on the front)", r, r.replicas) for _, r in others[:1]]


def _seen(record: TrialRecord, metric: str) -> list[float]:
    """The search's values of `metric` where it silenced a memory too."""
    return list(readings((replica for replica in record.replicas if replica.knock_outs), metric).values())


def _silenced(replicas: Iterable[ReplicaResult], memory: str, metric: str) -> list[float]:
    return [
        knock_out.metrics[metric]
        for replica in replicas
        for knock_out in replica.knock_outs
        if replica.status == "complete" and knock_out.silenced == memory and metric in knock_out.metrics
    ]


def _over_seeds(metric: str, values: Sequence[float]) -> Markup:
    return _two_lines(with_interval(metric, estimate(values)) if values else ABSENT)


def _factors(replicas: Iterable[ReplicaResult], memory: str) -> str:
    """Means over seeds, layer by layer: as one number, or from the lowest to the highest."""
    by_layer: dict[int, list[float]] = {}
    for gate in (gate for replica in replicas if replica.status == "complete" for gate in replica.gates):
        by_layer.setdefault(gate.layer, []).append(gate.kv if memory == "kv" else gate.fw)
    means = [estimate(values).mean for values in by_layer.values()]
    return " to ".join(dict.fromkeys(f"{mean:.2f}" for mean in (min(means), max(means)))) if means else ABSENT


def _failures(results: StudyResults, background: Background) -> Markup:
    lines: list[str] = []
    for record in results.trials:
        name = f"trial {record.number}" + (f" ({_cell(results, record)})" if record.cell else "")
        failed = [replica for replica in record.replicas + record.replication if replica.status == "failed"]
        for replica in failed:
            why = _last_line(replica.message or spoken(replica.reason or "failed"))
            lines.append(f"{name}, seed {replica.seed}, step {replica.step}: {why}")
        if not failed and record.state in ("failed", "quarantined"):
            lines.append(f"{name}: {record.state}: {_last_line(background.last_words.get(record.number, ''))}")
    if not lines:
        return Markup()
    more = [f"and {len(lines) - SHOWN_FAILURES} more"] if len(lines) > SHOWN_FAILURES else []
    printed = tag("p", "What a trial printed: ", tag("code", f"hqlt logs {results.name}/NUMBER{background.options}"))
    return join(bullets([*lines[:SHOWN_FAILURES], *more]), printed)


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else "no message"


def _again(results: StudyResults, background: Background) -> Markup:
    """Commands for the front, or an ablation's cells, and to go on with a study that is not finished."""
    if is_ablation(results):
        chosen = [(record, _cell(results, record)) for record in results.trials if record.state == "complete"]
    else:
        chosen = [(member.record, describe(member.record.config.arch)) for member in front_members(results)]

    def command(text: str) -> Markup:
        return tag("code", f"{text}{background.options}")

    rows = [
        [str(record.number), what, command(f"hqlt rerun {results.name}/{record.number}")]
        for record, what in chosen[:SHOWN_RERUNS]
    ]
    parts = []
    if rows:
        caption = "Train a stored trial again and compare it to the bit"
        parts.append(table(caption, ("trial", "model", "command"), rows, words={1, 2}))
        longer = command(f"hqlt rerun {results.name}/{chosen[0][0].number} --seed 9 --steps 20000")
        parts.append(tag("p", "With another seed, or longer: ", longer))
    if background.state != "complete":
        parts.append(tag("p", "To go on with the study: ", command(f"hqlt study resume {results.name}")))
    return join(*parts)
