"""Studies as values, built by hand: what the dashboards draw from."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

import pytest
from hqlt_dashboards.asked import Background
from hqlt_search_space.arch import Arch
from hqlt_search_space.mixers import Attention, FastWeight, Hybrid, Mixer
from hqlt_search_space.recipe import Recipe
from hqlt_search_space.study import Study
from hqlt_search_space.tasks import Parity
from hqlt_search_space.trial import (
    Config,
    CurvePoint,
    Environment,
    Objective,
    ReplicaResult,
    StudyResults,
    TrialRecord,
)

OBJECTIVES = (
    Objective(name="normalised_validation_accuracy", direction="maximize"),
    Objective(name="state_bytes", direction="minimize"),
)

HYBRID = Hybrid(n_heads=2, window=8)


def replica(seed: int, accuracy: float | None, **metrics: float) -> ReplicaResult:
    """One seed's result; an accuracy of None is a seed that diverged."""
    if accuracy is None:
        return ReplicaResult(seed=seed, status="failed", reason="diverged", message="loss is not finite", step=40)
    return ReplicaResult(
        seed=seed,
        status="complete",
        step=200,
        metrics={"normalised_validation_accuracy": accuracy, **metrics},
        curve=tuple(
            CurvePoint(
                step=50 * i, metrics={"normalised_validation_accuracy": accuracy * i / 4, "train_loss_nats": 1 / i}
            )
            for i in range(1, 5)
        ),
        train_seconds=2.0,
    )


def record(
    number: int,
    accuracy: float | None = 0.5,
    state_bytes: float = 1024.0,
    *,
    layers: Sequence[Mixer] = (HYBRID, HYBRID),
    replication: Mapping[int, float | None] | None = None,
    **changes: object,
) -> TrialRecord:
    """A trial of seed 0; every number has a config of its own, by its learning rate."""
    values: dict[str, object] = {
        "number": number,
        "phase": "search",
        "state": "complete" if accuracy is not None else "failed",
        "config": Config(
            arch=Arch(d_model=16, mlp_inner=32, layers=tuple(layers)),
            recipe=Recipe(learning_rate=1e-3 * (number + 1)),
            task=Parity(),
        ),
        "choices": {"first": "hybrid", "learning_rate": 1e-3 * (number + 1)},
        "costs": {"state_bytes": state_bytes, "parameters": 10_000.0},
        "objectives": {}
        if accuracy is None
        else {"normalised_validation_accuracy": accuracy, "state_bytes": state_bytes},
        "replicas": (replica(0, accuracy),),
        "replication": tuple(replica(seed, value) for seed, value in (replication or {}).items()),
    }
    return TrialRecord.model_validate(values | changes)


def study(*records: TrialRecord, **changes: object) -> StudyResults:
    values: dict[str, object] = {"name": "parity-blends", "objectives": OBJECTIVES, "trials": records, "budget": 12}
    return StudyResults.model_validate(values | changes)


def background(results: StudyResults, **changes: object) -> Background:
    """What a report tells beside `results`: a finished search, or an ablation if they have cells."""
    plan: dict[str, object] = {"search": {"space": {"first": ["hybrid", "attention"], "window": [4, 8]}}}
    if any(record.cell for record in results.trials):
        plan = {"ablation": {"baseline": {"first": "hybrid", "window": 8}, "vary": {"window": [4]}}}
    study = {
        "schema_version": 1,
        "name": "parity-blends",
        "task": {"kind": "parity"},
        "model": {"d_model": 16, "n_layers": 2, "n_heads": 2},
        "objectives": {o.name: o.direction for o in results.objectives},
    }
    values: dict[str, object] = {
        "study": Study.model_validate(study | plan | ({"budget": {"trials": 12}} if "search" in plan else {})),
        "file_text": "name: parity-blends",
        "state": "complete",
        "note": None,
        "began": datetime(2026, 11, 23, 9, 0, tzinfo=UTC),
        "made": datetime(2026, 11, 23, 10, 0, tzinfo=UTC),
        "version": "0.1.0",
        "environments": (
            Environment(
                python="3.11.7",
                torch="2.13.0",
                hqlt="0.1.0",
                source_version=None,
                platform="Linux",
                cpu="EPYC",
                instruction_set="avx2",
                n_threads=1,
                device="cpu",
            ),
        ),
        "backends": (),
        "notes": (),
        "last_words": {},
        "options": "",
    }
    return Background(**(values | changes))


@pytest.fixture(scope="session")
def make_background() -> Callable[..., Background]:
    return background


@pytest.fixture(scope="session")
def make_replica() -> Callable[..., ReplicaResult]:
    return replica


@pytest.fixture(scope="session")
def make_record() -> Callable[..., TrialRecord]:
    return record


@pytest.fixture(scope="session")
def make_study() -> Callable[..., StudyResults]:
    return study


@pytest.fixture(scope="session")
def make_results() -> Callable[..., StudyResults]:
    """Six trials of three kinds with one to three objectives, and a seventh that failed."""

    def make(n_objectives: int, replication: Mapping[int, float | None] | None = None) -> StudyResults:
        objectives = (*OBJECTIVES, Objective(name="parameters", direction="minimize"))[:n_objectives]
        mixers = [(FastWeight(n_heads=2),), (Attention(n_heads=2),), (FastWeight(n_heads=2), Attention(n_heads=2))]
        records = []
        for i in range(6):
            values = {
                "normalised_validation_accuracy": i / 5 - 0.1,
                "state_bytes": 512.0 * 3**i,
                "parameters": 9000.0 + 100 * (i % 3),
            }
            chosen = {objective.name: values[objective.name] for objective in objectives}
            costs = {name: values[name] for name in ("state_bytes", "parameters")}
            records.append(record(i, layers=mixers[i % 3], objectives=chosen, costs=costs, replication=replication))
        return study(*records, record(6, None), objectives=objectives)

    return make
