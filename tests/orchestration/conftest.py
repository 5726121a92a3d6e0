"""Small studies, and a store for each test."""

from collections.abc import Callable
from contextlib import closing
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hqlt_orchestration.records.store import Store
from hqlt_search_space.study import Study
from rich.console import Console

MakeStudy = Callable[..., Study]

SPACE: dict[str, Any] = {
    "first": ["hybrid", "fast_weight"],
    "second": ["attention"],
    "ratio": ["1:0", "1:1", "0:1"],
    "mixing": ["sum", "dynamic_vector"],
    "window": [4, 8],
    "rule": ["additive", "delta"],
    "learning_rate": {"low": 1e-3, "high": 1e-2, "scale": "log"},
}


@pytest.fixture
def make_study() -> MakeStudy:
    """A search over small models; keyword arguments replace keys of the study, `sampler` and `space` those within."""

    def make(sampler: str = "nsga2", space: dict[str, Any] | None = None, trials: int | None = 8, **keys: Any) -> Study:
        population = {"population": min(4, trials or 4)} if sampler.startswith("nsga") else {}
        search = {"sampler": {"kind": sampler, "seed": 3} | population, "space": space or SPACE}
        return Study.model_validate(
            {
                "schema_version": 1,
                "name": "small",
                "task": {"kind": "nothing"},
                "model": {"d_model": 16, "n_layers": 2, "n_heads": 2, "mlp_ratio": 2},
                "search": search,
                "objectives": {"parameters": "minimize", "state_bytes": "minimize"},
                "budget": {"trials": trials},
                "resources": {"gpu": 0},
            }
            | keys
        )

    return make


PARITY: dict[str, Any] = {
    "kind": "parity",
    "train_length": {"low": 3, "high": 8},
    "test_length": {"low": 8, "high": 12},
    "n_validation": 64,
    "n_test": 64,
}


@pytest.fixture
def make_training(make_study: MakeStudy) -> MakeStudy:
    """A search that really trains, for `steps` steps of a few milliseconds."""

    def make(steps: int = 20, trials: int = 3, **keys: Any) -> Study:
        return make_study(
            trials=trials,
            **{
                "task": PARITY,
                "recipe": {"steps": steps, "batch": 8},
                "objectives": {"normalised_validation_accuracy": "maximize", "state_bytes": "minimize"},
            }
            | keys,
        )

    return make


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "data")


Drive = Callable[[Study, Store], str]


@pytest.fixture
def drive() -> Drive:
    """What `hqlt study run` does, in this process and without MLflow; returns how it ended."""
    from hqlt_orchestration.driving.inline import InlineExecutor
    from hqlt_orchestration.driving.interrupts import Interrupts
    from hqlt_orchestration.driving.progress import ProgressView
    from hqlt_orchestration.driving.runner import Driver
    from hqlt_orchestration.driving.sampler import Proposer
    from hqlt_orchestration.records.tables import StudyRow

    def drive(study: Study, store: Store) -> str:
        with closing(store.open()) as ledger, ProgressView(study.name, Console(file=StringIO())) as view:
            study = Study.from_json(ledger.add_study(StudyRow.of(study)).study)
            ending = Driver(
                study,
                store=store,
                ledger=ledger,
                executor=lambda: InlineExecutor(cpus=1, gpus=0),
                proposer=Proposer(study, ledger),
                spool=None,
                view=view,
                interrupts=Interrupts(),
            ).run()
            ledger.update_study(study.name, state=ending)
            return ending

    return drive
