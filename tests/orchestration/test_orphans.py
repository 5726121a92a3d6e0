"""What a killed driver leaves behind: ended by its identity, and nobody else."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from hqlt_orchestration.driving.orphans import alone_in, end_dead_sessions, new_session
from hqlt_orchestration.records.processes import this_process

HOLDS = """
import sys, time
from pathlib import Path
from hqlt_orchestration.driving.orphans import alone_in
with alone_in(Path(sys.argv[1])):
    print("holds it", flush=True)
    time.sleep(600)
"""
STARTS_A_SESSION = """
import os, subprocess, sys, time
from hqlt_orchestration.driving.orphans import SESSION_VARIABLE, new_session
folder = new_session()
child = subprocess.Popen(["sleep", "600"], env={**os.environ, SESSION_VARIABLE: folder}, start_new_session=True)
print(folder, child.pid, flush=True)
time.sleep(600)
"""


@contextmanager
def started(script: str, *arguments: str, **environment: str) -> Iterator["subprocess.Popen[str]"]:
    """A process that runs `script`; it is killed in the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_process_is_known_by_when_it_started_since_the_machine_did() -> None:
    me = this_process()
    assert me.is_alive
    assert not replace(me, start_s=me.start_s - 0.01).is_alive
    assert not replace(me, boot_id="another").is_alive
    assert replace(me, host="elsewhere").is_alive is None
    assert not replace(me, host="elsewhere").kill()


def test_a_process_that_has_ended_and_only_waits_to_be_asked_for_its_exit_code_is_not_alive() -> None:
    with started("print()") as process:
        identity = replace(this_process(), pid=process.pid)
        process.stdout.read()  # type: ignore[union-attr]  # it is a pipe
        assert not identity.is_alive


def test_a_stopped_process_that_holds_a_replicas_folder_is_killed_by_the_next_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hqlt_orchestration.driving.orphans.ORPHAN_GRACE_S", 0.2)
    with started(HOLDS, str(tmp_path)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holds it\n"
        process.send_signal(signal.SIGSTOP)
        with alone_in(tmp_path):
            assert process.wait(10) == -signal.SIGKILL
        with alone_in(tmp_path):  # and who held it last may have it again
            pass


def test_what_is_left_of_a_dead_drivers_ray_is_ended_and_a_living_ones_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with started(STARTS_A_SESSION, TMPDIR=str(tmp_path)) as driver:
        assert driver.stdout is not None
        folder, _, pid = driver.stdout.readline().rpartition(" ")
        left = psutil.Process(int(pid))
        mine = new_session()
        assert end_dead_sessions() == []
        driver.kill()
        driver.wait()
        assert left.is_running()
        (said,) = end_dead_sessions()
    assert said == f"Ray of process {driver.pid}, which is gone: 1 process ended, {folder} removed"
    assert left.wait(10) in (None, -signal.SIGKILL)
    assert not Path(folder).exists()
    assert Path(mine).exists()
    assert end_dead_sessions() == []
