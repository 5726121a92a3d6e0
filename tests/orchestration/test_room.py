"""The disk is looked at before anything trains: a real one, small enough to be too small."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hqlt_orchestration.commands.room import KEPT, check_room, checkpoint_bytes
from hqlt_orchestration.records.store import Store
from hqlt_search_space.errors import ResourceError
from hqlt_search_space.study import Study
from hqlt_search_space.trial import Trial
from hqlt_trainer.run import run_trial

MakeStudy = Callable[..., Study]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.getuid() != 0:
        pytest.skip("only root may mount a small disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_study_whose_first_checkpoints_do_not_fit_is_refused(small_disk: Path, make_training: MakeStudy) -> None:
    study = make_training(trials=4, model={"d_model": 128, "n_layers": 4, "n_heads": 2}, budget={"trials": 4})
    with pytest.raises(ResourceError, match=r"has 1 MiB free, and 1 trial at a time may need [\d.]+ MiB"):
        check_room(study, 4, Store(small_disk / "data"))


def test_a_study_that_fits_for_now_is_warned_of_what_it_comes_to(small_disk: Path, make_training: MakeStudy) -> None:
    study = make_training(trials=100)
    warning = check_room(study, 100, Store(small_disk / "data"))
    assert warning is not None
    assert "`hqlt study gc small` removes" in warning
    assert check_room(study, 1, Store(small_disk / "data")) is None


def test_a_trial_writes_no_more_than_is_reckoned_with(make_training: MakeStudy, tmp_path: Path) -> None:
    study = make_training(trials=1, sampler="random", steps=4)
    largest = max(checkpoint_bytes(study))
    sampled, _ = study.resolve({"rule": "delta", "first": "hybrid", "ratio": "1:0", "window": 8})
    run_trial(Trial(config=sampled, rungs=(2, 3)), tmp_path)
    written = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert written <= KEPT * largest
