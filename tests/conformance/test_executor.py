"""What any executor must do. One worker trains for real: the smallest parity models."""

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from hqlt_orchestration.driving.executor import (
    END,
    Crashed,
    Event,
    Executor,
    Finished,
    Job,
    Measured,
    Paused,
    RungReached,
)
from hqlt_orchestration.driving.inline import InlineExecutor
from hqlt_orchestration.driving.ray_pool import RayExecutor, start_ray
from hqlt_orchestration.records.attempts import LOG_FILE, AttemptKey, replica_folder
from hqlt_search_space.arch import Arch
from hqlt_search_space.errors import ResourceError
from hqlt_search_space.mixers import Attention
from hqlt_search_space.recipe import Recipe
from hqlt_search_space.tasks import Lengths, Nothing, Parity
from hqlt_search_space.trial import Config, Trial

LONG = 5_000  # steps: nobody waits for their end


def config(steps: int, task: Parity | Nothing | None = None) -> Config:
    short = Lengths(low=3, high=6)
    parity = Parity(train_length=short, test_length=short, n_validation=16, n_test=16)
    return Config(
        arch=Arch(d_model=8, mlp_inner=8, layers=(Attention(n_heads=2),)),
        recipe=Recipe(steps=steps, batch=4, learning_rate=1e-3),
        task=task or parity,
    )


@pytest.fixture(params=["inline", "ray"], scope="module")
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    made: Executor
    if request.param == "inline":
        made = InlineExecutor(cpus=1, gpus=0)
    else:
        request.getfixturevalue("ray")
        made = RayExecutor(slots=1, cpus=1, gpus=0)
        wait_for(made, lambda _events: made.free() == 1)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _idle(request: pytest.FixtureRequest) -> None:
    """Whatever the test before did to the executor, it has a free slot again."""
    if "executor" in request.fixturenames:
        executor: Executor = request.getfixturevalue("executor")
        wait_for(executor, lambda _events: executor.free() == 1)


def wait_for(executor: Executor, enough: Callable[[list[Event]], bool], seconds: float = 60) -> list[Event]:
    """Every event until `enough` of them."""
    events: list[Event] = []
    deadline = time.monotonic() + seconds
    while not enough(events):
        assert time.monotonic() < deadline, f"still waiting; so far {events}"
        events += executor.poll(0.2)
    return events


def ended(events: list[Event]) -> bool:
    return any(isinstance(event, END) for event in events)


_attempts = itertools.count(1)


def job(folder: Path, steps: int, rungs: tuple[int, ...] = ()) -> Job:
    """A job with a key of its own, as the ledger gives them."""
    return Job((AttemptKey(3, 1, next(_attempts)),), Trial(config=config(steps), seeds=(1,), rungs=rungs), folder)


def test_a_job_ends_with_its_result_and_frees_its_slot(executor: Executor, tmp_path: Path) -> None:
    assert executor.device == "cpu"
    executor.submit(job(tmp_path, 10))
    assert executor.free() == 0
    events = wait_for(executor, ended)
    end = events[-1]
    assert isinstance(end, Finished)
    assert end.result.replicas[0].status == "complete"
    assert any(isinstance(event, Measured) and "train_loss_nats" in event.metrics for event in events)
    assert executor.free() == 1
    log = (replica_folder(tmp_path, 1) / LOG_FILE).read_text()
    assert "of trial 3, seed 1" in log
    assert "train_loss_nats" in log


def test_seeds_that_train_together_have_events_and_an_end_each(executor: Executor, tmp_path: Path) -> None:
    keys = tuple(AttemptKey(5, seed, next(_attempts)) for seed in (1, 2, 3))
    executor.submit(Job(keys, Trial(config=config(12), seeds=(1, 2, 3), rungs=(6,)), tmp_path))
    events: list[Event] = []
    for _ in keys:
        reached = wait_for(executor, lambda found: any(isinstance(event, RungReached) for event in found))
        events += reached
        asks = reached[-1]
        assert isinstance(asks, RungReached)
        assert executor.free() == 0
        executor.answer(asks.key, asks.step, go_on=asks.key.seed != 2)
    events += wait_for(executor, lambda _events: executor.free() == 1)
    ends = {event.key: event for event in events if isinstance(event, Finished)}
    assert set(ends) == set(keys)
    assert [[r.seed for r in ends[key].result.replicas] for key in keys] == [[1], [2], [3]]
    assert [ends[key].result.replicas[0].status for key in keys] == ["complete", "stopped", "complete"]
    assert all(end.result.trial.seeds == (1, 2, 3) for end in ends.values())
    for key in keys:
        assert {key} <= {event.key for event in events if isinstance(event, Measured)}
        assert f"of trial 5, seed {key.seed}" in (replica_folder(tmp_path, key.seed) / LOG_FILE).read_text()


def test_seeds_that_train_together_are_paused_together(executor: Executor, tmp_path: Path) -> None:
    keys = tuple(AttemptKey(6, seed, next(_attempts)) for seed in (1, 2))
    executor.submit(Job(keys, Trial(config=config(LONG), seeds=(1, 2)), tmp_path))
    wait_for(executor, lambda events: any(isinstance(event, Measured) for event in events))
    executor.cancel(keys[0])
    events = wait_for(executor, lambda _events: executor.free() == 1)
    assert {event.key for event in events if isinstance(event, Paused)} == set(keys)


def test_a_rung_waits_for_its_answer_and_a_no_stops_the_replica(executor: Executor, tmp_path: Path) -> None:
    executor.submit(job(tmp_path, 12, rungs=(4, 8)))
    for step, go_on in ((4, True), (8, False)):
        reached = wait_for(executor, lambda events: any(isinstance(event, RungReached) for event in events))[-1]
        assert isinstance(reached, RungReached)
        assert reached.step == step
        assert "normalised_validation_accuracy" in reached.metrics
        executor.answer(reached.key, step, go_on=go_on)
    end = wait_for(executor, ended)[-1]
    assert isinstance(end, Finished)
    assert (end.result.replicas[0].status, end.result.replicas[0].step) == ("stopped", 8)


def test_a_cancelled_job_pauses_and_continues_from_its_checkpoint(executor: Executor, tmp_path: Path) -> None:
    first, second = job(tmp_path, LONG), job(tmp_path, LONG)
    executor.submit(first)
    wait_for(executor, lambda events: any(isinstance(event, Measured) for event in events))
    executor.cancel(first.keys[0])
    assert isinstance(wait_for(executor, ended)[-1], Paused)
    assert list(replica_folder(tmp_path, 1).glob("checkpoints/step-*"))
    executor.submit(second)
    executor.cancel(first.keys[0])  # of a job that has ended: ignored
    events = wait_for(executor, lambda events: any(isinstance(event, Measured) for event in events))
    again = next(event for event in events if isinstance(event, Measured))
    assert again.step > LONG // 50  # the first reading of a job from the start
    executor.cancel(second.keys[0])
    assert isinstance(wait_for(executor, ended)[-1], Paused)


def test_a_cancelled_job_that_stands_at_a_rung_pauses_too(executor: Executor, tmp_path: Path) -> None:
    stands = job(tmp_path, LONG, rungs=(2,))
    executor.submit(stands)
    wait_for(executor, lambda events: any(isinstance(event, RungReached) for event in events))
    executor.cancel(stands.keys[0])
    assert isinstance(wait_for(executor, ended)[-1], Paused)


def test_an_exception_is_a_crash_with_its_traceback_in_the_log(executor: Executor, tmp_path: Path) -> None:
    folder = replica_folder(tmp_path, 1)
    folder.mkdir(parents=True)
    (folder / "checkpoints").write_text("a file where a folder must be")
    executor.submit(job(tmp_path, 10))
    end = wait_for(executor, ended)[-1]
    assert isinstance(end, Crashed)
    assert "Traceback" in (folder / LOG_FILE).read_text()
    wait_for(executor, lambda _events: executor.free() == 1)


def test_a_gpu_that_is_not_there_is_refused(executor: Executor) -> None:
    if executor.device == "cuda":
        pytest.skip("there is a GPU here")
    with pytest.raises(ResourceError, match="no GPU here"):
        InlineExecutor(cpus=1, gpus=1) if executor.name == "inline" else RayExecutor(slots=1, cpus=1, gpus=1)


def test_a_cluster_that_is_not_there_is_said_at_once() -> None:
    with pytest.raises(ResourceError, match="no Ray cluster answers at 127"):
        start_ray(1, "127.0.0.1:9")


def test_a_killed_worker_is_a_crash_and_another_takes_its_slot(ray: None, tmp_path: Path) -> None:
    executor = RayExecutor(slots=1, cpus=1, gpus=0)
    try:
        wait_for(executor, lambda _events: executor.free() == 1)
        executor.submit(job(tmp_path, LONG))
        wait_for(executor, lambda events: any(isinstance(event, Measured) for event in events))
        workers = [p for p in psutil.Process().children(recursive=True) if "ray::Worker" in " ".join(p.cmdline())]
        for worker in workers:
            os.kill(worker.pid, signal.SIGKILL)
        end = wait_for(executor, ended)[-1]
        assert isinstance(end, Crashed)
        assert "its worker process died" in end.message
        wait_for(executor, lambda _events: executor.free() == 1)
        executor.submit(Job((AttemptKey(4, 0, 1),), Trial(config=config(1, Nothing())), tmp_path / "next"))
        assert isinstance(wait_for(executor, ended)[-1], Finished)
    finally:
        executor.close()
