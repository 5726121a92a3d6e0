"""MLflow's server is killed for ten minutes while four trials report: what that costs them, and what MLflow has then.

python tests/chaos/outage.py --seconds 600
"""

import argparse
import os
import sqlite3
import tempfile
import time
from pathlib import Path

import psutil
from hqlt_orchestration.records.store import Store
from hqlt_orchestration.tracking.spool import Spool, unshipped_bytes
from lab import MlflowServer

N_TRIALS = 4
N_METRICS = 8
EVERY_S = 0.1


class Reporters:
    """Trials that report every metric at every step, in the driver's way, and how long each report took."""

    def __init__(self, store: Store) -> None:
        self._spool = Spool(store, "outage")
        self.n_steps = 0
        self.took_s: list[float] = []

    def report(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.n_steps += 1
            metrics = {f"metric_{i}": self.n_steps + i / N_METRICS for i in range(N_METRICS)}
            for number in range(N_TRIALS):
                record = {"phase": "search", "number": number, "step": self.n_steps, "metrics": metrics}
                began = time.perf_counter()
                self._spool.put({"kind": "metrics", **record})
                self.took_s.append(time.perf_counter() - began)
            time.sleep(EVERY_S)

    @property
    def writer(self) -> psutil.Process:
        return psutil.Process(self._spool._writer.pid)

    def close(self) -> int:
        return self._spool.close(300)


def processor_s(process: psutil.Process) -> float:
    """The processor time of a process and its children so far."""
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(time.user + time.system for time in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long the server is down")
    seconds: float = parser.parse_args().seconds
    with tempfile.TemporaryDirectory(prefix="hqlt-outage-") as temporary:
        folder = Path(temporary)
        server = MlflowServer(folder / "mlflow")
        try:
            store = Store(folder, mlflow=server.url)
            reporters = Reporters(store)
            reporters.report(20)
            server.kill()
            reporters.report(seconds)
            server.start()
            while not server.answers:
                reporters.report(1)
            back, writer = time.monotonic(), reporters.writer
            spent_s = [processor_s(server.process), processor_s(writer)]
            while unshipped_bytes(store.spool_folder("outage")) > 50_000 and time.monotonic() - back < 600:
                reporters.report(1)
            caught_up_s = time.monotonic() - back
            spent_s = [processor_s(server.process) - spent_s[0], processor_s(writer) - spent_s[1]]
            left = reporters.close()
        finally:
            server.kill()
        with sqlite3.connect(folder / "mlflow" / "mlflow.db") as database:
            query = "SELECT count(*), count(DISTINCT key || run_uuid || step) FROM metrics WHERE key LIKE 'metric_%'"
            n_points, n_distinct = database.execute(query).fetchone()
        database.close()
    took = sorted(reporters.took_s)
    p50, p99, p999 = (took[int(share * len(took))] * 1e6 for share in (0.5, 0.99, 0.999))
    n_told = reporters.n_steps * N_TRIALS * N_METRICS
    print(
        f"down for {seconds:.0f} s: {n_told} points told, MLflow has {n_points}, {n_points - n_distinct} of them twice"
    )
    print(f"shipped {caught_up_s:.0f} s after the server answered again; {left} bytes left in the end")
    print(f"processor time meanwhile: {spent_s[0]:.1f} s of MLflow's, {spent_s[1]:.1f} s of the writer's")
    print(f"load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores")
    print(f"to append a record: p50 {p50:.0f} us, p99 {p99:.0f} us, p99.9 {p999:.0f} us, max {took[-1] * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
