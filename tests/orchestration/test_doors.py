"""Who can talk to what `hqlt` starts: this machine and its browser, and nobody else."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hqlt_orchestration.driving.doors import Door, doors, open_doors_sentence
from hqlt_orchestration.records.store import Store
from hqlt_orchestration.tracking.spool import Spool

HQLT = Path(sys.executable).parent / "hqlt"
STUDY = """\
schema_version: 1
name: endless
task: {kind: parity, train_length: {low: 3, high: 8}, test_length: {low: 8, high: 12}, n_validation: 64, n_test: 64}
model: {d_model: 16, n_layers: 1, n_heads: 2, mlp_ratio: 2}
recipe: {steps: 1000000, batch: 8}
search: {sampler: {kind: random}, space: {first: [hybrid, fast_weight, attention], window: [2, 4]}}
objectives: {validation_loss_nats: minimize, state_bytes: minimize}
budget: {trials: 3}
resources: {gpu: 0}
"""


@contextlib.contextmanager
def running(folder: Path, *arguments: str, **environment: str) -> Iterator["subprocess.Popen[str]"]:
    """`hqlt` with `arguments` until the end of the block; then nothing of it is left."""
    process = subprocess.Popen(
        [HQLT, *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=60)
        finally:
            process.kill()


def test_a_running_study_listens_on_the_loopback_device_alone_and_wants_its_token(tmp_path: Path) -> None:
    (tmp_path / "endless.yaml").write_text(STUDY)
    home = tmp_path / "home"
    home.mkdir()
    with running(tmp_path, "study", "run", "endless.yaml", HOME=str(home), RAY_AUTH_TOKEN="") as study:
        while not list(tmp_path.glob("hqlt-data/studies/endless/trials/*/seed-0/log.txt")):
            assert study.poll() is None, study.communicate()
            time.sleep(0.1)
        found = doors(study.pid)
        assert {"gcs_server", "raylet"} <= {door.program for door in found}
        assert [door for door in found if not door.is_loopback] == []
        (gcs,) = [door for door in found if door.program == "gcs_server"]
        stranger = subprocess.run(
            [sys.executable, "-c", f"import ray; ray.init('127.0.0.1:{gcs.port}')"],
            env={
                **os.environ,
                "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": "0" * 64,
            },
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "Failed to connect to Ray cluster" in stranger.stderr
        assert not (home / ".ray").exists()  # where Ray would leave a token that everybody can read


def test_an_open_door_is_told_by_its_number() -> None:
    with socket.create_server(("0.0.0.0", 0)) as everywhere, socket.create_server(("127.0.0.1", 0)) as here:
        found = doors()
        open_port, closed_port = everywhere.getsockname()[1], here.getsockname()[1]
    own = {door.port: door.is_loopback for door in found}
    assert (own[open_port], own[closed_port]) == (False, True)
    sentence = open_doors_sentence(found) or ""
    assert (str(open_port) in sentence, str(closed_port) in sentence) == (True, False)
    assert open_doors_sentence([Door(1, "::1", "a"), Door(2, "::ffff:127.0.0.1", "b")]) is None


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port at which `hqlt ui` serves a study that was mirrored."""
    folder = tmp_path_factory.mktemp("pages")
    store = Store(folder / "hqlt-data")
    assert Spool(store, "small").close(60) == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    # What a user allows to servers of their own must not open this one.
    lax = {"MLFLOW_SERVER_ALLOWED_HOSTS": "*", "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE": "true"}
    with running(folder, "ui", "--port", str(port), **lax) as ui:
        assert ui.stdout is not None
        assert ui.stdout.readline() == f"MLflow's pages are at http://127.0.0.1:{port} (Ctrl-C ends)\n"
        assert ui.stdout.readline() == f"  small: http://127.0.0.1:{port}/#/experiments/1/runs\n"
        assert [door for door in doors(ui.pid) if not door.is_loopback] == []
        yield port


def ask(port: int, method: str, path: str, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    sent = {"Host": f"127.0.0.1:{port}"} | {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body=b'{"max_results": 5}' if method != "GET" else None, headers=sent)
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


SEARCH = "/ajax-api/2.0/mlflow/experiments/search"
FORBIDDEN: dict[str, tuple[str, str, dict[str, str]]] = {
    "another name": ("GET", "/", {"Host": "evil.example"}),
    "another name, health": ("GET", "/health", {"Host": "evil.example"}),
    "private address": ("GET", "/", {"Host": "10.1.2.3"}),
    "private address and port": ("GET", SEARCH + "?max_results=5", {"Host": "192.168.0.1:{port}"}),
    "our name as a part": ("GET", "/", {"Host": "127.0.0.1.evil.example:{port}"}),
    "another port": ("GET", "/", {"Host": "127.0.0.1:1"}),
    "no name": ("GET", "/", {"Host": ""}),
    "form of another site": ("POST", SEARCH, {"Origin": "http://evil.example", "Content_Type": "text/plain"}),
    "sandboxed page": ("POST", SEARCH, {"Origin": "null"}),
    "another server here": ("POST", SEARCH, {"Origin": "http://127.0.0.1:1"}),
    "outside the API": ("POST", "/graphql", {"Origin": "http://evil.example"}),
    "traces": ("POST", "/v1/traces", {"Origin": "http://evil.example"}),
    "read by another site": ("GET", SEARCH + "?max_results=5", {"Origin": "http://evil.example"}),
    "no origin": ("POST", SEARCH, {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "no-cors"}),
    "sibling site": ("GET", "/", {"Sec_Fetch_Site": "same-site", "Sec_Fetch_Mode": "no-cors"}),
    "form that navigates": ("POST", SEARCH, {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"}),
    "preflight": ("OPTIONS", SEARCH, {"Origin": "http://evil.example", "Access_Control_Request_Method": "POST"}),
}


@pytest.mark.parametrize("case", FORBIDDEN)
def test_the_pages_answer_no_request_that_another_site_made(case: str, pages: int) -> None:
    method, path, headers = FORBIDDEN[case]
    filled = {name: value.format(port=pages) for name, value in headers.items()}
    assert ask(pages, method, path, **filled) == (403, b"refused: this request comes from another site\n")


ALLOWED: dict[str, tuple[str, str, dict[str, str]]] = {
    "a link is followed": ("GET", "/", {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"}),
    "localhost": ("GET", "/", {"Host": "localhost:{port}"}),
    "a program": ("GET", SEARCH + "?max_results=5", {}),
    "the pages' own script": (
        "POST",
        SEARCH,
        {"Origin": "http://127.0.0.1:{port}", "Sec_Fetch_Site": "same-origin", "Content_Type": "application/json"},
    ),
}


@pytest.mark.parametrize("case", ALLOWED)
def test_the_pages_answer_their_own_browser_tab_and_programs(case: str, pages: int) -> None:
    method, path, headers = ALLOWED[case]
    status, body = ask(pages, method, path, **{name: value.format(port=pages) for name, value in headers.items()})
    assert (status, bool(body)) == (200, True)
