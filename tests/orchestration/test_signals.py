"""Ctrl-C and SIGTERM for the real command: what it leaves, what it says, and that nothing of it lives on."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from hqlt_orchestration.records.store import Store
from hqlt_orchestration.records.tables import AttemptRow
from hqlt_trainer.checkpoint import latest_checkpoint

STUDY = """
schema_version: 1
name: small
task: {kind: parity, train_length: {low: 3, high: 8}, test_length: {low: 8, high: 12}, n_validation: 64, n_test: 64}
model: {d_model: 16, n_layers: 2, n_heads: 2}
recipe: {steps: 1000000, batch: 8}
search: {sampler: {kind: random}, space: {rule: [additive, delta], window: [4, 8]}}
objectives: {validation_loss_nats: minimize}
budget: {trials: 2, parallel: 2}
resources: {gpu: 0}
"""
MARK = "HQLT_TEST_MARK"


class Command:
    """`hqlt study ...` in a session of its own, as a terminal would have it."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.mark = f"{MARK}={uuid4()}"
        name, value = self.mark.split("=")
        self.output = folder / f"{value}.txt"
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from hqlt_orchestration.cli import main; main()", *arguments],
                cwd=folder,
                stdout=file,
                stderr=file,
                start_new_session=True,
                env={**os.environ, name: value},
            )

    def processes(self) -> dict[int, str]:
        """Process id -> command line of all its processes, which have inherited its mark."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self.mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                    found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
        return found

    def signal_all(self, number: signal.Signals, which: str = "") -> None:
        """Signal those of its processes whose command line has `which` in it."""
        for pid, line in self.processes().items():
            if which in line:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def kill(self) -> None:
        """Whatever a failed test leaves."""
        self.signal_all(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def hqlt(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    (tmp_path / "small.yaml").write_text(STUDY)
    commands: list[Command] = []

    def start(*arguments: str) -> Command:
        commands.append(Command(tmp_path, *arguments))
        return commands[-1]

    yield start
    for command in commands:
        command.kill()


def wait_until(true: Callable[[], bool], what: str, seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"still waiting for {what}"
        time.sleep(0.1)


def attempts(store: Store) -> list[AttemptRow]:
    if not (store.data / "hqlt.db").exists():
        return []
    ledger = store.open()
    try:
        return ledger.attempts("small")
    finally:
        ledger.close()


def test_an_interrupt_pauses_a_study_with_checkpoints_and_a_second_one_ends_it_at_once(
    hqlt: Callable[..., Command], tmp_path: Path
) -> None:
    store = Store(tmp_path / "hqlt-data")

    def two_train() -> bool:
        assert commands[-1].process.poll() is None, commands[-1].output.read_text()
        return sum(one.state == "running" and one.step > 0 for one in attempts(store)) == 2

    commands = [hqlt("study", "run", "small.yaml")]
    first = commands[-1]
    wait_until(two_train, "two trials that train")
    asked = time.monotonic()
    os.killpg(first.process.pid, signal.SIGINT)  # a terminal sends Ctrl-C to all processes of the command
    assert first.process.wait(60) == 1
    print(f"Ctrl-C: ended with checkpoints after {time.monotonic() - asked:.1f} s")  # shown with -rP
    assert "stopping: trials write their checkpoints" in first.output.read_text()
    assert "paused; continue with: hqlt study resume small" in first.output.read_text()
    wait_until(lambda: not first.processes(), f"the end of {first.processes()}", 30)
    ledger = store.open()
    assert ledger.study("small").state == "paused"
    assert ledger.drivers("small") == []
    assert [one.state for one in ledger.attempts("small")] == ["paused", "paused"]
    for row in ledger.trials("small"):
        folder = store.trial_folder("small", row.number) / "seed-0" / "checkpoints"
        found, damaged = latest_checkpoint(folder, row.config.config_id)
        assert found is not None
        assert found.step > 0
        assert damaged == ()
    ledger.close()

    commands.append(hqlt("study", "resume", "small"))
    second = commands[-1]
    wait_until(two_train, "two trials that train again")
    second.signal_all(signal.SIGSTOP, "ray::Worker")  # they write no checkpoint, so the command waits for them
    second.process.send_signal(signal.SIGTERM)
    wait_until(lambda: "stopping" in second.output.read_text(), "the first SIGTERM to be heard")
    asked = time.monotonic()
    second.process.send_signal(signal.SIGTERM)
    assert second.process.wait(60) == 1
    print(f"the second SIGTERM: ended after {time.monotonic() - asked:.1f} s")
    assert "ended at once; from the last checkpoints on: hqlt study resume small" in second.output.read_text()
    wait_until(lambda: not second.processes(), f"the end of {second.processes()}", 30)
    ledger = store.open()
    assert ledger.study("small").state == "paused"
    assert ledger.drivers("small") == []
    assert [one.state for one in ledger.attempts("small")] == ["paused", "lost"] * 2
    assert ledger.counts("small")["running"] == 0
    ledger.close()
