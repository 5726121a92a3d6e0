"""`hqlt ui`: MLflow's pages on the recorded studies, for this machine and its browser only.

The pages are served by this very process, so they end with the command, however it ends. MLflow asks nobody for a
password, and a browser hands requests of any page it shows to a server on this machine: so a request is answered only
if it names this machine as its host and comes from these pages (or from no page at all, as a program's does).
"""

import contextlib
import os
import socket
import warnings
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from hqlt_search_space.errors import ResourceError, StoreError
from hqlt_search_space.wording import printable

from hqlt_orchestration.records.database import masked
from hqlt_orchestration.records.store import Store

HOST = "127.0.0.1"
SHOWN_STUDIES = 8
ENVIRONMENT = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


def serve(store: Store, port: int) -> None:
    """Serve until Ctrl-C. What MLflow lacks is told to it first.

    Raises:
        StoreError: nothing has been recorded yet, or MLflow does not answer.
        ResourceError: the port is taken.
    """
    _catch_up(store)
    if store.mlflow is not None and not store.mlflow.startswith("sqlite:"):
        print(f"MLflow's pages are at {masked(store.mlflow)}")
        return
    if store.mlflow is None and not (store.data / "mlflow.db").exists():
        raise StoreError(f"nothing is recorded in {store.data} yet; run a study first")
    _check_port(port)
    _run(store, port)


def _run(store: Store, port: int) -> None:
    os.environ |= ENVIRONMENT | {
        "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE": "false",  # whatever the user's own servers have
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(_own_names(port)),
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": f"http://{HOST}:{port}",
    }
    import uvicorn
    from mlflow.server.constants import ARTIFACT_ROOT_ENV_VAR, BACKEND_STORE_URI_ENV_VAR, REGISTRY_STORE_URI_ENV_VAR

    os.environ |= {
        BACKEND_STORE_URI_ENV_VAR: store.mlflow_uri,
        REGISTRY_STORE_URI_ENV_VAR: store.mlflow_uri,
        ARTIFACT_ROOT_ENV_VAR: str(store.artifacts.resolve()),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of MLflow's own imports
        from mlflow.server.fastapi_app import app

    links = _links(store, port)

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            print(f"MLflow's pages are at http://{HOST}:{port} (Ctrl-C ends)", *links, sep="\n", flush=True)

    level = "info" if os.environ.get("HQLT_DEBUG") else "critical"
    # Without its lifespan MLflow does not look for containers of its assistant.
    config = uvicorn.Config(
        guarded(app, port), HOST, port, log_level=level, lifespan="off", timeout_graceful_shutdown=1
    )
    with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises again once it has ended
        Server(config).run()


def _links(store: Store, port: int) -> list[str]:
    """Where the runs of the newest studies are: MLflow itself would first show what it has for language models."""
    from mlflow import MlflowClient

    newest = MlflowClient(store.mlflow_uri).search_experiments(
        max_results=SHOWN_STUDIES, filter_string="tags.`hqlt.study` != ''", order_by=["creation_time DESC"]
    )
    return [
        f"  {printable(found.name)}: http://{HOST}:{port}/#/experiments/{found.experiment_id}/runs" for found in newest
    ]


def _own_names(port: int) -> tuple[str, ...]:
    return f"{HOST}:{port}", f"localhost:{port}"


def guarded(app: App, port: int) -> App:
    """`app` behind a check that refuses (403) what a page of another site, or a name that another site has pointed at
    this machine, makes a browser ask. A link to the pages may be followed from anywhere."""
    hosts = {name.encode() for name in _own_names(port)}
    origins = {b"http://" + name for name in hosts}

    def is_own(scope: Message) -> bool:
        headers = list(scope["headers"])
        if [value for name, value in headers if name == b"host"][:1] not in ([host] for host in hosts):
            return False
        if any(value not in origins for name, value in headers if name == b"origin"):
            return False
        sites = {value for name, value in headers if name == b"sec-fetch-site"}
        modes = {value for name, value in headers if name == b"sec-fetch-mode"}
        return sites <= {b"same-origin", b"none"} or (scope.get("method") == "GET" and modes == {b"navigate"})

    async def guard(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not is_own(scope):
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"refused: this request comes from another site\n"})
        elif scope["type"] == "websocket":  # the pages use none
            await send({"type": "websocket.close"})
        else:
            await app(scope, receive, send)

    return guard


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ResourceError(f"port {port} is taken ({error.strerror}); give another with --port") from error


def _catch_up(store: Store) -> None:
    """Tell MLflow what it lacks of any study: what waits in spools, and what only the ledger knows."""
    from hqlt_orchestration.tracking.writer import catch_up

    for folder in sorted(store.data.glob("studies/*/spool")):
        try:
            catch_up(store, folder.parent.name)
        except Exception as error:
            last = masked(str(error)).strip().splitlines()[-1][:200]
            raise StoreError(f"cannot write to MLflow at {masked(store.mlflow_uri)}: {last}") from error
