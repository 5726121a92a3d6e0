"""Checkpoints are whole or not there, and a damaged one is never used."""

import hashlib
import io
import itertools
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hqlt_search_space.errors import CheckpointError
from hqlt_trainer.checkpoint import (
    _sealed,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    weights_sha256,
    write_whole,
)

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


class _Harm:
    """Makes a file as soon as it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self._canary,)


def _numpy_objects(canary: Path) -> bytes:
    content = io.BytesIO()
    np.save(content, np.array([_Harm(canary)], object), allow_pickle=True)
    return content.getvalue()


def _torch_file(canary: Path) -> bytes:
    content = io.BytesIO()
    torch.save({"weight": _Harm(canary)}, content)
    return content.getvalue()


def _header(entries: object, length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text


BEYOND = {"weight": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
FORGED: dict[str, tuple[str, Callable[[Path], bytes]]] = {
    "torch file as weights": ("model.safetensors", _torch_file),
    "pickle as weights": ("model.safetensors", lambda canary: pickle.dumps(_Harm(canary))),
    "pickle as optimiser": ("optimiser.safetensors", lambda canary: pickle.dumps(_Harm(canary))),
    "objects of numpy as weights": ("model.safetensors", _numpy_objects),
    "pickle as state": ("state.json", lambda canary: pickle.dumps(_Harm(canary))),
    "a list as state": ("state.json", lambda _: b"[1]"),
    "deep state": ("state.json", lambda _: b"[" * 100_000),
    "header of an exabyte": ("model.safetensors", lambda _: _header({}, 1 << 60)),
    "tensor beyond the file": ("model.safetensors", lambda _: _header(BEYOND)),
    "deep header": ("model.safetensors", lambda _: _header(b"[" * 100_000)),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_checkpoint_with_a_true_manifest_runs_no_code_and_is_damaged(case: str, tmp_path: Path) -> None:
    name, content = FORGED[case]
    canary = tmp_path / "canary"
    path = _save(tmp_path / "checkpoints", 1)
    _forge(path, name, content(canary))
    (path / ".metadata").write_bytes(pickle.dumps(_Harm(canary)))  # what torch's distributed checkpoints unpickle
    with pytest.raises(CheckpointError, match="incomplete or unreadable"):
        load_checkpoint(path, CONFIG)
    assert latest_checkpoint(tmp_path / "checkpoints", CONFIG)[0] is None
    assert not canary.exists()


def _forge(path: Path, name: str, content: bytes, **changes: object) -> None:
    """Write `content` into a checkpoint whose manifest agrees."""
    (path / name).write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_bytes())
    del manifest["sha256"]
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_bytes(_sealed(manifest | changes))


def _as_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _as_link(file: Path, to: str) -> None:
    file.unlink()
    file.symlink_to(to)


@pytest.mark.parametrize(
    "replace",
    [_as_pipe, lambda file: _as_link(file, "/dev/zero"), lambda file: _as_link(file, file.name)],
    ids=["pipe", "endless device", "link to itself"],
)
@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_what_is_no_regular_file_is_not_opened(tmp_path: Path, name: str, replace: Callable[[Path], None]) -> None:
    path = _save(tmp_path, 1)
    replace(path / name)
    with pytest.raises(CheckpointError, match="no regular file"):
        load_checkpoint(path, CONFIG)


def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    os.mkfifo(tmp_path / "outside")  # who opens it waits for ever
    expected = {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}
    _forge(path, "state.json", b"{}", files={**_files_of(path), "../outside": expected})
    with pytest.raises(CheckpointError, match="does not match the manifest"):
        load_checkpoint(path, CONFIG)
    _forge(path, "state.json", b"{}", files={"../outside": expected})
    with pytest.raises(CheckpointError, match="incomplete or unreadable"):
        load_checkpoint(path, CONFIG)


def _files_of(path: Path) -> dict[str, object]:
    files: dict[str, object] = json.loads((path / "manifest.json").read_bytes())["files"]
    return files
