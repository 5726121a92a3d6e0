"""Databases that every ledger test runs on."""

import os
import pwd
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import make_url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/hqlt.db"
    server: str = request.getfixturevalue("postgresql")
    name = f"t{abs(hash(str(tmp_path)))}"
    import psycopg

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
