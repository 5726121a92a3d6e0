"""The driver's end of the MLflow mirror: records are appended to a file, and nothing waits for MLflow.

`studies/NAME/spool/<time>-<pid>.jsonl` belongs to one driver, which holds a lock on it while it lives. The writer, a
process of its own (writer.py), ships what is in there and keeps beside it how far it has come.
"""

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from hqlt_orchestration.records.store import Store
from hqlt_orchestration.tracking.told import Record

LATE_BYTES = 64 * 1024**2  # what is remembered while the disk is full
WRITER_LOOK_S = 5.0  # between two looks whether the writer lives


class Spool:
    """Appends records and keeps a writer process running.

    A record that was put survives the end of this process, however it ends; after a power cut the ledger knows it.
    While the disk is full records wait in memory. If too many do, `broken` says that from there on the rest is left
    to the ledger: the writer tells MLflow what it lacks once the study has ended, or when it is next resumed.
    """

    def __init__(self, store: Store, study: str) -> None:
        self._store, self._study = store, study
        folder = store.spool_folder(study)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{time.time():.0f}-{os.getpid()}.jsonl"
        beside = path.with_suffix(".new")  # no writer looks at it before it is locked
        self._file = beside.open("ab", buffering=0)
        fcntl.flock(self._file, fcntl.LOCK_SH)  # says that the file is still written to
        beside.rename(path)
        self._late = bytearray()
        self.broken = False
        self._writer = start_writer(store, study)
        self._next_look = time.monotonic() + WRITER_LOOK_S

    def put(self, record: Record) -> None:
        """Append a record, stamped with the time if it has no stamp."""
        if self.broken:
            return
        self._late += (json.dumps({"unix_ms": time.time_ns() // 1_000_000, **record}) + "\n").encode()
        self._write()
        if len(self._late) > LATE_BYTES:
            self.broken = True
        if time.monotonic() > self._next_look:
            self._look_after_writer()

    def _look_after_writer(self) -> None:
        self._next_look = time.monotonic() + WRITER_LOOK_S
        if self._writer.poll() is not None:  # somebody has killed it
            assert self._writer.stdin is not None
            self._writer.stdin.close()
            self._writer = start_writer(self._store, self._study)

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # a full disk; the next record tries again, from the byte where this ended
            while self._late:
                del self._late[: self._file.write(self._late)]

    def close(self, timeout_s: float) -> int:
        """Wait for the writer to ship what is left. Returns the bytes that are still to be shipped."""
        self._write()
        self.broken = self.broken or bool(self._late)
        self._file.close()
        self._look_after_writer()
        assert self._writer.stdin is not None
        self._writer.stdin.close()  # what tells the writer that nothing more will come
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._writer.wait(timeout_s)
        if self._writer.poll() is None:
            self._writer.terminate()
            self._writer.wait()
        return unshipped_bytes(self._store.spool_folder(self._study))


def start_writer(store: Store, study: str) -> "subprocess.Popen[bytes]":
    """Start the process that ships the spools of `study`. It ends when its input is closed and all is sent.

    URLs may hold passwords: they travel in the environment, which other users cannot read.
    """
    folder = store.spool_folder(study)
    with (folder / "writer.log").open("ab") as log:
        return subprocess.Popen(  # noqa: S603  our own interpreter and module
            [sys.executable, "-m", "hqlt_orchestration.tracking.writer", study, "--data", str(store.data.resolve())],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env={**os.environ, "HQLT_STORE": store.database or "", "HQLT_MLFLOW": store.mlflow_uri},
            start_new_session=True,  # Ctrl-C is for the driver; the writer goes when the driver has gone
        )


def unshipped_bytes(folder: Path) -> int:
    """How much of the spools in `folder` MLflow does not have yet."""
    waiting = 0
    for spool in folder.glob("*.jsonl"):
        with contextlib.suppress(FileNotFoundError):  # shipped and removed meanwhile
            waiting += max(0, spool.stat().st_size - read_position(spool))
    return waiting


def read_position(spool: Path) -> int:
    """The bytes of `spool` that MLflow surely has; 0 if that is not known."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return int(position_file(spool).read_text())
    return 0


def write_position(spool: Path, done: int) -> None:
    beside = position_file(spool).with_suffix(".tmp")
    beside.write_text(str(done))
    beside.replace(position_file(spool))


def position_file(spool: Path) -> Path:
    return spool.with_suffix(".position")
