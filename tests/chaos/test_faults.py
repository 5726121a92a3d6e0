"""One real fault each, and what has to be true after it. The rows are those of the table in orchestration/README.md."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hqlt_orchestration.commands.invariants import invariants, mirror_violations
from hqlt_orchestration.records.attempts import AttemptKey
from hqlt_orchestration.records.drivers import DriverWatch
from hqlt_orchestration.records.leases import take_back
from hqlt_search_space.trial import Trial
from hqlt_trainer.run import run_trial
from lab import Command, Lab, locked, study_text, wait_until

MakeLab = Callable[..., Lab]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's own
STEPS = 400  # four seconds of an idle core
PATIENCE_S = 300.0  # for a machine that does ten other things


def text(trials: int = 1, steps: int = STEPS, parallel: int = 1, **keys: object) -> str:
    return study_text("chaos", trials=trials, steps=steps, parallel=parallel, **keys)


def wait_for_training(lab: Lab, command: Command, number: int = 0, steps: int = 1) -> AttemptKey:
    """Until the driver of `command` holds trial `number`, and that has come some steps far."""

    def far_enough() -> list[AttemptKey]:
        assert not command.has_ended, command.said
        held = [one.key for one in lab.held() if one.driver_pid == command.process.pid and one.key.number >= number]
        return [key for key in held if lab.has_begun(key, steps)]

    wait_until(far_enough, PATIENCE_S, f"trial {number} to train")
    return far_enough()[0]


def assert_sound_and_complete(lab: Lab) -> None:
    """The study is what it would have been without a fault: to the bit, and nothing is left of what ran it."""
    assert lab.orphans() == []
    assert invariants(lab.store, lab.name) == []
    assert mirror_violations(lab.store, lab.name) == []
    row = lab.ledger.study(lab.name)
    assert lab.ledger.counts(lab.name)["complete"] == row.budget
    for number in range(row.budget):
        assert_as_alone(lab, number)


def assert_as_alone(lab: Lab, number: int) -> None:
    """The result of a trial is that of its training alone, to the bit."""
    (replica,) = lab.ledger.replicas(lab.name, number)
    assert replica.result is not None
    trial = Trial(config=lab.ledger.trial(lab.name, number).config)
    (expected,) = run_trial(trial, lab.folder / "alone" / str(number)).replicas
    assert replica.result.weights_sha256 == expected.weights_sha256
    assert (replica.result.metrics, replica.result.curve) == (expected.metrics, expected.curve)


# Row 2

WRITER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from hqlt_trainer.checkpoint import latest_checkpoint, save_checkpoint

folder, generator, inside, config = Path(sys.argv[1]), random.Random(int(sys.argv[2])), 0, "0123456789abcdef"
print("seed", sys.argv[2])
for _ in range(40):
    before, _ = latest_checkpoint(folder, config)
    writer = os.fork()
    if writer == 0:
        for step in range(before.step + 1 if before else 1, 10**6):
            tensors = {"weight": torch.full((300, 300), float(step))}
            save_checkpoint(folder, step, config_id=config, model=tensors, optimiser=tensors, state={"step": step})
    time.sleep(generator.uniform(0.01, 0.06))
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    inside += any(folder.glob("*.tmp"))
    after, notes = latest_checkpoint(folder, config)
    assert not notes, notes
    assert before is None or after.step >= before.step, (before.step, after)
    assert after is None or bool((after.model["weight"] == after.step).all() and after.state == {"step": after.step})
print("killed inside a write", inside)
assert inside and after is not None
"""


def test_forty_kills_in_the_writing_of_a_checkpoint_leave_a_whole_one(tmp_path: Path) -> None:
    seed = str(time.time_ns() % 10**6)
    ran = subprocess.run(
        [sys.executable, "-c", WRITER, str(tmp_path), seed], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


# Row 3


def test_a_killed_driver_is_followed_by_one_that_loses_and_doubles_nothing(make_lab: MakeLab) -> None:
    lab = make_lab(text(trials=2))
    driver = lab.run("--executor", "ray")
    key = wait_for_training(lab, driver, steps=100)
    driver.kill()
    again = lab.resume("--executor", "inline")
    assert again.wait(PATIENCE_S) == 0, again.said
    assert f"trial {key.number}, seed {key.seed}: its driver is gone; it is tried again" in again.said
    assert_sound_and_complete(lab)


# Row 5


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a disk to fill")
def test_a_full_disk_ends_the_command_with_a_sentence_and_room_lets_it_go_on(make_lab: MakeLab) -> None:
    lab = make_lab(text(), disk_mib=96)
    assert lab.disk is not None
    driver = lab.run("--executor", "inline")
    wait_for_training(lab, driver, steps=100)
    lab.disk.fill()
    assert driver.wait(PATIENCE_S) != 0
    assert "full" in driver.said
    assert "Traceback" not in driver.said
    lab.disk.free()
    again = lab.resume("--executor", "inline")
    assert again.wait(PATIENCE_S) == 0, again.said
    assert_sound_and_complete(lab)


# Rows 6 and 7


def test_a_database_that_another_program_locks_is_waited_for_and_a_killed_writer_replaced(make_lab: MakeLab) -> None:
    lab = make_lab(text())
    driver = lab.run("--executor", "inline")
    wait_for_training(lab, driver, steps=100)
    (writer,) = [one for one in lab.processes() if "hqlt_orchestration.tracking.writer" in one.cmdline()]
    writer.kill()
    with locked(lab.store.data / "hqlt.db"):
        time.sleep(5)
    assert driver.wait(PATIENCE_S) == 0, driver.said
    assert_sound_and_complete(lab)


def test_a_postgresql_that_crashes_under_a_study_costs_it_nothing(make_lab: MakeLab) -> None:
    lab = make_lab(text(), database="postgresql")
    assert lab.postgres is not None
    driver = lab.run("--executor", "inline")
    wait_for_training(lab, driver, steps=100)
    lab.postgres.crash()
    time.sleep(3)
    lab.postgres.start()
    if driver.wait(PATIENCE_S):  # it may not have waited so long, but then it says what to do
        assert "Traceback" not in driver.said
        again = lab.resume("--executor", "inline")
        assert again.wait(PATIENCE_S) == 0, again.said
    assert_sound_and_complete(lab)


# Row 12

STEPPED_CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    long offset = 0;
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    FILE *file = clock == CLOCK_REALTIME && getenv("CLOCK") ? fopen(getenv("CLOCK"), "r") : 0;
    if (file) { if (fscanf(file, "%ld", &offset) == 1) now->tv_sec += offset; fclose(file); }
    return failed;
}
"""


def test_a_clock_that_is_set_an_hour_back_and_forth_costs_no_trial(make_lab: MakeLab, tmp_path: Path) -> None:
    clock = tmp_path / "clock"
    clock.write_text("0")
    shim = str(_compiled(STEPPED_CLOCK, tmp_path))
    lab = make_lab(text(steps=100_000), environment={"LD_PRELOAD": shim, "CLOCK": str(clock)})
    driver = lab.run("--executor", "inline")
    key = wait_for_training(lab, driver)
    for offset in (3600, -3600):
        clock.write_text(str(offset))
        wait_until(lambda shown=offset: abs(lab.newest_beat() - time.time() - shown) < 600, PATIENCE_S, "the new time")
        _join_for_a_moment(lab)  # a second driver judges the first, by a clock that is an hour off
    driver.terminate()
    assert driver.wait(PATIENCE_S) == 1, driver.said
    assert [(attempt.attempt, attempt.state) for attempt in lab.ledger.attempts("chaos")] == [(1, "paused")]
    saved = max(lab.seed_folder(key).glob("checkpoints/step-*/state.json"), key=lambda path: path.stat().st_mtime)
    progress = json.loads(saved.read_text())["progress"]
    assert progress["wall_seconds"] > progress["train_seconds"] > 0
    assert invariants(lab.store, "chaos") == []


def _join_for_a_moment(lab: Lab) -> None:
    lab.environment = {}
    joined = lab.resume("--executor", "inline")
    wait_until(lambda: len(lab.ledger.drivers("chaos")) == 2 or joined.has_ended, PATIENCE_S, "the second driver")
    joined.terminate()
    joined.wait(PATIENCE_S)


# Rows 1, 4, 20 and 21


def test_a_worker_that_is_killed_or_stopped_and_a_node_that_dies_cost_no_trial(make_lab: MakeLab) -> None:
    """One study, because Ray takes seconds to start; they strike one after the other. It is not run to its end.

    Only a trial whose worker is killed twice is given up.
    """
    lab = make_lab(text(trials=100, parallel=2, resources={"gpu": 0, "hang_after_s": 8}))
    driver = lab.run()
    killed = wait_for_training(lab, driver)
    _signal_worker(lab, killed, signal.SIGKILL)
    wait_until(lambda: lab.is_over(killed), PATIENCE_S, "another attempt after SIGKILL")
    stopped = wait_for_training(lab, driver, number=killed.number + 1, steps=100)
    _signal_worker(lab, stopped, signal.SIGSTOP)
    # A second blow would rightly quarantine them.
    wait_until(lambda: lab.has_result(killed) and lab.has_result(stopped), PATIENCE_S, "both trials to end")
    poison = wait_for_training(lab, driver, number=stopped.number + 1)
    _signal_worker(lab, poison, signal.SIGKILL)
    second_try = replace(poison, attempt=2)
    wait_until(lambda: lab.has_begun(second_try), PATIENCE_S, "its second attempt")
    _signal_worker(lab, second_try, signal.SIGKILL)
    wait_until(lambda: lab.has_result(poison), PATIENCE_S, "it to be given up")
    hit = wait_for_training(lab, driver, number=poison.number + 1)
    raylet = lab.raylet_of(driver)
    assert raylet is not None
    raylet.kill()
    assert driver.wait(PATIENCE_S) != 0
    assert "Ray's node is dead" in driver.said
    again = lab.resume()
    wait_for_training(lab, again)
    wait_until(lambda: lab.is_over(hit), PATIENCE_S, "another attempt after the end of the node")
    again.terminate()
    assert again.wait(PATIENCE_S) == 1, again.said
    states = {(a.number, a.attempt): a.state for a in lab.ledger.attempts("chaos")}
    assert states[killed.number, killed.attempt] == "crashed"
    assert states[stopped.number, stopped.attempt] == "hung"
    assert [replica.state for replica in lab.ledger.replicas("chaos", poison.number)] == ["quarantined"]
    assert lab.ledger.counts("chaos")["quarantined"] == 1
    assert lab.orphans() == []
    assert invariants(lab.store, lab.name) == []
    assert_as_alone(lab, killed.number)
    assert_as_alone(lab, stopped.number)


def _signal_worker(lab: Lab, key: AttemptKey, number: int) -> None:
    worker = lab.worker_of(key)
    assert worker is not None
    worker.send_signal(number)


# Hosts


def test_a_driver_on_another_host_that_dies_is_known_by_its_beats_alone(make_lab: MakeLab) -> None:
    """The host is a namespace with a name of its own, which is what tells hosts apart."""
    if os.getuid() != 0:
        pytest.skip("only root can make a namespace")
    lab = make_lab(text(steps=20_000))
    driver = lab.run("--executor", "inline", elsewhere="far-away")
    wait_until(lambda: lab.held(), PATIENCE_S, "its lease")
    (row,) = lab.ledger.drivers("chaos")
    assert row.host == "far-away"
    watch = DriverWatch(stale_after_s=8)
    until = time.monotonic() + 10
    while time.monotonic() < until:  # longer than what it may be silent
        assert watch.dead(lab.ledger.drivers("chaos")) == []
        time.sleep(0.5)
    driver.kill()
    wait_until(lambda: watch.dead(lab.ledger.drivers("chaos")), PATIENCE_S, "the silence to be noticed")
    take_back(lab.ledger, "chaos", watch.dead(lab.ledger.drivers("chaos")))
    assert invariants(lab.store, "chaos") == []


# Row 23

FAILING_FSYNC = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
static int calls;
int fsync(int descriptor) {
    static int (*real)(int);
    if (!real) real = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    if (getenv("FAIL_AT") && calls++ == atoi(getenv("FAIL_AT"))) { errno = EIO; return -1; }
    return real(descriptor);
}
"""
SAVER = """
import sys
from pathlib import Path
import torch
from hqlt_trainer.checkpoint import latest_checkpoint, save_checkpoint

folder, config = Path(sys.argv[1]), "0123456789abcdef"
tensors = {"weight": torch.ones(10)}
try:
    save_checkpoint(folder, 2, config_id=config, model=tensors, optimiser=tensors, state={})
except OSError as error:
    print(error.strerror)
found, notes = latest_checkpoint(folder, config)
print(found.step, notes)
"""


def test_a_checkpoint_that_could_not_be_synced_is_given_up_and_written_anew(tmp_path: Path) -> None:
    """The kernel reports an I/O error once and then forgets it: what could not be synced is not synced again."""
    shim = _compiled(FAILING_FSYNC, tmp_path)
    folder = tmp_path / "checkpoints"

    def save(**environment: str) -> list[str]:
        code = SAVER.replace("2, config_id", environment.pop("STEP", "2") + ", config_id")
        ran = subprocess.run(
            [sys.executable, "-c", code, str(folder)],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return ran.stdout.splitlines()

    assert save(STEP="1") == ["1 ()"]
    assert save(LD_PRELOAD=str(shim), FAIL_AT="1") == ["Input/output error", "1 ()"]
    assert not list(folder.glob("*.tmp"))
    assert save() == ["2 ()"]


def _compiled(source: str, folder: Path) -> Path:
    """A library for LD_PRELOAD."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    shim = folder / "shim.so"
    compile_it = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(shim), "-ldl"]
    subprocess.run(compile_it, input=source, text=True, check=True)
    return shim
