"""Language-modelling batches against the corpus they come from."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hqlt_search_space.errors import DataError
from hqlt_search_space.tasks import LanguageModelling
from hqlt_trainer.corpus import evaluation_tokens, load_corpus
from hqlt_trainer.tasks import build_task
from hqlt_trainer.tasks.batch import IGNORED


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"the {i}th line of a small text, not like the others: {i * i}\n" for i in range(2000)))
    return path


@pytest.mark.parametrize("n_bytes", [1, 63, 64, 65, 1000, 10**6], ids=str)
def test_every_evaluated_token_but_the_first_is_predicted_once_from_those_before(text_file: Path, n_bytes: int) -> None:
    task = LanguageModelling(corpus=str(text_file), context=64, n_validation_bytes=n_bytes)
    tokens = evaluation_tokens(task, "validation").astype(np.int64)
    # Shortest first, so the last window of the text comes first, on its own.
    batches = list(build_task(task).evaluation_batches("validation", 3, "cpu"))
    predicted = torch.cat([row[row != IGNORED] for batch in batches for row in batch.targets])
    short = (len(tokens) - 1) % 64
    expected = np.concatenate([tokens[len(tokens) - short :], tokens[1 : len(tokens) - short]])
    np.testing.assert_array_equal(predicted.numpy(), expected)
    for batch in batches:
        scored = batch.targets[:, 1:] != IGNORED
        assert torch.equal(batch.inputs[:, 1:][scored], batch.targets[:, :-1][scored])


def test_training_windows_are_pieces_of_the_training_text(text_file: Path) -> None:
    task = LanguageModelling(corpus=str(text_file), context=16)
    text = load_corpus(task).splits["train"].astype(np.int64).tobytes()
    batch = build_task(task).train_batch(0, 64, 0, "cpu")
    windows = torch.cat([batch.inputs, batch.targets[:, -1:]], 1).numpy()
    assert all(window.tobytes() in text for window in windows)
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    assert len({window.tobytes() for window in windows}) > 40


def test_the_compressors_scores_stand_beside_the_models(text_file: Path) -> None:
    data = build_task(LanguageModelling(corpus=str(text_file)))
    assert data.counts_bytes
    assert set(data.reference_metrics) == {"gzip_bits_per_byte", "xz_bits_per_byte"}


def test_a_context_longer_than_the_text_is_refused(text_file: Path) -> None:
    with pytest.raises(
        DataError, match=r"training split of '.*text.txt' has \d+ tokens, too few for a context of 1000000"
    ):
        build_task(LanguageModelling(corpus=str(text_file), context=1_000_000))
