"""What the training loop asks of a task: batches that are pure functions of (seed, step), and fixed evaluation data."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Split = Literal["validation", "test"]
Device = torch.device | str
Integers = npt.NDArray[np.integer]

IGNORED = -1
"""The target of a position that is not scored."""


class Batch(NamedTuple):
    """Sequences in rows, padded at the end; a causal model may read the padding, since no scored position sees it."""

    inputs: Tensor
    """Tokens, int64 [B, T]."""
    targets: Tensor
    """What is to be predicted at each position, int64 [B, T]; `IGNORED` where nothing is scored."""
    lengths: Tensor
    """Tokens of each row that are not padding, int64 [B]."""


class Rows(NamedTuple):
    """Sequences with one answer each, predicted at the last token: some rows for each of some streams."""

    inputs: Tensor
    """Tokens, int64 [streams, rows, T], padded at the end."""
    answers: Tensor
    """int64 [streams, rows]."""
    lengths: Tensor
    """Tokens that are not padding, int64 [streams, rows]."""

    def batch(self) -> Batch:
        """The rows of the first stream, then those of the second."""
        inputs, answers, lengths = (x.flatten(0, 1) for x in self)
        targets = torch.full_like(inputs, IGNORED).scatter_(1, lengths[:, None] - 1, answers[:, None])
        return Batch(inputs, targets, lengths)


@dataclass(frozen=True)
class LengthBucket:
    """Rows whose `Batch.lengths` lie from `low` to `high`, both included; scored apart under `label`.

    The label, `len_LO_HI`, speaks of lengths as the study file does: for formal languages the answer counts.
    """

    label: str
    low: int
    high: int


class TaskData(Protocol):
    """The data of one task. Nothing in it changes once it is built, so one value may serve all replicas."""

    @property
    def vocab_size(self) -> int:
        """Distinct tokens, in inputs and targets alike."""

    @property
    def chance(self) -> float | None:
        """Accuracy of the best guess that reads nothing; None where accuracy is not the measure."""

    @property
    def counts_bytes(self) -> bool:
        """Whether bits per byte are the measure: the loss is a code length, and targets 0 to 255 are bytes."""

    @property
    def reference_metrics(self) -> Mapping[str, float]:
        """Scores of methods that learn nothing, on the validation data, to print beside the model's."""

    def length_buckets(self, split: Split) -> tuple[LengthBucket, ...]:
        """The lengths to score apart, shortest first; empty where all sequences are alike."""

    def train_batch(self, step: int, batch: int, seed: int, device: Device) -> Batch:
        """The training data of `step`: `batch` rows, always of the same width.

        A pure function of its arguments, equal on every device, and fresh for every (seed, step): a resumed run needs
        no data state.
        """

    def row_source(self, seeds: Sequence[int], batch: int, first_step: int, device: Device) -> Callable[[], Rows] | str:
        """Makes the training data of `seeds` on `device`: of `first_step` when it is called first, then of the next.

        The same rows as `train_batch` for each seed. A call reads nothing back and copies nothing to the device, so a
        CUDA graph can contain it, and then gives the data of the next step whenever it is replayed.

        A sentence that says why, where a task's data cannot be made so.
        """

    def evaluation_batches(self, split: Split, batch: int, device: Device) -> Iterator[Batch]:
        """All of `split`, at most `batch` rows at a time, shortest first, each cropped to its longest sequence.

        The same for every training seed and every `batch`; from another stream than the training data.
        """


def random_stream(*name: str | int) -> np.random.Generator:
    """A random generator that depends on `name` alone; different names give independent streams.

    NumPy's Philox keyed with 128 bits of a hash, because torch's CPU generator keeps only the low 32 bits of its seed:
    among 10^5 steps two would be likely to share their data.
    """
    digest = hashlib.sha256("/".join(map(str, name)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def to_batch(inputs: Integers, targets: Integers, lengths: Integers, device: Device) -> Batch:
    """The arrays as int64 tensors on `device`."""
    return Batch(*(torch.from_numpy(array.astype(np.int64)).to(device) for array in (inputs, targets, lengths)))


def cropped_batches(
    inputs: Integers, targets: Integers, lengths: Integers, batch: int, device: Device
) -> Iterator[Batch]:
    """Rows sorted by length, `batch` at a time, each batch as wide as its longest row."""
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        width = int(lengths[rows[-1]])
        yield to_batch(inputs[rows, :width], targets[rows, :width], lengths[rows], device)
