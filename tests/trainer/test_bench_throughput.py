"""The benchmark's parts; its numbers are for people."""

from collections.abc import Iterator
from typing import Any

import pytest
from hqlt_trainer.bench_throughput import Crew, Model, Way, ways


@pytest.fixture
def crew() -> Iterator[Crew]:
    crew = Crew(Way("stacked", n_replicas=2), Model("parity", 32, 4), "cpu")
    crew.wait_until_ready()
    yield crew
    crew.leave()


def test_a_crew_trains_whenever_it_is_asked(crew: Crew) -> None:
    assert crew.not_captured is None
    assert crew.rate(0.05) > 0
    assert crew.rate(0.05) > 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_way_is_compared_with_one_training_after_another(device: str) -> None:
    first, *others = ways(device, 2, 8)
    assert (first.n_processes, first.n_threads, first.n_replicas, first.captured) == (1, 1, 1, False)
    assert len({first, *others}) == (6 if device == "cuda" else 5)


@pytest.mark.parametrize("task", ["parity", "modular_arithmetic"])
def test_a_model_comes_with_the_data_of_its_task(task: Any) -> None:
    batch = Model(task, 32, 4).data().train_batch(0, 4, 0, "cpu")
    assert batch.lengths.max() <= 39


@pytest.mark.parametrize("d_model", [32, 128])
def test_the_model_is_the_papers_in_a_size(d_model: int) -> None:
    arch = Model("parity", d_model, 64).arch
    assert arch.d_model // arch.layers[0].n_heads == 32
    assert arch.n_layers == 2
