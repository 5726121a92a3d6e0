import itertools
import math

import pytest
import torch
from hqlt_kernels.blend import blend
from hqlt_kernels.feature_maps import map_features
from hqlt_kernels.rotary import rotate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytestmark = pytest.mark.usefixtures("poisoned_memory")

TIMINGS = ("synchronous", "delayed_streaming", "delayed_chunk")
NAMES = ("q", "k", "v", "beta", "log_decay", "gate")


def make(length: int, *, batch=2, heads=2, key=6, value=5, writes=None, seed=0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    per_write = (batch, length, heads) if writes is None else (batch, length, writes, heads)
    return {
        "q": normal(batch, length, heads, key),
        "k": normal(*per_write, key),
        "v": normal(*per_write, value),
        "beta": 2 * torch.rand(per_write, generator=generator, dtype=torch.float64),
        "log_decay": -torch.rand(batch, length, heads, generator=generator, dtype=torch.float64),
        "gate": normal(batch, length, heads, value),
    }


def tokens(inputs: dict[str, Tensor], start: int, end: int) -> dict[str, Tensor]:
    return {name: x[:, start:end] for name, x in inputs.items()}


def answers_of(inputs: dict[str, Tensor], **options) -> tuple[Tensor, Tensor, Tensor]:
    """kv and fw, and of a second call, with the gate, mixed."""
    alone = blend(**{name: x for name, x in inputs.items() if name != "gate"}, feature_map="silu_l2", **options)
    mixed = blend(**inputs, feature_map="silu_l2", **options).mixed
    assert alone.kv is not None
    assert alone.fw is not None
    assert mixed is not None
    return alone.kv, alone.fw, mixed


def run(inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """Both answers, the mix, and the gradients of a weighted sum of all three."""
    inputs = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    answers = answers_of(inputs, **options)
    generator = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in answers)
    gradients = torch.autograd.grad(loss, list(inputs.values()), materialize_grads=True)
    return dict(zip(("kv", "fw", "mixed", *inputs), (*(x.detach() for x in answers), *gradients), strict=True))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


# Who sees whom: written as sets of pairs, and checked with memories that only add


def pairs_of_kv(timing: str, length: int, window: int) -> set[tuple[int, int]]:
    return {
        (t, j)
        for t in range(length)
        for j in range(t + 1)
        if (j // window == t // window if timing == "delayed_chunk" else t - window < j)
    }


def pairs_of_fw(timing: str, length: int, window: int, fw_chunk: int) -> set[tuple[int, int]]:
    last_read = {
        "synchronous": lambda t: t,
        "delayed_streaming": lambda t: t - window,
        "delayed_chunk": lambda t: t // fw_chunk * fw_chunk - 1,
    }[timing]
    return {(t, j) for t in range(length) for j in range(last_read(t) + 1)}


def attention_over(pairs: set[tuple[int, int]], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = torch.tensor([[(t, j) in pairs for j in range(q.shape[1])] for t in range(q.shape[1])])
    scores = torch.einsum("bthk,bjhk->bhtj", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhtj,bjhv->bthv", scores.masked_fill(~seen, -math.inf).softmax(-1), v)


def sum_over(pairs: set[tuple[int, int]], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = torch.tensor([[(t, j) in pairs for j in range(q.shape[1])] for t in range(q.shape[1])]).double()
    return torch.einsum("bthk,bjhk,tj,bjhv->bthv", q, k, seen, v) / math.sqrt(q.shape[-1])


@pytest.mark.parametrize("backend", ["definition", "chunked"])
@pytest.mark.parametrize("window", [1, 4, 7, 50])
@pytest.mark.parametrize("timing", TIMINGS)
def test_each_memory_covers_exactly_its_pairs(timing, window, backend):
    length = 30
    x = make(length)
    q, k, v = x["q"], x["k"], x["v"]
    out = blend(q, k, v, timing=timing, window=window, feature_map="elu_plus_one", backend=backend)
    phi_q, phi_k = map_features(q, "elu_plus_one"), map_features(k, "elu_plus_one")
    torch.testing.assert_close(out.kv, attention_over(pairs_of_kv(timing, length, window), q, k, v))
    torch.testing.assert_close(out.fw, sum_over(pairs_of_fw(timing, length, window, window), phi_q, phi_k, v))


@pytest.mark.parametrize("timing", ["delayed_streaming", "delayed_chunk"])
@pytest.mark.parametrize("window", [1, 4, 7])
def test_a_delayed_blend_puts_every_token_in_exactly_one_memory(timing, window):
    kv, fw = pairs_of_kv(timing, 30, window), pairs_of_fw(timing, 30, window, window)
    assert kv | fw == {(t, j) for t in range(30) for j in range(t + 1)}
    assert kv & fw == set()


@pytest.mark.parametrize("backend", ["definition", "chunked"])
def test_the_released_code_reads_chunks_of_its_own_length(backend):
    x = make(40)
    q, k, v = x["q"], x["k"], x["v"]
    out = blend(q, k, v, timing="delayed_chunk", window=4, fw_chunk=16, backend=backend)
    torch.testing.assert_close(out.kv, attention_over(pairs_of_kv("delayed_chunk", 40, 4), q, k, v))
    torch.testing.assert_close(out.fw, sum_over(pairs_of_fw("delayed_chunk", 40, 4, 16), q, k, v))
    assert (out.fw[:, :16] == 0).all()


@pytest.mark.parametrize("backend", ["definition", "chunked"])
@pytest.mark.parametrize("delay_beta", [False, True])
def test_a_streaming_write_uses_the_strengths_of_the_token_that_arrives_unless_they_are_delayed(delay_beta, backend):
    length, window = 20, 6
    x = make(length)
    phi_q, phi_k = map_features(x["q"], "silu_l2"), map_features(x["k"], "silu_l2")
    state = torch.zeros(2, 2, 6, 5, dtype=torch.float64)
    expected = torch.zeros(2, length, 2, 5, dtype=torch.float64)
    for t in range(window, length):
        leaving = t - window
        strengths = leaving if delay_beta else t
        key = phi_k[:, leaving]
        state = x["log_decay"][:, strengths].exp()[..., None, None] * state
        missing = x["v"][:, leaving] - torch.einsum("bhk,bhkv->bhv", key, state)
        state = state + torch.einsum("bhk,bhv->bhkv", key, x["beta"][:, strengths, :, None] * missing)
        expected[:, t] = torch.einsum("bhk,bhkv->bhv", phi_q[:, t], state) / math.sqrt(6)
    options = {"timing": "delayed_streaming", "window": window, "delay_beta": delay_beta, "backend": backend}
    torch.testing.assert_close(answers_of(x, **options)[1], expected)


@pytest.mark.parametrize("timing", ["delayed_streaming", "delayed_chunk"])
def test_an_empty_memory_adds_nothing_to_a_normaliser(timing):
    """elu_plus_one maps a zero key to ones: a delay that shifts in zeros would count them."""
    x = make(12)
    q, k, v = x["q"], x["k"], x["v"]
    out = blend(q, k, v, timing=timing, window=4, feature_map="elu_plus_one", normaliser="time")
    phi_q, phi_k = map_features(q, "elu_plus_one"), map_features(k, "elu_plus_one")
    pairs = pairs_of_fw(timing, 12, 4, 4)
    weights, ones = sum_over(pairs, phi_q, phi_k, torch.ones_like(v)), sum_over(pairs, phi_q, phi_k, v)
    expected = torch.where(weights == 0, torch.zeros_like(ones), ones / weights)
    torch.testing.assert_close(out.fw, expected, rtol=1e-6, atol=1e-8)


def test_in_a_delta_product_attention_takes_the_last_write():
    x = make(20, writes=3)
    kv, _, _ = answers_of(x, timing="synchronous", window=5, kv_rope_base=10.0)
    last = blend(x["q"], x["k"][:, :, 2], x["v"][:, :, 2], timing="synchronous", window=5, kv_rope_base=10.0)
    torch.testing.assert_close(kv, last.kv)


@pytest.mark.parametrize("backend", ["definition", "chunked"])
@pytest.mark.parametrize("timing", TIMINGS)
def test_rotation_acts_on_each_branch_by_its_own_base_and_by_the_tokens_own_positions(timing, backend):
    x = make(20)
    q, k, v = x["q"], x["k"], x["v"]
    out = blend(q, k, v, timing=timing, window=5, kv_rope_base=10.0, fw_rope_base=20.0, backend=backend)
    kv = attention_over(pairs_of_kv(timing, 20, 5), rotate(q, 10.0), rotate(k, 10.0), v)
    fw = sum_over(pairs_of_fw(timing, 20, 5, 5), rotate(q, 20.0), rotate(k, 20.0), v)
    torch.testing.assert_close(out.kv, kv)
    torch.testing.assert_close(out.fw, fw)


# Fast against slow


@settings(deadline=None, max_examples=40)
@given(
    timing=st.sampled_from(TIMINGS),
    length=st.integers(1, 50),
    window=st.integers(1, 40),
    writes=st.none() | st.integers(1, 3),
    delay_beta=st.booleans(),
    chunks=st.integers(1, 3),
    rope=st.booleans(),
)
def test_chunked_equals_the_definition_with_every_gradient(timing, length, window, writes, delay_beta, chunks, rope):
    options = {
        "timing": timing,
        "window": window,
        "delay_beta": delay_beta,
        "fw_chunk": chunks * window if timing == "delayed_chunk" else None,
        "kv_rope_base": 10.0 if rope else None,
        "fw_rope_base": 20.0 if rope else None,
    }
    inputs = make(length, batch=1, writes=writes)
    assert_equal(run(inputs, backend="chunked", **options), run(inputs, backend="definition", **options))


def test_a_synchronous_blend_may_see_all_keys():
    inputs = make(70, batch=1)
    options = {"timing": "synchronous", "window": None}
    assert_equal(run(inputs, backend="chunked", **options), run(inputs, backend="definition", **options))


def test_the_gate_mixes_convexly():
    inputs = make(10)
    kv, fw, mixed = answers_of(inputs, timing="synchronous", window=4)
    share = inputs["gate"].sigmoid()
    torch.testing.assert_close(mixed, share * fw + (1 - share) * kv)


# Carrying on


@settings(deadline=None, max_examples=60)
@given(
    timing=st.sampled_from(TIMINGS),
    window=st.integers(1, 12),
    parts=st.lists(st.integers(1, 15), min_size=1, max_size=6),
    writes=st.none() | st.integers(1, 2),
    delay_beta=st.booleans(),
    chunks=st.integers(1, 3),
    backend=st.sampled_from(["definition", "chunked"]),
    mixes=st.booleans(),
)
def test_any_split_of_a_sequence_is_the_whole(timing, window, parts, writes, delay_beta, chunks, backend, mixes):
    options = {
        "timing": timing,
        "window": window,
        "delay_beta": delay_beta,
        "fw_chunk": chunks * window if timing == "delayed_chunk" else None,
        "feature_map": "silu_l2",
        "kv_rope_base": 10.0,
        "fw_rope_base": 20.0,
        "return_state": True,
        "backend": backend,
    }
    inputs = make(sum(parts), batch=1, writes=writes)
    if not mixes:
        inputs.pop("gate")
    whole = blend(**inputs, **options)
    outputs, state = [], None
    for start, end in itertools.pairwise([0, *itertools.accumulate(parts)]):
        out = blend(**tokens(inputs, start, end), **options, state=state)
        state = out.state
        outputs.append(out)
    for name in ("mixed",) if mixes else ("kv", "fw"):
        torch.testing.assert_close(torch.cat([getattr(out, name) for out in outputs], 1), getattr(whole, name))
    torch.testing.assert_close(state.fw, whole.state.fw)
    torch.testing.assert_close(state.recent.k, whole.state.recent.k)
    assert state.position == whole.state.position == sum(parts)


@pytest.mark.parametrize("rule", [("additive", "time"), ("additive", "heads")], ids="-".join)
@pytest.mark.parametrize("timing", TIMINGS)
def test_one_token_at_a_time_is_the_whole_with_a_normaliser(timing, rule):
    inputs = make(40)
    for name in ("beta", "log_decay"):
        inputs.pop(name)
    options = {"timing": timing, "window": 6, "feature_map": "elu_plus_one", "normaliser": rule[1]}
    whole = blend(**inputs, **options)
    state = None
    for t in range(40):
        out = blend(**tokens(inputs, t, t + 1), **options, state=state, return_state=True)
        state = out.state
        torch.testing.assert_close(out.mixed[:, 0], whole.mixed[:, t])


@pytest.mark.parametrize(
    ("timing", "fw_chunk", "most"),
    [("synchronous", None, 8), ("delayed_streaming", None, 8), ("delayed_chunk", None, 7), ("delayed_chunk", 16, 15)],
)
def test_what_a_decoder_keeps_is_bounded_by_the_window_or_the_chunk(timing, fw_chunk, most):
    inputs = make(50)
    state, kept = None, []
    for t in range(50):
        options = {"timing": timing, "window": 8, "fw_chunk": fw_chunk, "feature_map": "silu_l2"}
        state = blend(**tokens(inputs, t, t + 1), **options, state=state, return_state=True).state
        kept.append(len(state.recent))
        for x in (state.recent.k, state.recent.v):
            assert x.untyped_storage().nbytes() <= (most + 1) * x[:, :1].numel() * x.element_size()
    assert max(kept) == most


def test_gradients_flow_through_a_carried_state():
    inputs = {name: x.requires_grad_() for name, x in make(24).items()}
    options = {"timing": "delayed_streaming", "window": 5, "feature_map": "silu_l2"}
    whole = blend(**inputs, **options).mixed[:, 15:].square().sum()
    first = blend(**tokens(inputs, 0, 15), **options, return_state=True)
    second = blend(**tokens(inputs, 15, 24), **options, state=first.state).mixed.square().sum()
    leaves = list(inputs.values())
    expected = torch.autograd.grad(whole, leaves, materialize_grads=True)
    for found, wanted in zip(torch.autograd.grad(second, leaves, materialize_grads=True), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("timing", TIMINGS)
def test_a_token_changes_nothing_before_it_to_the_bit(timing):
    inputs = {name: x.float() for name, x in make(60).items()}
    options = {"timing": timing, "window": 8}
    before = answers_of(inputs, **options)
    changed = {name: x.clone() for name, x in inputs.items()}
    for x in changed.values():
        x[:, 37] = -0.5
    for x, y in zip(answers_of(changed, **options), before, strict=True):
        assert torch.equal(x[:, :37], y[:, :37])


@pytest.mark.parametrize("writes", [None, 2])
@pytest.mark.parametrize("timing", TIMINGS)
def test_vmap_over_replicas_is_a_loop_over_replicas(timing, writes):
    options = {"timing": timing, "window": 5, "kv_rope_base": 10.0}
    replicas = [make(18, writes=writes, seed=seed) for seed in range(3)]
    alone = [run(inputs, **options) for inputs in replicas]
    stacked = [torch.stack([inputs[name] for inputs in replicas]).requires_grad_() for name in NAMES]

    def replica(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return answers_of(dict(zip(NAMES, tensors, strict=True)), **options)

    answers = torch.func.vmap(replica)(*stacked)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape[1:], generator=generator, dtype=x.dtype) for x in answers]
    loss = sum((x * weight).sum() for x, weight in zip(answers, weights, strict=True))
    gradients = torch.autograd.grad(loss, stacked)
    for i, expected in enumerate(alone):
        found = dict(zip(("kv", "fw", "mixed", *NAMES), (x[i] for x in (*answers, *gradients)), strict=True))
        assert_equal(found, expected)


def test_a_gradient_inside_vmap_is_refused_with_the_way_to_write_it():
    inputs = torch.stack([make(10, seed=seed)["q"] for seed in range(2)])

    def loss(x: Tensor) -> Tensor:
        return blend(x, x, x, timing="synchronous", window=4).fw.square().sum()

    torch.testing.assert_close(
        torch.func.grad(lambda x: torch.func.vmap(loss)(x).sum())(inputs),
        torch.stack([torch.func.grad(loss)(x) for x in inputs]),
    )
    with pytest.raises(NotImplementedError, match="take its gradient outside"):
        torch.func.vmap(torch.func.grad(loss))(inputs)


@pytest.mark.parametrize("backend", ["definition", "chunked"])
def test_autocast_does_not_narrow_the_products_inside(backend):
    inputs = {name: x.float() for name, x in make(30).items()}
    options = {"timing": "synchronous", "window": 8, "feature_map": "silu_l2", "backend": backend}
    expected = blend(**inputs, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = blend(**inputs, **options)
    assert torch.equal(found.mixed, expected.mixed)


# Mistakes


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"timing": "late", "window": 4}, "no timing 'late'; there is synchronous, delayed_streaming, delayed_chunk"),
        ({"timing": "delayed_streaming", "window": None}, "delayed_streaming needs a window"),
        ({"timing": "synchronous", "window": 0}, "window is 0"),
        ({"timing": "synchronous", "window": 4, "fw_chunk": 4}, "fw_chunk belongs to delayed_chunk"),
        ({"timing": "delayed_chunk", "window": 4, "fw_chunk": 6}, "fw_chunk 6 is not a multiple of window 4"),
    ],
    ids=lambda x: x["timing"] if isinstance(x, dict) else None,
)
def test_a_mistake_is_answered_with_what_would_be_right(options, sentence):
    x = make(3)
    with pytest.raises(ValueError, match=sentence):
        blend(x["q"], x["k"], x["v"], **options)
