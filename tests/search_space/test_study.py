"""The study: what its spaces hold, what its cells are, and what is wrong between its keys."""

import copy
import itertools
import math
from typing import Any

import pytest
from hqlt_search_space.axes import AxisDomain, AxisValue, Choices, IntegerRange, RealRange
from hqlt_search_space.cost import costs
from hqlt_search_space.errors import InvalidArchError, MatchError, UnknownNameError
from hqlt_search_space.study import Study
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

SEARCH: dict[str, Any] = {
    "schema_version": 1,
    "name": "parity-blends",
    "task": {"kind": "parity", "train_length": {"low": 3, "high": 40}, "test_length": {"low": 40, "high": 256}},
    "model": {"d_model": 64, "n_layers": 2, "n_heads": 2, "short_conv": 4},
    "search": {
        "sampler": {"kind": "nsga2", "seed": 0, "population": 8},
        "space": {
            "first": ["hybrid", "fast_weight"],
            "second": ["attention"],
            "ratio": ["1:0", "1:1", "0:1"],
            "blend": ["synchronous", "delayed_streaming", "delayed_chunk"],
            "mixing": ["sum", "dynamic_scalar", "dynamic_vector"],
            "window": [4, 8, 16],
            "rule": ["additive", "delta", "gated_delta"],
            "beta_range": [1, 2],
            "learning_rate": {"low": 1e-3, "high": 1e-2, "scale": "log"},
        },
    },
    "objectives": {"validation_accuracy": "maximize", "state_bytes": "minimize"},
    "constraints": {"parameters": {"max": 500_000}},
    "recipe": {"steps": 2000, "batch": 128},
    "early_stopping": {"kind": "moasha", "rungs": [500, 1000, 2000], "eta": 3},
    "replication": {"seeds": [1, 2, 3, 4, 5], "what": "front"},
    "budget": {"trials": 48, "parallel": 2},
    "resources": {"cpu": 1, "gpu": "auto"},
}

ABLATION: dict[str, Any] = {
    "schema_version": 1,
    "name": "what-matters",
    "task": {"kind": "parity"},
    "model": {"d_model": 64, "n_layers": 2, "n_heads": 2},
    "recipe": {"steps": 100},
    "ablation": {
        "baseline": {"blend": "synchronous", "mixing": "dynamic_vector", "window": 8, "rule": "delta"},
        "vary": {
            "mixing": ["sum", "dynamic_scalar"],
            "rule": ["additive"],
            "blend": ["delayed_streaming", "delayed_chunk"],
        },
    },
    "objectives": {"validation_accuracy": "maximize"},
}


FIVE_AXES = ("learning_rate", "clip", "init_std", "weight_decay", "epsilon")


def edited(base: dict[str, Any], **changes: object) -> dict[str, Any]:
    """`base` with the keys of dotted paths (`search__space`) set; None removes a key."""
    result = copy.deepcopy(base)
    for path, value in changes.items():
        *parents, last = path.split("__")
        inner = result
        for parent in parents:
            inner = inner.setdefault(parent, {})
        if value is None:
            inner.pop(last, None)
        else:
            inner[last] = value
    return result


def search(space: dict[str, Any], **changes: object) -> Study:
    """A small search over `space`."""
    base = edited(SEARCH, search__space=space, constraints={}, search__sampler={"kind": "random"})
    return Study.model_validate(edited(base, **changes))


def drawn(domain: AxisDomain, data: st.DataObject) -> AxisValue:
    match domain:
        case Choices():
            return data.draw(st.sampled_from(domain.values))
        case IntegerRange():
            return data.draw(st.sampled_from(range(domain.low, domain.high + 1, domain.step)))
        case RealRange():
            return data.draw(st.floats(domain.low, domain.high))


def sentences(data: dict[str, Any]) -> dict[str, str]:
    """Path -> sentence of everything that is wrong with `data`."""
    with pytest.raises(ValidationError) as caught:
        Study.model_validate(data)
    return {".".join(map(str, error["loc"])): error["msg"] for error in caught.value.errors()}


# --- values ---


@pytest.mark.parametrize("data", [SEARCH, ABLATION], ids=["search", "ablation"])
def test_a_study_round_trips_through_json(data: dict[str, Any]) -> None:
    study = Study.model_validate(data)
    assert Study.from_json(study.canonical_json()) == study
    assert Study.from_json(study.canonical_json()).canonical_json() == study.canonical_json()


def test_what_is_not_in_the_file_is_not_in_the_study() -> None:
    """An axis that is not named keeps its default, which is another thing than being set to null."""
    study = Study.model_validate(SEARCH)
    assert "window" not in study.model
    assert study.model_dump(mode="json")["model"] == SEARCH["model"]


def test_a_sampler_sees_typed_domains() -> None:
    study = search(
        {
            "window": [4, None],
            "d_model": {"low": 32, "high": 64, "step": 16},
            "steps": {"low": 10, "high": 1000, "scale": "log"},
            "weight_decay": {"low": 0, "high": 1},
            "learning_rate": {"low": 1e-3, "high": 1e-2, "scale": "log"},
        },
        model={"n_heads": 2},
        recipe={},
        early_stopping=None,
    )
    assert study.domains() == {
        "window": Choices((4, None)),
        "d_model": IntegerRange(32, 64, 16, log=False),
        "steps": IntegerRange(10, 1000, 1, log=True),
        "weight_decay": RealRange(0.0, 1.0, log=False),
        "learning_rate": RealRange(1e-3, 1e-2, log=True),
    }
    assert all(type(end) is float for end in (study.domains()["weight_decay"].low,))  # type: ignore[union-attr]


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_canonical_choices_make_the_same_config_again(data: st.DataObject) -> None:
    study = Study.model_validate(SEARCH)
    choices = {axis: drawn(domain, data) for axis, domain in study.domains().items()}
    config, canonical = study.resolve(choices)
    assert canonical.keys() <= choices.keys()
    again, twice = study.resolve(canonical)
    assert again.config_id == config.config_id
    assert twice == canonical


def test_choices_without_meaning_are_dropped_and_the_ratio_is_what_was_built() -> None:
    study = Study.model_validate(SEARCH)
    choices = {"first": "fast_weight", "ratio": "1:0", "window": 4, "rule": "additive", "beta_range": 1}
    assert study.resolve(choices)[1] == {"first": "fast_weight", "ratio": "1:0", "rule": "additive"}
    assert study.resolve({"first": "hybrid", "ratio": "3:1"})[1]["ratio"] == "1:1"


def test_a_choice_overrules_what_the_study_fixes() -> None:
    study = Study.model_validate(SEARCH)
    config, _ = study.resolve({"d_model": 32, "steps": 7})
    assert (config.arch.d_model, config.recipe.steps, config.recipe.batch) == (32, 7, 128)
    with pytest.raises(UnknownNameError, match="did you mean 'd_model'"):
        study.resolve({"dmodel": 32})
    with pytest.raises(InvalidArchError, match="window: 0 is below"):
        study.resolve({"window": 0})


# --- spaces ---


@pytest.mark.parametrize(
    "space",
    [
        {"window": [4, 8], "blend": ["synchronous", "delayed_streaming"]},
        {
            "first": ["hybrid", "fast_weight", "attention"],
            "window": [4, None],
            "blend": ["synchronous", "delayed_chunk"],
        },
        {
            "rule": ["delta", "delta_product", "additive"],
            "n_householder": [1, 2],
            "feature_map": ["silu_l2", "identity"],
        },
        {"ratio": ["1:1", "3:1", "1:0"], "second": ["attention", "hybrid"], "placement": ["interleaved", "last"]},
        {"n_heads": {"low": 1, "high": 5}, "steps": [10, 20], "accumulation": [1, 3]},
    ],
    ids=["blend", "mixers", "rules", "ratio", "heads"],
)
def test_size_counts_each_feasible_config_once(space: dict[str, Any]) -> None:
    model = {"d_model": 64} if "n_heads" in space else {"d_model": 64, "n_heads": 2}
    limits = {"parameters": {"max": 100_000}}
    study = search(space, model=model, recipe={"batch": 128}, early_stopping=None, constraints=limits)
    expected = set()
    values = [d.values if isinstance(d, Choices) else range(d.low, d.high + 1) for d in study.domains().values()]  # type: ignore[union-attr]
    for combination in itertools.product(*values):
        try:
            config, _ = study.resolve(dict(zip(study.domains(), combination, strict=True)))
        except InvalidArchError:
            continue
        if not study.violations(costs(config)):
            expected.add(config.config_id)
    assert study.size() == len(expected)
    listed = [config.config_id for _, config in study.configs()]
    assert len(listed) == len(set(listed))
    assert set(listed) == expected


def test_listed_choices_make_the_listed_configs() -> None:
    study = search(
        {"first": ["hybrid", "fast_weight"], "window": [4, 8], "steps": [10, 20]}, recipe={}, early_stopping=None
    )
    assert study.size() == 6
    for choices, config in study.configs():
        assert study.resolve(choices)[0] == config


def test_a_range_of_real_numbers_is_infinite() -> None:
    assert Study.model_validate(SEARCH).size() is None
    assert math.isinf(Study.model_validate(SEARCH).n_combinations)


def test_a_space_too_large_to_list_has_no_size() -> None:
    study = search({"window": {"low": 1, "high": 1000}, "batch": {"low": 1, "high": 101}}, recipe={"steps": 2000})
    assert study.n_combinations == 101_000
    assert study.size() is None


def test_a_constraint_that_excludes_everything_is_named_with_the_nearest() -> None:
    study = search({"window": [4, 8]}, constraints={"parameters": {"max": 1000}, "state_bytes": {"max": 10**9}})
    reason = study.why_empty()
    assert reason is not None
    assert "parameters max 1,000 (the nearest has 1" in reason
    assert "state_bytes" not in reason


def test_constraints_that_exclude_everything_together_are_all_named() -> None:
    study = search(
        {"first": ["attention", "fast_weight"], "window": [4]},
        constraints={"fw_state_bytes": {"max": 0}, "kv_cache_bytes": {"max": 0}},
        model={"d_model": 64, "n_heads": 2},
    )
    reason = study.why_empty()
    assert reason is not None
    assert reason.startswith("no config of this space satisfies all at once of fw_state_bytes max 0")
    assert "kv_cache_bytes max 0 (the nearest has" in reason
    assert "; 1 of 2 break it)" in reason


def test_a_learning_rate_does_not_make_the_look_for_feasible_configs_a_guess() -> None:
    study = Study.model_validate(edited(SEARCH, constraints={"parameters": {"max": 1000}}))
    assert study.size() is None
    reason = study.why_empty()
    assert reason is not None
    assert reason.startswith("no config of this space satisfies parameters max 1,000")


def test_an_infinite_space_is_judged_by_samples_and_says_so() -> None:
    study = search({"mlp_ratio": {"low": 1, "high": 4}}, constraints={"parameters": {"max": 1000}})
    reason = study.why_empty()
    assert reason is not None
    assert reason.startswith("none of 1,000 random configs of this space satisfies parameters max 1,000")


def test_a_space_of_models_that_cannot_be_built_says_why() -> None:
    study = search({"n_heads": [3, 5]}, model={"d_model": 64})
    assert study.why_empty() == "no config of this space can be built: n_heads 3 does not divide d_model 64"
    assert study.size() == 0


def test_a_space_with_a_feasible_config_is_not_empty() -> None:
    assert Study.model_validate(SEARCH).why_empty() is None


def test_violations_say_what_is_broken() -> None:
    study = search({"window": [4]}, constraints={"parameters": {"max": 10}, "state_bytes": {"min": 5}})
    assert study.violations({"parameters": 11, "state_bytes": 4}) == (
        "parameters 11 is above max 10",
        "state_bytes 4 is below min 5",
    )
    assert study.violations({"parameters": 10, "state_bytes": 5}) == ()


def test_a_matched_search_makes_all_configs_equally_large() -> None:
    study = search(
        {"first": ["hybrid", "attention"], "mixing": ["sum", "separate_vector"]},
        search__match={"quantity": "parameters", "target": 150_000},
    )
    counted = [costs(config)["parameters"] for _, config in study.configs()]
    assert len(counted) == 3
    assert all(abs(n / 150_000 - 1) < 0.01 for n in counted)
    too_small = search({"mixing": ["sum"]}, search__match={"quantity": "parameters", "target": 1000})
    with pytest.raises(InvalidArchError, match="nearest reachable"):
        too_small.resolve({})


# --- ablations ---


def test_one_factor_changes_one_thing_at_a_time() -> None:
    cells = Study.model_validate(ABLATION).cells()
    assert [cell.label for cell in cells] == [
        "baseline",
        "blend=delayed_streaming",
        "blend=delayed_chunk",
        "mixing=sum",
        "mixing=dynamic_scalar",
        "rule=additive",
    ]
    baseline = cells[0].choices
    for cell in cells[1:]:
        axis, value = cell.label.split("=")
        assert cell.choices == {**baseline, axis: value}


def test_a_factorial_has_every_combination() -> None:
    study = Study.model_validate(edited(ABLATION, ablation__design="factorial"))
    assert len(study.cells()) == study.size() == study.n_trials == 3 * 2 * 3
    assert study.cells()[0].label == "baseline"
    assert "blend=delayed_chunk, mixing=sum, rule=additive" in {cell.label for cell in study.cells()}


def test_a_factorials_equal_models_are_one_cell() -> None:
    vary = {"rule": ["additive"], "beta_range": [1]}
    study = Study.model_validate(edited(ABLATION, ablation__design="factorial", ablation__vary=vary))
    assert [cell.label for cell in study.cells()] == ["baseline", "beta_range=1", "rule=additive"]


@pytest.mark.parametrize(
    ("match", "cost", "limit"), [("parameters", "parameters", 0.01), ("flops", "flops_per_token", 0.01)]
)
def test_cells_have_as_much_as_the_baseline(match: str, cost: str, limit: float) -> None:
    cells = Study.model_validate(edited(ABLATION, ablation__match=match)).cells()
    target = costs(cells[0].config)[cost]
    for cell in cells:
        assert cell.residual is not None
        assert abs(cell.residual) <= limit
        assert costs(cell.config)[cost] == pytest.approx(target * (1 + cell.residual))


def test_unmatched_cells_keep_their_mlp_and_have_no_residual() -> None:
    cells = Study.model_validate(edited(ABLATION, ablation__match="none")).cells()
    assert {cell.config.arch.mlp_inner for cell in cells} == {cells[0].config.arch.mlp_inner}
    assert {cell.residual for cell in cells} == {None}


def test_state_that_cannot_be_reached_is_refused_and_names_the_cell() -> None:
    vary = {"first": ["fast_weight"]}
    study = Study.model_validate(edited(ABLATION, ablation__match="state", ablation__vary=vary))
    with pytest.raises(MatchError, match=r"ablation cell first=fast_weight: .*nearest reachable"):
        study.cells()


def test_a_recipe_can_be_ablated() -> None:
    vary = {"learning_rate": [1e-3], "clip": [1.0]}
    cells = Study.model_validate(edited(ABLATION, ablation__vary=vary)).cells()
    assert [(cell.config.recipe.learning_rate, cell.config.recipe.clip) for cell in cells] == [
        (5e-3, None),
        (1e-3, None),
        (5e-3, 1.0),
    ]


# --- identity ---


@pytest.mark.parametrize(
    "changes",
    [{"budget": {"trials": 99, "parallel": 3}}, {"resources": {"gpu": 0.5}}, {"replication": None}, {"name": "other"}],
    ids=["budget", "resources", "replication", "name"],
)
def test_what_may_change_between_runs_is_not_part_of_the_space_hash(changes: dict[str, Any]) -> None:
    assert Study.model_validate(edited(SEARCH, **changes)).space_hash == Study.model_validate(SEARCH).space_hash


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"search__space__window": [4, 8]}, "search.space.window: [4,8] in the file, [4,8,16] in the store"),
        ({"search__space__window": None}, "search.space.window: nothing in the file, [4,8,16] in the store"),
        ({"search__sampler__seed": 1}, "search.sampler.seed: 1 in the file, 0 in the store"),
        (
            {"objectives": {"validation_accuracy": "maximize"}},
            'objectives.state_bytes: nothing in the file, "minimize" in the store',
        ),
        ({"constraints": {}}, "constraints.parameters.max: nothing in the file, 500000.0 in the store"),
        ({"recipe__steps": 2001}, "recipe.steps: 2001 in the file, 2000 in the store"),
    ],
    ids=["values", "axis", "seed", "objective", "constraint", "recipe"],
)
def test_another_study_of_the_name_is_another_hash_and_says_where(changes: dict[str, Any], sentence: str) -> None:
    stored, file = Study.model_validate(SEARCH), Study.model_validate(edited(SEARCH, **changes))
    assert file.space_hash != stored.space_hash
    assert sentence in file.differences(stored)
    assert stored.differences(stored) == ()


def test_the_order_of_keys_is_not_part_of_the_space_hash() -> None:
    turned = {key: SEARCH[key] for key in reversed(SEARCH)}
    assert Study.model_validate(turned).space_hash == Study.model_validate(SEARCH).space_hash


# --- what is wrong between keys ---


@pytest.mark.parametrize(
    ("changes", "path", "sentence"),
    [
        ({"search": None}, "", "a study needs a search or an ablation"),
        ({"ablation": ABLATION["ablation"]}, "ablation", "a search or an ablation, not both"),
        ({"objectives": {"validation_acuracy": "maximize"}}, "objectives.validation_acuracy", "'validation_accuracy'?"),
        ({"objectives": {"test_accuracy": "maximize"}}, "objectives.test_accuracy", "only reported"),
        (
            {"objectives": {"validation_bits_per_byte": "minimize"}},
            "objectives.validation_bits_per_byte",
            "no metric or cost of that name",
        ),
        ({"model__window": 4}, "search.space.window", "window is fixed in model as well"),
        ({"recipe__learning_rate": 1.0}, "search.space.learning_rate", "fixed in recipe as well"),
        ({"early_stopping__rungs": [10, 10]}, "early_stopping.rungs.1", "10 is not above 10"),
        ({"early_stopping__rungs": [10, 2001]}, "early_stopping.rungs.1", "rung 2001 is beyond the last of 2000"),
        ({"replication__seeds": [1, 0]}, "replication.seeds.1", "seed 0 is a seed of the search"),
        ({"budget": {}}, "budget", "a search needs budget.trials"),
        ({"search__sampler": {"kind": "tpe", "population": 4}}, "search.sampler.population", "tpe has no population"),
        ({"search__sampler__population": 49}, "search.sampler.population", "above the budget of 48 trials"),
        ({"search__sampler": {"kind": "grid"}}, "search.space.learning_rate", "not a range of real numbers"),
        ({"model__normaliser": "none", "search__space__rule": ["delta"]}, "model.normaliser", "has no meaning"),
        ({"search__space__n_householder": [1, 2]}, "search.space.n_householder", "rule is not delta_product"),
        ({"model__n_layers": 1, "search__space__ratio": ["1:1"]}, "search.space", "needs at least 2 layers"),
        (
            {"search__match": {"quantity": "flops", "target": 10**6}, "model__mlp_ratio": 2.0},
            "model.mlp_ratio",
            "match: flops sets the width of the MLP",
        ),
        ({"search__space__window": [4, 4]}, "search.space.window.choices.1", "4 is in the list already"),
        (
            {"search__space__window": {"low": 8, "high": 4}},
            "search.space.window.range.high",
            "high 4 is not above low 8",
        ),
        (
            {"search__space__window": {"low": 1, "high": 8, "step": 3}},
            "search.space.window.range.high",
            "steps of 3 from 1 end at 7, not at 8",
        ),
        (
            {"search__space__window": {"low": 1, "high": 8, "step": 7, "scale": "log"}},
            "search.space.window.range.step",
            "a log scale has no step",
        ),
        (
            {"search__space__window": {"low": 1.5, "high": 8}},
            "search.space.window.range.low",
            "1.5 is not a whole number",
        ),
        (
            {"search__space__weight_decay": {"low": 0, "high": 1, "scale": "log"}},
            "search.space.weight_decay.range.low",
            "a log scale needs low above 0",
        ),
        (
            {"search__space__weight_decay": {"low": 0, "high": 1, "step": 1}},
            "search.space.weight_decay.range.step",
            "not an axis of whole numbers",
        ),
        ({"constraints__parameters": {}}, "constraints.parameters", "needs min, max, or both"),
        ({"constraints__parameters": {"min": 2, "max": 1}}, "constraints.parameters", "min 2 is above max 1"),
        ({"constraints__param": {"max": 1}}, "constraints.param.[key]", "no cost of that name"),
        ({"replication__seeds": [1, 1]}, "replication.seeds.1", "1 is in the list already"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_a_search_that_makes_no_sense_is_told_where_and_why(changes: dict[str, Any], path: str, sentence: str) -> None:
    found = sentences(edited(SEARCH, **changes))
    assert path in found
    assert sentence in found[path]


@pytest.mark.parametrize(
    ("changes", "path", "sentence"),
    [
        ({"model__window": 4}, "ablation.baseline.window", "window is fixed in model as well"),
        ({"ablation__vary__mixing": ["dynamic_vector"]}, "ablation.vary.mixing.0", "is the same model as baseline"),
        ({"ablation__vary__feature_map": ["identity"]}, "ablation.vary.feature_map.0", "needs keys of unit length"),
        ({"ablation__baseline__n_heads": 3, "model__n_heads": None}, "ablation.baseline", "does not divide"),
        ({"ablation__baseline__n_householder": 3}, "ablation.baseline.n_householder", "has no meaning"),
        ({"ablation__vary__mlp_ratio": [1.0]}, "ablation.vary.mlp_ratio", "match: parameters sets the width"),
        ({"replication": {"seeds": [9]}}, "replication", "seeds in ablation.seeds"),
        ({"early_stopping": {"rungs": [9]}}, "early_stopping", "trained to the end"),
        ({"budget": {"trials": 9}}, "budget.trials", "runs every cell"),
        ({"constraints": {"parameters": {"max": 9}}}, "constraints", "only a search has constraints"),
        (
            {"ablation__design": "factorial", "ablation__vary": {a: [1.0, 2.0, 3.0] for a in FIVE_AXES}},
            "ablation.vary",
            "1024 cells are too many",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_an_ablation_that_makes_no_sense_is_told_where_and_why(
    changes: dict[str, Any], path: str, sentence: str
) -> None:
    found = sentences(edited(ABLATION, **changes))
    assert path in found
    assert sentence in found[path]


def test_population_is_a_quarter_of_the_trials_unless_given() -> None:
    study = Study.model_validate(edited(SEARCH, search__sampler={"kind": "nsga3"}))
    assert study.population == 12
    assert Study.model_validate(SEARCH).population == 8
    assert Study.model_validate(edited(SEARCH, search__sampler={}, budget={"trials": 6})).population == 4


def test_a_grid_without_a_budget_has_as_many_trials_as_configs() -> None:
    space = {"window": [4, 8], "rule": ["delta", "additive"]}
    study = search(space, search__sampler={"kind": "grid"}, budget={})
    assert study.n_trials == study.size() == 4


# --- named cells, and further tasks ---

NAMED = edited(
    ABLATION,
    ablation__vary=None,
    ablation__match="none",
    ablation__cells={
        "attention": {"first": "attention", "window": None},
        "linear attention": {"rule": "additive", "normaliser": "time"},
    },
    ablation__also_on=[{"task": {"kind": "even_pairs"}, "model": {"n_layers": 3}, "recipe": {"batch": 256}}],
)


def test_a_named_cell_changes_several_axes_of_the_baseline() -> None:
    cells = Study.model_validate(edited(NAMED, ablation__also_on=None)).cells()
    assert [cell.label for cell in cells] == ["baseline", "attention", "linear attention"]
    assert [cell.config.arch.layers[0].kind for cell in cells] == ["hybrid", "attention", "hybrid"]
    assert cells[1].choices["window"] is None


def test_every_cell_is_trained_on_every_task_with_what_the_task_changes() -> None:
    study = Study.model_validate(NAMED)
    cells = study.cells()
    assert study.n_trials == study.size() == len(cells) == 6
    assert [cell.label for cell in cells[:3]] == [cell.label for cell in cells[3:]]
    assert {cell.config.task.kind for cell in cells[:3]} == {"parity"}
    assert {cell.config.task.kind for cell in cells[3:]} == {"even_pairs"}
    assert {(cell.config.arch.n_layers, cell.config.recipe.batch) for cell in cells[3:]} == {(3, 256)}
    assert {cell.config.recipe.steps for cell in cells} == {100}
    assert len({cell.config.config_id for cell in cells}) == 6
    assert [s.task.kind for s in study.by_task()] == ["parity", "even_pairs"]
    assert study.on(cells[-1].config.task).build({})[0] == cells[3].config


def test_each_task_matches_its_own_baseline() -> None:
    cells = Study.model_validate(edited(NAMED, ablation__match="parameters")).cells()
    parameters = [costs(cell.config)["parameters"] for cell in cells]
    assert parameters[3] > 1.3 * parameters[0]
    assert all(cell.residual is not None and abs(cell.residual) < 0.01 for cell in cells)


@pytest.mark.parametrize(
    ("changes", "path", "sentence"),
    [
        ({"ablation__cells": {}}, "ablation", "needs vary, cells, or both"),
        ({"ablation__cells": {"same": {"blend": "synchronous"}}}, "ablation.cells.same", "the same model as baseline"),
        (
            {"ablation__cells": {"a": {"first": "attention", "beta_range": 1}}},
            "ablation.cells.a.beta_range",
            "no meaning for this model",
        ),
        ({"ablation__cells": {"d": {"feature_map": "identity"}}}, "ablation.cells.d", "unit length"),
        ({"ablation__also_on": [{"task": {"kind": "parity"}}]}, "ablation.also_on.0.task", "already"),
        (
            {"ablation__also_on": [{"task": {"kind": "language_modelling"}}]},
            "objectives.validation_accuracy",
            "language_modelling has no such metric",
        ),
        (
            {"ablation__also_on": [{"task": {"kind": "even_pairs"}, "model": {"window": 4}}]},
            "ablation.baseline.window",
            "fixed in model as well",
        ),
    ],
)
def test_what_makes_no_sense_in_named_cells_is_said_once_in_its_place(
    changes: dict[str, Any], path: str, sentence: str
) -> None:
    found = sentences(edited(NAMED, **changes))
    assert set(found) == {path}
    assert sentence in found[path]
