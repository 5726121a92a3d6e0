"""A study that real `hqlt` commands run, and everything about it that can be broken from outside.

A `Lab` owns what it breaks: its folder (on a file system of its own, where root may mount one), its PostgreSQL and
MLflow servers, and every process that came of its commands, also those whose parents were killed: they are known by a
variable in their environment. It signals no other process.
"""

import contextlib
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa
from hqlt_orchestration.records.attempts import AttemptKey
from hqlt_orchestration.records.ledger import Ledger
from hqlt_orchestration.records.store import Store
from hqlt_orchestration.records.tables import ATTEMPTS, DRIVERS, FINISHED
from hqlt_search_space.errors import HqltError

HQLT = Path(sys.executable).parent / "hqlt"
MARK = "HQLT_LAB"  # in the environment of everything that a lab's commands start
SLOW_SYNC = """
import os, time

sync = os.fsync

def slowly(file):
    sync(file)
    descriptor = file if isinstance(file, int) else file.fileno()
    if "/checkpoints/" in os.readlink(f"/proc/self/fd/{{descriptor}}"):
        time.sleep({seconds})

os.fsync = slowly
"""
QUIET: dict[str, Any] = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": "/"}


def study_text(name: str, *, trials: int, steps: int, parallel: int, sampler_seed: int = 0, **keys: Any) -> str:
    """A search on random suggestions without early stopping: what it finds does not depend on when things happen."""
    study = {
        "schema_version": 1,
        "name": name,
        "task": {
            "kind": "parity",
            "train_length": {"low": 3, "high": 14},
            "test_length": {"low": 14, "high": 24},
            "n_validation": 256,
            "n_test": 256,
        },
        "model": {"d_model": 32, "n_layers": 1, "n_heads": 2, "mlp_ratio": 2},
        "recipe": {"steps": steps, "batch": 32},
        "search": {
            "sampler": {"kind": "random", "seed": sampler_seed},
            "space": {
                "first": ["hybrid", "fast_weight", "attention"],
                "window": [2, 4],
                "rule": ["additive", "delta"],
                "learning_rate": {"low": 1e-3, "high": 1e-2, "scale": "log"},
            },
        },
        "objectives": {"validation_loss_nats": "minimize", "state_bytes": "minimize"},
        "budget": {"trials": trials, "parallel": parallel},
        "resources": {"gpu": 0},
    }
    return json.dumps(study | keys, indent=1)  # which is YAML too


class Command:
    """A running `hqlt` command, in a process group of its own as a shell would start it, and what it has said."""

    def __init__(self, arguments: list[str], output: Path, environment: dict[str, str]) -> None:
        self._output = output
        with output.open("ab") as file:
            self.process = subprocess.Popen(
                arguments, stdout=file, stderr=file, env=environment, process_group=0, cwd=output.parent
            )

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def said(self) -> str:
        return self._output.read_text(errors="replace")

    def wait(self, timeout_s: float) -> int:
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        self.process.kill()

    def terminate(self) -> None:
        self.process.terminate()

    def press_ctrl_c(self) -> None:
        """A terminal signals everybody in the group."""
        os.killpg(self.process.pid, signal.SIGINT)


class Disk:
    """A small file system in memory; only root can mount one."""

    def __init__(self, at: Path, mib: int) -> None:
        self.at = at
        self._ballast = at / "ballast"
        at.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "hqlt-lab", str(at)], **QUIET)

    def fill(self) -> None:
        """Leave no byte free."""
        with self._ballast.open("ab") as file, contextlib.suppress(OSError):
            while True:
                free = os.statvfs(self.at).f_bavail * os.statvfs(self.at).f_frsize
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), max(free, 4096))

    def free(self) -> None:
        self._ballast.unlink(missing_ok=True)

    def unmount(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.at)], **QUIET)


class Postgres:
    """A PostgreSQL server on loopback, whose commits reach the disk."""

    def __init__(self, at: Path) -> None:
        """Raises FileNotFoundError where PostgreSQL is not installed, KeyError where root has no user for it."""
        programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
        self._programs = programs[-1] if programs else Path(shutil.which("initdb") or _absent("initdb")).parent
        self._as_user: list[str] = []
        at.mkdir()
        if os.getuid() == 0:
            owner = pwd.getpwnam("postgres")
            os.chown(at, owner.pw_uid, owner.pw_gid)
            self._as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        self._at = at
        port = free_port()
        self.url = f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres"
        self._options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={at}"
        self._run("initdb", "-A", "trust", "-U", "postgres")
        self.start()

    def start(self) -> None:
        self._run("pg_ctl", "-w", "-l", str(self._at / "log"), "-o", self._options, "start")
        self.is_up = True

    def crash(self) -> None:
        """Every server process ends at once, as if killed."""
        self.is_up = False
        self._run("pg_ctl", "-w", "-m", "immediate", "stop")

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [*self._as_user, str(self._programs / program), "-D", str(self._at / "data"), *arguments], **QUIET
        )


class MlflowServer:
    """MLflow's own server on loopback, with its database and artifacts in `at`."""

    def __init__(self, at: Path) -> None:
        at.mkdir()
        self._at = at
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self.start()

    def start(self) -> None:
        """Takes tens of seconds until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--backend-store-uri", f"sqlite:///{self._at}/mlflow.db", "--workers", "1"]
        command += ["--artifacts-destination", str(self._at / "artifacts")]
        # Its job runners take the cores for a minute, and have nothing to do with what is tracked.
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self._at / "server.log").open("ab") as log:
            self._server = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True, cwd=self._at
            )

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(self._server.pid)

    @property
    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        """It and its workers, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._server.pid, signal.SIGKILL)
        self._server.wait()


@dataclass(frozen=True)
class Held:
    """A running attempt, as the ledger has it."""

    key: AttemptKey
    driver_pid: int
    crashes: int
    started_at: float
    """Unix seconds, by the clock of the driver's host."""


@dataclass
class Lab:
    """One study. `close` ends every process and gives the disk back."""

    folder: Path
    name: str
    text: str
    database: str = "sqlite"
    """Or `postgresql`: a server of the lab's own."""
    disk_mib: int | None = None
    """The size of the data's own file system, which can then be filled; None for the file system it is on."""
    with_server: bool = False
    """Whether metrics go to an MLflow server of the lab's own, which can be killed; else to the data folder."""
    sync_s: float | None = None
    """What it takes longer to sync a file of a checkpoint, so that somebody can look on; None for no longer."""
    environment: dict[str, str] = field(default_factory=dict)
    disk: Disk | None = field(default=None, init=False)
    postgres: Postgres | None = field(default=None, init=False)
    mlflow: MlflowServer | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._mark = uuid.uuid4().hex[:8]
        self.folder.mkdir(parents=True, exist_ok=True)
        data = self.folder / "data"
        if self.disk_mib is not None:
            self.disk = Disk(data, self.disk_mib)
        if self.database == "postgresql":
            self.postgres = Postgres(Path("/tmp") / f"lab-{self._mark}")  # short, for its socket
        if self.with_server:
            self.mlflow = MlflowServer(self.folder / "mlflow")
        self.store = Store(data, self.postgres and self.postgres.url, self.mlflow and self.mlflow.url)
        if self.sync_s is not None:
            (self.folder / "sitecustomize.py").write_text(SLOW_SYNC.format(seconds=self.sync_s))
            self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(self.folder), os.getenv("PYTHONPATH")]))
        (self.folder / "study.yaml").write_text(self.text)
        self._commands: list[Command] = []
        self._ledger: Ledger | None = None

    def hqlt(self, *arguments: str, elsewhere: str | None = None) -> Command:
        """Start a command on the lab's store; `elsewhere` is the name of the host that it is to believe itself on."""
        prefix = [] if elsewhere is None else ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', elsewhere]
        environment = os.environ | {"HQLT_DATA": str(self.store.data), MARK: self._mark} | self.environment
        if self.postgres is not None:
            environment["HQLT_STORE"] = self.postgres.url
        if self.mlflow is not None:
            environment["HQLT_MLFLOW"] = self.mlflow.url
        output = self.folder / f"command-{len(self._commands) + 1:03d}.txt"
        self._commands.append(Command([*prefix, str(HQLT), *arguments], output, environment))
        return self._commands[-1]

    def run(self, *options: str, elsewhere: str | None = None) -> Command:
        return self.hqlt("study", "run", str(self.folder / "study.yaml"), *options, elsewhere=elsewhere)

    def resume(self, *options: str) -> Command:
        return self.hqlt("study", "resume", self.name, *options)

    @property
    def ledger(self) -> Ledger:
        if self._ledger is None:
            self._ledger = self.store.open_existing()
        return self._ledger

    @property
    def can_ask(self) -> bool:
        """Whether the database is there: the ledger would wait for it, and nobody could bring it back meanwhile."""
        return self.postgres is None or self.postgres.is_up

    def held(self) -> list[Held]:
        """The attempts that run; [] while the database cannot be read or does not know the study yet."""
        if not self.can_ask:
            return []
        query = (
            sa.select(ATTEMPTS.c.number, ATTEMPTS.c.seed, ATTEMPTS.c.attempt, ATTEMPTS.c.started_at, DRIVERS.c.pid)
            .join(DRIVERS, DRIVERS.c.id == ATTEMPTS.c.driver)
            .where(ATTEMPTS.c.study == self.name, ATTEMPTS.c.state == "running")
        )
        try:
            crashes = {(r.number, r.seed): r.crashes for r in self.ledger.replicas(self.name)}
            with self.ledger.read() as tx:
                return [
                    Held(
                        key=AttemptKey(row.number, row.seed, row.attempt),
                        driver_pid=row.pid,
                        crashes=crashes.get((row.number, row.seed), 0),
                        started_at=row.started_at,
                    )
                    for row in tx.execute(query)
                ]
        except (HqltError, sa.exc.SQLAlchemyError):
            return []

    def newest_beat(self) -> float:
        """When a driver that is there last beat, in Unix seconds by the clock of its host; 0 if none can be read."""
        if not self.can_ask:
            return 0.0
        try:
            return max((driver.beat_at for driver in self.ledger.drivers(self.name)), default=0.0)
        except (HqltError, sa.exc.SQLAlchemyError):
            return 0.0

    # Processes

    def processes(self) -> list[psutil.Process]:
        """What came of the commands and lives, orphans included; not the lab's servers."""
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def worker_of(self, key: AttemptKey) -> psutil.Process | None:
        """The process that trains an attempt: who has the lock of its folder open. None if nobody has yet."""
        lock = self.seed_folder(key) / ".lock"
        for process in self.processes():
            with contextlib.suppress(psutil.Error, OSError):
                if str(lock) in (file.path for file in process.open_files()):
                    return process
        return None

    def raylet_of(self, driver: Command) -> psutil.Process | None:
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(driver.process.pid).children(recursive=True):
                if child.name() == "raylet":
                    return child
        return None

    def seed_folder(self, key: AttemptKey) -> Path:
        return self.store.trial_folder(self.name, key.number) / f"seed-{key.seed}"

    def writes_checkpoint(self, held: Held) -> bool:
        """Whether this attempt, and no earlier one, has a checkpoint that is half written."""
        with contextlib.suppress(FileNotFoundError):  # done meanwhile
            half = (self.seed_folder(held.key) / "checkpoints").glob("step-*.tmp")
            return any(path.stat().st_mtime > held.started_at for path in half)
        return False

    def has_begun(self, key: AttemptKey, steps: int = 0) -> bool:
        """Whether this very attempt trains and, in its log, has come `steps` far."""
        _, found, own = self._log(key).rpartition(f"  attempt {key.attempt} of trial")
        return bool(found) and (steps == 0 or any(int(step) >= steps for step in re.findall(r"\nstep (\d+) ", own)))

    def is_over(self, key: AttemptKey) -> bool:
        """Whether a later attempt at the same seed trains, or the seed has a result."""
        if any(int(number) > key.attempt for number in re.findall(r"  attempt (\d+) of trial", self._log(key))):
            return True
        return self.has_result(key)

    def has_result(self, key: AttemptKey) -> bool:
        return any(r.seed == key.seed and r.state in FINISHED for r in self.ledger.replicas(self.name, key.number))

    def _log(self, key: AttemptKey) -> str:
        with contextlib.suppress(FileNotFoundError):
            return (self.seed_folder(key) / "log.txt").read_text(errors="replace")
        return ""

    def orphans(self, patience_s: float = 15.0) -> list[str]:
        """What is still there some time after the last command has ended."""
        deadline = time.monotonic() + patience_s
        while True:
            left: list[str] = []
            for process in self.processes():
                with contextlib.suppress(psutil.Error):
                    left.append(f"process {process.pid}: {' '.join(process.cmdline())[:100]}")
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.2)

    def close(self) -> None:
        if self._ledger is not None:
            self._ledger.close()
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        for command in self._commands:
            command.process.wait()
        if self.mlflow is not None:
            self.mlflow.kill()
        if self.postgres is not None:
            with contextlib.suppress(subprocess.CalledProcessError):
                self.postgres.crash()
            shutil.rmtree(self.postgres._at, ignore_errors=True)
        if self.disk is not None:
            self.disk.unmount()


@contextlib.contextmanager
def locked(database: Path) -> Iterator[None]:
    """Another program holds the write lock of a SQLite file."""
    import sqlite3

    with contextlib.closing(sqlite3.connect(database, isolation_level=None, timeout=30)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            connection.execute("ROLLBACK")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(condition: Any, timeout_s: float, what: str, every_s: float = 0.1) -> None:
    """Raises TimeoutError with `what` was waited for."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(every_s)


def _absent(program: str) -> str:
    raise FileNotFoundError(f"{program} is not installed")
