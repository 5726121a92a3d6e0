"""Where trials run: in processes of a Ray cluster, or in a thread of this one, behind one contract.

A worker runs one job at a time and answers to four calls: `run`, `events`, `answer` and `cancel`. Ray wraps it in an
actor, inline execution calls it directly, so both behave alike. Nothing here retries: what to do about a lost worker
is the ledger's decision.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from hqlt_search_space.errors import ResourceError
from hqlt_search_space.trial import Trial, TrialResult

from hqlt_orchestration.driving.packing import Placement
from hqlt_orchestration.records.attempts import AttemptKey

PAUSE_GRACE_S = 30.0  # a paused trial writes its checkpoint within this time, or is killed


@dataclass(frozen=True)
class Job:
    """A trial to be run in the folder `out`, which it shares with its other seeds: attempts at one seed or, where they
    train as one stack, at several. A seed of the trial without an attempt here has its result already.
    """

    keys: tuple[AttemptKey, ...]
    trial: Trial
    out: Path

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels as JSON: pickling the values of a trial one by one takes a millisecond."""
        return _job, (self.keys, self.trial.model_dump_json(), self.out)


def _job(keys: tuple[AttemptKey, ...], trial: str, out: Path) -> Job:
    return Job(keys, Trial.from_json(trial), out)


@dataclass(frozen=True)
class Measured:
    """Metrics at a step, as they come."""

    key: AttemptKey
    step: int
    metrics: dict[str, float]
    unix_ms: int


@dataclass(frozen=True)
class Moved:
    """A sign of life, every few seconds from a job that takes steps or evaluates: the step at which it stands."""

    key: AttemptKey
    step: int
    n_signs: int
    """How often the job has shown life so far: once a step, and once for each batch that it judged."""
    slowest_s: float
    """The longest time that has passed between two of them in this job."""


@dataclass(frozen=True)
class RungReached:
    """The job stands still until `answer` says whether this seed goes on."""

    key: AttemptKey
    step: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Finished:
    """The seed has a result, the only replica in there, which may be a failure with its reason."""

    key: AttemptKey
    result: TrialResult


@dataclass(frozen=True)
class Paused:
    """The job was cancelled, wrote a checkpoint and ended."""

    key: AttemptKey


@dataclass(frozen=True)
class Crashed:
    """The job ended without a result: its process died, or a programmer's mistake got out of it."""

    key: AttemptKey
    message: str
    out_of_memory: bool = False
    """The machine had no more memory: half of a micro-batch may fit."""


Event = Measured | Moved | RungReached | Finished | Paused | Crashed


END = (Finished, Paused, Crashed)


Device = Literal["cpu", "cuda"]


class Executor(Protocol):
    """Runs jobs, at most `placement.slots` at a time.

    A submitted job ends with exactly one of Finished, Paused or Crashed for each of its keys. Between `submit` and that
    event a key is the caller's to use with `answer`, `cancel` and `kill`; a key of no running job is ignored. Seeds
    that train together are paused and killed together.
    """

    name: str
    device: Device
    placement: Placement

    def free(self) -> int:
        """How many jobs may be submitted now."""

    def submit(self, job: Job) -> None:
        """Start `job`. Needs a free slot."""

    def poll(self, timeout_s: float) -> list[Event]:
        """What happened since the last call; waits up to `timeout_s` for something to happen."""

    def answer(self, key: AttemptKey, step: int, *, go_on: bool) -> None:
        """Answer the RungReached of that step."""

    def cancel(self, key: AttemptKey) -> None:
        """Ask the job to write a checkpoint and stop: it ends as Paused, or Finished if it was faster."""

    def kill(self, key: AttemptKey) -> None:
        """End the job's process: it ends as Crashed. For a job that does not answer."""

    def close(self) -> None:
        """Give back every process. Jobs that still run are lost."""


def no_gpu(gpus: float) -> ResourceError:
    return ResourceError(f"resources.gpu: {gpus:g} a trial, but there is no GPU here; write `auto` or 0 to use the CPU")
