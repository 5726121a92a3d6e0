"""Checkpoints that are either whole or not there.

A checkpoint is a folder `step-N`:

    model.safetensors       parameters by name
    optimiser.safetensors   AdamW's moments and step counts
    state.json              everything else that a resumed run needs
    manifest.json           size and SHA-256 of the three, step and config_id, and a SHA-256 of itself

It is written aside as `step-N.tmp`, synced, given its manifest, synced, and renamed, so a crash at any moment leaves
the earlier checkpoints as they were. Reading checks every byte against the manifest before anything is used. No file is
a pickle. Which checkpoint is the latest is computed, never stored.
"""

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from hqlt_search_space.errors import CheckpointError
from hqlt_search_space.spec import canonical_json
from torch import Tensor

KEPT = 2
FORMAT = 1
MANIFEST = "manifest.json"
FILES = ("model.safetensors", "optimiser.safetensors", "state.json")
MAX_MANIFEST_BYTES = 64 * 1024


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, read and verified."""

    path: Path
    step: int
    model: dict[str, Tensor]
    optimiser: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    config_id: str,
    model: Mapping[str, Tensor],
    optimiser: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> Path:
    """Writes `folder/step-N` and removes all but the newest two. A whole checkpoint of this step stays as it is.

    Raises:
        OSError: the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final, aside = folder / f"step-{step}", folder / f"step-{step}.tmp"
    if final.exists():
        try:
            return load_checkpoint(final, config_id).path
        except _DamagedError:
            shutil.rmtree(final)
    for abandoned in folder.glob("step-*.tmp"):  # by a process that died
        shutil.rmtree(abandoned)
    contents = {
        "model.safetensors": safetensors.torch.save(_on_cpu(model)),
        "optimiser.safetensors": safetensors.torch.save(_on_cpu(optimiser)),
        "state.json": canonical_json(dict(state)).encode(),
    }
    manifest = {
        "format": FORMAT,
        "step": step,
        "config_id": config_id,
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in contents.items()
        },
    }
    try:
        aside.mkdir()
        for name, content in contents.items():
            _write_synced(aside / name, content)
        _write_synced(aside / MANIFEST, _sealed(manifest))
        _sync_folder(aside)
        aside.rename(final)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    _sync_folder(folder)
    for _, old in _steps(folder)[KEPT:]:
        shutil.rmtree(old)
    return final


def latest_checkpoint(
    folder: Path, config_id: str, at_most: int | None = None
) -> tuple[Checkpoint | None, tuple[str, ...]]:
    """The newest checkpoint in `folder`, up to step `at_most`, that is whole, or None; and a sentence for each newer
    one that is not.

    Raises:
        CheckpointError: a whole checkpoint belongs to another config.
    """
    notes: list[str] = []
    for step, path in _steps(folder):
        if at_most is not None and step > at_most:
            continue
        try:
            return load_checkpoint(path, config_id), tuple(notes)
        except _DamagedError as error:
            notes.append(f"skipped a damaged checkpoint: {error}")
    return None, tuple(notes)


def remove_newer(folder: Path, step: int) -> None:
    """Removes the checkpoints of later steps."""
    for found, path in _steps(folder):
        if found > step:
            shutil.rmtree(path)


def load_checkpoint(path: Path, config_id: str) -> Checkpoint:
    """The checkpoint at `path`, every byte verified.

    Raises:
        CheckpointError: it is damaged or incomplete, or belongs to another config.
    """
    try:
        sealed = _read(path / MANIFEST)
        manifest = json.loads(sealed)
        del manifest["sha256"]
        if sealed != _sealed(manifest) or manifest["format"] != FORMAT:
            raise _DamagedError(f"{path / MANIFEST} does not match its own SHA-256")
        contents = {}
        for name in FILES:
            expected = manifest["files"][name]
            content = contents[name] = _read(path / name, expected["bytes"])
            if len(content) != expected["bytes"] or hashlib.sha256(content).hexdigest() != expected["sha256"]:
                raise _DamagedError(f"{path / name} does not match the manifest's SHA-256")
        found = Checkpoint(
            path=path,
            step=int(manifest["step"]),
            model=safetensors.torch.load(contents["model.safetensors"]),
            optimiser=safetensors.torch.load(contents["optimiser.safetensors"]),
            state=dict(json.loads(contents["state.json"])),
        )
        belongs_to = str(manifest["config_id"])
    # A manifest that is true to its files can still be somebody's who means harm.
    except (OSError, ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError) as error:
        raise _DamagedError(f"{path} is incomplete or unreadable: {error}") from error
    if belongs_to != config_id:
        raise CheckpointError(
            f"{path} belongs to config {belongs_to[:100]}, not {config_id}; give each trial a folder of its own"
        )
    return found


def _read(path: Path, n_bytes: int = MAX_MANIFEST_BYTES) -> bytes:
    """What is in the file `path`, at most `n_bytes`. A link, a pipe or a device is not read: some never end."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise _DamagedError(f"{path} is no regular file")
    if status.st_size > n_bytes:
        raise _DamagedError(f"{path} has {status.st_size} bytes, expected {n_bytes} at most")
    return path.read_bytes()


def write_whole(path: Path, text: str) -> None:
    """Writes `text` so that `path` holds all of it or what it held before, even if the machine stops meanwhile."""
    aside = path.with_name(path.name + ".tmp")
    aside.unlink(missing_ok=True)
    _write_synced(aside, text.encode())
    aside.replace(path)
    _sync_folder(path.parent)


def weights_sha256(parameters: Mapping[str, Tensor]) -> str:
    """SHA-256 over every parameter's name, shape and bytes, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(parameters.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class _DamagedError(CheckpointError):
    """Skipped by `latest_checkpoint`, unlike a checkpoint of another config."""


def _sealed(manifest: dict[str, Any]) -> bytes:
    """The manifest with a hash of itself: the only bytes that are accepted back, so any flipped bit shows."""
    digest = hashlib.sha256(canonical_json(manifest).encode()).hexdigest()
    return canonical_json(manifest | {"sha256": digest}).encode()


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders of the checkpoints, newest first; those written aside by a process that died are not there."""
    found = []
    for path in folder.glob("step-*"):
        number = path.name.removeprefix("step-")
        if number.isdecimal():
            found.append((int(number), path))
    return sorted(found, reverse=True)


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
