"""Trials in processes of a Ray cluster: placed by Ray, replaced when they die."""

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from hqlt_search_space.errors import ResourceError

from hqlt_orchestration.driving.executor import END, Crashed, Device, Event, Finished, Job, no_gpu
from hqlt_orchestration.driving.orphans import SESSION_VARIABLE, end_dead_sessions, end_session, new_session
from hqlt_orchestration.driving.packing import Need, Placement, place, placed
from hqlt_orchestration.driving.worker import LONG_POLL_S, Worker
from hqlt_orchestration.records.attempts import AttemptKey

TRIALS_PER_WORKER = 200  # then a fresh process, so that a slow leak of a library cannot grow without end
OBJECT_STORE_BYTES = 80 * 1024**2  # results are kilobytes; Ray's default is 30 % of the machine
_WORKER_STARTS = 3  # workers that die before they are ready, in a row, before we say that none will start
_NODE_LOOK_S = 5.0  # between two looks whether a node lives, while a worker is to start


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
            raise no_gpu(gpus) if not n_gpus else ResourceError(f"resources.gpu: {gpus} a trial; Ray has {n_gpus:g}")
        if gpus is None and n_gpus:
            self.placement = place(slots, n_gpus, self._gpu_memory_bytes(), need())
        else:
            self.placement = Placement(gpus or 0.0, slots)
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
        self._slots = [self._new_slot() for _ in range(self.placement.slots)]

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
        slot.waiting_for = slot.actor.events.remote(LONG_POLL_S)

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
            slot.waiting_for = slot.actor.events.remote(LONG_POLL_S)
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
        try:
            for slot in self._slots:
                self._ray.kill(slot.actor)
            self._slots = []
        finally:
            self._stop_ray()

    def _stop_ray(self) -> None:
        """Stop or leave the Ray that this executor started or joined; one it found running is left alone."""
        if self._temporary is None:
            return
        if self._temporary:
            self._hurry(self._temporary)
        try:
            self._ray.shutdown()
        finally:  # a second Ctrl-C may come here
            if self._temporary:
                end_session(self._temporary)

    def _hurry(self, session: str) -> None:
        """Have Ray's shutdown kill its processes instead of asking them first: nothing in them is needed any more, and
        the raylet takes all of the second that it is given, in which somebody waits after Ctrl-C.
        """
        node = self._ray._private.worker._global_node
        ask_and_reap = node.kill_all_processes

        def kill_and_reap(**how: bool) -> None:
            end_session(session)
            ask_and_reap(**how)

        node.kill_all_processes = kill_and_reap


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
