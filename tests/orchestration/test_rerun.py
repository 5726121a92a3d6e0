from typing import Any

import pytest
from hqlt_orchestration.commands.rerun import differences, environment_differences
from hqlt_search_space.arch import Arch
from hqlt_search_space.mixers import Attention
from hqlt_search_space.recipe import Recipe
from hqlt_search_space.tasks import Nothing
from hqlt_search_space.trial import Config, Environment, Trial, TrialResult

ENVIRONMENT = {
    "python": "3.11",
    "torch": "2.13",
    "hqlt": "0.1",
    "source_version": "a",
    "platform": "x",
    "cpu": "y",
    "instruction_set": "AVX2",
    "n_threads": 1,
    "device": "cpu",
}
REPLICA: dict[str, Any] = {
    "seed": 0,
    "status": "complete",
    "step": 9,
    "metrics": {"loss": 0.5},
    "knock_outs": [{"silenced": "kv", "metrics": {"loss": 0.9}}],
    "curve": [{"step": 3, "metrics": {"loss": 0.7}}, {"step": 6, "metrics": {"loss": 0.6}}],
    "weights_sha256": "aa",
    "wall_seconds": 1.0,
    "peak_memory_bytes": 10,
}


def outcome(**changes: Any) -> TrialResult:
    config = Config(
        arch=Arch(d_model=8, mlp_inner=8, layers=(Attention(n_heads=2),)), recipe=Recipe(steps=1), task=Nothing()
    )
    return TrialResult.model_validate(
        {"trial": Trial(config=config), "replicas": [REPLICA | changes], "environment": ENVIRONMENT}
    )


CHANGES: dict[str, dict[str, Any]] = {
    "last digit of a metric": {"metrics": {"loss": 0.5000000000000001}},
    "weights": {"weights_sha256": "ab"},
    "a point of the curve": {"curve": [{"step": 3, "metrics": {"loss": 0.71}}, REPLICA["curve"][1]]},
    "a knock-out": {"knock_outs": [{"silenced": "kv", "metrics": {"loss": 0.8}}]},
    "the status": {"status": "failed", "reason": "diverged"},
    "a metric that is gone": {"metrics": {}},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
def test_the_smallest_change_of_a_result_is_a_difference(changes: dict[str, Any]) -> None:
    assert differences(outcome(), outcome(**changes))
    assert not differences(outcome(**changes), outcome(**changes))


def test_times_and_memory_may_differ() -> None:
    assert not differences(outcome(), outcome(wall_seconds=2.0, peak_memory_bytes=20))


def test_a_stopped_replica_is_compared_as_far_as_it_ran() -> None:
    stopped = outcome(status="stopped", step=3, curve=REPLICA["curve"][:1], weights_sha256="of step 3")
    assert not differences(stopped, outcome())
    assert differences(stopped, outcome(**CHANGES["a point of the curve"]))


def test_another_instruction_set_is_noted() -> None:
    there = Environment.model_validate(ENVIRONMENT | {"instruction_set": "AVX512", "platform": "other"})
    assert environment_differences(Environment.model_validate(ENVIRONMENT), there) == [
        "instruction_set was AVX2, is AVX512"
    ]
