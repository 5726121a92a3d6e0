"""What the commands that only read show: status, list, front, ablation table, logs."""

import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from hqlt_dashboards.front import front, front_hypervolume
from hqlt_dashboards.published import PublishedTable, published_tables
from hqlt_dashboards.tables import front_text, published_text
from hqlt_dashboards.words import spoken
from hqlt_search_space.cost import COSTS
from hqlt_search_space.errors import HqltError, NoResultError, UnknownNameError
from hqlt_search_space.study import Study
from hqlt_search_space.trial import StudyResults

from hqlt_orchestration.records.attempts import LOG_FILE, replica_folder
from hqlt_orchestration.records.drivers import living
from hqlt_orchestration.records.ledger import Ledger
from hqlt_orchestration.records.results import study_results
from hqlt_orchestration.records.store import Store

WATCH_EVERY_S = 2.0
FOLLOW_EVERY_S = 0.3
SHOWN = 8  # lines of one kind in a status: it is to fit a screen


def screen_width() -> int:
    """Columns that a table may have: the terminal's, from 60 to 120; 80 where there is none."""
    return min(120, max(60, shutil.get_terminal_size().columns)) if sys.stdout.isatty() else 80


def status(name: str | None, store: Store, *, as_json: bool, watch: bool) -> None:
    """Print how a study stands, or with no name how all do.

    Raises:
        UnknownNameError: there is no such study.
    """
    ledger = store.open_existing()
    while True:
        text = _list_text(ledger) if name is None else status_text(ledger, name, as_json=as_json)
        if watch and sys.stdout.isatty():
            print("\x1b[H\x1b[2J", end="")
        print(text, flush=True)
        if not watch or (name is not None and ledger.study(name).state == "complete"):
            return
        if _is_interrupted(WATCH_EVERY_S):
            return


def _is_interrupted(seconds: float) -> bool:
    """Whether Ctrl-C was pressed within `seconds`: that is how one ends `--watch` and `--follow`."""
    try:
        time.sleep(seconds)
    except KeyboardInterrupt:
        return True
    return False


def list_studies(store: Store) -> None:
    print(_list_text(store.open_existing()))


def _list_text(ledger: Ledger) -> str:
    rows = ledger.studies()
    if not rows:
        return "no studies yet; run one with: hqlt study run FILE"
    lines = []
    for row in rows:
        counts = ledger.counts(row.name)
        done = counts["complete"] + counts["stopped"] + counts["failed"] + counts["quarantined"]
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(row.created_at))
        lines.append(f"{row.name:<32} {row.state:<9} {done:>5} of {row.budget:<5} {when}")
    return "\n".join(lines)


def status_text(ledger: Ledger, name: str, *, as_json: bool) -> str:
    row = ledger.study(name)
    counts = ledger.counts(name)
    results = study_results(ledger, name)
    members = front(results.trials, results.objectives, results.constraints)
    if as_json:
        return json.dumps(
            {
                "name": name,
                "budget": row.budget,
                "trials": counts,
                "front": [record.trial_id for record in members],
                "hypervolume": front_hypervolume(results),
            }
        )
    shown = ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "no trial yet"
    lines = [f"{name}: {row.state}, {sum(counts.values())} of {row.budget} trials: {shown}"]
    if row.note:
        lines.append(row.note)
    drivers = list(_drivers(ledger, name))
    lines += drivers
    lines += _few(_running(ledger, name))
    study = Study.from_json(row.study)
    if study.ablation is not None and any(record.replicas for record in results.trials):
        published = published_tables(results)
        text = published_text(published, screen_width()) if published else ablation_texts(results, metric_of(study))
        lines += ["", text.rstrip()]
    elif members:
        lines += ["", front_text(results, screen_width(), most=SHOWN).rstrip()]
    lines += _failures(ledger, results)
    lines += _few(_incidents(ledger, name))
    if row.state != "complete" and not drivers:
        lines += ["", f"continue with: hqlt study resume {name}"]
    return "\n".join(lines)


def _drivers(ledger: Ledger, name: str) -> Iterator[str]:
    for driver in living(ledger.drivers(name)):
        yield f"run by process {driver.pid} on {driver.host} ({driver.executor})"


def _running(ledger: Ledger, name: str) -> Iterator[str]:
    for attempt in ledger.attempts(name):
        if attempt.state == "running":
            again = f", attempt {attempt.attempt}" if attempt.attempt > 1 else ""
            minutes = (time.time() - attempt.started_at) / 60
            yield f"  trial {attempt.number}, seed {attempt.seed}: step {attempt.step}, {minutes:.1f} min{again}"


def _failures(ledger: Ledger, results: StudyResults) -> list[str]:
    bad = [record for record in results.trials if record.state in ("failed", "quarantined")]
    last_words = {attempt.number: attempt.message for attempt in ledger.attempts(results.name) if attempt.message}
    lines = []
    for record in bad:
        failed = [replica for replica in record.replicas if replica.status == "failed"]
        message = (failed[0].message or str(failed[0].reason)) if failed else last_words.get(record.number, "")
        lines.append(f"trial {record.number} {record.state}: {_last_line(message or 'no message')}")
    return ["", *_few(lines)] if lines else []


def _few(lines: Iterable[str]) -> list[str]:
    """The first of `lines`, and how many there are beyond."""
    lines = list(lines)
    return lines[:SHOWN] + ([f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else [])


def _incidents(ledger: Ledger, name: str) -> Iterator[str]:
    """What went wrong on the way and was mended."""
    attempts = ledger.attempts(name)
    ended = Counter(attempt.state for attempt in attempts)
    words = {"crashed": "crashed", "hung": "hung", "out_of_memory": "out of memory", "lost": "lost with their driver"}
    found = [f"{ended[state]} {word}" for state, word in words.items() if ended[state]]
    if found:
        yield f"attempts that came to no result: {', '.join(found)}"
    for attempt in attempts:
        if attempt.state == "complete" and attempt.message:
            yield f"trial {attempt.number}, seed {attempt.seed}: {attempt.message}"


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def pareto(name: str, out: Path | None, store: Store) -> None:
    """Print the front of a study, or write it to `out` in the format of its suffix.

    Raises:
        UnknownNameError: there is no such study.
        NoResultError: it has no complete trial.
        HqltError: it has trials on several tasks.
    """
    from hqlt_dashboards.ablation import by_task

    results = study_results(store.open_existing(), name)
    if len(by_task(results)) > 1:
        raise HqltError(
            f"study {name!r} has trials on several tasks, which have no front together; see: hqlt ablation {name}"
        )
    if out is not None:
        from hqlt_dashboards.export import export_front

        export_front(results, out)
        print(f"written to {out}", file=sys.stderr)
        return
    if not front(results.trials, results.objectives, results.constraints):
        raise NoResultError(f"study {name!r} has no complete trial yet, so it has no front")
    print(front_text(results, screen_width()), end="")


def ablation(name: str, out: Path | None, metric: str | None, store: Store) -> None:
    """Print the ablation table of a study, a table a task, or write it to `out` as .md or .tex.

    Raises:
        HqltError: the study is a search, has no results, or the suffix is another.
    """
    from hqlt_dashboards.ablation import AblationTable, ablation_table, by_task

    ledger = store.open_existing()
    study = Study.from_json(ledger.study(name).study)
    results = study_results(ledger, name)
    if study.ablation is not None and not any(record.replicas for record in results.trials):
        raise NoResultError(f"study {name!r} has no result yet, so it has no table")
    metric = metric or metric_of(study)
    if out is None:
        print(ablation_texts(results, metric), end="")
        return
    if out.suffix not in (".md", ".tex"):
        raise HqltError(f"cannot write a table as {out.suffix or 'a file without suffix'!r}; give .md or .tex")
    tables: list[AblationTable | PublishedTable] = [ablation_table(part, metric) for part in by_task(results)]
    tables += published_tables(results)
    texts = [table.to_markdown() if out.suffix == ".md" else table.to_latex() for table in tables]
    try:
        out.write_text("\n".join(texts), encoding="utf-8")
    except OSError as error:
        raise HqltError(f"cannot write {out}: {error.strerror}") from error
    print(f"written to {out}", file=sys.stderr)


def ablation_texts(results: StudyResults, metric: str) -> str:
    """The table of an ablation for each of its tasks, and beside the paper's numbers where it has the paper's models.

    Raises:
        HqltError: the study is a search, or nothing has a metric of that name.
    """
    from hqlt_dashboards.ablation import ablation_table, by_task
    from hqlt_dashboards.tables import ablation_text

    parts, width = by_task(results), screen_width()
    texts = [
        (f"{part.name}: {spoken(metric)}\n\n" if len(parts) > 1 else "")
        + ablation_text(ablation_table(part, metric), width)
        for part in parts
    ]
    published = published_tables(results)
    return "\n".join([*texts, published_text(published, width)] if published else texts)


def metric_of(study: Study) -> str:
    """What an ablation is about: its first objective that is measured, not computed."""
    return next((name for name in study.objectives if name not in COSTS), next(iter(study.objectives)))


def logs(trial: str, store: Store, *, seed: int | None, follow: bool) -> None:
    """Print what a trial printed, by default that of its first seed; with `follow`, until the trial has ended.

    Raises:
        UnknownNameError: there is no such trial, or seed of it.
    """
    ledger = store.open_existing()
    study, number = ledger.find_trial(trial)
    seeds = [replica.seed for replica in ledger.replicas(study, number)]
    if seed is not None and seed not in seeds:
        raise UnknownNameError("seed", str(seed), tuple(map(str, seeds)))
    path = replica_folder(store.trial_folder(study, number), seeds[0] if seed is None else seed) / LOG_FILE
    if not path.exists() and not follow:
        raise NoResultError(f"trial {study}/{number} has printed nothing yet, or ran with another --data folder")
    shown = 0
    while True:
        ended = ledger.trial(study, number).state not in ("running", "waiting")
        if path.exists():
            with path.open(encoding="utf-8", errors="replace") as file:
                file.seek(shown)
                print(file.read(), end="", flush=True)
                shown = file.tell()
        if not follow or ended or _is_interrupted(FOLLOW_EVERY_S):
            return
