"""The arithmetic of costs against lists of matrices and against sequences walked token by token."""

import math
from typing import get_args

import pytest
from hqlt_search_space.arch import Arch
from hqlt_search_space.axes import AxisValue
from hqlt_search_space.build import build_arch
from hqlt_search_space.cost import (
    COSTS,
    costs,
    decode_flops,
    flops_per_token,
    fw_state_bytes,
    kv_cache_bytes,
    mean_visible_keys,
    parameters,
    state_bytes,
)
from hqlt_search_space.mixers import Attention, DelayedChunk, FastWeight, Hybrid, Mixer, Mixing
from hqlt_search_space.paper import LANGUAGE_VOCABULARY, paper_arch
from hqlt_search_space.recipe import Recipe
from hqlt_search_space.rules import Additive, Decay, Delta, DeltaProduct, GatedDelta
from hqlt_search_space.tasks import Lengths, Parity
from hqlt_search_space.trial import Config
from hypothesis import given, settings
from hypothesis import strategies as st

Strategy = st.SearchStrategy[dict[str, AxisValue]]
VOCABULARY = 11


def matrices(mixer: Mixer, d: int) -> list[tuple[int, int]]:
    """The shape of every matrix of a mixer; a convolution's filters are taps x channels."""
    heads = mixer.n_heads
    rule = None if isinstance(mixer, Attention) else mixer.rule
    writes = rule.n_householder if isinstance(rule, DeltaProduct) else 1
    shapes = [(d, d), (d, writes * d), (d, writes * d)]
    shapes += [(2 * d, d)] if isinstance(mixer, Hybrid) and mixer.mixing == "concat" else [(d, d)]
    if mixer.output_gate:
        shapes += [(d, d)]
    if mixer.short_conv:
        shapes += [(mixer.short_conv, d), (mixer.short_conv, writes * d), (mixer.short_conv, writes * d)]
    if isinstance(rule, Delta | GatedDelta | DeltaProduct):
        shapes += [(d, writes * heads)]
    if isinstance(rule, GatedDelta) or (isinstance(rule, Decay) and rule.decay == "data_dependent"):
        shapes += [(d, heads)]
    if isinstance(mixer, Hybrid):
        widths = {"dynamic_scalar": 2 * heads, "dynamic_vector": d, "separate_vector": 2 * d}
        shapes += [(d, widths[mixer.mixing])] if mixer.mixing in widths else []
    return shapes


def vectors(mixer: Mixer, d: int) -> list[int]:
    """The length of every other parameter of a mixer."""
    if isinstance(mixer, Attention):
        return []
    head_width = d // mixer.n_heads
    lengths = [2 * head_width if isinstance(mixer, Hybrid) and mixer.mixing == "concat" else head_width]
    if isinstance(mixer.rule, GatedDelta) or (isinstance(mixer.rule, Decay) and mixer.rule.decay == "data_dependent"):
        lengths += [mixer.n_heads, mixer.n_heads]
    if isinstance(mixer, Hybrid):
        lengths += [mixer.n_heads, mixer.n_heads] if mixer.mixing == "static_scalar" else []
        lengths += [head_width, head_width] if mixer.branch_norm else []
    return lengths


def sees(mixer: Mixer, query: int, key: int) -> bool:
    """Whether KV-memory's query at position `query` sees the key at `key`, counted from 0."""
    if isinstance(mixer, FastWeight) or key > query:
        return False
    if mixer.window is None:
        return True
    if isinstance(mixer, Hybrid) and isinstance(mixer.blend, DelayedChunk):
        return key // mixer.window == query // mixer.window
    return query - key < mixer.window


def recurrence_flops(mixer: Mixer, d: int) -> int:
    """FLOPs of FW-memory's own arithmetic for one token, product by product."""
    if isinstance(mixer, Attention):
        return 0
    rule, width = mixer.rule, d // mixer.n_heads
    columns = width + (1 if isinstance(rule, Additive) and rule.normaliser == "time" else 0)
    product = 2 * width * columns
    total = product  # read
    if isinstance(rule, Decay | GatedDelta):
        total += width * columns
    for _ in range(rule.n_householder if isinstance(rule, DeltaProduct) else 1):
        total += product  # write
        if not isinstance(rule, Additive | Decay):
            total += product  # predict
    if isinstance(rule, Additive) and rule.normaliser == "heads":
        total += 3 * width
    return mixer.n_heads * total


def flops_at(arch: Arch, position: int) -> int:
    """Forward FLOPs of the token at `position`, counted from 0."""
    d = arch.d_model
    total = 2 * d * VOCABULARY
    for layer in arch.layers:
        total += sum(2 * rows * columns for rows, columns in matrices(layer, d)) + 2 * 3 * d * arch.mlp_inner
        total += sum(4 * d for key in range(position + 1) if sees(layer, position, key)) + recurrence_flops(layer, d)
    return total


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_parameters_are_the_sum_of_all_matrices_and_vectors(data: st.DataObject, sensible_settings: Strategy) -> None:
    arch, _ = build_arch(data.draw(sensible_settings))
    d = arch.d_model
    expected = 2 * VOCABULARY * d + d
    for layer in arch.layers:
        expected += sum(rows * columns for rows, columns in matrices(layer, d)) + sum(vectors(layer, d))
        expected += 3 * d * arch.mlp_inner + 2 * d
    assert parameters(arch, VOCABULARY) == expected


@given(data=st.data(), context=st.integers(1, 21))
@settings(max_examples=100, deadline=None)
def test_flops_are_what_walking_the_sequence_adds_up_to(
    data: st.DataObject, context: int, sensible_settings: Strategy
) -> None:
    arch, _ = build_arch(data.draw(sensible_settings))
    walked = [flops_at(arch, position) for position in range(context)]
    assert math.isclose(flops_per_token(arch, VOCABULARY, context), sum(walked) / context)
    alone = [arch.model_copy(update={"layers": (layer,)}) for layer in arch.layers]  # each at its own dearest token
    more = [max(flops_at(one, p) for p in range(context)) - flops_at(one, 0) for one in alone]
    assert decode_flops(arch, VOCABULARY, context) == walked[0] + sum(more)


@pytest.mark.parametrize("mixing", get_args(Mixing))
def test_every_mixing_is_counted(mixing: Mixing) -> None:
    layer = Hybrid(n_heads=2, mixing=mixing)
    arch = Arch(d_model=8, mlp_inner=1, layers=(layer,))
    entries = sum(rows * columns for rows, columns in matrices(layer, 8)) + sum(vectors(layer, 8))
    assert parameters(arch, 1) == entries + 3 * 8 + 2 * 8 + 2 * 8 + 8


@given(window=st.integers(1, 30), context=st.integers(1, 60), chunked=st.booleans())
def test_mean_visible_keys_is_the_mean_over_positions(window: int, context: int, chunked: bool) -> None:
    mixer = Hybrid(n_heads=1, window=window, blend=DelayedChunk()) if chunked else Attention(n_heads=1, window=window)
    counted = sum(sees(mixer, query, key) for query in range(context) for key in range(query + 1))
    assert math.isclose(mean_visible_keys(mixer, context), counted / context)


@pytest.mark.parametrize(
    ("model", "size", "millions"),
    [
        ("deltanet", "340m", 374.1),
        ("hqlt_synchronous", "340m", 399.2),
        ("hqlt_dynamic_scalar", "340m", 374.5),
        ("deltanet", "1.3b", 1365),
        ("hqlt_synchronous", "1.3b", 1466),
        ("hqlt_dynamic_scalar", "1.3b", 1367),
    ],
)
def test_parameters_of_the_papers_models_are_the_published_ones(model: str, size: str, millions: float) -> None:
    counted = parameters(paper_arch(model, size), LANGUAGE_VOCABULARY) / 1e6
    assert round(counted, 1 if size == "340m" else 0) == millions


def test_fast_weight_state_does_not_grow_with_context_and_the_cache_stops_at_the_window() -> None:
    arch = Arch(d_model=16, mlp_inner=8, layers=(Hybrid(n_heads=2, window=8),))
    assert fw_state_bytes(arch) == 4 * 2 * 8 * 8
    assert [kv_cache_bytes(arch, context, 2) for context in (4, 8, 100)] == [2 * 2 * 16 * n for n in (4, 8, 8)]
    assert state_bytes(arch, 100, 2) == state_bytes(arch, 10_000, 2)


@given(data=st.data(), context=st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_the_state_is_at_least_its_parts_and_never_shrinks(
    data: st.DataObject, context: int, sensible_settings: Strategy
) -> None:
    arch, _ = build_arch(data.draw(sensible_settings))
    whole = state_bytes(arch, context, 4)
    assert whole >= fw_state_bytes(arch) + kv_cache_bytes(arch, context, 4)
    assert whole <= state_bytes(arch, context + 1, 4)


def test_costs_are_taken_at_the_longest_sequence_and_training_at_the_training_length() -> None:
    task = Parity(train_length=Lengths(low=3, high=10), test_length=Lengths(low=10, high=50))
    arch, _ = build_arch({"first": "attention", "d_model": 16})
    recipe = Recipe(steps=7, batch=4, precision="bfloat16")
    found = costs(Config(arch=arch, recipe=recipe, task=task))
    assert set(found) == set(COSTS)
    assert found["flops_per_token"] == flops_per_token(arch, 3, 50)
    assert found["training_flops"] == 3 * flops_per_token(arch, 3, 10) * 10 * 7 * 4
    assert found["kv_cache_bytes"] == 2 * 2 * 50 * 16 * 2
    assert all(math.isfinite(value) and value >= 0 for value in found.values())
