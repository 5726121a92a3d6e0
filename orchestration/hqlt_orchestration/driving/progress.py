"""What a user sees while a study runs: a bar that moves on a terminal, plain lines elsewhere. All on stderr."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

PLAIN_EVERY_S = 15.0  # between two plain lines of a study in which nothing happens


@dataclass(frozen=True)
class Standing:
    """How far a phase is."""

    phase: str
    done: int
    total: int
    running: int
    failed: int
    objective: str
    best: str | None
    on_front: int
    seconds_left: float | None


class ProgressView:
    """Shows a `Standing` and, above it, a line for whatever deserves one. A context manager."""

    def __init__(self, study: str, console: Console | None = None) -> None:
        self._study = study
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._shown: Standing | None = None
        self._shown_at = 0.0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=16),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                TextColumn("{task.fields[best]}"),
                TextColumn("{task.fields[failed]}", style="red"),
                console=self._console,
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(line, markup=False)

    def show(self, standing: Standing) -> None:
        if self._bar is not None:
            self._move(self._bar, standing)
        elif self._is_news(standing):
            self._shown_at = time.monotonic()
            left = f", {_duration(standing.seconds_left)} left" if standing.seconds_left is not None else ""
            failed = f", {standing.failed} failed" if standing.failed else ""
            front = f"; best {standing.objective} {standing.best}, {standing.on_front} on the front"
            best = front if standing.best is not None else ""
            self.say(f"{self._study}: {standing.phase} {standing.done}/{standing.total}{failed}{left}{best}")
        self._shown = standing

    def _move(self, bar: Progress, standing: Standing) -> None:
        left = f"{_duration(standing.seconds_left)} left" if standing.seconds_left is not None else ""
        best = f"best {standing.best}, {standing.on_front} on the front" if standing.best is not None else ""
        failed = f"{standing.failed} failed" if standing.failed else ""
        fields: dict[str, Any] = {"left": left, "best": best, "failed": failed}
        if self._task is None:
            self._task = bar.add_task(standing.phase, total=standing.total, **fields)
        bar.update(self._task, description=standing.phase, completed=standing.done, total=standing.total, **fields)

    def _is_news(self, standing: Standing) -> bool:
        if self._shown is None or standing.phase != self._shown.phase:
            return True
        if standing.done == standing.total > self._shown.done:
            return True
        elapsed = time.monotonic() - self._shown_at
        return elapsed > PLAIN_EVERY_S or (standing.done > self._shown.done and elapsed > 1.0)


class Estimate:
    """Seconds left, from how long this process has taken for what it has done."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started: float | None = None
        self._done_before = 0

    def start(self, done: int) -> None:
        """Begin to measure, with `done` already behind us."""
        self._started, self._done_before = self._clock(), done

    def seconds_left(self, done: int, total: int) -> float | None:
        """None until something was done."""
        done_here = done - self._done_before
        if self._started is None or done_here <= 0:
            return None
        return (self._clock() - self._started) / done_here * max(0, total - done)


def _duration(seconds: float | None) -> str:
    """`seconds` as people say it: 40 s, 12 min, 3.5 h.

    >>> [_duration(s) for s in (8.2, 130.0, 12_000.0)]
    ['8 s', '2 min', '3.3 h']
    """
    if seconds is None:
        return "?"
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
