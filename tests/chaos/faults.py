"""The faults that `make chaos` draws from. Each strikes a study that runs and says whom it hit."""

import contextlib
import random
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import psutil
from hqlt_orchestration.records.attempts import AttemptKey
from hqlt_orchestration.tracking.spool import unshipped_bytes
from lab import Command, Held, Lab, locked

STRAGGLER_BYTES = 4096  # a spool that is written to all the time is seldom empty


@dataclass
class Blow:
    """One fault that struck."""

    row: int
    what: str
    hit: tuple[AttemptKey, ...] = ()
    """The attempts that it ends; it is over when each of them has a successor that trains, or its trial a result."""
    lift: Callable[[], None] | None = None
    """Ends the fault itself, `lasts_s` after it struck."""
    lasts_s: float = 0.0
    is_over: Callable[[], bool] = lambda: True
    """What else must be true before it is over."""
    struck_at: float = field(default_factory=time.monotonic)
    recovered_s: float | None = None


@dataclass
class Scene:
    """A study that runs, and what strikes it."""

    lab: Lab
    random: random.Random
    driver: Command
    guest: Command | None = None
    blows: list[Blow] = field(default_factory=list)
    struck: set[tuple[int, int]] = field(default_factory=set)
    """Trials and seeds whose process was killed. A second time, and the study would rightly call them poison."""

    def of(self, command: Command) -> list[Held]:
        return [held for held in self.lab.held() if held.driver_pid == command.process.pid]

    def victims(self) -> list[Held]:
        """The trials in training that may be killed, in random order."""
        able = [held for held in self.lab.held() if held.crashes == 0 and _replica(held.key) not in self.struck]
        self.random.shuffle(able)
        return able

    def spend(self, keys: Iterable[AttemptKey]) -> None:
        self.struck |= {_replica(key) for key in keys}


def _signal_worker(scene: Scene, row: int, number: signal.Signals) -> Blow | None:
    for held in scene.victims():
        process = scene.lab.worker_of(held.key)
        if process is not None:
            scene.spend([held.key])
            process.send_signal(number)
            return Blow(row, f"{number.name} the worker of trial {held.key.number}", (held.key,))
    return None


def kill_worker(scene: Scene) -> Blow | None:
    return _signal_worker(scene, 1, signal.SIGKILL)


def kill_worker_while_it_writes(scene: Scene) -> Blow | None:
    """A worker that is at it right now. If it had done when the signal came, that was row 1."""
    for held in scene.victims():
        process = scene.lab.worker_of(held.key) if scene.lab.writes_checkpoint(held) else None
        if process is None or not scene.lab.writes_checkpoint(held):
            continue
        with contextlib.suppress(psutil.Error):
            process.kill()
            process.wait(10)
        scene.spend([held.key])
        row, moment = (2, "inside") if scene.lab.writes_checkpoint(held) else (1, "just after")
        what = f"SIGKILL the worker of trial {held.key.number} {moment} the writing of a checkpoint"
        return Blow(row, what, (held.key,))
    return None


def kill_driver(scene: Scene) -> Blow | None:
    hit = [held.key for held in scene.of(scene.driver)]
    if not hit:
        return None
    scene.driver.kill()
    return Blow(3, f"SIGKILL the driver of {_numbers(hit)}", tuple(hit))


def kill_raylet(scene: Scene) -> Blow | None:
    """The node goes, and with it all its workers."""
    held = scene.of(scene.driver)
    raylet = scene.lab.raylet_of(scene.driver)
    if not held or raylet is None or any(_replica(one.key) in scene.struck or one.crashes for one in held):
        return None
    hit = [one.key for one in held]
    scene.spend(hit)
    raylet.send_signal(signal.SIGKILL)
    return Blow(4, f"SIGKILL the raylet of {_numbers(hit)}", tuple(hit))


def fill_disk(scene: Scene) -> Blow | None:
    disk = scene.lab.disk
    if disk is None:
        return None
    hit = tuple(held.key for held in scene.lab.held())
    disk.fill()
    seconds = scene.random.uniform(5, 25)
    # Whoever has nothing to write meanwhile is not hit.
    return Blow(5, f"fill the disk for {seconds:.0f} s ({_numbers(hit)} run)", lift=disk.free, lasts_s=seconds)


def kill_mlflow(scene: Scene) -> Blow | None:
    """The server where there is one, else the process that ships."""
    server = scene.lab.mlflow
    spool = scene.lab.store.spool_folder(scene.lab.name)

    def all_shipped() -> bool:
        return (server is None or server.answers) and unshipped_bytes(spool) < STRAGGLER_BYTES

    if server is not None:
        server.kill()
        seconds = scene.random.choice((0.0, 20.0, 60.0))
        return Blow(6, f"SIGKILL MLflow for {seconds:.0f} s", (), server.start, seconds, all_shipped)
    for process in scene.lab.processes():
        with contextlib.suppress(psutil.Error):
            if "hqlt_orchestration.tracking.writer" in process.cmdline():
                process.kill()
                return Blow(6, "SIGKILL the process that ships to MLflow", is_over=all_shipped)
    return None


def crash_database(scene: Scene) -> Blow | None:
    """PostgreSQL loses every process; another program locks SQLite's file."""
    lab = scene.lab
    if lab.postgres is not None:
        seconds = scene.random.choice((0.0, 5.0, 20.0))
        lab.postgres.crash()
        struck = time.time()
        return Blow(
            7,
            f"crash PostgreSQL for {seconds:.0f} s",
            lift=lab.postgres.start,
            lasts_s=seconds,
            is_over=lambda: lab.newest_beat() > struck,
        )
    seconds = scene.random.uniform(2, 15)
    held = contextlib.ExitStack()
    held.enter_context(locked(lab.store.data / "hqlt.db"))
    struck = time.time()
    return Blow(
        7,
        f"lock the database for {seconds:.0f} s",
        lift=held.close,
        lasts_s=seconds,
        is_over=lambda: lab.newest_beat() > struck + seconds,
    )


def start_second_driver(scene: Scene) -> Blow | None:
    """It joins, and after a while is killed or asked to go."""
    if scene.guest is not None and not scene.guest.has_ended:
        return None
    guest = scene.guest = scene.lab.resume()
    kills = scene.random.random() < 0.5
    seconds = scene.random.uniform(20, 45)

    how = "SIGKILL" if kills else "SIGTERM"
    blow = Blow(11, f"a second driver for {seconds:.0f} s, ended by {how}", lasts_s=seconds)

    def end() -> None:
        blow.hit = tuple(held.key for held in scene.of(guest))
        guest.kill() if kills else guest.terminate()

    blow.lift, blow.is_over = end, lambda: guest.has_ended
    return blow


def interrupt_driver(scene: Scene) -> Blow | None:
    """SIGTERM, Ctrl-C, or Ctrl-C twice."""
    hit = tuple(held.key for held in scene.of(scene.driver))
    if not hit:
        return None
    how = scene.random.choice(("SIGTERM", "Ctrl-C", "Ctrl-C twice"))
    if how == "SIGTERM":
        scene.driver.terminate()
    else:
        scene.driver.press_ctrl_c()
    if how == "Ctrl-C twice":
        time.sleep(0.5)
        scene.driver.press_ctrl_c()
    return Blow(19, f"{how} for the driver of {_numbers(hit)}", hit)


def stop_worker(scene: Scene) -> Blow | None:
    return _signal_worker(scene, 20, signal.SIGSTOP)


FAULTS: dict[int, tuple[str, Callable[[Scene], Blow | None]]] = {
    1: ("SIGKILL a worker", kill_worker),
    2: ("SIGKILL a worker that writes a checkpoint", kill_worker_while_it_writes),
    3: ("SIGKILL the driver", kill_driver),
    4: ("SIGKILL the raylet, and so the node", kill_raylet),
    5: ("fill the disk", fill_disk),
    6: ("SIGKILL MLflow", kill_mlflow),
    7: ("crash or lock the database", crash_database),
    11: ("a second driver comes and goes", start_second_driver),
    19: ("SIGTERM, Ctrl-C, Ctrl-C twice", interrupt_driver),
    20: ("SIGSTOP a worker", stop_worker),
}


def _replica(key: AttemptKey) -> tuple[int, int]:
    return key.number, key.seed


def _numbers(keys: Iterable[AttemptKey]) -> str:
    return "trials " + ", ".join(str(key.number) for key in sorted(keys))
