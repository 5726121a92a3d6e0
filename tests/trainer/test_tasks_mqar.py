"""Multi-query associative recall against a reader that keeps a dictionary."""

import hashlib
import itertools

import numpy as np
import pytest
from hqlt_search_space.tasks import Mqar
from hqlt_trainer.tasks import build_task
from hqlt_trainer.tasks.batch import IGNORED, random_stream
from hqlt_trainer.tasks.mqar import sample_without_replacement
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=40, deadline=None)
@given(
    n_pairs=st.integers(1, 12),
    spare=st.integers(0, 30),
    vocab_size=st.integers(26, 300),
    seed=st.integers(0, 2**31 - 1),
)
def test_every_query_asks_for_the_value_that_stood_behind_its_key(
    n_pairs: int, spare: int, vocab_size: int, seed: int
) -> None:
    task = Mqar(vocab_size=vocab_size, length=max(8, 4 * n_pairs + spare), n_pairs=n_pairs)
    batch = build_task(task).train_batch(0, 8, seed, "cpu")
    for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        keys, values = inputs[0 : 2 * n_pairs : 2], inputs[1 : 2 * n_pairs : 2]
        memory = dict(zip(keys, values, strict=True))
        assert len(memory) == len(set(values)) == n_pairs
        assert all(1 <= key < vocab_size // 2 for key in keys)
        assert all(vocab_size // 2 <= value < vocab_size for value in values)
        answers = {i: target for i, target in enumerate(targets) if target != IGNORED}
        assert answers == {i: memory[inputs[i]] for i in range(2 * n_pairs, task.length) if inputs[i] in memory}
        assert sorted(memory) == sorted(inputs[i] for i in answers)


def test_queries_come_sooner_rather_than_later_by_the_power_law() -> None:
    batch = build_task(Mqar(length=34, n_pairs=1)).train_batch(0, 40_000, 0, "cpu")
    slots = ((batch.targets != IGNORED).int().argmax(1) - 2) // 2
    weights = np.arange(1, 17) ** (0.01 - 1)
    shares = np.bincount(slots.numpy(), minlength=16) / len(slots)
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=0.01)  # four standard deviations


def test_fillers_are_any_token_but_the_keys() -> None:
    batch = build_task(Mqar(vocab_size=16, length=64, n_pairs=3)).train_batch(0, 2000, 0, "cpu")
    inputs = batch.inputs.numpy()
    filler = inputs[:, 7::2]  # the second token of each slot
    assert set(np.unique(filler)) == set(range(16))
    shares = np.bincount(filler.reshape(-1), minlength=16) / filler.size
    # A key is missing from the three in seven rows where it is a key; the others fill a row's 13 places evenly.
    np.testing.assert_allclose(shares[1:8], 4 / 7 / 13, atol=0.004)
    np.testing.assert_allclose(np.delete(shares, range(1, 8)), 1 / 13, atol=0.004)


def test_each_ordered_choice_is_equally_likely() -> None:
    drawn = sample_without_replacement(random_stream("test"), 60_000, 3, 4)
    counts = [int((drawn == choice).all(1).sum()) for choice in itertools.permutations(range(4), 3)]
    assert sum(counts) == 60_000
    assert max(abs(count - 2500) for count in counts) < 4 * 2500**0.5


def test_the_first_batch_is_the_one_of_the_first_release() -> None:
    batch = build_task(Mqar()).train_batch(0, 32, 0, "cpu")
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in batch)).hexdigest()
    assert digest[:16] == "8caa427fc2dc16e6", "a generator that gives other data needs another `version` of its task"


def test_the_test_split_can_be_longer_and_have_more_pairs() -> None:
    data = build_task(Mqar(test_length=128, test_pairs=8, n_test=10))
    (batch,) = data.evaluation_batches("test", 10, "cpu")
    assert batch.inputs.shape == (10, 128)
    assert ((batch.targets != IGNORED).sum(1) == 8).all()


@pytest.mark.parametrize(
    ("given_values", "sentence"),
    [
        ({"n_pairs": 20}, "20 pairs and their queries need length 80 or more; got 64"),
        ({"test_pairs": 20}, "20 pairs and their queries need length 80 or more; got 64"),
        ({"vocab_size": 16, "n_pairs": 8}, "a vocabulary of 16 has 7 keys; got 8 pairs"),
    ],
    ids=["too short", "test too short", "too few keys"],
)
def test_pairs_that_do_not_fit_are_refused(given_values: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Mqar(**given_values)
