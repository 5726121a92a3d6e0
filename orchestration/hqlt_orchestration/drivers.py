"""Which drivers of a study are alive."""

import socket
import time
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

import psutil

from hqlt_orchestration.tables import DriverId, DriverRow

STALE_DRIVER_S = 60.0  # twelve missed beats: what a driver on another host may miss before its trials are given away


def driver_is_dead(driver: DriverRow) -> bool | None:
    """Whether a driver's process is gone; None if it is on another machine and only its beats can tell.

    A process id alone may have been given to another process, hence the start time; after a reboot nobody is left.
    """
    if driver.host != socket.gethostname():
        return None
    if driver.boot_id != boot_id():
        return True
    try:
        return bool(abs(psutil.Process(driver.pid).create_time() - driver.process_start) > 1.0)
    except psutil.NoSuchProcess:
        return True


class DriverWatch:
    """Tells which drivers are dead, those on other machines by beats that stay away.

    Only differences of this process's monotonic clock are used: neither a stepped clock nor two hosts that disagree
    about the time can make a living driver look dead.
    """

    def __init__(self, stale_after_s: float = STALE_DRIVER_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._stale_after_s = stale_after_s
        self._clock = clock
        self._seen: dict[DriverId, tuple[int, float]] = {}

    def dead(self, drivers: Iterable[DriverRow]) -> list[DriverRow]:
        now = self._clock()
        dead: list[DriverRow] = []
        for driver in drivers:
            verdict = driver_is_dead(driver)
            beats, since = self._seen.get(driver.id, (-1, now))
            if beats != driver.beats:
                self._seen[driver.id] = (driver.beats, now)
                since = now
            if verdict is True or (verdict is None and now - since > self._stale_after_s):
                dead.append(driver)
        return dead


@lru_cache
def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
