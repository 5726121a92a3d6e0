"""The values that cross every border come back from JSON as they were."""

import math

import pytest
from hqlt_search_space.axes import AxisValue
from hqlt_search_space.build import build_arch
from hqlt_search_space.recipe import Recipe
from hqlt_search_space.tasks import (
    CycleNavigation,
    EvenPairs,
    LanguageModelling,
    Lengths,
    ModularArithmetic,
    Mqar,
    Nothing,
    Parity,
    Task,
)
from hqlt_search_space.trial import (
    Backend,
    Config,
    CurvePoint,
    Environment,
    KnockOut,
    MeanGate,
    Objective,
    ReplicaResult,
    Runtime,
    StudyResults,
    Trial,
    TrialRecord,
    TrialResult,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

Strategy = st.SearchStrategy[dict[str, AxisValue]]
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
METRICS = st.dictionaries(st.sampled_from(["validation_loss_nats", "validation_accuracy"]), NUMBERS)
TASKS: tuple[Task, ...] = (
    Parity(train_length=Lengths(low=3, high=9)),
    EvenPairs(),
    CycleNavigation(n_positions=4),
    ModularArithmetic(brackets=True),
    Mqar(vocab_size=64),
    LanguageModelling(corpus="a folder/é.txt"),
    Nothing(),
)


@st.composite
def replicas(draw: st.DrawFn) -> ReplicaResult:
    return ReplicaResult(
        seed=draw(st.integers(0, 2**31 - 1)),
        status=draw(st.sampled_from(["complete", "stopped", "failed"])),
        reason=draw(st.sampled_from([None, "diverged", "out_of_memory"])),
        message=draw(st.none() | st.text(max_size=20)),
        step=draw(st.integers(0, 10**9)),
        metrics=draw(METRICS),
        knock_outs=(KnockOut(silenced="kv", metrics=draw(METRICS)),),
        gates=(MeanGate(layer=0, fw=draw(NUMBERS), kv=0.5),),
        curve=(CurvePoint(step=1, metrics=draw(METRICS)),),
        tokens_per_second=draw(st.none() | NUMBERS),
    )


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_trials_and_results_round_trip_through_json(
    data: st.DataObject, sensible_settings: Strategy, environment: Environment
) -> None:
    arch, _ = build_arch(data.draw(sensible_settings))
    recipe = Recipe(learning_rate=data.draw(st.floats(1e-8, 1.0)), clip=data.draw(st.none() | st.just(1.0)))
    config = Config(arch=arch, recipe=recipe, task=data.draw(st.sampled_from(TASKS)))
    trial = Trial(config=config, seeds=(0, 5), rungs=(10, 20), runtime=Runtime(device="cuda"), study="s", number=3)
    done = data.draw(replicas())
    backends = (Backend(operator="blend", backend="chunked", reason="cpu"),)
    result = TrialResult(trial=trial, replicas=(done,), backends=backends, environment=environment)
    record = TrialRecord(
        number=0, phase="search", state="complete", config=config, choices={"window": None}, replicas=(done,)
    )
    results = StudyResults(
        name="s",
        objectives=(Objective(name="state_bytes", direction="minimize"),),
        trials=(record,),
        budget=3,
        constraints={"parameters": (None, 5.0)},
    )
    for value in (trial, result, results):
        assert type(value).from_json(value.canonical_json()) == value
        assert type(value).from_json(value.model_dump_json()).canonical_json() == value.canonical_json()
    assert trial.trial_id == record.trial_id == config.config_id
    assert trial.model_copy(update={"number": 4, "seeds": (9,)}).trial_id == trial.trial_id


def test_two_configs_that_differ_anywhere_have_two_ids() -> None:
    arch, _ = build_arch({"d_model": 16})
    other, _ = build_arch({"d_model": 16, "window": 9})
    configs = [
        Config(arch=a, recipe=Recipe(steps=steps), task=task)
        for a in (arch, other)
        for steps in (1, 2)
        for task in (Parity(), Parity(n_test=3), LanguageModelling(), LanguageModelling(data_sha256="0"))
    ]
    assert len({config.config_id for config in configs}) == len(configs)


def test_an_id_is_sixteen_digits_and_the_same_in_every_process() -> None:
    config = Config(arch=build_arch({})[0], recipe=Recipe(), task=Parity())
    assert config.config_id == "64cfde0a643bef54"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "-inf"])
def test_what_is_not_finite_cannot_be_a_result(value: float) -> None:
    with pytest.raises(ValidationError):
        ReplicaResult(seed=0, status="complete", step=1, metrics={"validation_loss_nats": value})


def test_an_unknown_key_is_refused() -> None:
    with pytest.raises(ValidationError, match="windows"):
        Trial.from_json('{"windows": 3}')


def test_accumulation_must_divide_the_batch() -> None:
    with pytest.raises(ValidationError, match="accumulation 3 does not divide batch 8"):
        Recipe(batch=8, accumulation=3)
