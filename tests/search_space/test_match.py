"""Models brought to equal size."""

import pytest
from hqlt_search_space.axes import AxisValue
from hqlt_search_space.build import build_arch
from hqlt_search_space.cost import costs
from hqlt_search_space.errors import MatchError
from hqlt_search_space.match import COST_OF, HEAD_WIDTHS, TOLERANCE, WINDOWS, matched
from hqlt_search_space.mixers import FastWeight, Hybrid
from hqlt_search_space.recipe import Recipe
from hqlt_search_space.tasks import Parity
from hqlt_search_space.trial import Config
from hypothesis import given, settings
from hypothesis import strategies as st

Strategy = st.SearchStrategy[dict[str, AxisValue]]


def config(values: dict[str, AxisValue]) -> Config:
    return Config(arch=build_arch(values)[0], recipe=Recipe(), task=Parity())


@given(data=st.data(), quantity=st.sampled_from(["parameters", "flops"]))
@settings(max_examples=60, deadline=None)
def test_any_model_comes_within_one_per_cent_through_its_mlp_alone(
    data: st.DataObject, quantity: str, sensible_settings: Strategy
) -> None:
    start = config({**data.draw(sensible_settings), "d_model": 32})
    target = 2 * costs(start)[COST_OF[quantity]]  # a wider MLP always reaches more
    reached, residual = matched(start, quantity, target)
    assert reached.arch.layers == start.arch.layers
    assert costs(reached)[COST_OF[quantity]] == pytest.approx(target * (1 + residual))
    assert abs(residual) <= 0.01
    neighbours = [reached.arch.model_copy(update={"mlp_inner": reached.arch.mlp_inner + step}) for step in (-1, 1)]
    for arch in neighbours:
        other = costs(reached.model_copy(update={"arch": arch}))[COST_OF[quantity]]
        assert abs(other - target) >= abs(residual * target) - 1e-6


def test_a_target_below_the_mixers_alone_is_refused_with_the_nearest() -> None:
    with pytest.raises(MatchError, match=r"nearest reachable has [\d,]+ \(\+\d+.*inner width 1"):
        matched(config({}), "parameters", 1000)


def test_a_matched_model_matched_again_is_itself() -> None:
    once, _ = matched(config({"mixing": "sum"}), "parameters", 900_000)
    twice, residual = matched(once, "parameters", costs(once)["parameters"])
    assert (twice, residual) == (once, 0.0)


def test_state_is_matched_by_the_nearest_of_all_heads_and_windows() -> None:
    start = config({"first": "hybrid", "d_model": 64, "n_heads": 4, "window": 8, "fw_positions": "none"})
    target = 1.37 * costs(start)["state_bytes"]
    reached, residual = matched(start, "state", target)
    everything = [
        costs(config({"first": "hybrid", "d_model": 64, "n_heads": 64 // width, "window": window}))["state_bytes"]
        for width in HEAD_WIDTHS
        if 64 % width == 0
        for window in WINDOWS
    ]
    assert costs(reached)["state_bytes"] == min(everything, key=lambda value: abs(value - target))
    assert abs(residual) <= TOLERANCE["state"]


def test_an_equal_state_is_left_alone() -> None:
    start = config({"d_model": 64, "window": 8})
    assert matched(start, "state", costs(start)["state_bytes"]) == (start, 0.0)


def test_what_a_cell_varies_is_not_changed_back() -> None:
    start = config({"d_model": 64, "n_heads": 4, "window": 16})
    target = costs(config({"d_model": 64, "n_heads": 4, "window": 8}))["state_bytes"]
    with pytest.raises(MatchError):
        matched(start, "state", target, fixed=frozenset({"window", "n_heads"}))
    by_window, _ = matched(start, "state", target, fixed=frozenset({"n_heads"}))
    by_heads, _ = matched(start, "state", target)
    assert isinstance(by_window.arch.layers[0], Hybrid)
    assert (by_window.arch.layers[0].n_heads, by_window.arch.layers[0].window) == (4, 8)
    assert costs(by_heads)["state_bytes"] == target


def test_fast_weights_alone_reach_only_what_heads_give() -> None:
    start = config({"first": "fast_weight", "d_model": 64, "n_heads": 4})
    state = costs(start)["state_bytes"]
    halved, residual = matched(start, "state", state / 2)
    assert isinstance(halved.arch.layers[0], FastWeight)
    assert (halved.arch.layers[0].n_heads, residual) == (8, 0.0)
    with pytest.raises(MatchError, match="n_heads"):
        matched(start, "state", state * 0.7)


def test_layers_with_different_windows_keep_them() -> None:
    start = config({"ratio": "1:1", "window": 8, "attention_window": 32, "d_model": 64, "n_heads": 4})
    reached, _ = matched(start, "state", costs(start)["state_bytes"] * 1.01)
    assert [layer.window for layer in reached.arch.layers if not isinstance(layer, FastWeight)] == [8, 32]
