"""Which drivers of a study are alive."""

import time
from collections.abc import Callable, Iterable

from hqlt_orchestration.records.processes import ProcessIdentity
from hqlt_orchestration.records.tables import DriverId, DriverRow

STALE_DRIVER_S = 60.0  # twelve missed beats: what a driver may miss before its trials are given away
_LONGEST_GAP_S = 10.0  # between two looks; more means that we stood still ourselves, or the database did for all


def driver_is_dead(driver: DriverRow) -> bool | None:
    """Whether a driver's process is gone; None if it is on another machine and only its beats can tell."""
    identity = ProcessIdentity(driver.host, driver.boot_id, driver.pid, driver.process_start)
    return None if identity.is_alive is None else not identity.is_alive


def living(drivers: Iterable[DriverRow]) -> list[DriverRow]:
    """Those of `drivers` that one look does not show to be dead."""
    return [driver for driver in drivers if not driver_is_dead(driver)]


class DriverWatch:
    """Tells which drivers are dead: their process is gone, or their beats stay away, wherever they are.

    A driver beats from the loop that also watches over its trials, so one that was stopped or hangs does not beat.
    Only differences of this process's monotonic clock are used: neither a stepped clock nor two hosts that disagree
    about the time can make a living driver look dead. It counts only while somebody looks: after an outage of the
    database, in which nobody could beat, every driver has its full time again.
    """

    def __init__(self, stale_after_s: float = STALE_DRIVER_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._stale_after_s = stale_after_s
        self._clock = clock
        self._looked_at = clock()
        self._watched_s = 0.0
        self._seen: dict[DriverId, tuple[int, float]] = {}

    def dead(self, drivers: Iterable[DriverRow]) -> list[DriverRow]:
        """Those of `drivers`, as they were just read, that are dead. Beats are compared with those of earlier calls."""
        before, self._looked_at = self._looked_at, self._clock()
        self._watched_s += min(self._looked_at - before, _LONGEST_GAP_S)
        now = self._watched_s
        dead: list[DriverRow] = []
        for driver in drivers:
            beats, since = self._seen.get(driver.id, (-1, now))
            if beats != driver.beats:
                self._seen[driver.id] = (driver.beats, now)
                since = now
            if driver_is_dead(driver) or now - since > self._stale_after_s:
                dead.append(driver)
        return dead
