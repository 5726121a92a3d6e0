"""`python -m hqlt_trainer.bench_throughput`: trainings an hour by each way of running many small ones.

Every way is a number of worker processes, each of which trains some replicas of one model with so many threads. The
workers start, take a few steps, and wait until all are ready; what is timed is the steps they then take. Starting
Python, building the model and judging it are left out, which flatters one process a training. The ways are measured
in turns and the best turn of each counts, because whatever else the machine does only slows them.

The first way is a process a training, one after another, each operation launched from Python: what a training script
does. hqlt itself captures every step on a GPU, so the table has that too, by itself and in several processes.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from hqlt_search_space.arch import Arch
from hqlt_search_space.paper import paper_arch
from hqlt_search_space.recipe import Recipe
from hqlt_search_space.tasks import Lengths, ModularArithmetic, Parity
from hqlt_search_space.trial import Runtime

from hqlt_trainer.environment import reproducible
from hqlt_trainer.model import build_model
from hqlt_trainer.replicas import EAGER_STEPS, Stack, feed
from hqlt_trainer.tasks import build_task
from hqlt_trainer.tasks.batch import TaskData

WARM_UP_STEPS = EAGER_STEPS + 2
STEPS_BETWEEN_LOOKS = {"cpu": 1, "cuda": 50}
MANY_STEPS = 10**9
STEPS_A_TRAINING = {"parity": 20_000, "modular_arithmetic": 100_000}
"""Those of the published recipes; they only convert a rate of steps into trainings an hour."""


@dataclass(frozen=True)
class Way:
    """How trainings are run: `n_processes` side by side, `n_threads` each, `n_replicas` stacked in each."""

    name: str
    n_processes: int = 1
    n_threads: int = 1
    n_replicas: int = 1
    captured: bool = False


@dataclass(frozen=True)
class Model:
    """What is trained: the paper's synchronous blend for a task, in a width, and a batch."""

    task: Literal["parity", "modular_arithmetic"]
    d_model: int
    batch: int

    def __str__(self) -> str:
        name = self.task.replace("_", " ")
        arch = f"synchronous blend, {self.arch.n_layers} layers, d_model {self.d_model}"
        return f"{name}, lengths 3-40, batch {self.batch}, {arch}"

    @property
    def arch(self) -> Arch:
        published = paper_arch("hqlt_synchronous", self.task)
        factor = published.d_model // self.d_model
        heads = {"n_heads": max(1, published.layers[0].n_heads // factor)}
        layers = tuple(layer.model_copy(update=heads) for layer in published.layers)
        return published.model_copy(
            update={"d_model": self.d_model, "mlp_inner": published.mlp_inner // factor, "layers": layers}
        )

    def recipe(self, device: str) -> Recipe:
        """Endless; on a GPU in bfloat16, as published."""
        precision: Literal["float32", "bfloat16"] = "bfloat16" if device == "cuda" else "float32"
        return Recipe(steps=MANY_STEPS, batch=self.batch, precision=precision)

    def data(self) -> TaskData:
        lengths = Lengths(low=3, high=40)
        task = Parity(train_length=lengths) if self.task == "parity" else ModularArithmetic(train_length=lengths)
        return build_task(task)


def ways(device: str, n_cores: int, n_stacked: int) -> tuple[Way, ...]:
    """What is compared; the first is what the others are measured by."""
    if device == "cuda":
        return (
            Way("one after another"),
            Way("3 processes share the GPU", n_processes=3),
            Way(f"{n_stacked} stacked", n_replicas=n_stacked),
            Way("one after another, captured", captured=True),
            Way("3 processes share the GPU, captured", n_processes=3, captured=True),
            Way(f"{n_stacked} stacked, captured", n_replicas=n_stacked, captured=True),
        )
    return (
        Way("one after another, 1 thread"),
        Way(f"one after another, {n_cores} threads", n_threads=n_cores),
        Way(f"{n_cores} processes", n_processes=n_cores),
        Way(f"{n_stacked} stacked", n_replicas=n_stacked),
        Way(f"{n_cores} processes, {n_stacked} stacked in each", n_processes=n_cores, n_replicas=n_stacked),
    )


class Crew:
    """The worker processes of one way, ready to train for some seconds whenever they are asked."""

    def __init__(self, way: Way, model: Model, device: str) -> None:
        threads = str(way.n_threads)
        command = [sys.executable, "-m", "hqlt_trainer.bench_throughput", "--worker"]
        asked = json.dumps({**asdict(way), **asdict(model), "device": device})
        self._workers = [
            subprocess.Popen(  # noqa: S603  our own interpreter and module
                [*command, asked],
                env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(way.n_processes)
        ]
        self.not_captured: str | None = None
        """Why a step was not captured that should have been; known once the crew is ready."""

    def wait_until_ready(self) -> None:
        for worker in self._workers:
            self.not_captured = self._answer(worker)

    def rate(self, seconds: float) -> float:
        """Steps of a replica a second, all processes together."""
        for worker in self._workers:
            assert worker.stdin is not None
            worker.stdin.write(f"{seconds}\n")
            worker.stdin.flush()
        return float(sum(self._answer(worker) for worker in self._workers))

    def leave(self) -> None:
        for worker in self._workers:
            worker.kill()
            worker.communicate()

    def _answer(self, worker: "subprocess.Popen[str]") -> Any:
        assert worker.stdout is not None
        line = worker.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with exit code {worker.wait()}")
        return json.loads(line)


def work(asked: dict[str, Any]) -> None:
    """One worker: builds, warms up, says so; then trains for each number of seconds it reads, and prints its rate."""
    model = Model(asked["task"], asked["d_model"], asked["batch"])
    device: Literal["cpu", "cuda"] = asked["device"]
    n = asked["n_replicas"]
    recipe, task_data = model.recipe(device), model.data()
    with reproducible(Runtime(device=device, n_threads=asked["n_threads"])):
        models = [build_model(model.arch, task_data.vocab_size, seed=seed, device=device) for seed in range(n)]
        stack = Stack(models, [recipe] * n, torch.device(device))
        if not asked["captured"]:
            stack.not_captured = "not asked for"
        with feed(task_data, recipe, range(n), 0, device) as (data, _):
            for step in range(WARM_UP_STEPS):
                stack.take_step(step, next(data))
            stack.tallies()  # waits for a GPU
            print(json.dumps(stack.not_captured if asked["captured"] else None), flush=True)
            step = WARM_UP_STEPS
            for line in sys.stdin:
                started, taken = time.perf_counter(), 0
                while time.perf_counter() - started < float(line):
                    for _ in range(STEPS_BETWEEN_LOOKS[device]):
                        stack.take_step(step, next(data))
                        step += 1
                        taken += n
                    stack.tallies()
                print(json.dumps(taken / (time.perf_counter() - started)), flush=True)


def compare(model: Model, device: str, n_stacked: int, seconds: float, turns: int) -> float:
    """Prints a table for one model; returns the best rate over that of one training after another."""
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    crews: dict[Way, Crew] = {}
    try:
        for way in ways(device, n_cores, n_stacked):
            crews[way] = Crew(way, model, device)
        for crew in crews.values():
            crew.wait_until_ready()
        rates = [{way: crew.rate(seconds) for way, crew in crews.items()} for _ in range(turns)]
    finally:
        for crew in crews.values():
            crew.leave()
    best = {way: max(turn[way] for turn in rates) for way in crews}
    slowest = next(iter(best.values()))
    print(f"\n{model}\n{'':<40}{'ms a training and step':>24}{'trainings an hour':>20}{'speed-up':>10}")
    for way, rate in best.items():
        remark = f"  not captured: {crews[way].not_captured}" if crews[way].not_captured else ""
        hourly = rate * 3600 / STEPS_A_TRAINING[model.task]
        print(f"{way.name:<40}{1e3 / rate:>24.2f}{hourly:>20.2f}{rate / slowest:>9.2f}x{remark}", flush=True)
    return max(best.values()) / slowest


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition(": ")[2].partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="of training in each measurement")
    parser.add_argument("--turns", type=int, default=8, help="measurements of each way, of which the best counts")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker is not None:
        work(json.loads(options.worker))
        return 0
    on_gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.backends.cpu.get_cpu_capability()}"
    lengths = ", ".join(f"{steps} steps of {task}" for task, steps in STEPS_A_TRAINING.items())
    print(f"{name}, torch {torch.__version__}; a training is {lengths}")
    load, n_cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > n_cores / 2:
        print(f"this machine is busy (load {load:.1f} on {n_cores} cores): side by side looks slower than it is")
    models = [(Model("parity", 32, 32), 8)]
    if on_gpu:
        models = [
            (Model("parity", 128, 1024), 3),
            (Model("modular_arithmetic", 128, 256), 3),
            (Model("parity", 128, 64), 8),
        ]
    device = "cuda" if on_gpu else "cpu"
    speed_ups = [compare(model, device, stacked, options.seconds, options.turns) for model, stacked in models]
    print(f"speed-up over one training after another: {speed_ups[-1]:.2f}x")
    return 0


if __name__ == "__main__":
    sys.exit(main())
