"""From settings of axes to an architecture: what is dropped, what is refused, what is the same model."""

import json
from collections.abc import Mapping
from itertools import pairwise

import pytest
from hqlt_search_space.arch import Arch
from hqlt_search_space.axes import AXES, AxisValue, check_value
from hqlt_search_space.build import build_arch, layer_pattern
from hqlt_search_space.errors import InvalidArchError, UnknownNameError
from hqlt_search_space.mixers import Attention, DelayedChunk, DelayedStreaming, FastWeight, Hybrid
from hypothesis import given, settings
from hypothesis import strategies as st

PLACEMENTS = ("interleaved", "first", "last", "middle")
Strategy = st.SearchStrategy[dict[str, AxisValue]]


@given(
    n_layers=st.integers(2, 40),
    a=st.integers(0, 9),
    b=st.integers(0, 9),
    placement=st.sampled_from(PLACEMENTS),
)
def test_a_ratio_gives_the_nearest_number_of_layers_and_at_least_one_of_each(n_layers, a, b, placement) -> None:
    if a + b == 0:
        return
    n_second = layer_pattern(n_layers, f"{a}:{b}", placement).count("second")
    exact = n_layers * b / (a + b)
    if a == 0 or b == 0:
        assert n_second == exact
    else:
        assert 1 <= n_second <= n_layers - 1
        assert abs(n_second - exact) <= 0.5 or n_second in (1, n_layers - 1)


@given(n_layers=st.integers(2, 40), a=st.integers(1, 9), b=st.integers(1, 9))
def test_placement_moves_layers_and_changes_no_counts(n_layers, a, b) -> None:
    patterns = {placement: layer_pattern(n_layers, f"{a}:{b}", placement) for placement in PLACEMENTS}
    assert len({pattern.count("second") for pattern in patterns.values()}) == 1
    assert list(patterns["first"]) == sorted(patterns["first"], reverse=True)
    assert list(patterns["last"]) == sorted(patterns["last"])
    middle = "".join(place[0] for place in patterns["middle"])
    before, after = len(middle) - len(middle.lstrip("f")), len(middle) - len(middle.rstrip("f"))
    assert "sfs" not in middle
    assert 0 <= after - before <= 1


@given(n_layers=st.integers(2, 60), a=st.integers(1, 9), b=st.integers(1, 9))
def test_interleaved_layers_are_spread_as_evenly_as_whole_numbers_allow(n_layers, a, b) -> None:
    pattern = layer_pattern(n_layers, f"{a}:{b}", "interleaved")
    places = [-1, *(i for i, place in enumerate(pattern) if place == "second")]
    gaps = {after - before for before, after in pairwise(places)}
    assert max(gaps) - min(gaps) <= 1
    assert pattern[-1] == "second"


def test_three_to_one_ends_each_group_of_four_with_the_second_mixer() -> None:
    assert layer_pattern(8, "3:1", "interleaved") == ("first", "first", "first", "second") * 2


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_settings_make_a_model_or_a_reason(data: st.DataObject, model_settings: Strategy) -> None:
    values = data.draw(model_settings)
    arch, reasons = None, tuple[str, ...]()
    try:
        arch, _ = build_arch(values)
    except InvalidArchError as error:
        reasons = error.reasons
    assert (arch is None) == bool(reasons)
    assert all(reasons)
    if arch is not None:
        assert arch.n_layers == values.get("n_layers", 2)
        assert Arch.from_json(arch.canonical_json()) == arch


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_an_axis_without_meaning_changes_nothing(data: st.DataObject, sensible_settings: Strategy) -> None:
    values = data.draw(sensible_settings)
    arch, asked = build_arch(values)
    kept = {axis: value for axis, value in values.items() if axis in asked}
    assert build_arch(kept)[0].arch_id == arch.arch_id


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_an_axis_with_meaning_is_read(data: st.DataObject, sensible_settings: Strategy) -> None:
    values = data.draw(sensible_settings)
    arch, asked = build_arch(values)
    kinds = {layer.kind for layer in arch.layers}
    assert ("blend" in asked) == ("hybrid" in kinds)
    assert ("rule" in asked) == bool(kinds & {"hybrid", "fast_weight"})
    assert ("attention_window" in asked) == ("attention" in kinds)
    assert ("placement" in asked) == (len(kinds) > 1)


def _default(axis: str, settings: Mapping[str, AxisValue]) -> AxisValue:
    """The default that the table states, for settings that hold one mixer and one rule."""
    words = AXES[axis].default
    if axis == "window":
        return 64 if settings["first"] == "hybrid" else None
    if axis == "feature_map":
        return "elu_plus_one" if settings["rule"] == "additive" else "silu_l2"
    return words if axis in ("ratio", "fw_chunk", "attention_window") else _plain(words)


def _plain(words: str) -> AxisValue:
    try:
        value: AxisValue = json.loads(words)
    except json.JSONDecodeError:
        return words
    return value


@pytest.mark.parametrize("blend", ["synchronous", "delayed_streaming", "delayed_chunk"])
@pytest.mark.parametrize("rule", ["additive", "decay", "delta", "gated_delta", "delta_product"])
@pytest.mark.parametrize("first", ["attention", "fast_weight", "hybrid"])
def test_the_table_states_the_defaults_that_are_used(first: str, rule: str, blend: str) -> None:
    given_values: dict[str, AxisValue] = {"first": first, "rule": rule, "blend": blend}
    arch, asked = build_arch(given_values)
    stated = {axis: _default(axis, given_values) for axis in asked if axis not in given_values}
    assert build_arch({**given_values, **stated})[0] == arch


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"rule": "delta", "feature_map": "identity"}, "rule delta needs keys of unit length"),
        ({"rule": "gated_delta", "feature_map": "elu_plus_one"}, "rule gated_delta needs keys of unit length"),
        ({"blend": "delayed_streaming", "window": None}, "a delayed_streaming blend needs a window"),
        ({"blend": "delayed_chunk", "window": None}, "a delayed_chunk blend needs a window"),
        ({"blend": "delayed_chunk", "window": 6, "fw_chunk": 64}, "fw_chunk 64 is not a multiple of window 6"),
        ({"n_heads": 3}, "n_heads 3 does not divide d_model 128"),
        ({"d_model": 12, "n_heads": 4}, "rope needs an even head width"),
        ({"n_layers": 1, "ratio": "1:1"}, "ratio 1:1 needs at least 2 layers"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_contradiction_is_refused_with_its_reason(values: dict[str, AxisValue], sentence: str) -> None:
    with pytest.raises(InvalidArchError, match=sentence):
        build_arch(values)


def test_every_reason_is_given_at_once() -> None:
    with pytest.raises(InvalidArchError) as caught:
        build_arch({"blend": "delayed_chunk", "window": None, "n_heads": 3})
    assert len(str(caught.value).split("; ")) == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"rule": "delta_product", "n_householder": 1}, {"rule": "delta"}),
        ({"blend": "delayed_chunk", "window": 64, "fw_chunk": 64}, {"blend": "delayed_chunk", "window": 64}),
        (
            {"blend": "delayed_streaming", "rule": "additive", "delay_beta": True},
            {"blend": "delayed_streaming", "rule": "additive"},
        ),
        (
            {"blend": "delayed_streaming", "rule": "decay", "decay": "fixed", "delay_beta": True},
            {"blend": "delayed_streaming", "rule": "decay", "decay": "fixed"},
        ),
        ({"ratio": "3:1"}, {"ratio": "1:1"}),
        ({"first": "attention", "second": "attention", "ratio": "1:1"}, {"first": "attention"}),
        ({"first": "hybrid", "second": "attention", "ratio": "0:1"}, {"first": "attention"}),
    ],
    ids=["one_step", "fw_chunk", "additive", "fixed_decay", "two_layers", "one_mixer", "only_second"],
)
def test_two_spellings_of_a_model_have_one_id(one: dict[str, AxisValue], other: dict[str, AxisValue]) -> None:
    assert build_arch(one)[0].arch_id == build_arch(other)[0].arch_id


def test_a_decay_of_the_token_can_be_delayed() -> None:
    values: dict[str, AxisValue] = {"blend": "delayed_streaming", "rule": "decay", "decay": "data_dependent"}
    layer = build_arch({**values, "delay_beta": True})[0].layers[0]
    assert isinstance(layer, Hybrid)
    assert layer.blend == DelayedStreaming(delay_beta=True)


def test_window_is_that_of_hybrid_and_attention_unless_attention_has_its_own() -> None:
    values: dict[str, AxisValue] = {"ratio": "1:1", "window": 8}
    hybrid, attention = build_arch(values)[0].layers
    assert isinstance(hybrid, Hybrid)
    assert isinstance(attention, Attention)
    assert (hybrid.window, attention.window) == (8, 8)
    _, full = build_arch({**values, "attention_window": None})[0].layers
    assert isinstance(full, Attention)
    assert full.window is None


def test_mlp_ratio_is_exact_and_null_is_the_published_rounding() -> None:
    assert build_arch({"d_model": 96, "mlp_ratio": 2.5})[0].mlp_inner == 240
    assert build_arch({"d_model": 1024, "n_heads": 8})[0].mlp_inner == 2816


@pytest.mark.parametrize(
    ("axis", "value", "sentence"),
    [
        ("window", 0, "window: 0 is below the least allowed, 1"),
        ("window", True, "window: true is not a whole number"),
        ("rule", "gated_delt", "did you mean 'gated_delta'"),
        ("ratio", "0:0", "is not a ratio"),
        ("short_conv", 9, "short_conv: 9 is above the most allowed, 8"),
        ("learning_rate", -1.0, "learning_rate: -1.0 is not above 0"),
        ("n_layers", "two", "n_layers: 'two' is not a whole number"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_a_value_an_axis_cannot_take_gets_a_sentence(axis: str, value: object, sentence: str) -> None:
    with pytest.raises(InvalidArchError, match=sentence):
        check_value(axis, value)


def test_an_unknown_axis_is_named_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'window'"):
        check_value("windows", 3)


def test_pure_fast_weight_has_no_window() -> None:
    arch, asked = build_arch({"first": "fast_weight", "window": 8, "mixing": "sum"})
    assert all(isinstance(layer, FastWeight) for layer in arch.layers)
    assert not asked & {"window", "mixing", "blend", "positions"}


def test_fw_chunk_beyond_the_window_stays_as_published() -> None:
    layer = build_arch({"blend": "delayed_chunk", "window": 16, "fw_chunk": 64})[0].layers[0]
    assert isinstance(layer, Hybrid)
    assert layer.blend == DelayedChunk(fw_chunk=64)
