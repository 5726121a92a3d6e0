"""What a driver that was killed leaves behind on its machine, and how the next one gets rid of it.

A trial's process may live on for a while, or stand still for ever, and hold the trial's folder; some of Ray's processes
outlive the driver that started them by minutes. Both are ended by their identity, never by their name.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

ORPHAN_GRACE_S = 5.0  # what the process of an ended attempt may take for its last step before it is killed
SESSION_VARIABLE = "HQLT_RAY_SESSION"
"""In the environment of every process of a Ray that we started: the session's folder."""
_OWNER_FILE = "driver.json"


@dataclass(frozen=True)
class ProcessIdentity:
    """A process, for ever: a process id alone is given again. No clock is in it that anybody could set."""

    host: str
    boot_id: str
    pid: int
    start_s: float
    """When it was started, in seconds since the machine was."""

    @property
    def is_alive(self) -> bool | None:
        """Whether it runs, or stands still; None if it is on another machine."""
        if self.host != socket.gethostname():
            return None
        return self.boot_id == boot_id() and _start_s(self.pid) == self.start_s

    def kill(self) -> bool:
        """End it, if it is on this machine and is not this one."""
        if not self.is_alive or self.pid == os.getpid():
            return False
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(self.pid, signal.SIGKILL)
            return True
        return False


def this_process() -> ProcessIdentity:
    start_s = _start_s(os.getpid())
    assert start_s is not None
    return ProcessIdentity(socket.gethostname(), boot_id(), os.getpid(), start_s)


@lru_cache
def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _start_s(pid: int) -> float | None:
    """When process `pid` was started, by the clock that nobody sets; None if there is none, or only its exit code."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else int(fields[18]) / os.sysconf("SC_CLK_TCK")


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
                if time.monotonic() > deadline and (holder := _read_identity(lock.name)) is not None:
                    holder.kill()
                time.sleep(0.05)
        lock.truncate(0)
        lock.write(json.dumps(asdict(this_process())))
        lock.flush()
        yield


def _read_identity(path: Path | str) -> ProcessIdentity | None:
    try:
        return ProcessIdentity(**json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None  # just being written, or by another version


def new_session() -> str:
    """A folder for a Ray of this process. Its path is short: sockets have at most 107 characters."""
    folder = tempfile.mkdtemp(prefix="hqlt-")
    (Path(folder) / _OWNER_FILE).write_text(json.dumps(asdict(this_process())), encoding="utf-8")
    return folder


def end_dead_sessions() -> list[str]:
    """End what is left of every Ray whose driver is gone, and remove its folder. Returns a sentence for each."""
    said: list[str] = []
    for folder in sorted(Path(tempfile.gettempdir()).glob("hqlt-*")):
        owner = _read_identity(folder / _OWNER_FILE)
        if owner is None or owner.is_alive is not False or folder.stat().st_uid != os.getuid():
            continue
        left = _processes_of(str(folder))
        for process in left:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)
        processes = "1 process" if len(left) == 1 else f"{len(left)} processes"
        said.append(f"Ray of process {owner.pid}, which is gone: {processes} ended, {folder} removed")
    return said


def _processes_of(session: str) -> list[ProcessIdentity]:
    """Every process on this machine, of this user, that carries the session's folder in its environment."""
    mark = f"{SESSION_VARIABLE}={session}".encode()
    found: list[ProcessIdentity] = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (process / "environ").read_bytes().split(b"\0"):
                start_s = _start_s(int(process.name))
                if start_s is not None:
                    found.append(ProcessIdentity(socket.gethostname(), boot_id(), int(process.name), start_s))
    return found
