"""Multi-query associative recall (Arora et al. 2023, arXiv:2312.04927), drawn for all rows at once.

The published generator takes fillers from an unseeded source, and 0.8 % of them are keys of their row, which repeats a
query without an answer. Here everything comes from the seed and fillers are never keys of their row.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

import numpy as np
from hqlt_search_space.tasks import Mqar

from hqlt_trainer.tasks.batch import (
    IGNORED,
    Batch,
    Device,
    Integers,
    LengthBucket,
    Split,
    cropped_batches,
    random_stream,
    to_batch,
)

GAP_EXPONENT = 0.01  # the published `a`: a query's slot i (from 1) has weight i^(a - 1), so most queries come soon


class MqarData:
    """`TaskData` of MQAR. A query sits at the first token of one of the two-token slots after the pairs."""

    counts_bytes = False
    reference_metrics: Mapping[str, float] = {}

    def __init__(self, task: Mqar) -> None:
        self._task = task
        self.vocab_size = task.vocab_size
        self.chance = 1 / (task.vocab_size - task.vocab_size // 2)

    def length_buckets(self, split: Split) -> tuple[LengthBucket, ...]:
        return ()

    def train_batch(self, step: int, batch: int, seed: int, device: Device) -> Batch:
        rng = random_stream(self._task.kind, self._task.version, "train", seed, step)
        return to_batch(*_sequences(rng, batch, self._task.vocab_size, *_shape(self._task, "train")), device)

    def row_source(self, seeds: Sequence[int], batch: int, first_step: int, device: Device) -> str:
        return "keys are drawn again until none repeats, and whether one does must be looked at"

    def evaluation_batches(self, split: Split, batch: int, device: Device) -> Iterator[Batch]:
        return cropped_batches(*_evaluation_sequences(self._task, split), batch, device)


def _shape(task: Mqar, split: str) -> tuple[int, int]:
    """Length and number of pairs; validation is like training, as in the published set-up."""
    if split == "test":
        return task.test_length or task.length, task.test_pairs or task.n_pairs
    return task.length, task.n_pairs


@lru_cache(maxsize=6)
def _evaluation_sequences(task: Mqar, split: Split) -> tuple[Integers, Integers, Integers]:
    rng = random_stream(task.kind, task.version, split)
    count = task.n_validation if split == "validation" else task.n_test
    return _sequences(rng, count, task.vocab_size, *_shape(task, split))


def _sequences(
    rng: np.random.Generator, count: int, vocab_size: int, length: int, n_pairs: int
) -> tuple[Integers, Integers, Integers]:
    """Inputs [count, length], targets of the same shape, and the lengths, all equal."""
    keys = 1 + sample_without_replacement(rng, count, n_pairs, vocab_size // 2 - 1)
    values = vocab_size // 2 + sample_without_replacement(rng, count, n_pairs, vocab_size - vocab_size // 2)
    n_slots = (length - 2 * n_pairs) // 2
    # Gumbel noise on log weights, largest n_pairs first: drawing without replacement in proportion to the weights.
    noise = rng.gumbel(size=(count, n_slots)) + (GAP_EXPONENT - 1) * np.log(np.arange(1, n_slots + 1))
    slots = np.argsort(-noise, axis=1)[:, :n_pairs]
    query_positions = 2 * n_pairs + 2 * slots

    inputs = tokens_other_than(keys, rng.integers(0, vocab_size - n_pairs, (count, length)), vocab_size)
    inputs[:, 0 : 2 * n_pairs : 2] = keys
    inputs[:, 1 : 2 * n_pairs : 2] = values
    np.put_along_axis(inputs, query_positions, keys, axis=1)
    targets = np.full(inputs.shape, IGNORED)
    np.put_along_axis(targets, query_positions, values, axis=1)
    return inputs, targets, np.full(count, length)


def sample_without_replacement(rng: np.random.Generator, count: int, n_drawn: int, population: int) -> Integers:
    """`count` rows of `n_drawn` distinct integers below `population`, each ordered choice equally likely.

    Repeats are drawn again until none is left. That treats all integers alike, and any choice can be renamed into any
    other, so no choice is likelier than another.
    """
    drawn = rng.integers(0, population, (count, n_drawn))
    rows = np.arange(count)
    while len(rows):
        order = np.argsort(drawn[rows], axis=1, kind="stable")
        ranked = np.take_along_axis(drawn[rows], order, axis=1)
        repeats = np.zeros(order.shape, np.bool_)
        np.put_along_axis(repeats, order[:, 1:], ranked[:, 1:] == ranked[:, :-1], axis=1)
        row, column = np.nonzero(repeats)
        drawn[rows[row], column] = rng.integers(0, population, len(row))
        rows = rows[np.unique(row)]
    return drawn


def tokens_other_than(excluded: Integers, ranks: Integers, vocab_size: int) -> Integers:
    """Per row, the `ranks`-th tokens (from 0) of the vocabulary without the row's `excluded` ones, which are distinct.

    With s the sorted excluded tokens, rank r is token r + #{j : s_j - j <= r}. The search runs over all rows in one
    sorted array, in which each row has a range of its own.
    """
    count, n_excluded = excluded.shape
    row_offset = np.arange(count)[:, None] * vocab_size
    thresholds = np.sort(excluded, axis=1) - np.arange(n_excluded) + row_offset
    below: Integers = np.searchsorted(thresholds.reshape(-1), ranks + row_offset, side="right")
    tokens: Integers = ranks + below - np.arange(count)[:, None] * n_excluded
    return tokens
