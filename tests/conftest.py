"""What several folders of tests share."""

import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from hqlt_search_space.trial import Config, Environment, ReplicaResult, Trial, TrialResult

# Without a CUDA device the Triton kernels run in Triton's interpreter. It is chosen when a kernel is decorated, that
# is, when any test first imports one: so here, before all of them.
if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_report_header() -> str:
    """What the kernels run on."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__}, no CUDA device"
    return f"torch {torch.__version__}, triton {version('triton')}, {torch.cuda.get_device_name()}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, for all to see, what needs a CUDA device where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: make test-gpu on a machine with one"))


@pytest.fixture(scope="session")
def environment() -> Environment:
    """Where nothing was run."""
    return Environment(
        python="3",
        torch="2",
        hqlt="0",
        source_version=None,
        platform="",
        cpu="",
        instruction_set="",
        n_threads=1,
        device="cpu",
    )


@pytest.fixture(scope="session")
def make_outcome(environment: Environment) -> Callable[..., TrialResult]:
    """A result of one seed of a config, which nobody has trained."""

    def make(config: Config, seed: int = 0, loss: float = 1.0, status: str = "complete") -> TrialResult:
        measured = {"seed": seed, "status": status, "step": 5, "metrics": {"validation_loss_nats": loss}}
        replicas = (ReplicaResult.model_validate(measured),)
        return TrialResult(trial=Trial(config=config, seeds=(seed,)), replicas=replicas, environment=environment)

    return make


@pytest.fixture(scope="session")
def ray() -> Iterator[None]:
    """One Ray for all tests that need it: it takes seconds to start. Executors find it running and leave it alone."""
    from hqlt_orchestration.driving.ray_pool import start_ray

    folder = start_ray(2, None)  # before anything imports ray, which then reads its settings
    import ray

    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/hqlt.db"
    server: str = request.getfixturevalue("postgresql")
    name = f"t{abs(hash(str(tmp_path)))}"
    import psycopg
    from sqlalchemy import make_url  # not at the top: the GPU tests run where there is no database

    parsed = make_url(server)
    with psycopg.connect(host=parsed.host, port=parsed.port, user="postgres", autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    return parsed.set(database=name).render_as_string()


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL server of our own on loopback; skipped where it is not installed."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not programs and shutil.which("initdb"):
        programs = [Path(str(shutil.which("initdb")))]
    if not programs:
        pytest.skip("PostgreSQL is not installed")
    folder = Path("/tmp") / f"hqlt-pg-{os.getpid()}"  # short, for its socket, and open to the user that it runs as
    folder.mkdir()
    as_user: list[str] = []
    if os.getuid() == 0:
        try:
            owner = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
        os.chown(folder, owner.pw_uid, owner.pw_gid)
        as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    bin_folder = programs[-1].parent
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": "/"}
    data = str(folder / "data")
    subprocess.run([*as_user, str(bin_folder / "initdb"), "-D", data, "-A", "trust", "-U", "postgres"], **quiet)
    control = [*as_user, str(bin_folder / "pg_ctl"), "-D", data, "-w"]
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    subprocess.run([*control, "-l", str(folder / "log"), "-o", options, "start"], **quiet)
    yield f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres"
    subprocess.run([*control, "-m", "immediate", "stop"], **quiet)
    shutil.rmtree(folder, ignore_errors=True)
