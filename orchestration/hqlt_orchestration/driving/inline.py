"""Trials in a thread of this process: no Ray, one at a time."""

import threading

from hqlt_orchestration.driving.executor import END, PAUSE_GRACE_S, Device, Event, Job, no_gpu
from hqlt_orchestration.driving.packing import Placement
from hqlt_orchestration.driving.worker import Worker
from hqlt_orchestration.records.attempts import AttemptKey


class InlineExecutor:
    """One job at a time in a thread of this process: for debugging, tests and machines without Ray."""

    name = "inline"

    def __init__(self, *, cpus: int, gpus: float | None) -> None:
        """`gpus` None: use one if there is one.

        Raises:
            ResourceError: a GPU is asked for and there is none.
        """
        self._worker = Worker(cpus, capture=False)
        if gpus and not self._worker.has_cuda():
            raise no_gpu(gpus)
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
