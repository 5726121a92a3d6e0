"""Where trials run: in processes of a Ray cluster, or in a thread of this one, behind one contract.

A worker runs one job at a time and answers to four calls: `run`, `events`, `answer` and `cancel`. Ray wraps it in an
actor, inline execution calls it directly, so both behave alike. Nothing here retries: what to do about a lost worker
is the ledger's decision.
"""

import contextlib
import os
import queue
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from hqlt_search_space.errors import HqltError, ResourceError, TrialPausedError
from hqlt_search_space.trial import Trial, TrialResult

from hqlt_orchestration.orphans import SESSION_VARIABLE, alone_in, end_dead_sessions, new_session
from hqlt_orchestration.packing import Need, Placement, place, placed

TRIALS_PER_WORKER = 200  # then a fresh process, so that a slow leak of a library cannot grow without end
LOG_FILE = "log.txt"
OBJECT_STORE_BYTES = 80 * 1024**2  # results are kilobytes; Ray's default is 30 % of the machine
PAUSE_GRACE_S = 30.0  # a paused trial writes its checkpoint within this time, or is killed
_LONG_POLL_S = 2.0  # how long a worker holds an unanswered `events` call: one message per 2 s from a silent trial
_WORKER_STARTS = 3  # workers that die before they are ready, in a row, before we say that none will start
_NODE_LOOK_S = 5.0  # between two looks whether a node lives, while a worker is to start


@dataclass(frozen=True, order=True)
class AttemptKey:
    """One try at one seed of a trial. Who has it in the ledger may commit its result, once."""

    number: int
    seed: int
    attempt: int


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
    """Runs jobs, at most `slots` at a time.

    A submitted job ends with exactly one of Finished, Paused or Crashed for each of its keys. Between `submit` and that
    event a key is the caller's to use with `answer`, `cancel` and `kill`; a key of no running job is ignored. Seeds
    that train together are paused and killed together.
    """

    name: str
    device: Device
    slots: int
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


class _Life:
    """The signs of life of one job: written by the thread that trains, read by those that answer the driver."""

    def __init__(self, keys: tuple[AttemptKey, ...]) -> None:
        self._keys = keys
        self._n_signs = self._n_told = self._step = 0
        self._slowest_s = 0.0
        self._last = time.monotonic()

    def show(self, step: int) -> None:
        now = time.monotonic()
        if self._n_signs:  # before the first there is no step, but libraries that load and kernels that compile
            self._slowest_s = max(self._slowest_s, now - self._last)
        self._last = now
        self._step = step
        self._n_signs += 1

    def news(self) -> list[Event]:
        n_signs = self._n_signs
        if n_signs == self._n_told:
            return []
        self._n_told = n_signs
        return [Moved(key, self._step, n_signs, self._slowest_s) for key in self._keys]


class Worker:
    """Runs jobs one after the other in the process it lives in. `events` and the rest may be called meanwhile."""

    def __init__(self, n_threads: int, *, capture: bool) -> None:
        """Import what trials need. With `capture`, the process's output goes to the log of the running trial."""
        for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[variable] = str(n_threads)
        import torch
        from hqlt_trainer.run import run_trial

        torch.set_num_threads(n_threads)
        self._run_trial = run_trial
        self._has_cuda = torch.cuda.is_available()
        self._capture = capture
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[AttemptKey, int, bool]] = queue.SimpleQueue()
        self._cancelled: set[AttemptKey] = set()
        self._life = _Life(())

    def has_cuda(self) -> bool:
        return self._has_cuda

    def run(self, job: Job) -> None:
        """Run `job` to its end, which is an event for each of its keys."""
        try:
            with contextlib.ExitStack() as held:
                logs: dict[int, IO[str]] = {}
                for key in sorted(job.keys):
                    folder = replica_folder(job.out, key.seed)
                    folder.mkdir(parents=True, exist_ok=True)
                    held.enter_context(alone_in(folder))
                    capture = self._capture and not logs  # of a stack, the first seed's log has what was printed
                    logs[key.seed] = held.enter_context(_log(key, folder, capture=capture))
                ends = self._ends_of(job, logs)
        except Exception:  # noqa: BLE001  whatever it was, the driver must hear that the job has ended
            text = traceback.format_exc()
            ends = [Crashed(key, text) for key in job.keys]
        for end in ends:
            self._events.put(end)

    def _ends_of(self, job: Job, logs: dict[int, IO[str]]) -> list[Event]:
        life = self._life = _Life(job.keys)
        keys = {key.seed: key for key in job.keys}  # what happens to a seed without one is nobody's business here

        def cancelled() -> bool:
            return not self._cancelled.isdisjoint(job.keys)

        def on_metrics(seed: int, step: int, metrics: dict[str, float]) -> None:
            if seed not in keys:
                return
            line = "  ".join(f"{name} {value:.6g}" for name, value in metrics.items())
            logs[seed].write(f"step {step}  {line}\n")
            self._events.put(Measured(keys[seed], step, dict(metrics), time.time_ns() // 1_000_000))

        def on_rung(seed: int, step: int, metrics: dict[str, float]) -> bool:
            if seed not in keys:
                return True
            self._events.put(RungReached(keys[seed], step, dict(metrics)))
            while not cancelled():
                with contextlib.suppress(queue.Empty):
                    key, answered, go_on = self._answers.get(timeout=0.2)
                    if (key, answered) == (keys[seed], step):
                        return go_on
            return True  # the next look at `cancelled` ends the job

        def log(text: str) -> None:
            for file in logs.values():
                file.write(f"{text}\n")

        try:
            result = self._run_trial(
                job.trial, job.out, on_rung, on_metrics=on_metrics, cancelled=cancelled, on_progress=life.show
            )
        except TrialPausedError as paused:
            log(str(paused))
            return [Paused(key) for key in job.keys]
        except Exception as error:  # noqa: BLE001  recorded whole, with its traceback
            text = str(error) if isinstance(error, HqltError) else traceback.format_exc()
            log(text)
            return [Crashed(key, text) for key in job.keys]
        finally:
            self._life = _Life(())
        ends: list[Event] = []
        for replica in result.replicas:
            if replica.seed in keys:
                logs[replica.seed].write(f"seed {replica.seed}: {replica.status} at step {replica.step}\n")
                if replica.message:
                    logs[replica.seed].write(replica.message + "\n")
                ends.append(Finished(keys[replica.seed], result.model_copy(update={"replicas": (replica,)})))
        return ends

    def events(self, timeout_s: float) -> list[Event]:
        """Every event since the last call; waits up to `timeout_s` for the first."""
        found: list[Event] = []
        with contextlib.suppress(queue.Empty):
            found.append(self._events.get(timeout=timeout_s))
            while True:
                found.append(self._events.get_nowait())
        return self._life.news() + found

    def answer(self, key: AttemptKey, step: int, go_on: bool) -> None:
        self._answers.put((key, step, go_on))

    def cancel(self, key: AttemptKey) -> None:
        self._cancelled.add(key)


class InlineExecutor:
    """One job at a time in a thread of this process: for debugging, tests and machines without Ray."""

    name = "inline"
    slots = 1

    def __init__(self, *, cpus: int, gpus: float | None) -> None:
        """`gpus` None: use one if there is one.

        Raises:
            ResourceError: a GPU is asked for and there is none.
        """
        self._worker = Worker(cpus, capture=False)
        if gpus and not self._worker.has_cuda():
            raise _no_gpu(gpus)
        self.device: Device = "cuda" if self._worker.has_cuda() and gpus != 0 else "cpu"
        self.placement = Placement(1.0 if self.device == "cuda" else 0.0, 1)
        self._running: set[AttemptKey] = set()
        self._thread: threading.Thread | None = None

    def free(self) -> int:
        return int(not self._running)

    def submit(self, job: Job) -> None:
        assert not self._running, f"{self._running} still run"
        self._running = set(job.keys)
        self._thread = threading.Thread(target=self._worker.run, args=(job,), daemon=True)
        self._thread.start()

    def poll(self, timeout_s: float) -> list[Event]:
        if not self._running:
            return []
        found = self._worker.events(timeout_s)
        self._running -= {event.key for event in found if isinstance(event, END)}
        return found

    def answer(self, key: AttemptKey, step: int, *, go_on: bool) -> None:
        self._worker.answer(key, step, go_on)

    def cancel(self, key: AttemptKey) -> None:
        self._worker.cancel(key)

    def kill(self, key: AttemptKey) -> None:
        """A thread cannot be killed; it is asked to stop."""
        self.cancel(key)

    def close(self) -> None:
        if self._thread is not None and self._running:
            for key in self._running:
                self._worker.cancel(key)
            self._thread.join(PAUSE_GRACE_S)


@dataclass
class _Slot:
    """An actor, and the one call to it that we wait for: its first answer, or its next events."""

    actor: Any
    waiting_for: Any
    ready: bool = False
    keys: set[AttemptKey] = field(default_factory=set)
    """What has not ended of the job that runs."""
    n_jobs: int = 0
    spoilt: bool = False


class RayExecutor:
    """A pool of Ray actors, each with its share of CPUs and GPUs. Ray restarts and retries nothing.

    Actors, not tasks: a GPU task gets a new process, and with it an import of torch and a CUDA context, every time.
    """

    name = "ray"

    def __init__(
        self,
        *,
        slots: int,
        cpus: int,
        gpus: float | None,
        need: Callable[[], Need | None] = lambda: None,
        address: str | None = None,
    ) -> None:
        """Start Ray on this machine, or join the cluster at `address`.

        `gpus` None: share what GPUs there are among as many trials as `need` lets fit; there may be fewer slots then.

        Raises:
            ResourceError: a GPU is asked for and there is none, or no cluster answers at `address`.
        """
        self._temporary = None if _ray_is_running() else start_ray(slots * cpus, address)
        import ray

        self._ray: Any = ray  # most of it has no types
        n_gpus: float = self._ray.cluster_resources().get("GPU", 0.0)
        if gpus and n_gpus < gpus:
            self._stop_ray()
            raise _no_gpu(gpus) if not n_gpus else ResourceError(f"resources.gpu: {gpus} a trial; Ray has {n_gpus:g}")
        if gpus is None and n_gpus:
            self.placement = place(slots, n_gpus, self._gpu_memory_bytes(), need())
        else:
            self.placement = Placement(gpus or 0.0, slots)
        self.slots = slots = self.placement.slots
        share = self.placement.share
        self.device: Device = "cuda" if share else "cpu"
        self._cpus = cpus
        self._actor_class: Any = self._ray.remote(Worker).options(
            num_cpus=cpus,
            num_gpus=share,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=4,  # run, a long poll of events, and room for answer and cancel
        )
        self._failed_starts = 0
        self._next_look = 0.0
        self._slots = [self._new_slot() for _ in range(slots)]

    def _gpu_memory_bytes(self) -> int | None:
        """What the GPU that Ray gives to a task has, which may be on another machine; None if nobody there can say."""
        asked: int | None = self._ray.get(self._ray.remote(_gpu_memory_bytes).options(num_gpus=0.0001).remote())
        return asked

    def _new_slot(self) -> _Slot:
        actor = self._actor_class.remote(self._cpus, capture=True)
        return _Slot(actor, actor.has_cuda.remote())

    def free(self) -> int:
        return sum(slot.ready and not slot.keys for slot in self._slots)

    def submit(self, job: Job) -> None:
        if self.device == "cuda" and self.placement.share < 1:
            job = replace(job, trial=placed(job.trial, self.placement))
        slot = next(slot for slot in self._slots if slot.ready and not slot.keys)
        slot.keys = set(job.keys)
        slot.n_jobs += 1
        slot.actor.run.remote(job)
        slot.waiting_for = slot.actor.events.remote(_LONG_POLL_S)

    def poll(self, timeout_s: float) -> list[Event]:
        self._look_for_a_node()
        waiting = {slot.waiting_for: slot for slot in self._slots if slot.waiting_for is not None}
        if not waiting:
            return []
        done, _ = self._ray.wait(list(waiting), num_returns=1, timeout=timeout_s)
        if done and len(waiting) > 1:  # whoever else is done by now; `wait` returns only as many as asked for
            done, _ = self._ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        found: list[Event] = []
        for reference in done:
            found += self._take(waiting[reference], reference)
        return found

    def _look_for_a_node(self) -> None:
        """Without one no worker will ever start, and Ray would wait for ever.

        Raises:
            ResourceError: Ray's last node is dead.
        """
        now = time.monotonic()
        if now < self._next_look or all(slot.ready for slot in self._slots):
            return
        self._next_look = now + _NODE_LOOK_S
        if not any(node["Alive"] for node in self._ray.nodes()):
            raise ResourceError(
                "Ray's node is dead (killed, or the machine was out of memory), and every worker with it; "
                "`hqlt study resume` starts another"
            )

    def _take(self, slot: _Slot, reference: Any) -> list[Event]:
        try:
            answer = self._ray.get(reference)
        except self._ray.exceptions.RayActorError as error:
            return self._replace_dead(slot, error)
        if not slot.ready:
            slot.ready, slot.waiting_for = True, None
            self._failed_starts = 0
            return []
        found: list[Event] = answer
        ends = [event for event in found if isinstance(event, END)]
        slot.keys -= {end.key for end in ends}
        slot.spoilt = slot.spoilt or any(_spoils_its_worker(end) for end in ends)
        if slot.keys:
            slot.waiting_for = slot.actor.events.remote(_LONG_POLL_S)
            return found
        slot.waiting_for = None
        if slot.n_jobs >= TRIALS_PER_WORKER or slot.spoilt:
            self._renew(slot)
        return found

    def _replace_dead(self, slot: _Slot, error: Exception) -> list[Event]:
        if not slot.ready:
            self._failed_starts += 1
            if self._failed_starts >= _WORKER_STARTS:
                raise ResourceError(f"no worker process will start; the last said: {error}") from error
        self._renew(slot)
        out_of_memory = isinstance(error, self._ray.exceptions.OutOfMemoryError)
        obituary = "ended because the machine ran out of memory" if out_of_memory else "died (killed or faulted)"
        return [Crashed(key, f"its worker process {obituary}", out_of_memory) for key in sorted(slot.keys)]

    def _renew(self, slot: _Slot) -> None:
        self._ray.kill(slot.actor)
        self._slots[self._slots.index(slot)] = self._new_slot()

    def answer(self, key: AttemptKey, step: int, *, go_on: bool) -> None:
        for slot in self._of(key):
            slot.actor.answer.remote(key, step, go_on)

    def cancel(self, key: AttemptKey) -> None:
        for slot in self._of(key):
            slot.actor.cancel.remote(key)

    def kill(self, key: AttemptKey) -> None:
        for slot in self._of(key):
            self._ray.kill(slot.actor)

    def _of(self, key: AttemptKey) -> list[_Slot]:
        return [slot for slot in self._slots if key in slot.keys]

    def close(self) -> None:
        for slot in self._slots:
            self._ray.kill(slot.actor)
        self._slots = []
        self._stop_ray()

    def _stop_ray(self) -> None:
        """Stop or leave the Ray that this executor started or joined; one it found running is left alone."""
        if self._temporary is None:
            return
        self._ray.shutdown()
        if self._temporary:
            shutil.rmtree(self._temporary, ignore_errors=True)


def replica_folder(trial_folder: Path, seed: int) -> Path:
    """Where `run_trial` keeps the checkpoints of one seed, and we its log."""
    return trial_folder / f"seed-{seed:d}"


def _ray_is_running() -> bool:
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def start_ray(n_cpus: int, address: str | None) -> str:
    """Connect this process to Ray. Returns the folder to remove afterwards, "" for a cluster that was joined.

    A Ray that is started here listens on the loopback device alone, and answers only to who has its token: one made
    for this process and its children, in no file. A cluster that is joined has its own doors, and a token too.
    """
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  Ray's own name; its 15 starves trials on a busy machine
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns of a change to come
    if address is None:
        # Ray's name for "this node will never be part of a cluster": the one way to have it bind 127.0.0.1 (2.60 binds
        # every device even with _node_ip_address="127.0.0.1"). It is read when ray is imported.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        if not os.environ.get("RAY_AUTH_TOKEN"):  # then Ray would write one to ~/.ray/auth_token, mode 0644
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    else:
        _knock(address)
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is not None:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            advice = "is its token in RAY_AUTH_TOKEN, or in ~/.ray/auth_token?"
            raise ResourceError(f"no Ray cluster lets us in at {address}: {error}; {advice}") from error
        return ""
    end_dead_sessions()
    # Ray never removes its logs, and lets everybody write into its folder: it gets one inside ours, closed to others.
    folder = new_session()
    os.environ[SESSION_VARIABLE] = folder  # inherited by all that Ray starts
    try:
        ray.init(
            address="local",
            num_cpus=max(n_cpus, os.cpu_count() or 1),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=f"{folder}/ray",
            **quiet,
        )
    finally:
        del os.environ[SESSION_VARIABLE]
    return folder


def _knock(address: str) -> None:
    """Ask at once whether anybody is at HOST:PORT: Ray itself tries for minutes, and not in one sentence.

    Raises:
        ResourceError: nobody is.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "/" in host:  # `auto`, or a URL that Ray knows how to read
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise ResourceError(f"no Ray cluster answers at {address}: {error.strerror or error}") from error


def _spoils_its_worker(end: Event) -> bool:
    """Whether a process that ended a job so should not be given another: memory may be held, CUDA may be unusable."""
    if isinstance(end, Finished):
        return any(replica.reason in ("out_of_memory", "error") for replica in end.result.replicas)
    return isinstance(end, Crashed)


def _gpu_memory_bytes() -> int | None:
    """Memory of the smallest GPU that this process may use, by the driver's own tool: torch would take seconds."""
    try:
        asked = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        told = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True)  # noqa: S603  from PATH
        return min(int(line) for line in told.stdout.splitlines()) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _no_gpu(gpus: float) -> ResourceError:
    return ResourceError(f"resources.gpu: {gpus:g} a trial, but there is no GPU here; write `auto` or 0 to use the CPU")


@contextlib.contextmanager
def _log(key: AttemptKey, folder: Path, *, capture: bool) -> Iterator[IO[str]]:
    """The log of a trial, appended to by every attempt. With `capture`, file descriptors 1 and 2 go there too."""
    with (folder / LOG_FILE).open("a", buffering=1, encoding="utf-8") as log:
        when = time.strftime("%Y-%m-%d %H:%M:%S")
        log.write(f"{when}  attempt {key.attempt} of trial {key.number}, seed {key.seed}\n")
        if not capture:
            yield log
            return
        saved = os.dup(1), os.dup(2)
        try:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            yield log
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, descriptor in zip((1, 2), saved, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)
