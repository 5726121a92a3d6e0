"""What runs one job at a time, in a thread or in a process of Ray's, and tells what happens in it."""

import contextlib
import os
import queue
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from hqlt_search_space.errors import HqltError, TrialPausedError

from hqlt_orchestration.driving.executor import Crashed, Event, Finished, Job, Measured, Moved, Paused, RungReached
from hqlt_orchestration.driving.orphans import alone_in
from hqlt_orchestration.records.attempts import LOG_FILE, AttemptKey, replica_folder

LONG_POLL_S = 2.0  # how long a worker holds an unanswered `events` call: one message per 2 s from a silent trial


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
