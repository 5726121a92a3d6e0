"""What a user sees while a study runs: a bar that moves on a terminal, plain lines elsewhere. All on stderr."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from hqlt_dashboards.words import duration
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

PLAIN_EVERY_S = 15.0  # between two plain lines of a study in which nothing happens
SHOWN_MEMBERS = 5  # of the front, under the bar


@dataclass(frozen=True)
class Standing:
    """How far a phase is."""

    phase: str
    done: int
    total: int
    running: int
    failed: int
    best: str | None
    """The best of the first objective, by name; None while there is no front, and where there is none to come."""
    front: tuple[str, ...]
    """A line for each member, the best of the first objective first."""
    seconds_left: float | None

    def counts(self) -> str:
        """`2 running, 1 failed, 12 min left`: of these what there is."""
        parts = [f"{self.running} running"] if self.running else []
        parts += [f"{self.failed} failed"] if self.failed else []
        if self.seconds_left is not None and self.done < self.total:
            parts.append(f"{duration(self.seconds_left)} left")
        return ", ".join(parts)

    def best_of_front(self) -> str:
        return f"best {self.best}, {len(self.front)} on the front" if self.best is not None else ""


class _Bar(Progress):
    """A bar and, below it, some lines."""

    below: tuple[str, ...] = ()

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        for line in self.below:
            yield Text(line, no_wrap=True, overflow="ellipsis")


class ProgressView:
    """Shows a `Standing` and, above it, a line for whatever deserves one. A context manager."""

    def __init__(self, study: str, console: Console | None = None) -> None:
        self._study = study
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: _Bar | None = None
        self._shown: Standing | None = None
        self._shown_at = 0.0

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = _Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=min(16, max(4, self._console.width - 60))),
                TextColumn("{task.fields[done]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[counts]}"),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task("starting", total=None, done="", counts="")
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
        done, counts, best = f"{standing.done}/{standing.total}", standing.counts(), standing.best_of_front()
        if self._bar is not None:
            self._bar.below = (best, *(f"  {line}" for line in standing.front[:SHOWN_MEMBERS])) if best else ()
            self._bar.update(
                self._task,
                description=standing.phase,
                completed=standing.done,
                total=standing.total,
                done=done,
                counts=counts,
            )
        elif self._is_news(standing):
            self._shown_at = time.monotonic()
            line = f"{self._study}: {standing.phase} {', '.join(part for part in (done, counts) if part)}"
            self.say(f"{line}; {best}" if best else line)
        self._shown = standing

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
