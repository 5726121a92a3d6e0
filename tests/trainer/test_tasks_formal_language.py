"""Formal languages against slow, readable evaluators: for arithmetic, Python's own."""

import hashlib
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hqlt_search_space.tasks import CycleNavigation, EvenPairs, Lengths, ModularArithmetic, Parity
from hqlt_trainer.tasks import build_task
from hqlt_trainer.tasks.batch import IGNORED, Batch
from hqlt_trainer.tasks.bracketed import bracketed_answer_shares
from hqlt_trainer.tasks.formal_language import FormalLanguage
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

TASKS = {
    "parity": Parity(),
    "even_pairs": EvenPairs(),
    "cycle_navigation": CycleNavigation(),
    "cycle_of_7": CycleNavigation(n_positions=7),
    "modular_arithmetic": ModularArithmetic(),
    "modular_arithmetic_brackets": ModularArithmetic(brackets=True),
}
every_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())


def slow_answer(task: FormalLanguage, content: list[int]) -> int:
    """The answer token of one sequence, straight from the definition."""
    match task:
        case Parity():
            return 1 + sum(token - 1 for token in content) % 2
        case EvenPairs():
            return 1 + sum(a != b for a, b in pairwise(content)) % 2
        case CycleNavigation():
            return 4 + sum({1: 0, 2: 1, 3: -1}[token] for token in content) % task.n_positions
        case ModularArithmetic():
            symbols = "01234+-*()=" if task.brackets else " +-*=01234"
            expression, equals = "".join(symbols[token] for token in content[:-1]), symbols[content[-1]]
            assert equals == "="
            if task.brackets:
                check_brackets(expression)
            return symbols.index(str(eval(expression) % 5))  # the expression is ours


def check_brackets(expression: str) -> None:
    """Fully bracketed: of four tokens at most, or in brackets; and nothing but digits, operators and brackets."""
    assert len(expression) <= 2 or (expression[0] == "(" and expression[-1] == ")")
    assert expression.count("(") == expression.count(")")
    assert "=" not in expression


def rows(batch: Batch) -> list[tuple[list[int], list[int], int]]:
    return list(zip(batch.inputs.tolist(), batch.targets.tolist(), batch.lengths.tolist(), strict=True))


@every_task
@settings(max_examples=25, deadline=None)
@given(low=st.integers(3, 60), span=st.integers(1, 60), seed=st.integers(0, 2**31 - 1), step=st.integers(0, 10**6))
def test_the_one_scored_token_is_the_last_and_has_the_slow_answer(
    task: FormalLanguage, low: int, span: int, seed: int, step: int
) -> None:
    lengths = Lengths(low=low, high=low + span)
    batch = build_task(task.model_copy(update={"train_length": lengths})).train_batch(step, 16, seed, "cpu")
    for inputs, targets, length in rows(batch):
        assert low - 1 <= length <= low + span - 1
        assert [i for i, target in enumerate(targets) if target != IGNORED] == [length - 1]
        assert targets[length - 1] == slow_answer(task, inputs[:length])
        assert len(set(inputs[length:])) <= 1


class Watched(TorchDispatchMode):
    """Remembers which operations are called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.add(func._overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@every_task
def test_data_made_on_a_device_take_no_look_at_it_and_copy_nothing_to_it(task: FormalLanguage) -> None:
    # A tensor on the device "meta" has no values to look at.
    source = build_task(task).row_source([0, 1, 2], 16, 0, "meta")
    if isinstance(source, str):
        assert isinstance(task, ModularArithmetic)
        assert task.brackets
        return
    with Watched() as watched:
        rows = source()
    assert rows.inputs.shape == (3, 16, 39)
    assert rows.answers.shape == rows.lengths.shape == (3, 16)
    assert not watched.called & {"_to_copy", "lift_fresh"}


@pytest.mark.gpu
@every_task
def test_a_gpu_makes_the_data_that_a_cpu_makes(task: FormalLanguage) -> None:
    for step in (0, 7):
        on_cpu, on_gpu = (build_task(task).train_batch(step, 64, 3, device) for device in ("cpu", "cuda"))
        assert all(torch.equal(a, b.cpu()) for a, b in zip(on_cpu, on_gpu, strict=True))


@every_task
def test_labels_are_as_frequent_as_chance_says(task: FormalLanguage) -> None:
    data = build_task(task)
    labels = torch.cat([batch.targets.amax(1) for batch in data.evaluation_batches("validation", 1024, "cpu")])
    shares = torch.bincount(labels).double() / len(labels)
    assert data.chance is not None
    assert shares.max() == pytest.approx(data.chance, abs=0.015)  # three standard deviations of 8192 draws


def test_shares_of_bracketed_answers_agree_with_an_enumeration() -> None:
    digits = range(5)
    plain = [left + right for left in digits for right in digits]
    minus = [left - right for left in digits for right in digits]
    times = [left * right for left in digits for right in digits]
    counts = np.bincount(np.array(plain + minus + times) % 5)
    np.testing.assert_allclose(bracketed_answer_shares(5)[5], counts / counts.sum())


GOLDEN = {
    "parity": "46fd2e4c677e3891",
    "even_pairs": "fd53ea82a7b5b239",
    "cycle_navigation": "c56987738dde856b",
    "cycle_of_7": "aff7a3894c49a5a9",
    "modular_arithmetic": "6b0e1dd4558a17bd",
    "modular_arithmetic_brackets": "a68c73187eb45372",
}


@pytest.mark.parametrize("name", TASKS, ids=TASKS.keys())
def test_the_first_batch_is_the_one_of_the_first_release(name: str) -> None:
    batch = build_task(TASKS[name]).train_batch(0, 32, 0, "cpu")
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in batch)).hexdigest()
    assert digest[:16] == GOLDEN[name], "a generator that gives other data needs another `version` of its task"


@every_task
def test_lengths_are_uniform_with_both_ends_included(task: FormalLanguage) -> None:
    batch = build_task(task).train_batch(0, 20_000, 0, "cpu")
    counts = torch.bincount(batch.lengths + 1, minlength=41)[3:]
    if isinstance(task, ModularArithmetic) and not task.brackets:
        assert counts[1::2].sum() == 0
        counts = counts[0::2]
    expected = 20_000 / len(counts)
    assert ((counts - expected).abs() < 5 * expected**0.5).all()


@every_task
def test_training_batches_are_as_wide_as_the_longest_training_sequence(task: FormalLanguage) -> None:
    batch = build_task(task).train_batch(0, 2, 0, "cpu")
    assert batch.inputs.shape == batch.targets.shape == (2, 39)
    assert batch.inputs.dtype == batch.targets.dtype == batch.lengths.dtype == torch.int64


def test_every_seed_and_step_has_data_of_its_own() -> None:
    data = build_task(Parity(train_length=Lengths(low=40, high=40)))
    # 2^32 apart is what torch's own generator cannot tell apart.
    places = [(0, 0), (0, 1), (1, 0), (0, 10), (0, 100), (10, 0), (2**31 - 1, 0), (0, 2**32)]
    batches = [data.train_batch(step, 8, seed, "cpu").inputs for seed, step in places]
    sequences = {tuple(row) for batch in batches for row in batch.tolist()}
    assert len(sequences) == 8 * len(places)


def test_a_batch_depends_on_nothing_but_seed_and_step() -> None:
    first = build_task(Parity()).train_batch(7, 16, 3, "cpu")
    data = build_task(Parity())
    data.train_batch(6, 16, 3, "cpu")
    list(data.evaluation_batches("test", 512, "cpu"))
    torch.manual_seed(1)
    again = data.train_batch(7, 16, 3, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def evaluated(task: FormalLanguage, batch: int) -> list[tuple[int, ...]]:
    batches = build_task(task).evaluation_batches("validation", batch, "cpu")
    return [tuple(inputs[:length]) for part in batches for inputs, _, length in rows(part)]


def test_evaluation_data_do_not_depend_on_the_batch_they_come_in() -> None:
    task = Parity(n_validation=300)
    assert evaluated(task, 300) == evaluated(task, 7)


@every_task
def test_evaluation_batches_are_sorted_and_cropped(task: FormalLanguage) -> None:
    lengths = []
    for batch in build_task(task).evaluation_batches("test", 1000, "cpu"):
        assert batch.inputs.shape[1] == batch.lengths.max()
        lengths += batch.lengths.tolist()
    assert lengths == sorted(lengths)
    assert len(lengths) == task.n_test


def test_validation_has_lengths_of_its_own_if_given() -> None:
    data = build_task(Parity(validation_length=Lengths(low=5, high=6), n_validation=64))
    lengths = torch.cat([batch.lengths for batch in data.evaluation_batches("validation", 64, "cpu")])
    assert set(lengths.tolist()) == {4, 5}


@settings(max_examples=50, deadline=None)
@given(low=st.integers(3, 300), span=st.integers(0, 300))
def test_length_buckets_divide_the_evaluated_lengths(low: int, span: int) -> None:
    task = Parity(test_length=Lengths(low=low, high=low + span))
    buckets = build_task(task).length_buckets("test")
    covered = [length for bucket in buckets for length in range(bucket.low, bucket.high + 1)]
    assert covered in ([], list(range(low - 1, low + span)))
    assert all(bucket.label == f"len_{bucket.low + 1}_{bucket.high + 1}" for bucket in buckets)


def test_the_task_that_trains_nothing_has_no_data() -> None:
    from hqlt_search_space.tasks import Nothing

    with pytest.raises(ValueError, match="nothing"):
        build_task(Nothing())
