"""The page of a study: what the store knows of it, handed to `hqlt_dashboards.report`."""

import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from hqlt_dashboards.asked import Background
from hqlt_dashboards.export import write_whole
from hqlt_dashboards.report import report as page
from hqlt_search_space.errors import HqltError
from hqlt_search_space.study import Study
from hqlt_search_space.trial import StudyResults

from hqlt_orchestration.driving.importances import importances
from hqlt_orchestration.records.ledger import Ledger
from hqlt_orchestration.records.results import study_results
from hqlt_orchestration.records.store import Store


def report(name: str, out: Path | None, store: Store) -> None:
    """Write the page of a study to `out`, by default NAME-report.html here; a file of that name is replaced.

    Raises:
        UnknownNameError: there is no such study.
        NoResultError: none of its trials has ended.
        HqltError: another suffix than .html, or the file cannot be written.
    """
    path = out or Path(f"{name}-report.html")
    if path.suffix.lower() != ".html":
        raise HqltError(f"cannot write a report as {path.suffix or 'a file without suffix'!r}; give .html")
    ledger = store.open_existing()
    results, background = report_parts(ledger, name, options_of(store))
    content = page(results, background).encode()
    try:
        write_whole(path, content)
    except OSError as error:
        raise HqltError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    print(f"written to {path}", file=sys.stderr)


def report_parts(ledger: Ledger, name: str, options: str = "") -> tuple[StudyResults, Background]:
    """What the page of the study `name` is made of. `options` is what a command needs to find the study again."""
    row = ledger.study(name)
    study = Study.from_json(row.study)
    results = study_results(ledger, name)
    found = importances(study, ledger.trials(name), results.trials)
    outcomes = [replica.outcome for replica in ledger.replicas(name) if replica.outcome is not None]
    return results.model_copy(update={"importances": found}), Background(
        study=study,
        file_text=row.file_text,
        state=row.state,
        note=row.note,
        began=datetime.fromtimestamp(row.created_at, UTC),
        made=datetime.now(UTC),
        version=version("hqlt"),
        environments=tuple(dict.fromkeys(outcome.environment for outcome in outcomes)),
        backends=tuple(dict.fromkeys(backend for outcome in outcomes for backend in outcome.backends)),
        notes=tuple(dict.fromkeys(note for outcome in outcomes for note in outcome.notes)),
        last_words={attempt.number: attempt.message for attempt in ledger.attempts(name) if attempt.message},
        options=options,
    )


def options_of(store: Store) -> str:
    """What to add to a command so that it finds the study. A database's URL may hold a password: it stays out."""
    data = "" if store.data == Path("hqlt-data") else f" --data {shlex.quote(str(store.data))}"
    return data + (' --store "$HQLT_STORE"' if store.database else "")
