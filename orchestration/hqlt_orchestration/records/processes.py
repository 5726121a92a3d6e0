"""Processes by what nobody can give them twice: host, boot, process id and start."""

import contextlib
import json
import os
import signal
import socket
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path


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
        return self.boot_id == boot_id() and start_time_s(self.pid) == self.start_s

    def kill(self) -> bool:
        """End it, if it is on this machine and is not this one."""
        if not self.is_alive or self.pid == os.getpid():
            return False
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(self.pid, signal.SIGKILL)
            return True
        return False


def this_process() -> ProcessIdentity:
    start_s = start_time_s(os.getpid())
    assert start_s is not None
    return ProcessIdentity(socket.gethostname(), boot_id(), os.getpid(), start_s)


@lru_cache
def boot_id() -> str:
    """A name that the kernel gives to each start of this machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def start_time_s(pid: int) -> float | None:
    """When process `pid` was started, by the clock that nobody sets; None if there is none, or only its exit code."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else int(fields[18]) / os.sysconf("SC_CLK_TCK")


def read_identity(path: Path | str) -> ProcessIdentity | None:
    """The process that wrote its identity to `path`, as JSON; None if that cannot be read."""
    try:
        return ProcessIdentity(**json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None  # just being written, or by another version
