import pytest
from hqlt_dashboards.words import describe, format_value, mixer_kinds
from hqlt_search_space.arch import Arch
from hqlt_search_space.mixers import Attention, DelayedChunk, DelayedStreaming, FastWeight, Hybrid
from hqlt_search_space.rules import Additive, Decay, Delta, DeltaProduct, GatedDelta
from hypothesis import given
from hypothesis import strategies as st

ATTENTION, FAST = Attention(n_heads=2), FastWeight(n_heads=2)
NARROW = FastWeight(n_heads=2, rule=Delta(beta_range=1))


@pytest.mark.parametrize(
    ("layers", "line"),
    [
        ((Attention(n_heads=2, window=4),), "attention W4"),
        ((FAST, FAST, ATTENTION), "fast_weight delta x2, attention full"),
        ((FAST, ATTENTION, FAST, ATTENTION), "(fast_weight delta, attention full) x2"),
        (
            (Hybrid(n_heads=2, window=8, blend=DelayedChunk(fw_chunk=64), rule=DeltaProduct(beta_range=1)),),
            "hybrid delayed_chunk(64) delta_product(2, beta < 1) W8 dynamic_vector",
        ),
        (
            (Hybrid(n_heads=2, blend=DelayedStreaming(delay_beta=True), branch_norm=True),),
            "hybrid delayed_streaming(delay_beta) delta W64 dynamic_vector(branch_norm)",
        ),
        ((FastWeight(n_heads=2, rule=Additive(normaliser="heads")),), "fast_weight additive(norm over heads)"),
        (
            (FastWeight(n_heads=2, rule=Decay(decay="fixed", feature_map="identity")),),
            "fast_weight decay(fixed, identity)",
        ),
    ],
    ids=["window", "runs", "repeating", "chunk", "delayed", "normaliser", "decay"],
)
def test_an_arch_is_described_in_one_line(layers, line):
    assert describe(Arch(d_model=8, mlp_inner=8, layers=layers)) == line


@given(st.lists(st.sampled_from([ATTENTION, FAST, NARROW]), min_size=1, max_size=7))
def test_archs_of_equal_size_are_described_alike_only_if_their_layers_are_alike(layers):
    other = [*layers[1:], layers[0]]
    lines = [describe(Arch(d_model=8, mlp_inner=8, layers=tuple(order))) for order in (layers, other)]
    assert (lines[0] == lines[1]) == (layers == other)


def test_mixers_are_named_in_the_order_of_the_layers():
    gated = FastWeight(n_heads=2, rule=GatedDelta())
    assert mixer_kinds(Arch(d_model=8, mlp_inner=8, layers=(ATTENTION, gated, FAST))) == "attention + fast_weight"


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("state_bytes", 0, "0 B"),
        ("state_bytes", 1023, "1023 B"),
        ("state_bytes", 1536, "1.5 KiB"),
        ("parameters", 9_999, "9999"),
        ("parameters", 999_999_999, "1G"),
        ("training_flops", 3.2e15, "3.2P"),
        ("validation_loss_nats", 0.69314718, "0.6931"),
        ("normalised_validation_accuracy", -0.0125, "-0.0125"),
    ],
    ids=lambda x: str(x),
)
def test_a_value_is_written_with_four_digits_and_a_prefix(name, value, text):
    assert format_value(name, value) == text


@given(st.integers(0, 10**15))
def test_a_shortened_count_of_bytes_is_off_by_less_than_a_thousandth(value):
    number, unit = format_value("state_bytes", value).split()
    scale = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}[unit]
    assert abs(float(number) * scale - value) <= value / 1000
