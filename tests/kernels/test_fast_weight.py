import math
from dataclasses import dataclass, replace

import pytest
import torch
from hqlt_kernels.fast_weight import fast_weight, fast_weight_step
from hqlt_kernels.feature_maps import map_features
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.usefixtures("poisoned_memory")

RULES = ("additive", "decay", "delta", "gated_delta", "delta_product", "gated_delta_product")
LENGTHS = (1, 15, 63, 64, 65, 100, 257)


@dataclass(frozen=True)
class Case:
    """Inputs of a rule. `tensors` are q, k, v, beta, log_decay, initial_state."""

    tensors: tuple[Tensor | None, ...]
    weight_o: Tensor
    weight_state: Tensor

    def to(self, dtype: torch.dtype) -> "Case":
        tensors = tuple(None if x is None else x.to(dtype) for x in self.tensors)
        return Case(tensors, self.weight_o.to(dtype), self.weight_state.to(dtype))


def make_case(rule: str, *, batch=2, length=20, heads=2, key=6, value=5, writes=3, carried=True, seed=0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    per_write = (batch, length, writes, heads) if "product" in rule else (batch, length, heads)
    return Case(
        (
            normal(batch, length, heads, key),
            normal(*per_write, key),
            normal(*per_write, value),
            2 * uniform(*per_write) if "delta" in rule else None,
            -2 * uniform(batch, length, heads) if rule in ("decay", "gated_delta", "gated_delta_product") else None,
            normal(batch, heads, key, value) if carried else None,
        ),
        normal(batch, length, heads, value),
        normal(batch, heads, key, value),
    )


def run(case: Case, backend: str, **options) -> dict[str, Tensor]:
    """o, the final state, and the gradient of a weighted sum of both with respect to every input."""
    inputs = [None if x is None else x.clone().requires_grad_() for x in case.tensors]
    q, k, v, beta, log_decay, initial_state = inputs
    options = {"feature_map": "silu_l2", **options}
    o, state = fast_weight(
        q, k, v, beta=beta, log_decay=log_decay, initial_state=initial_state, backend=backend, **options
    )
    loss = (o * case.weight_o).sum() + (state * case.weight_state).sum()
    loss.backward()
    names = ("q", "k", "v", "beta", "log_decay", "initial_state")
    return {"o": o.detach(), "state": state.detach()} | {
        name: torch.zeros_like(x) if x.grad is None else x.grad
        for name, x in zip(names, inputs, strict=True)
        if x is not None
    }


def assert_equal_in_float64(case: Case, **options) -> None:
    truth, fast = run(case, "definition", **options), run(case, "chunked", **options)
    for name in truth:
        torch.testing.assert_close(fast[name], truth[name], rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


# The definition against mathematics written differently


@pytest.mark.parametrize("chunk", [None, 4])
def test_the_additive_rules_are_sums_over_pairs(chunk):
    case = make_case("decay", carried=False)
    q, k, v, _, log_decay, _ = case.tensors
    length = q.shape[1]
    summed = log_decay.cumsum(1)
    expected = torch.zeros_like(case.weight_o)
    for t in range(length):
        last = t if chunk is None else t // chunk * chunk - 1  # the last token in the state that t reads
        for j in range(last + 1):
            left = (summed[:, last] - summed[:, j]).exp()
            expected[:, t] += (left * (q[:, t] * k[:, j]).sum(-1))[..., None] * v[:, j]
    o, _ = fast_weight(q, k, v, log_decay=log_decay, scale=1.0, read_chunk=chunk, backend="definition")
    torch.testing.assert_close(o, expected)


def test_the_delta_rules_are_products_of_transition_matrices():
    case = make_case("gated_delta_product", length=6)
    q, k, v, beta, log_decay, state = case.tensors
    k = map_features(k, "relu_l2")
    eye = torch.eye(k.shape[-1], dtype=k.dtype)
    for t in range(6):
        state = log_decay[:, t].exp()[..., None, None] * state
        for i in range(3):
            key, strength = k[:, t, i], beta[:, t, i, :, None, None]
            state = (eye - strength * torch.einsum("bhi,bhj->bhij", key, key)) @ state
            state = state + strength * torch.einsum("bhi,bhj->bhij", key, v[:, t, i])
        query = map_features(q[:, t], "relu_l2")
        o, final = fast_weight(
            q[:, : t + 1],
            case.tensors[1][:, : t + 1],
            v[:, : t + 1],
            beta=beta[:, : t + 1],
            log_decay=log_decay[:, : t + 1],
            initial_state=case.tensors[5],
            feature_map="relu_l2",
            backend="definition",
        )
        torch.testing.assert_close(final, state)
        torch.testing.assert_close(o[:, t], torch.einsum("bhk,bhkv->bhv", query, state) / math.sqrt(k.shape[-1]))


# The chunked form against the definition


@pytest.mark.parametrize("carried", [False, True], ids=["empty", "carried"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("rule", RULES)
def test_chunked_equals_the_definition_with_every_gradient(rule, length, carried):
    assert_equal_in_float64(make_case(rule, length=length, batch=1, carried=carried))


@pytest.mark.parametrize("chunk", [1, 5, 8, 16, 24, 37, 64, 300])
@pytest.mark.parametrize("rule", ["decay", "delta", "gated_delta_product"])
def test_reads_at_chunk_starts_equal_the_definition_whatever_the_tile(rule, chunk):
    assert_equal_in_float64(make_case(rule, length=100, batch=1, carried=chunk % 2 == 0), read_chunk=chunk)


@pytest.mark.parametrize("read_chunk", [None, 20, 128])
def test_wide_heads_have_tiles_that_are_inverted_by_halves(read_chunk):
    case = make_case("gated_delta", length=140, batch=1, heads=1, key=128, value=3)
    assert_equal_in_float64(case, read_chunk=read_chunk)


@settings(deadline=None, max_examples=40)
@given(
    rule=st.sampled_from(RULES),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.integers(1, 70),
    key=st.integers(1, 9),
    value=st.integers(1, 9),
    writes=st.integers(1, 4),
    read_chunk=st.none() | st.integers(1, 80),
    carried=st.booleans(),
    feature_map=st.sampled_from(["silu_l2", "relu_l2"]),
)
def test_chunked_equals_the_definition_for_any_shape(
    rule, batch, heads, length, key, value, writes, read_chunk, carried, feature_map
):
    case = make_case(
        rule, batch=batch, length=length, heads=heads, key=key, value=value, writes=writes, carried=carried
    )
    assert_equal_in_float64(case, read_chunk=read_chunk, feature_map=feature_map)


def hard(kind: str, case: Case) -> Case:
    """Inputs at which clumsy algebra loses its digits."""
    q, k, v, beta, log_decay, state = case.tensors
    if kind == "correlated keys":
        k = 0.1 * k + 3 * k[:, :1]
    elif kind == "identical keys, beta 2":
        k, beta = k[:, :1].expand_as(k).clone(), torch.full_like(beta, 2.0)
    elif kind == "beta 0":
        beta = torch.zeros_like(beta)
    elif kind == "beta 0 or 2":
        beta = beta.round().clamp(0, 1) * 2
    elif kind == "no decay":
        log_decay = torch.zeros_like(log_decay)
    elif kind == "strong decay":
        log_decay = 50 * log_decay
    elif kind == "a reset among small decays":
        log_decay = 0.01 * log_decay
        log_decay[:, 30] = -3000.0
    return replace(case, tensors=(q, k, v, beta, log_decay, state))


@pytest.mark.parametrize("rule", ["gated_delta", "gated_delta_product"])
@pytest.mark.parametrize(
    "kind",
    [
        "random keys",
        "correlated keys",
        "identical keys, beta 2",
        "beta 0",
        "beta 0 or 2",
        "no decay",
        "strong decay",
        "a reset among small decays",
    ],
)
def test_chunked_in_float32_is_no_worse_than_the_token_loop(rule, kind, assert_no_worse_than_torch):
    case = hard(kind, make_case(rule, length=100, key=16, value=8, seed=3)).to(torch.float32)
    truth = run(case.to(torch.float64), "definition")
    loop, fast = run(case, "definition"), run(case, "chunked")
    for name in truth:
        assert_no_worse_than_torch(fast[name], loop[name], truth[name], name=name)


@pytest.mark.parametrize("rule", ["decay", "gated_delta"])
def test_an_infinite_decay_empties_the_memory(rule):
    case = make_case(rule, length=40)
    case.tensors[4][:, 17] = -math.inf
    whole = run(case, "chunked")
    q, k, v, beta, log_decay, _ = (None if x is None else x[:, 17:] for x in case.tensors)
    after, _ = fast_weight(q, k, v, beta=beta, log_decay=log_decay, feature_map="silu_l2", backend="chunked")
    torch.testing.assert_close(whole["o"][:, 17:], after)
    assert all(torch.isfinite(x).all() for x in whole.values())


@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_the_chunked_form_match_finite_differences(rule):
    case = make_case(rule, batch=1, heads=1, length=9, key=3, value=2, writes=2)
    given_tensors = [x.clone().requires_grad_() for x in case.tensors if x is not None]

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        remaining = iter(tensors)
        q, k, v, beta, log_decay, state = (None if x is None else next(remaining) for x in case.tensors)
        return fast_weight(
            q,
            k,
            v,
            beta=beta,
            log_decay=log_decay,
            initial_state=state,
            feature_map="silu_l2",
            read_chunk=2,
            backend="chunked",
        )

    assert torch.autograd.gradcheck(function, given_tensors)


def test_a_gradient_through_one_output_alone_is_right():
    case = make_case("gated_delta", length=40)
    for unused in ("weight_o", "weight_state"):
        assert_equal_in_float64(replace(case, **{unused: torch.zeros_like(getattr(case, unused))}))
    inputs = [x.clone().requires_grad_() for x in case.tensors]
    q, k, v, beta, log_decay, initial_state = inputs
    results = []
    for backend in ("definition", "chunked"):
        _, state = fast_weight(
            q, k, v, beta=beta, log_decay=log_decay, initial_state=initial_state, feature_map="silu_l2", backend=backend
        )
        results.append(torch.autograd.grad(state.sum(), inputs[1:]))
    torch.testing.assert_close(results[1], results[0])


# Properties


@pytest.mark.parametrize("read_chunk", [None, 8])
@pytest.mark.parametrize("backend", ["definition", "chunked"])
def test_a_token_changes_nothing_before_it_to_the_bit(backend, read_chunk):
    case = make_case("gated_delta", length=50)
    before = run(case, backend, read_chunk=read_chunk)["o"]
    changed = tuple(None if x is None else x.clone() for x in case.tensors)
    for x in changed[:5]:
        x[:, 33] = -0.5
    after = run(replace(case, tensors=changed), backend, read_chunk=read_chunk)["o"]
    assert torch.equal(after[:, :33], before[:, :33])
    assert not torch.equal(after[:, 33], before[:, 33])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", ["definition", "chunked"])
def test_a_sequence_in_parts_with_the_state_carried_is_the_whole(backend, rule):
    q, k, v, beta, log_decay, state = make_case(rule, length=60).tensors
    whole, final = fast_weight(
        q, k, v, beta=beta, log_decay=log_decay, initial_state=state, feature_map="silu_l2", backend=backend
    )
    parts = []
    for start, end in [(0, 1), (1, 2), (2, 37), (37, 60)]:
        o, state = fast_weight(
            q[:, start:end],
            k[:, start:end],
            v[:, start:end],
            beta=None if beta is None else beta[:, start:end],
            log_decay=None if log_decay is None else log_decay[:, start:end],
            initial_state=state,
            feature_map="silu_l2",
            backend=backend,
        )
        parts.append(o)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("normaliser", ["none", "time", "heads"])
def test_steps_of_one_token_are_the_whole(normaliser):
    q, k, v, *_ = make_case("additive", length=12).tensors
    options = {"feature_map": "elu_plus_one", "normaliser": normaliser}
    whole, final = fast_weight(q, k, v, **options)
    state = None
    for t in range(12):
        o, state = fast_weight_step(q[:, t], k[:, t], v[:, t], state, **options)
        torch.testing.assert_close(o, whole[:, t])
    torch.testing.assert_close(state, final)


def test_two_runs_are_equal_to_the_bit():
    case = make_case("gated_delta", length=100).to(torch.float32)
    first, second = run(case, "chunked"), run(case, "chunked")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("read_chunk", [None, 4, 30])
def test_without_gradients_the_answers_are_the_same_to_the_bit(read_chunk):
    case = make_case("gated_delta", length=100)
    q, k, v, beta, log_decay, _ = case.tensors
    with torch.no_grad():
        alone = fast_weight(q, k, v, beta=beta, log_decay=log_decay, feature_map="silu_l2", read_chunk=read_chunk)
    q.requires_grad_()
    kept = fast_weight(q, k, v, beta=beta, log_decay=log_decay, feature_map="silu_l2", read_chunk=read_chunk)
    assert all(torch.equal(a, b) for a, b in zip(alone, kept, strict=True))


def test_what_inference_has_remembered_serves_training():
    case = make_case("delta", length=29)  # a length that no other test has
    q, k, v, beta, _, _ = case.tensors
    with torch.inference_mode():
        fast_weight(q, k, v, beta=beta, feature_map="silu_l2")
    assert_equal_in_float64(case)


class FromPython(TorchDispatchMode):
    """The shapes of the tensors that are made of Python's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        if operation is torch.ops.aten.lift_fresh.default and made.dim() > 0:  # one number is filled in, not copied
            self.shapes.append(made.shape)
        return made


@pytest.mark.parametrize("read_chunk", [None, 1, 4, 48])
@pytest.mark.parametrize("rule", RULES)
def test_a_second_call_copies_nothing_from_python_as_a_cuda_graph_demands(rule, read_chunk):
    case = make_case(rule, length=100)
    first = run(case, "chunked", read_chunk=read_chunk)
    with FromPython() as copied:
        second = run(case, "chunked", read_chunk=read_chunk)
    assert copied.shapes == []
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_inputs_need_not_be_contiguous():
    case = make_case("gated_delta", length=40)
    scattered = tuple(x.transpose(0, -1).contiguous().transpose(0, -1) for x in case.tensors)
    expected, found = run(case, "chunked"), run(replace(case, tensors=scattered), "chunked")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("backend", ["definition", "chunked"])
def test_sixteen_bit_inputs_are_computed_in_float32(backend):
    case = make_case("gated_delta", length=40).to(torch.bfloat16)
    q, k, v, beta, log_decay, _ = case.tensors
    o, state = fast_weight(q, k, v, beta=beta, log_decay=log_decay, feature_map="silu_l2", backend=backend)
    wide = [x.float() for x in (q, k, v, beta, log_decay)]
    expected, _ = fast_weight(*wide[:3], beta=wide[3], log_decay=wide[4], feature_map="silu_l2", backend="definition")
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(o.float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("length", [1, 40])
def test_vmap_over_replicas_is_a_loop_over_replicas(rule, length):
    cases = [make_case(rule, length=length, seed=seed) for seed in range(3)]
    alone = [run(case, "chunked", read_chunk=4) for case in cases]
    inputs = [
        None if columns[0] is None else torch.stack(columns).requires_grad_()
        for columns in zip(*(case.tensors for case in cases), strict=True)
    ]
    mapped = [x for x in inputs if x is not None]

    def replica(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        remaining = iter(tensors)
        q, k, v, beta, log_decay, state = (None if x is None else next(remaining) for x in inputs)
        return fast_weight(
            q, k, v, beta=beta, log_decay=log_decay, initial_state=state, feature_map="silu_l2", read_chunk=4
        )

    o, state = torch.func.vmap(replica)(*mapped)
    loss = sum((o[i] * case.weight_o).sum() + (state[i] * case.weight_state).sum() for i, case in enumerate(cases))
    gradients = torch.autograd.grad(loss, mapped, allow_unused=True)
    names = [name for name in alone[0] if name not in ("o", "state")]
    for i in range(3):
        torch.testing.assert_close(o[i], alone[i]["o"])
        torch.testing.assert_close(state[i], alone[i]["state"])
        for name, gradient in zip(names, gradients, strict=True):
            torch.testing.assert_close(
                torch.zeros_like(alone[i][name]) if gradient is None else gradient[i], alone[i][name]
            )


def test_vmap_shares_what_is_not_mapped():
    q, k, v, _, log_decay, _ = make_case("decay", length=30).tensors
    queries = torch.stack([q, 2 * q], dim=2)
    o, _ = torch.func.vmap(lambda query: fast_weight(query, k, v, log_decay=log_decay), in_dims=2)(queries)
    expected, _ = fast_weight(q, k, v, log_decay=log_decay)
    torch.testing.assert_close(o, torch.stack([expected, 2 * expected]))


# Normalisers


@pytest.mark.parametrize("backend", ["definition", "chunked"])
@pytest.mark.parametrize("chunk", [None, 4])
def test_the_normaliser_over_time_makes_the_answer_a_weighted_mean_of_values(chunk, backend):
    q, k, v, *_ = make_case("additive", length=11).tensors
    phi_q, phi_k = map_features(q, "elu_plus_one"), map_features(k, "elu_plus_one")
    o, state = fast_weight(q, k, v, feature_map="elu_plus_one", normaliser="time", read_chunk=chunk, backend=backend)
    for t in range(11):
        n_read = t + 1 if chunk is None else t // chunk * chunk
        weights = torch.einsum("bhk,bjhk->bjh", phi_q[:, t], phi_k[:, :n_read])
        mean = (weights[..., None] * v[:, :n_read]).sum(1) / (weights.sum(1)[..., None] + 1e-10)
        torch.testing.assert_close(o[:, t], mean)
    torch.testing.assert_close(state[..., -1], phi_k.sum(1))


@pytest.mark.parametrize("cut", [4, 8])
def test_the_sum_of_keys_is_carried_with_the_state(cut):
    q, k, v, *_ = make_case("additive", length=12).tensors
    options = {"feature_map": "elu_plus_one", "normaliser": "time", "read_chunk": 4}
    whole, final = fast_weight(q, k, v, **options)
    first, state = fast_weight(q[:, :cut], k[:, :cut], v[:, :cut], **options)
    second, state = fast_weight(q[:, cut:], k[:, cut:], v[:, cut:], initial_state=state, **options)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(state, final)


def test_the_published_normaliser_sums_the_current_key_over_heads():
    q, k, v, *_ = make_case("additive", length=5, heads=3).tensors
    phi_q, phi_k = map_features(q, "elu_plus_one"), map_features(k, "elu_plus_one")
    plain, _ = fast_weight(phi_q, phi_k, v, scale=1.0)
    o, _ = fast_weight(q, k, v, feature_map="elu_plus_one", normaliser="heads")
    for head in range(3):
        divisor = (phi_q[:, :, head] * phi_k[:, :, : head + 1].sum(2)).sum(-1, keepdim=True) + 1e-10
        torch.testing.assert_close(o[:, :, head], plain[:, :, head] / divisor)


# Mistakes


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"beta": torch.ones(1, 3, 2), "normaliser": "time"}, "belongs to the additive rule"),
        ({"normaliser": "space"}, "no normaliser 'space'; there is none, time, heads"),
        ({"feature_map": "cosine"}, "no feature map 'cosine'; there is identity"),
        ({"read_chunk": 0}, "read_chunk is 0"),
        ({"beta": torch.ones(1, 3)}, r"beta is \(1, 3\), not \(1, 3, 2\)"),
        ({"log_decay": torch.ones(1, 2, 3)}, r"log_decay is \(1, 2, 3\), not \(1, 3, 2\)"),
        ({"v": torch.ones(1, 3, 1, 4)}, "do not fit together"),
        ({"initial_state": torch.ones(1, 2, 4, 5)}, r"initial_state is \(1, 2, 4, 5\), not \(1, 2, 4, 4\)"),
        ({"k": torch.ones(1, 3, 2, 2, 4), "v": torch.ones(1, 3, 2, 2, 4)}, "a delta product and need beta"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_a_mistake_is_answered_with_what_would_be_right(change, sentence):
    arguments = {name: torch.ones(1, 3, 2, 4) for name in "qkv"} | change
    with pytest.raises(ValueError, match=sentence):
        fast_weight(**arguments)
