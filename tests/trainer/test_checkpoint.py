"""Checkpoints are whole or not there, and a damaged one is never used."""

import itertools
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hqlt_search_space.errors import CheckpointError
from hqlt_trainer.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint, weights_sha256, write_whole

CONFIG = "0123456789abcdef"


def _save(folder: Path, step: int) -> Path:
    tensors = {"weight": torch.full((3, 4), float(step)), "empty": torch.empty(0)}
    state = {"step": step, "third": 1 / 3}
    return save_checkpoint(folder, step, config_id=CONFIG, model=tensors, optimiser=tensors, state=state)


def _latest_step(folder: Path) -> int | None:
    found, _ = latest_checkpoint(folder, CONFIG)
    return None if found is None else found.step


def test_what_is_saved_comes_back_to_the_bit(tmp_path: Path) -> None:
    found = load_checkpoint(_save(tmp_path, 7), CONFIG)
    assert (found.step, found.state) == (7, {"step": 7, "third": 1 / 3})
    assert torch.equal(found.model["weight"], torch.full((3, 4), 7.0))
    assert found.optimiser["empty"].shape == (0,)


def test_the_newest_two_are_kept_and_order_is_by_number(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        _save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-100"]
    assert _latest_step(tmp_path) == 100


def test_any_changed_byte_is_detected_before_use(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    files = sorted(path.iterdir())
    assert len(files) == 4
    generator = random.Random(0)
    for _ in range(1000):
        file = generator.choice(files)
        content = file.read_bytes()
        place = generator.randrange(len(content))
        changed = bytearray(content)
        changed[place] ^= generator.randrange(1, 256)
        file.write_bytes(changed)
        with pytest.raises(CheckpointError):
            load_checkpoint(path, CONFIG)
        file.write_bytes(content)
    load_checkpoint(path, CONFIG)


@pytest.mark.parametrize("name", ["model.safetensors", "optimiser.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize(
    "damage",
    [lambda file: file.unlink(), lambda file: file.write_bytes(b""), lambda file: os.truncate(file, 40)],
    ids=["missing", "empty", "truncated"],
)
def test_a_damaged_checkpoint_is_skipped_with_a_note(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    _save(tmp_path, 1)
    damage(_save(tmp_path, 2) / name)
    found, notes = latest_checkpoint(tmp_path, CONFIG)
    assert found is not None
    assert found.step == 1
    assert len(notes) == 1
    assert "step-2" in notes[0]


def test_a_damaged_checkpoint_is_replaced_by_the_next_of_its_step(tmp_path: Path) -> None:
    (_save(tmp_path, 2) / "state.json").write_bytes(b"{}")
    _save(tmp_path, 2)
    assert _latest_step(tmp_path) == 2


def test_a_checkpoint_of_another_config_is_refused(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="belongs to config 0123456789abcdef, not feedfeedfeedfeed"):
        latest_checkpoint(tmp_path, "feedfeedfeedfeed")


@pytest.mark.parametrize("n", range(6), ids=lambda n: f"sync_{n}")
def test_a_write_that_fails_anywhere_leaves_the_earlier_checkpoint(
    n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th sync fails as on a full disk: of the four files, of their folder, of the folder around it."""
    _save(tmp_path, 1)
    real_fsync, calls = os.fsync, itertools.count()

    def fsync(descriptor: int) -> None:
        if next(calls) == n:
            raise OSError(28, "No space left on device")
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        _save(tmp_path, 2)
    assert _latest_step(tmp_path) == (1 if n < 5 else 2)
    assert not list(tmp_path.glob("*.tmp"))


def test_what_a_killed_process_wrote_aside_is_ignored_and_removed(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    shutil.copytree(tmp_path / "step-1", tmp_path / "step-2.tmp")
    assert _latest_step(tmp_path) == 1
    _save(tmp_path, 3)
    assert not (tmp_path / "step-2.tmp").exists()


def test_weights_hash_sees_a_single_bit_and_not_the_order() -> None:
    weights = {"a": torch.zeros(3), "b": torch.ones(2)}
    changed = {"a": torch.tensor([0.0, 0.0, -0.0]), "b": torch.ones(2)}
    assert weights_sha256(weights) == weights_sha256(dict(reversed(weights.items())))
    assert weights_sha256(weights) != weights_sha256(changed)


def test_write_whole_replaces_a_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_whole(path, "first")
    write_whole(path, "second")
    assert path.read_text() == "second"
    assert list(tmp_path.iterdir()) == [path]
