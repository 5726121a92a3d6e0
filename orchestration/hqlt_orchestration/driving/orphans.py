"""What a driver that was killed leaves behind on its machine, and how the next one gets rid of it.

A trial's process may live on for a while, or stand still for ever, and hold the trial's folder; some of Ray's processes
outlive the driver that started them by minutes. Both are ended by their identity, never by their name.
"""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from hqlt_orchestration.records.processes import ProcessIdentity, boot_id, read_identity, start_time_s, this_process

ORPHAN_GRACE_S = 5.0  # what the process of an ended attempt may take for its last step before it is killed
SESSION_VARIABLE = "HQLT_RAY_SESSION"
"""In the environment of every process of a Ray that we started: the session's folder."""
_OWNER_FILE = "driver.json"


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder of a replica, which one process at a time may write to.

    Who holds it belongs to an earlier attempt, since the ledger lets one attempt at a time run: it gets a moment to
    finish, and is then killed, if it is on this machine.
    """
    with (folder / ".lock").open("a+", encoding="utf-8") as lock:
        deadline = time.monotonic() + ORPHAN_GRACE_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline and (holder := read_identity(lock.name)) is not None:
                    holder.kill()
                time.sleep(0.05)
        lock.truncate(0)
        lock.write(json.dumps(asdict(this_process())))
        lock.flush()
        yield


def new_session() -> str:
    """A folder for a Ray of this process. Its path is short: sockets have at most 107 characters."""
    folder = tempfile.mkdtemp(prefix="hqlt-")
    (Path(folder) / _OWNER_FILE).write_text(json.dumps(asdict(this_process())), encoding="utf-8")
    return folder


def end_dead_sessions() -> list[str]:
    """End what is left of every Ray whose driver is gone, and remove its folder. Returns a sentence for each."""
    said: list[str] = []
    for folder in sorted(Path(tempfile.gettempdir()).glob("hqlt-*")):
        owner = read_identity(folder / _OWNER_FILE)
        if owner is None or owner.is_alive is not False or folder.stat().st_uid != os.getuid():
            continue
        left = end_session(str(folder))
        processes = "1 process" if left == 1 else f"{left} processes"
        said.append(f"Ray of process {owner.pid}, which is gone: {processes} ended, {folder} removed")
    return said


def end_session(folder: str) -> int:
    """End what is left of the Ray of this session, and remove its folder. Returns how many processes there were.

    Some of Ray's processes outlive its shutdown by half a minute.
    """
    left = _processes_of(folder)
    for process in left:
        process.kill()
    shutil.rmtree(folder, ignore_errors=True)
    return len(left)


def _processes_of(session: str) -> list[ProcessIdentity]:
    """Every process on this machine, of this user, that carries the session's folder in its environment."""
    mark = f"{SESSION_VARIABLE}={session}".encode()
    found: list[ProcessIdentity] = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (process / "environ").read_bytes().split(b"\0"):
                start_s = start_time_s(int(process.name))
                if start_s is not None:
                    found.append(ProcessIdentity(socket.gethostname(), boot_id(), int(process.name), start_s))
    return found
