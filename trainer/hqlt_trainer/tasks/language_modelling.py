"""Byte-level language modelling: next-byte prediction on a corpus, vocabulary 257."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from hqlt_search_space import tasks
from hqlt_search_space.errors import DataError
from hqlt_search_space.tasks import LanguageModelling

from hqlt_trainer.corpus import DOCUMENT_START, compressor_bits_per_byte, evaluation_tokens, load_corpus
from hqlt_trainer.tasks.batch import (
    IGNORED,
    Batch,
    Device,
    LengthBucket,
    Split,
    cropped_batches,
    random_stream,
    to_batch,
)


class LanguageModellingData:
    """`TaskData` of a corpus.

    Training windows begin anywhere. Evaluation windows stand side by side and predict every token of the evaluated
    part once, but for its first. The mark before a document is predicted too: its cost counts, it is no byte.
    """

    chance = None
    counts_bytes = True

    def __init__(self, task: LanguageModelling) -> None:
        self._task = task
        self._train = load_corpus(task).splits["train"]
        if len(self._train) <= task.context:
            raise DataError(
                f"the training split of {task.corpus!r} has {len(self._train)} tokens, "
                f"too few for a context of {task.context}"
            )
        for split in ("validation", "test"):
            if not np.any(evaluation_tokens(task, split)[1:] != DOCUMENT_START):
                raise DataError(f"the {split} split of {task.corpus!r} has no byte to predict")
        self.vocab_size = tasks.vocab_size(task)

    @property
    def reference_metrics(self) -> Mapping[str, float]:
        return compressor_bits_per_byte(self._task)

    def length_buckets(self, split: Split) -> tuple[LengthBucket, ...]:
        return ()

    def train_batch(self, step: int, batch: int, seed: int, device: Device) -> Batch:
        context = self._task.context
        rng = random_stream(self._task.kind, self._task.version, "train", seed, step)
        starts = rng.integers(0, len(self._train) - context, batch)
        windows = self._train[starts[:, None] + np.arange(context + 1)]
        return to_batch(windows[:, :-1], windows[:, 1:], np.full(batch, context), device)

    def row_source(self, seeds: Sequence[int], batch: int, first_step: int, device: Device) -> str:
        return "the text is in the host's memory, where it takes none of the GPU's"

    def evaluation_batches(self, split: Split, batch: int, device: Device) -> Iterator[Batch]:
        tokens = evaluation_tokens(self._task, split).astype(np.int16)
        context = self._task.context
        n_predicted = len(tokens) - 1
        n_windows = -(-n_predicted // context)
        inputs = np.zeros((n_windows, context), np.int16)
        targets = np.full((n_windows, context), IGNORED, np.int16)
        inputs.reshape(-1)[:n_predicted] = tokens[:-1]
        targets.reshape(-1)[:n_predicted] = tokens[1:]
        lengths = np.full(n_windows, context)
        lengths[-1] = n_predicted - (n_windows - 1) * context
        return cropped_batches(inputs, targets, lengths, batch, device)
