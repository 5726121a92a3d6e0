"""`make chaos` in short."""

import os
import time
from pathlib import Path

import pytest
from chaos import Plan, table, unbroken, under_fire
from faults import FAULTS


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's own
def test_a_minute_of_random_faults_changes_nothing_in_what_a_study_finds(tmp_path: Path) -> None:
    is_root = os.getuid() == 0
    plan = Plan(
        seconds=60.0,
        seed=time.time_ns() % 10**6,
        trials=6,
        steps=400,
        parallel=2,
        rows=tuple(row for row in FAULTS if is_root or row != 5),
        database="sqlite",
        with_server=False,
        disk_mib=128 if is_root else None,
        mean_pause_s=8.0,
    )
    print(f"seed {plan.seed}")  # shown if the test fails
    expected, seconds = unbroken(plan, tmp_path / "unbroken")
    outcome = under_fire(plan, tmp_path / "broken", expected, seconds)
    print(table([outcome], plan.rows))
    assert outcome.problems == []
    assert outcome.blows
