"""What the numbers of a study say, in sentences: who is on the front and by what margin; what each change does.

Every number is one of `front`, `ablation` or `seeds`; here they only become words. A margin is a paired difference over
the seeds that both sides have, and a sentence whose interval says little says that it says little.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

from hqlt_search_space.cost import COSTS
from hqlt_search_space.trial import Objective, ReplicaResult, StudyResults, TrialRecord

from hqlt_dashboards.ablation import BASELINE, AblationRow, AblationTable, ablation_table, by_task, paired
from hqlt_dashboards.front import FrontMember, fresh_replicas, front_members
from hqlt_dashboards.seeds import CAVEATS, Estimate, readings
from hqlt_dashboards.words import describe, format_value, mixer_kinds, spoken

NAMED = 4  # trials named in a sentence; the rest is counted

Verdict = Literal["better", "worse", "not told apart", "one seed"]


def answer(results: StudyResults) -> list[str]:
    """What came out, sentence by sentence."""
    if is_ablation(results):
        parts = by_task(results)
        return [sentence for part in parts for sentence in _of_ablation(part, named=len(parts) > 1)]
    members = front_members(results)
    if not members:
        failed = sum(record.state in ("failed", "quarantined") for record in results.trials)
        return [
            "No trial has come to a result yet." if not failed else f"No trial has come to a result; {failed} failed."
        ]
    return list(dict.fromkeys([*_of_front(results, members), *_of_kinds(results, members)]))  # a caveat is said once


def is_ablation(results: StudyResults) -> bool:
    return any(record.cell is not None for record in results.trials)


def measured_objectives(results: StudyResults) -> list[Objective]:
    """The objectives that training decides; the others are arithmetic."""
    return [objective for objective in results.objectives if objective.name not in COSTS]


def verdict(row: AblationRow, direction: str | None) -> Verdict:
    """Whether the interval of a row's difference to the baseline leaves out 0, and on which side of it.

    `one seed` has no interval.
    """
    found = row.difference
    if found is None or found.low is None or found.high is None:
        return "one seed"
    if found.low <= 0 <= found.high:
        return "not told apart"
    return "better" if (found.mean > 0) == (direction == "maximize") else "worse"


def with_interval(name: str, found: Estimate, *, sign: bool = False) -> str:
    """`found` of the metric `name` as mean and interval."""
    mean, low, high = (
        "" if value is None else ("+" if sign and value > 0 else "") + format_value(name, value, digits)
        for value, digits in ((found.mean, 4), (found.low, 3), (found.high, 3))
    )
    return f"{mean} [{low}, {high}]" if low else mean


def _of_front(results: StudyResults, members: Sequence[FrontMember]) -> list[str]:
    n_complete = sum(record.state == "complete" for record in results.trials)
    first, *others = results.objectives
    if not others:
        tied = f"trials {_listed(str(m.record.number) for m in members)} tie" if len(members) > 1 else "one is best"
        sentences = [f"Of {_count(n_complete, 'trial')} with a result, {tied}: {_best(members, first, ())}."]
    elif len(members) == 1:
        sentences = [
            f"Of {_count(n_complete, 'trial')} with a result, one is at least as good as all in every objective: "
            f"{_best(members, first, others)}."
        ]
    else:
        sentences = [
            f"{len(members)} of {_count(n_complete, 'trial')} with a result are on the front: "
            "nothing that was tried is at least as good in every objective and better in one."
        ]
        for objective in results.objectives:
            rest = [other for other in results.objectives if other is not objective]
            sentences.append(f"{_superlative(objective)}: {_best(members, objective, rest)}.")
    if any(member.replicated for member in members):
        sentences.append("These are means over fresh seeds, which had no part in choosing.")
        counts = sorted({found.n for member in members for found in member.estimates.values()})
        sentences += [f"{CAVEATS[n]}." for n in counts if n in CAVEATS]
    elif measured_objectives(results):
        sentences.append(
            "These are the values by which the search chose, so they flatter its winners; "
            "with replication the study would train its front again over fresh seeds."
        )
    return sentences


def _best(members: Sequence[FrontMember], objective: Objective, rest: Iterable[Objective]) -> str:
    """The member that is best in `objective`, with what it has in the `rest`."""
    sign = 1 if objective.direction == "minimize" else -1
    lowest = min(sign * member.values[objective.name] for member in members)
    tied = [member for member in members if sign * member.values[objective.name] == lowest]
    best = tied[0]
    found = best.estimates.get(objective.name)
    value = (
        with_interval(objective.name, found)
        if found is not None
        else format_value(objective.name, best.values[objective.name])
    )
    seeds = f" over {_count(found.n, 'seed')}" if found is not None and found.n > 1 else ""
    also = f", level with {_trials(tied[1:])}" if len(tied) > 1 else ""
    with_rest = "; ".join(f"{spoken(o.name)} {format_value(o.name, best.values[o.name])}" for o in rest)
    return f"{_named(best.record)} with {value}{seeds}" + (f" ({with_rest})" if with_rest else "") + also


def _of_kinds(results: StudyResults, members: Sequence[FrontMember]) -> list[str]:
    """The best of each combination of mixers in the first measured objective, and how far ahead the first is."""
    objective = next(iter(measured_objectives(results)), None)
    if objective is None:
        return []
    sign = 1 if objective.direction == "minimize" else -1
    best: dict[str, TrialRecord] = {}
    complete = [record for record in results.trials if objective.name in record.objectives]
    for record in sorted(complete, key=lambda record: sign * record.objectives[objective.name]):
        best.setdefault(mixer_kinds(record.config.arch), record)
    if len(best) < 2:
        return []
    listed = _listed(
        f"{kinds} {format_value(objective.name, record.objectives[objective.name])} (trial {record.number})"
        for kinds, record in best.items()
    )
    ahead, behind, *_ = best.values()
    seeds = _listed(map(str, results.seeds or sorted(readings(ahead.replicas, objective.name))))
    sentences = [
        f"In {spoken(objective.name)}, as the search saw it on seed{'s' if ',' in seeds or ' and ' in seeds else ''} "
        f"{seeds}, the best of each kind of model: {listed}."
    ]
    lead, whose = _lead(ahead, behind, objective)
    if lead is None:
        return sentences
    if lead.mean == 0:
        return [*sentences, f"Trials {ahead.number} and {behind.number} are level over {whose}."]
    by = with_interval(objective.name, lead)
    if lead.low is None:
        return [*sentences, f"Trial {ahead.number} leads by {by}, on one seed: that may be luck."]
    luck = " That may be luck: the interval holds 0." if lead.low <= 0 else ""
    sentences.append(f"Over {whose}, trial {ahead.number} leads trial {behind.number} by {by}.{luck}")
    return [*sentences, *([f"{CAVEATS[lead.n]}."] if lead.n in CAVEATS else [])]


def _lead(ahead: TrialRecord, behind: TrialRecord, objective: Objective) -> tuple[Estimate | None, str]:
    """By how much one is better than the other: paired over fresh seeds if both have some, else over the search's."""
    sign = 1 if objective.direction == "maximize" else -1

    def lead(*replicas: Iterable[ReplicaResult]) -> Estimate | None:
        return paired(*({s: sign * value for s, value in readings(r, objective.name).items()} for r in replicas))

    fresh = lead(fresh_replicas(ahead), fresh_replicas(behind))
    if fresh is not None:
        return fresh, f"the {_count(fresh.n, 'fresh seed')} that both have"
    seen = lead(ahead.replicas, behind.replicas)
    return seen, "" if seen is None else f"the search's {_count(seen.n, 'seed') if seen.n > 1 else 'one seed'}"


def _of_ablation(results: StudyResults, *, named: bool) -> list[str]:
    sentences: list[str] = []
    for objective in measured_objectives(results)[:1]:
        table = ablation_table(results, objective.name)
        start = f"{results.name}: " if named else ""
        found = table.rows[0].estimate if table.rows[0].cell == BASELINE else None
        if found is None:
            sentences.append(f"{start}The baseline has no value yet, so nothing can be compared with it.")
            continue
        sentences.append(
            f"{start}The baseline has a {spoken(objective.name)} of {with_interval(objective.name, found)} "
            f"over {_count(found.n, 'seed')}."
        )
        sentences += _of_cells(table, objective)
    return sentences


def _of_cells(table: AblationTable, objective: Objective) -> list[str]:
    sentences: list[str] = []
    compared = [row for row in table.rows[1:] if row.difference is not None]
    ordered = sorted(compared, key=lambda row: -abs(row.difference.mean) if row.difference else 0.0)
    words: dict[Verdict, str] = {
        "better": "Better than it by an interval that leaves out 0",
        "worse": "Worse than it by an interval that leaves out 0",
        "not told apart": "Not told apart from it",
        "one seed": "On one seed, without an interval to judge by",
    }
    for kind, saying in words.items():
        rows = [row for row in ordered if verdict(row, objective.direction) == kind]
        if rows:
            cells = _listed(
                f"{row.cell} ({with_interval(objective.name, row.difference, sign=True)})"
                for row in rows
                if row.difference is not None
            )
            sentences.append(f"{saying}: {cells}.")
    counts = sorted({row.difference.n for row in compared if row.difference is not None})
    sentences += [f"{CAVEATS[n]}." for n in counts if n in CAVEATS]
    if len(compared) > 1 and any(n > 1 for n in counts):
        sentences.append(f"No interval is widened for there being {len(compared)} comparisons.")
    return sentences


def _superlative(objective: Objective) -> str:
    return f"{'Highest' if objective.direction == 'maximize' else 'Lowest'} {spoken(objective.name)}"


def _named(record: TrialRecord) -> str:
    return f"trial {record.number}, {describe(record.config.arch)},"


def _trials(members: Sequence[FrontMember]) -> str:
    numbers = [str(member.record.number) for member in members]
    more = len(numbers) - NAMED
    return f"trial{'s' if len(numbers) > 1 else ''} " + (
        f"{', '.join(numbers[:NAMED])} and {more} more" if more > 0 else _listed(numbers)
    )


def _listed(words: Iterable[str]) -> str:
    """`words` with commas, and `and` before the last.

    >>> _listed(["a", "b", "c"])
    'a, b and c'
    """
    *start, last = words
    return f"{', '.join(start)} and {last}" if start else last


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
