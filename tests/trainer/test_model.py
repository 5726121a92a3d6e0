"""The model: two forms of one function, causal, initialised as documented."""

import itertools
import math

import pytest
import torch
from hqlt_kernels.feature_maps import map_features
from hqlt_kernels.rotary import rotate
from hqlt_search_space import cost
from hqlt_search_space.arch import Arch
from hqlt_search_space.mixers import Attention, FastWeight, Hybrid, Mixer
from hqlt_trainer.layers import RMSNorm
from hqlt_trainer.mixers import HybridLayer
from hqlt_trainer.model import Model, build_model
from torch import Tensor, nn
from torch.nn import functional

RULES = [
    {"kind": "additive", "normaliser": "time"},
    {"kind": "additive", "normaliser": "heads"},
    {"kind": "additive", "normaliser": "none", "feature_map": "identity"},
    {"kind": "decay", "decay": "fixed"},
    {"kind": "decay", "decay": "data_dependent", "feature_map": "relu_l2"},
    {"kind": "delta", "beta_range": 1},
    {"kind": "delta", "beta_range": 2, "feature_map": "relu_l2"},
    {"kind": "gated_delta"},
    {"kind": "delta_product", "n_householder": 2},
    {"kind": "delta_product", "n_householder": 3, "beta_range": 1},
]
BLENDS = [
    {"kind": "synchronous"},
    {"kind": "delayed_streaming", "delay_beta": False},
    {"kind": "delayed_streaming", "delay_beta": True},
    {"kind": "delayed_chunk"},
    {"kind": "delayed_chunk", "fw_chunk": 24},
]
MIXINGS = ["sum", "static_scalar", "dynamic_scalar", "dynamic_vector", "separate_vector", "difference", "concat"]


def _mixers() -> dict[str, Mixer]:
    """Every rule with every blend, and along with them every mixing, position, convolution, gate and norm."""
    found: dict[str, Mixer] = {}
    positions = itertools.cycle(["rope", "none", "none"])
    convs, gates, norms = itertools.cycle([None, 4]), itertools.cycle([True, False, False]), itertools.cycle([0, 0, 1])
    for window, conv in itertools.product([None, 8], [None, 4]):
        mixer = Attention(n_heads=2, window=window, positions=next(positions), short_conv=conv, output_gate=next(gates))
        found[f"attention-window_{window}-conv_{conv}"] = mixer
    for i, rule in enumerate(RULES):
        mixer = FastWeight.model_validate(
            {
                "n_heads": 2,
                "rule": rule,
                "fw_positions": next(positions),
                "short_conv": next(convs),
                "output_gate": next(gates),
            }
        )
        found[f"fast_weight-{i}-{rule['kind']}"] = mixer
    mixings = itertools.cycle(MIXINGS)
    # Each kind of rule with each blend, in one variant; the other variants with one blend each.
    firsts = {rule["kind"]: i for i, rule in reversed(list(enumerate(RULES)))}
    pairs = [(i, j) for i in firsts.values() for j in range(len(BLENDS))]
    pairs += [(i, i % len(BLENDS)) for i in range(len(RULES)) if i not in firsts.values()]
    for i, j in pairs:
        rule, blend = RULES[i], BLENDS[j]
        window = None if blend["kind"] == "synchronous" and i % 3 == 0 else 8
        mixer = Hybrid.model_validate(
            {
                "n_heads": 2,
                "blend": blend,
                "window": window,
                "positions": next(positions),
                "fw_positions": next(positions),
                "rule": rule,
                "mixing": next(mixings),
                "branch_norm": bool(next(norms)),
                "short_conv": next(convs),
                "output_gate": next(gates),
            }
        )
        found[f"hybrid-{i}-{rule['kind']}-{j}-{blend['kind']}-{mixer.mixing}"] = mixer
    return found


MIXERS = _mixers()
every_mixer = pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS.keys())


def _model(mixer: Mixer, *, layers: int = 1, backend: str = "auto") -> Model:
    # A larger init than in training, so that no gate sits at its middle and no output is near zero.
    arch = Arch(d_model=16, mlp_inner=24, layers=(mixer,) * layers)
    return build_model(arch, 11, init_std=0.3, seed=1, backend=backend)  # type: ignore[arg-type]


def _tokens(batch: int, length: int) -> Tensor:
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(2))


def test_the_mixers_below_have_every_value_of_every_field() -> None:
    hybrids = [mixer for mixer in MIXERS.values() if isinstance(mixer, Hybrid)]
    assert {mixer.mixing for mixer in hybrids} == set(MIXINGS)
    for name in ("positions", "fw_positions", "branch_norm", "output_gate", "short_conv", "window"):
        assert len({getattr(mixer, name) for mixer in hybrids}) == 2, name


@every_mixer
@torch.no_grad()
def test_step_form_equals_parallel_form_over_300_tokens(mixer: Mixer) -> None:
    model, tokens = _model(mixer), _tokens(1, 300)
    state, stepped = None, []
    for t in range(300):
        logits, state = model.step(tokens[:, t], state)
        stepped.append(logits)
    parallel = model(tokens)
    assert parallel.std() > 0.1
    step_form = torch.stack(stepped, 1)
    torch.testing.assert_close(step_form[:, 1:], parallel[:, 1:], rtol=1e-5, atol=1e-5)
    # At the first token both memories answer a multiple of v: a mix may cancel to nothing and the norm then blows up
    # its rounding.
    torch.testing.assert_close(step_form[:, 0], parallel[:, 0], rtol=1e-3, atol=1e-3)


@every_mixer
def test_cost_arithmetic_counts_the_parameters_that_are_built(mixer: Mixer) -> None:
    arch = Arch(d_model=16, mlp_inner=24, layers=(mixer, mixer))
    built = build_model(arch, 11, device="meta")
    assert cost.parameters(arch, 11) == sum(parameter.numel() for parameter in built.parameters())


@every_mixer
@torch.no_grad()
def test_cost_arithmetic_gives_the_most_bytes_that_decoding_keeps(mixer: Mixer) -> None:
    model, state, most = _model(mixer), None, 0
    arch = Arch(d_model=16, mlp_inner=24, layers=(mixer,))
    for token in _tokens(1, 30).unbind(1):
        _, state = model.step(token, state)
        most = max(most, state.bytes)
    assert cost.state_bytes(arch, 30, 4) == most


@every_mixer
@torch.no_grad()
def test_a_token_changes_no_logits_before_it(mixer: Mixer) -> None:
    model, tokens = _model(mixer, layers=2), _tokens(1, 40)
    changed = tokens.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 11
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20], rtol=0, atol=2e-6)
    assert (before[:, 20] - after[:, 20]).abs().max() > 1e-3


@torch.no_grad()
def test_logits_at_positions_are_those_of_the_whole() -> None:
    model, tokens = _model(Hybrid(n_heads=2, window=4, short_conv=4, output_gate=True), layers=2), _tokens(3, 20)
    at = torch.tensor([5, 19, 20, 47])
    torch.testing.assert_close(model(tokens, at), model(tokens).flatten(0, 1)[at])


@torch.no_grad()
def test_published_hybrid_layer_equals_a_token_loop_written_from_the_paper() -> None:
    """Synchronous, delta rule, vector mixing, RoPE on KV-memory, short convolution, output gate; float64."""
    d, n_heads, window, length = 12, 2, 5, 17
    spec = Hybrid(n_heads=n_heads, window=window, short_conv=4, output_gate=True)
    layer = build_model(Arch(d_model=d, mlp_inner=4, layers=(spec,)), 3, init_std=0.5).double().mixers[0]
    x = torch.randn(1, length, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    W_q, W_k, W_v, W_beta, W_mix, W_gate = layer.in_proj.weight.split([d, d, d, n_heads, d, d])
    assert layer.short_conv is not None
    filters = layer.short_conv.weight.split([d, d, d])

    def convolve(rows: Tensor, taps: Tensor) -> Tensor:
        padded = torch.cat([torch.zeros(3, d, dtype=torch.float64), rows])
        return torch.stack([(padded[t : t + 4] * taps.T).sum(0) for t in range(length)])

    q, k, v = (convolve(x[0] @ W.T, taps) for W, taps in zip((W_q, W_k, W_v), filters, strict=True))
    heads = (length, n_heads, d // n_heads)
    q, k, v = q.view(heads), k.view(heads), functional.silu(v).view(heads)
    turned_q, turned_k = rotate(q[None], 10_000.0)[0], rotate(k[None], 10_000.0)[0]
    phi_q, phi_k = map_features(q, "silu_l2"), map_features(k, "silu_l2")
    beta = 2 * torch.sigmoid(x[0] @ W_beta.T)
    g = torch.sigmoid(x[0] @ W_mix.T).view(heads)
    scale = (d // n_heads) ** -0.5
    outputs = torch.empty(heads, dtype=torch.float64)
    for h in range(n_heads):
        S = torch.zeros(d // n_heads, d // n_heads, dtype=torch.float64)
        for t in range(length):
            S = S + beta[t, h] * torch.outer(v[t, h] - S @ phi_k[t, h], phi_k[t, h])
            o_fw = scale * S @ phi_q[t, h]
            first = max(0, t - window + 1)
            weights = torch.softmax(scale * turned_k[first : t + 1, h] @ turned_q[t, h], 0)
            o_kv = weights @ v[first : t + 1, h]
            mixed = g[t, h] * o_fw + (1 - g[t, h]) * o_kv
            outputs[t, h] = mixed / torch.sqrt(mixed.square().mean() + 1e-5)
    gated = outputs.reshape(length, d) * functional.silu(x[0] @ W_gate.T)
    found = layer([x @ layer.in_proj.weight.T])[0][0]
    torch.testing.assert_close(found, gated @ layer.o_proj.weight.T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mixing", MIXINGS)
@torch.no_grad()
def test_mixing_adds_the_two_memories_as_documented(mixing: str) -> None:
    spec = Hybrid.model_validate({"n_heads": 2, "mixing": mixing})
    layer = build_model(Arch(d_model=8, mlp_inner=4, layers=(spec,)), 3).mixers[0]
    assert isinstance(layer, HybridLayer)
    kv, fw = torch.randn(2, 3, 5, 2, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    width = {"dynamic_scalar": 4, "dynamic_vector": 8, "separate_vector": 16}.get(mixing, 0)
    logits = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(1))
    g = torch.sigmoid(logits)
    if mixing == "static_scalar":
        layer.mixing_scalars.copy_(torch.tensor([[0.5, 0.25], [2.0, 3.0]]))
    expected = {
        "sum": lambda: kv + fw,
        "difference": lambda: kv - fw,
        "concat": lambda: torch.cat([kv, fw], -1),
        "static_scalar": lambda: torch.stack(
            [0.5 * kv[..., 0, :] + 2 * fw[..., 0, :], 0.25 * kv[..., 1, :] + 3 * fw[..., 1, :]], -2
        ),
        "dynamic_scalar": lambda: g[..., :2, None] * fw + g[..., 2:, None] * kv,
        "dynamic_vector": lambda: g.view(fw.shape) * fw + (1 - g.view(fw.shape)) * kv,
        "separate_vector": lambda: g[..., :8].reshape(fw.shape) * fw + g[..., 8:].reshape(fw.shape) * kv,
    }[mixing]()
    torch.testing.assert_close(layer._mix(kv, fw, logits), expected)


def test_equal_seeds_give_equal_weights_and_leave_the_global_generator_alone() -> None:
    arch = Arch(d_model=16, mlp_inner=24, layers=(FastWeight(n_heads=2, rule={"kind": "gated_delta"}),))  # type: ignore[arg-type]
    state = torch.get_rng_state()
    first, again, other = (build_model(arch, 5, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    assert torch.equal(state, torch.get_rng_state())


def test_every_parameter_starts_where_the_docstring_says() -> None:
    spec = Hybrid(n_heads=4, rule={"kind": "gated_delta"}, mixing="static_scalar", branch_norm=True, short_conv=4)  # type: ignore[arg-type]
    model = build_model(Arch(d_model=64, mlp_inner=128, layers=(spec,) * 3), 100, init_std=0.05, seed=0)
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            assert (module.weight == 1).all(), name
        elif isinstance(module, nn.Linear) and name.endswith(("o_proj", "down_proj")):
            bound = 1 / math.sqrt(module.in_features * 6)
            assert 0.95 * bound < module.weight.abs().max() <= bound, name
        elif isinstance(module, nn.Linear | nn.Embedding):
            assert module.weight.std().item() == pytest.approx(0.05, rel=0.1), name
        elif isinstance(module, HybridLayer):
            assert (module.mixing_scalars == 1).all()
            assert ((module.A_log.exp() > 0) & (module.A_log.exp() < 16)).all()
            dt = functional.softplus(module.dt_bias)
            assert ((dt > 0.99e-3) & (dt < 1.01e-1)).all()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@every_mixer
def test_every_parameter_learns(mixer: Mixer) -> None:
    model = _model(mixer)
    logits = model(_tokens(2, 40))
    functional.cross_entropy(logits.flatten(0, 1), _tokens(2, 40).flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_bfloat16_autocast_stays_near_float32() -> None:
    tokens = _tokens(2, 40)
    for mixer in (Attention(n_heads=2), FastWeight(n_heads=2), Hybrid(n_heads=2, window=8, short_conv=4)):
        model = _model(mixer)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            narrow = model(tokens).float()
        wide = model(tokens)
        assert (narrow - wide).abs().max() < 0.05 * wide.abs().max(), mixer.kind
