"""`hqlt ui`: MLflow's pages on the recorded studies, for this machine only."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from hqlt_search_space.errors import ResourceError, StoreError

from hqlt_orchestration.store import Store

HOST = "127.0.0.1"
READY_S = 60.0  # 6 to 12 s on two quiet cores
# Without the job runner and its seven consumers MLflow needs 2 processes and half a gigabyte instead of 15 and 2.6.
ENVIRONMENT = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}


def serve(store: Store, port: int) -> None:
    """Serve until Ctrl-C. What waits in a spool is shipped first.

    Raises:
        StoreError: nothing has been recorded yet.
        ResourceError: the port is taken, or the server does not start.
    """
    if store.mlflow is not None and not store.mlflow.startswith("sqlite:"):
        print(f"MLflow's pages are at {store.mlflow}")
        return
    _ship_leftovers(store)
    if store.mlflow is None and not (store.data / "mlflow.db").exists():
        raise StoreError(f"nothing is recorded in {store.data} yet; run a study first")
    _check_port(port)
    server = start(store, port)
    try:
        wait_until_ready(server, port)
        print(f"MLflow's pages are at http://{HOST}:{port} (Ctrl-C ends)", flush=True)
        server.wait()
    except KeyboardInterrupt:
        print(file=sys.stderr)
    finally:
        server.terminate()
        server.wait()


def start(store: Store, port: int) -> "subprocess.Popen[bytes]":
    """The server process, which is not ready yet."""
    return subprocess.Popen(  # noqa: S603  our own interpreter and MLflow's command
        [
            *(sys.executable, "-m", "mlflow", "server"),
            *("--backend-store-uri", store.mlflow_uri),
            *("--default-artifact-root", str(store.artifacts.resolve())),
            *("--host", HOST, "--port", str(port), "--workers", "1"),
        ],
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.DEVNULL,
        stderr=sys.stderr if os.environ.get("HQLT_DEBUG") else subprocess.DEVNULL,
    )


def wait_until_ready(server: "subprocess.Popen[bytes]", port: int) -> None:
    """Return once the server answers.

    Raises:
        ResourceError: it ended, or does not answer in `READY_S`.
    """
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise ResourceError(f"MLflow's server ended with code {server.returncode}; HQLT_DEBUG=1 shows what it said")
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=1):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.2)
    raise ResourceError(f"MLflow's server does not answer on port {port} after {READY_S:.0f} s")


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ResourceError(f"port {port} is taken ({error.strerror}); give another with --port") from error


def _ship_leftovers(store: Store) -> None:
    from hqlt_orchestration.tracking import start_writer, unshipped_bytes

    folders: list[Path] = [folder for folder in store.data.glob("studies/*/spool") if unshipped_bytes(folder)]
    for folder in folders:
        writer = start_writer(folder, uri=store.mlflow_uri, artifacts=store.artifacts)
        assert writer.stdin is not None
        writer.stdin.close()
        writer.wait()
