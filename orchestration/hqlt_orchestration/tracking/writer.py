"""The process that talks to MLflow: `python -m hqlt_orchestration.tracking.writer`, one for each study that runs.

MLflow is a mirror, not the memory. Drivers append records to spools and never wait; this process ships them in batches,
at a low priority. If MLflow is down, hangs or answers nonsense, or this process is killed, the records stay where they
are and are shipped later, by whoever comes next. What no spool holds any more is told from the ledger.
"""

import argparse
import contextlib
import fcntl
import json
import logging
import os
import select
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from hqlt_search_space.errors import HqltError

from hqlt_orchestration.records.database import masked
from hqlt_orchestration.records.store import Store
from hqlt_orchestration.tracking.mirror import KINDS, Mirror, is_refusal, knock
from hqlt_orchestration.tracking.spool import position_file, read_position, write_position
from hqlt_orchestration.tracking.told import Record

RETRY_S = 2.0  # between two tries to reach MLflow
IDLE_S = 0.5  # between two looks at the spool: what the pages of a running study lag behind
BATCH_RECORDS = 2000
NICENESS = 10  # the mirror must not take a processor from a trial
# An outage is waited for here, where nobody stands still for it; MLflow's own retries would hide it for minutes, and
# send a batch again whose answer was lost.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def ship(folder: Path, mirror: Mirror, *, one_by_one: bool = False) -> bool:
    """Ship what the spools in `folder` hold. Returns whether there was anything.

    A spool that nobody writes any more is removed when all of it has been shipped. With `one_by_one` a record that
    MLflow refuses for what it says is logged and left out; else it ends the shipping as an outage does.
    """
    any_sent = False
    for spool in sorted(folder.glob("*.jsonl"), key=lambda path: path.stat().st_mtime):
        is_final = not _is_written(spool)
        for end, records in _batches(spool, 1 if one_by_one else BATCH_RECORDS):
            try:
                mirror.apply(records)
            except Exception as error:
                if not (one_by_one and is_refusal(error)):
                    raise
                logging.warning("MLflow refuses this record, it is left out: %.1000s\n%s", records, error)
                mirror.forget_pending()
            write_position(spool, end)
            any_sent = True
        if is_final:  # a last line without its end was cut off by a crash or a full disk
            spool.unlink()
            position_file(spool).unlink(missing_ok=True)
    return any_sent


def _is_written(spool: Path) -> bool:
    """Whether the driver that writes `spool` still has it open."""
    with spool.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _batches(spool: Path, size: int) -> Iterator[tuple[int, list[Record]]]:
    """(end in bytes, records) of what is not shipped. A last line without its end is left for later."""
    end = read_position(spool)
    with spool.open("rb") as file:
        file.seek(end)
        records: list[Record] = []
        n_lines = 0
        for line in file:
            if not line.endswith(b"\n"):
                break
            end += len(line)
            n_lines += 1
            record = _parsed(line)
            records += [] if record is None else [record]
            if n_lines == size:
                yield end, records
                records, n_lines = [], 0
        if n_lines:
            yield end, records


def _parsed(line: bytes) -> Record | None:
    """The record in a line; None for what a power cut, or another version of us, has left there."""
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if isinstance(found, dict) and found.get("kind") in KINDS:
        return found
    logging.warning("no record, left out: %.200r", line)
    return None


def _mirror(store: Store, study: str) -> Mirror:
    """The mirror of `study`. If MLflow knows nothing of it, spools that are still there are shipped from the start:
    MLflow is new, or has lost its database.
    """
    mirror = Mirror(store.mlflow_uri, store.artifacts, study)
    if mirror.is_new:
        for spool in store.spool_folder(study).glob("*.jsonl"):
            write_position(spool, 0)
    return mirror


def catch_up(store: Store, study: str) -> None:
    """Ship what waits of `study`, and tell from the ledger what MLflow lacks of it; nothing if a writer does so."""
    _configure_mlflow()
    with _alone_in(store.spool_folder(study)) as alone:
        if alone:
            mirror = _mirror(store, study)
            ship(store.spool_folder(study), mirror)
            _tell_missing(store, study, mirror)


def _tell_missing(store: Store, study: str, mirror: Mirror) -> None:
    """Tell MLflow what the ledger has and MLflow lacks, unless a driver lives whose spool is elsewhere: what that has
    not told yet, it will tell itself.
    """
    from hqlt_orchestration.records.drivers import living
    from hqlt_orchestration.tracking.told import everything_ended

    if store.database is None and not (store.data / "hqlt.db").exists():  # the ledger is elsewhere
        return
    try:
        ledger = store.open_existing()
    except HqltError as error:
        logging.warning("cannot compare MLflow with the ledger: %s", error)
        return
    try:
        if study not in {row.name for row in ledger.studies()}:  # deleted meanwhile
            return
        spooling = {spool.stem.rpartition("-")[2] for spool in store.spool_folder(study).glob("*.jsonl")}
        if all(str(driver.pid) in spooling for driver in living(ledger.drivers(study))):
            mirror.tell_missing(everything_ended(ledger, store, study))
    finally:
        ledger.close()


def _configure_mlflow() -> None:
    """Set what the user has not set. MLflow reads its environment whenever it needs it."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _driver_has_gone() -> bool:
    """Whether standard input, which the driver holds open and never writes to, has been closed."""
    return bool(select.select([sys.stdin], [], [], 0)[0])


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[bool]:
    """Whether this is the one writer of a study: two would each make a run for the same trial."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".writer.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def main() -> None:
    """The writer process: ship until the driver has gone and nothing is left, or MLflow cannot be reached any more."""
    parser = argparse.ArgumentParser(description="Ship the spools of a study to MLflow.")
    parser.add_argument("study")
    parser.add_argument("--data", type=Path, required=True)
    arguments = parser.parse_args()
    store = Store(arguments.data, os.environ["HQLT_STORE"] or None, os.environ["HQLT_MLFLOW"])
    os.nice(NICENESS)
    _configure_mlflow()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    while True:
        with _alone_in(store.spool_folder(arguments.study)) as alone:
            if alone:
                _serve(store, arguments.study)
                return
        if _driver_has_gone():
            return  # the writer of another driver ships our spool too
        time.sleep(IDLE_S)


def _serve(store: Store, study: str) -> None:
    mirror: Mirror | None = None
    outage = one_by_one = told = False
    while True:
        last_round = _driver_has_gone()
        try:
            if outage:
                # What MLflow took in while we had given up waiting may still be on its way: it is given time to
                # arrive before anybody looks at what is there.
                knock(store.mlflow_uri)
                time.sleep(RETRY_S)
                outage = False
            mirror = mirror or _mirror(store, study)
            sent = ship(store.spool_folder(study), mirror, one_by_one=one_by_one)
            one_by_one = False
            if not sent and (not told or last_round):
                _tell_missing(store, study, mirror)
                told = True
        except Exception as error:  # noqa: BLE001  MLflow raises its own, SQLAlchemy's and requests' for an outage
            logging.warning("could not ship to MLflow: %s", masked(f"{type(error).__name__}: {error}")[:1000])
            refused = is_refusal(error) and not one_by_one
            if last_round and not refused:
                raise SystemExit(1) from None
            mirror, outage, told, one_by_one = None, True, False, refused
            time.sleep(RETRY_S)
            continue
        if last_round and not sent:
            return
        if not sent:
            time.sleep(IDLE_S)


if __name__ == "__main__":
    main()
