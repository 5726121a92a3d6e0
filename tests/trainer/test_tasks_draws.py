"""SplitMix64 in torch against SplitMix64 in Python's integers; and what a training needs of it."""

import numpy as np
import pytest
import torch
from hqlt_trainer.tasks.draws import GAMMA, Draws, int64, stream_key, upper_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

KEYS = st.integers(0, 2**64 - 1)


def slow_splitmix64(counter: int) -> int:
    """As in the Java of its authors, all 64 bits."""
    x = (counter ^ counter >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def test_the_slow_generator_gives_the_numbers_that_others_print() -> None:
    found = [slow_splitmix64((1234567 + n * GAMMA) % 2**64) for n in (1, 2, 3)]
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@settings(max_examples=50, deadline=None)
@given(st.lists(KEYS, min_size=1, max_size=20))
def test_the_upper_bits_are_those_of_splitmix64(counters: list[int]) -> None:
    found = upper_bits(torch.tensor([int64(counter) for counter in counters]))
    assert found.tolist() == [slow_splitmix64(counter) >> 33 for counter in counters]


@settings(max_examples=50, deadline=None)
@given(
    keys=st.lists(KEYS, min_size=1, max_size=4),
    ranges=st.lists(st.tuples(st.integers(0, 99), st.integers(1, 2**16)), min_size=1, max_size=6),
    rows=st.integers(1, 5),
    n_before=st.integers(0, 10**6),
)
def test_a_table_is_the_next_numbers_of_its_stream_whoever_else_draws(
    keys: list[int], ranges: list[tuple[int, int]], rows: int, n_before: int
) -> None:
    draws = Draws(keys, ranges, rows, n_before, "cpu")
    draws()
    second = draws().tolist()
    place = (n_before + 1) * rows * len(ranges)
    for key, table in zip(keys, second, strict=True):
        numbers = [slow_splitmix64((key + GAMMA * (place + n)) % 2**64) for n in range(1, rows * len(ranges) + 1)]
        drawn = iter(numbers)
        assert table == [[low + (next(drawn) >> 33) * count // 2**31 for low, count in ranges] for _ in range(rows)]


N_VALUES = 5


@pytest.fixture(scope="module")
def tables() -> Tensor:
    """[steps, seeds, rows, columns] of numbers from 0 to 4, keyed as training data are."""
    draws = Draws([stream_key("a task", 1, "train", seed) for seed in range(8)], [(0, N_VALUES)] * 8, 64, 0, "cpu")
    return torch.stack([draws() for _ in range(64)])


def counts_are_level(counts: Tensor) -> bool:
    """Whether chi-square would be exceeded by less than one in a million fair draws, or fallen short of."""
    return 1e-6 < float(stats.chisquare(counts.numpy()).pvalue) < 1 - 1e-6


@pytest.mark.parametrize("axis", range(4), ids=["step", "seed", "row", "column"])
def test_numbers_are_uniform_at_every_place(axis: int, tables: Tensor) -> None:
    for place in tables.unbind(axis):
        assert counts_are_level(torch.bincount(place.flatten(), minlength=N_VALUES))


@pytest.mark.parametrize("axis", range(4), ids=["step", "seed", "row", "column"])
@pytest.mark.parametrize("distance", [1, 2, 4])
def test_neighbours_know_nothing_of_each_other(axis: int, distance: int, tables: Tensor) -> None:
    n = tables.shape[axis]
    one, other = (tables.narrow(axis, start, n - distance).flatten() for start in (0, distance))
    assert counts_are_level(torch.bincount(N_VALUES * one + other, minlength=N_VALUES**2))
    correlation = np.corrcoef(one, other)[0, 1]
    assert abs(correlation) < 5 / len(one) ** 0.5


@pytest.mark.gpu
def test_a_gpu_draws_the_same_numbers_in_a_graph_that_is_replayed() -> None:
    on_cpu, on_gpu = (Draws([7, 2**64 - 1], [(3, 38), (1, 2), (1, 3)], 64, 5, device) for device in ("cpu", "cuda"))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        drawn = [on_gpu().clone()]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        table = on_gpu()
    for _ in range(3):
        graph.replay()
        drawn.append(table.clone())
    assert all(torch.equal(on_cpu(), each.cpu()) for each in drawn)
