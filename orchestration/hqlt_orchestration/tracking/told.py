"""What MLflow is told of a study: as it happens, record by record, or afterwards from the ledger.

A record is a dict of JSON values; its `kind` says which method of `mirror.Mirror` understands it. A driver puts
records into its spool. What was lost on the way (the driver was killed between a commit and its record, the disk was
full, MLflow came back without its database) is made again here, from the ledger.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from hqlt_dashboards.front import front_hypervolume, ranks
from hqlt_dashboards.words import describe
from hqlt_search_space.study import Study
from hqlt_search_space.trial import ReplicaResult, Trial, TrialRecord, TrialResult

from hqlt_orchestration.records.attempts import LOG_FILE, replica_folder
from hqlt_orchestration.records.ledger import Ledger
from hqlt_orchestration.records.results import by_trial, minimised, study_results, trial_record
from hqlt_orchestration.records.states import CRASHES
from hqlt_orchestration.records.store import Store
from hqlt_orchestration.records.tables import FINISHED, AttemptRow, ReplicaRow, State, StudyRow, TrialRow

Record = dict[str, Any]
NAME_CHARACTERS = 250  # MLflow's own limit for the name of a run
MESSAGE_CHARACTERS = 5000


def phase_begins(phase: str, row: StudyRow) -> Record:
    study = Study.from_json(row.study)
    return {
        "kind": "phase",
        "phase": phase,
        "file_text": row.file_text,
        "study_json": study.model_dump_json(indent=1),
    }


def phase_ends(phase: str, artifacts: Sequence[str] = ()) -> Record:
    return {"kind": "phase_end", "phase": phase, "artifacts": list(artifacts)}


def trial_begins(phase: str, row: TrialRow, trial: Trial | None) -> Record:
    """`trial` is what a worker is given; None if no result of the trial says what that was."""
    return {
        "kind": "trial",
        "phase": phase,
        "number": row.number,
        "name": f"{row.number} {row.cell or describe(row.config.arch)}"[:NAME_CHARACTERS],
        "params": {**row.choices, "mixers": describe(row.config.arch)},
        "tags": {"hqlt.trial_id": row.config.config_id},
        "trial_json": trial.model_dump_json(indent=1) if trial is not None else None,
    }


def measured(phase: str, number: int, seed: int, step: int, metrics: Mapping[str, float], *, n_seeds: int) -> Record:
    """Metrics of one seed; of several seeds each has a curve of its own."""
    named = dict(metrics) if n_seeds == 1 else {f"{name}/seed-{seed}": value for name, value in metrics.items()}
    return {"kind": "metrics", "phase": phase, "number": number, "step": step, "metrics": named}


def trial_ends(
    phase: str,
    row: TrialRow,
    state: State,
    replicas: Sequence[ReplicaResult],
    objectives: Mapping[str, float],
    folder: Path,
    obituary: tuple[str, str] | None,
) -> Record:
    """`folder` is the trial's, `obituary` what `died_of` says."""
    artifacts = [folder / replica.checkpoint for replica in replicas if replica.checkpoint]
    artifacts += [replica_folder(folder, replica.seed) / LOG_FILE for replica in replicas[:1]]
    failures = [] if obituary is None else [obituary]
    failures += [(replica.reason, replica.message or "") for replica in replicas if replica.reason]
    errors = {
        "error.type": ", ".join(sorted({reason for reason, _ in failures})),
        "error.message": next((message for _, message in failures if message), "")[:MESSAGE_CHARACTERS],
    }
    return {
        "kind": "trial_end",
        "phase": phase,
        "number": row.number,
        "state": state,
        "step": max((replica.step for replica in replicas), default=0),
        "metrics": {**row.costs, **means(replicas)} | {f"objective/{n}": value for n, value in objectives.items()},
        "tags": errors if failures else {},
        "artifacts": [str(path) for path in artifacts],
    }


def rerun(
    number: int, of: str, changes: Mapping[str, Any], outcome: TrialResult, folder: Path, *, identical: bool
) -> Iterator[Record]:
    """All of a rerun of the trial `of`, which is a run with a `number` of its own."""
    (replica,) = outcome.replicas
    what = ", ".join(f"{name}={value}" for name, value in changes.items()) or "unchanged"
    run = {"phase": "rerun", "number": number}
    yield {
        "kind": "trial",
        **run,
        "name": f"{of.rpartition('/')[2]}: {what}"[:NAME_CHARACTERS],
        "params": {"rerun_of": of, **changes},
        "tags": {
            "hqlt.rerun_of": of,
            "hqlt.variation": what[:MESSAGE_CHARACTERS],
            "hqlt.identical": str(identical),
        },
        "trial_json": outcome.trial.model_dump_json(indent=1),
    }
    for point in replica.curve:
        yield measured("rerun", number, replica.seed, point.step, point.metrics, n_seeds=1)
    yield {
        "kind": "trial_end",
        **run,
        "state": replica.status,
        "step": replica.step,
        "metrics": final_metrics(replica),
        "tags": {},
        "artifacts": [str(folder / replica.checkpoint)] if replica.checkpoint else [],
    }
    yield phase_ends("rerun")


def front_moves(phase: str, step: int, hypervolume: float, changed: Mapping[int, int]) -> Record:
    """`changed` is the rank of the trials that came to or left the front; 0 is on it."""
    return {"kind": "front", "phase": phase, "step": step, "hypervolume": hypervolume, "ranks": dict(changed)}


def front_ranks(study: Study, records: Iterable[TrialRecord]) -> dict[int, int]:
    """Trial number -> the front it is on, of the trials with objectives."""
    points = {record.number: minimised(study, record.objectives) for record in records if record.objectives}
    return dict(zip(points, ranks(list(points.values())), strict=True))


def final_metrics(result: ReplicaResult) -> dict[str, float]:
    """What a replica ended with: its metrics, knock-outs and gates by name."""
    found = dict(result.metrics)
    for knock_out in result.knock_outs:
        found |= {f"without_{knock_out.silenced}/{name}": value for name, value in knock_out.metrics.items()}
    for gate in result.gates:
        found |= {f"gate_fw/layer-{gate.layer}": gate.fw, f"gate_kv/layer-{gate.layer}": gate.kv}
    names = ("tokens_per_second", "train_seconds", "peak_memory_bytes", "accumulation")
    extra = {name: getattr(result, name) for name in names}
    return found | {name: float(value) for name, value in extra.items() if value is not None}


def means(replicas: Sequence[ReplicaResult]) -> dict[str, float]:
    """The mean over several complete replicas of each metric; nothing for one, whose metrics stand already."""
    complete = [replica.metrics for replica in replicas if replica.status == "complete"]
    if len(complete) < 2:
        return {}
    shared = set.intersection(*(set(metrics) for metrics in complete))
    return {name: fmean(metrics[name] for metrics in complete) for name in sorted(shared)}


@dataclass(frozen=True)
class Ended:
    """A trial that has ended in a phase, or with `number` None the phase itself, and all that is to be told of it.

    `state` is that of the trial; of a phase `running` says that it has begun.
    """

    phase: str
    number: int | None
    state: State
    records: tuple[Record, ...]


def everything_ended(ledger: Ledger, store: Store, name: str) -> Iterator[Ended]:
    """All of the study `name` that has ended, as the ledger has it: phases that have begun, trials, phases that ended.

    Raises:
        UnknownNameError: there is no such study.
    """
    stored = ledger.study(name)
    study = Study.from_json(stored.study)
    attempts, replicas = by_trial(ledger.attempts(name)), by_trial(ledger.replicas(name))
    rows = [row for row in ledger.trials(name) if row.state in FINISHED]
    scored = [trial_record(study, row, replicas[row.number]) for row in rows]
    ended: list[Ended] = []
    for row, record in zip(rows, scored, strict=True):
        own = [replica for replica in replicas[row.number] if replica.phase == row.phase]
        ended.append(_ended(study, store, row.phase, row, row.state, own, record.objectives, attempts[row.number]))
    for row in rows:
        fresh = [replica for replica in replicas[row.number] if replica.phase == "replicate"]
        if fresh and all(replica.state in FINISHED for replica in fresh):
            ended.append(_ended(study, store, "replicate", row, "complete", fresh, {}, attempts[row.number]))
    phases = dict.fromkeys(each.phase for each in ended)
    for phase in phases:
        yield Ended(phase, None, "running", (phase_begins(phase, stored),))
    yield from ended
    for phase in phases if stored.state == "complete" else ():
        found = front_ranks(study, scored)
        volume = front_hypervolume(study_results(ledger, name))
        moved = [front_moves(phase, len(found), volume, found)] if found else []
        yield Ended(phase, None, "complete", (*moved, phase_ends(phase)))


def _ended(
    study: Study,
    store: Store,
    phase: str,
    row: TrialRow,
    state: State,
    replicas: Sequence[ReplicaRow],
    objectives: Mapping[str, float],
    attempts: Sequence[AttemptRow],
) -> Ended:
    tried = [attempt for attempt in attempts if attempt.seed in {replica.seed for replica in replicas}]
    began = {"unix_ms": int(min(attempt.started_at for attempt in tried) * 1000)} if tried else {}
    ended_at = {attempt.seed: attempt.ended_at for attempt in tried if attempt.ended_at is not None}
    outcome = next((replica.outcome for replica in replicas if replica.outcome is not None), None)
    records = [trial_begins(phase, row, outcome.trial if outcome is not None else None) | began]
    for replica in replicas:
        if replica.result is None:
            continue
        points = [(point.step, point.metrics) for point in replica.result.curve]
        points.append((replica.result.step, final_metrics(replica.result)))
        records += [
            measured(phase, row.number, replica.seed, step, metrics, n_seeds=len(replicas))
            | {"unix_ms": int(ended_at[replica.seed] * 1000)}
            for step, metrics in points
        ]
    results = [replica.result for replica in replicas if replica.result is not None]
    end = {"unix_ms": int(max(ended_at.values()) * 1000)} if ended_at else {}
    folder = store.trial_folder(study.name, row.number)
    records.append(trial_ends(phase, row, state, results, objectives, folder, died_of(state, tried)) | end)
    return Ended(phase, row.number, state, tuple(records))


def died_of(state: State, attempts: Iterable[AttemptRow]) -> tuple[str, str] | None:
    """How the last attempt at a quarantined trial ended, and its last words."""
    bad = [attempt for attempt in attempts if attempt.state in CRASHES]
    if state != "quarantined" or not bad:
        return None
    last = max(bad, key=lambda attempt: attempt.ended_at or 0.0)
    return last.state, last.message or ""
