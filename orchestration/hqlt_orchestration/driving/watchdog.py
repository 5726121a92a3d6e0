"""Which trials stand still: a thread's heartbeat would beat on beside a hung training, so steps are counted instead."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from hqlt_orchestration.records.attempts import AttemptKey

FLOOR_S = 120.0  # a checkpoint on a slow disk, a kernel that is compiled for a new shape
FACTOR = 10.0  # times the slowest step so far
STARTING_SIGNS = 5  # in the first steps libraries load, kernels are compiled and a CUDA graph is captured
STARTING_FACTOR = 5.0
_LONGEST_GAP_S = 2.0  # between two looks; more means that we stood still ourselves


@dataclass
class _Watched:
    moved_at: float
    step: int = 0
    n_signs: int = 0
    slowest_s: float = 0.0


class Watchdog:
    """Knows when each running attempt last showed life. `look` has to be called every second or so.

    Its clock runs only while somebody looks: a driver that was stopped, or a laptop that slept, finds no trial hung.
    """

    def __init__(self, hang_after_s: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        """`hang_after_s`: what a trial may stand still, instead of what follows from its slowest step."""
        self._hang_after_s = hang_after_s
        self._clock = clock
        self._looked_at = clock()
        self._now = 0.0
        self._watched: dict[AttemptKey, _Watched] = {}

    def begin(self, key: AttemptKey) -> None:
        self._watched[key] = _Watched(self._now)

    def end(self, key: AttemptKey) -> None:
        self._watched.pop(key, None)

    def alive(self, key: AttemptKey) -> None:
        """The attempt was heard of, unless it is no longer watched over."""
        if key in self._watched:
            self._watched[key].moved_at = self._now

    def moved(self, key: AttemptKey, step: int, n_signs: int, slowest_s: float) -> None:
        """The attempt has shown `n_signs` signs of life, at most `slowest_s` apart, the last at `step`."""
        if key in self._watched:
            self._watched[key] = _Watched(self._now, step, n_signs, slowest_s)

    def limit_s(self, key: AttemptKey) -> float:
        """How long this attempt may stand still."""
        watched = self._watched[key]
        limit = max(FLOOR_S, FACTOR * watched.slowest_s) if self._hang_after_s is None else self._hang_after_s
        return limit * STARTING_FACTOR if watched.n_signs < STARTING_SIGNS else limit

    def look(self) -> dict[AttemptKey, str]:
        """The attempts that have stood still for too long, and a sentence for each."""
        before, self._looked_at = self._looked_at, self._clock()
        self._now += min(self._looked_at - before, _LONGEST_GAP_S)
        return {
            key: f"hung: no step for {self._now - watched.moved_at:.0f} s, after step {watched.step} "
            f"(allowed {self.limit_s(key):.0f} s); its process was ended"
            for key, watched in self._watched.items()
            if self._now - watched.moved_at > self.limit_s(key)
        }
