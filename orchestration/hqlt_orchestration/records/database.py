"""Connections to the database that ledger and sampling history share: transactions, locks, and errors as sentences."""

import contextlib
import fcntl
import logging
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import sqlalchemy as sa
from hqlt_search_space.errors import StoreError
from sqlalchemy.exc import DBAPIError, OperationalError

BUSY_TIMEOUT_S = 30.0
OUTAGE_S = 120.0  # how long a PostgreSQL that has answered before is waited for when it does not
_LONGEST_PAUSE_S = 2.0  # between two tries
_PASSWORDS = re.compile(r"(?<=://)([^\s/:@]*):[^\s/@]*(?=@)|(?<=[?&])(password|sslpassword)=[^\s&]*")
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


def make_engine(url: str) -> sa.Engine:
    """An engine whose SQLite connections use WAL, full durability and a patient lock.

    Raises:
        StoreError: `url` is no URL of a database that can be used, or its driver is not installed.
    """
    try:
        backend = sa.make_url(url).get_backend_name()
        if backend == "postgresql":
            return sa.create_engine(url, pool_pre_ping=True)
    except sa.exc.ArgumentError:
        backend = None
    except ImportError as error:
        raise StoreError(f"PostgreSQL needs a driver: pip install 'hqlt[postgres]' ({error})") from error
    if backend != "sqlite":
        raise StoreError(f"--store {masked(url)}: write sqlite:///PATH or postgresql+psycopg://USER@HOST/DATABASE")
    engine = sa.create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S})

    @sa.event.listens_for(engine, "connect")
    def _configure(connection: sqlite3.Connection, _record: object) -> None:
        configure_sqlite(connection)
        connection.isolation_level = None  # we say BEGIN ourselves, so that it can be IMMEDIATE

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        writes = connection.get_execution_options().get("hqlt_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def configure_sqlite(connection: sqlite3.Connection) -> None:
    """WAL: readers never wait, a commit is one write. FULL: what was committed survives a power cut."""
    for pragma in ("trusted_schema=OFF", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def patiently(url: str, call: Callable[[], _T]) -> _T:
    """What `call` returns, which only connects or reads: while PostgreSQL does not answer it is repeated.

    Raises:
        the error of `call`, after `OUTAGE_S`; on SQLite at once, whose connections have a patience of their own.
    """
    deadline, pause_s = None, 0.1
    while True:
        try:
            return call()
        except Exception as error:
            # Optuna wraps what SQLAlchemy says.
            said = error if isinstance(error, OperationalError) else error.__cause__
            now = time.monotonic()
            if not url.startswith("postgresql") or not isinstance(said, OperationalError):
                raise
            if deadline is None:
                deadline = now + OUTAGE_S
                _log.warning("%s does not answer; it is waited for up to %.0f s", shown(url), OUTAGE_S)
            if now > deadline:
                raise
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def masked(text: str) -> str:
    """`text` without the passwords of the URLs in it.

    >>> masked("no answer from postgresql+psycopg://anna:secret@db/hqlt?password=secret")
    'no answer from postgresql+psycopg://anna:***@db/hqlt?password=***'
    """
    return _PASSWORDS.sub(lambda found: f"{found[1]}:***" if found[2] is None else f"{found[2]}=***", text)


def shown(url: str) -> str:
    """`url` as a user should see it: a path for SQLite, and never a password."""
    parsed = sa.make_url(url)
    return str(parsed.database) if parsed.get_backend_name() == "sqlite" else masked(parsed.render_as_string())


@contextlib.contextmanager
def store_errors(url: str) -> Iterator[None]:
    """Turn what a database says about its disk and locks into a `StoreError` with a sentence."""
    try:
        yield
    except StoreError:
        raise
    except (DBAPIError, sqlite3.Error) as error:
        original = error.orig if isinstance(error, DBAPIError) else error
        sentence = _sentence(url, str(original))
        if sentence is None:
            raise
        raise StoreError(sentence) from error
    except Exception as error:
        # Optuna wraps database errors in its own; the cause says what happened.
        cause = error.__cause__
        sentence = _sentence(url, str(cause.orig)) if isinstance(cause, DBAPIError) else None
        if sentence is None:
            raise
        raise StoreError(sentence) from error


_SENTENCES = {
    "readonly database": "{where} is read-only; give a folder you may write to with --data",
    "unable to open database file": "cannot open {where}: the folder is missing or may not be written to",
    "disk is full": "the disk that holds {where} is full; free some space, then `hqlt study resume`",
    "disk I/O error": "the disk that holds {where} fails to write (full, or a network file system); nothing was lost",
    "database is locked": f"{{where}} was locked by another program for {BUSY_TIMEOUT_S:.0f} s; close it and resume",
    "not a database": "{where} is not a database; move it away or give another --data folder",
    "malformed": "{where} is damaged; restore it from a backup or give another --data folder",
    "connection": "cannot reach the database {where}: is it running, and may this user log in?",
    "password": "cannot reach the database {where}: is it running, and may this user log in?",
    "no such table": "{where} lacks a table of hqlt's; restore it from a backup or give another --data folder",
    "no such column": "{where} lacks a column of hqlt's; restore it from a backup or give another --data folder",
    "Could not decode to UTF-8": "{where} has bytes where hqlt writes text; restore it from a backup",
    "does not exist": "cannot use the database {where}: it, or a table of it, does not exist",
}


def _sentence(url: str, message: str) -> str | None:
    for part, sentence in _SENTENCES.items():
        if part in message:
            return sentence.format(where=shown(url))
    return None


def refuse_foreign_code(url: str, engine: sa.Engine) -> None:
    """Triggers and views run whenever a table is written or read, and hqlt has none: a file that has is not ours.

    Raises:
        StoreError: the SQLite database at `url` has one.
    """
    if engine.dialect.name != "sqlite":
        return
    with engine.connect() as connection:
        query = sa.text("SELECT type, name FROM sqlite_master WHERE type IN ('trigger', 'view')")
        found = connection.execute(query).first()
    if found is not None:
        raise StoreError(f"{shown(url)} has a {found.type} {found.name[:100]!r} that hqlt did not make; it is not used")


@contextlib.contextmanager
def schema_lock(url: str, engine: sa.Engine) -> Iterator[None]:
    """One process at a time; six that create tables in a fresh file at once would kill some of each other."""
    if engine.dialect.name == "postgresql":
        with engine.connect() as connection:
            connection.execute(sa.text("SELECT pg_advisory_lock(4714802)"))
            yield
            connection.execute(sa.text("SELECT pg_advisory_unlock(4714802)"))
        return
    database = sa.make_url(url).database
    if database is None or database == ":memory:":
        raise StoreError("a study needs a database file; sqlite:///:memory: would forget it")
    path = Path(database)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StoreError(f"cannot write to {path.parent}: {error.strerror}; give another folder with --data") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
