import pytest
import torch
from hqlt_kernels.fast_weight import definition
from hqlt_kernels.feature_maps import map_features
from torch import Tensor
from triton_cases import CUDA, DEVICE, assert_as_good_as_torch, fast_weight_operator, pairwise, relative_error

# On a GPU the poisoned memory's switch warns of what PyTorch itself does in no fixed order.
pytestmark = pytest.mark.filterwarnings("ignore:.*deterministic")

NAMES = ("q", "k", "v", "beta", "log_decay", "initial_state")
FACTOR = {torch.float32: 4.0, torch.bfloat16: 2.0, torch.float16: 2.0}


def inputs(
    *,
    rule,
    dtype,
    head_dim,
    n_tokens,
    keys="random",
    strength="up to 2",
    decay="mild",
    carried=True,
    batch=1,
    n_heads=2,
) -> list[Tensor | None]:
    """Float64 tensors that `dtype` holds exactly: both sides of a comparison see the same numbers."""
    torch.manual_seed(n_tokens)
    writes = (2,) if rule == "delta_product" else ()
    q = torch.randn(batch, n_tokens, n_heads, head_dim)
    k, v = (torch.randn(batch, n_tokens, *writes, n_heads, head_dim) for _ in "kv")
    if keys == "correlated":
        k = 0.3 * k + torch.randn(n_heads, head_dim)
    elif keys == "identical":
        k = torch.randn(n_heads, head_dim).expand_as(k)
    beta = None
    if "delta" in rule:
        beta = torch.rand(k.shape[:-1]) * (1.0 if strength == "up to 1" else 2.0)
        if strength == "some zero":
            beta[:, ::3] = 0.0
    log_decay = None
    if rule in ("decay", "gated_delta"):
        log_decay = -torch.rand(batch, n_tokens, n_heads) * {"none": 0.0, "mild": 0.3, "strong": 30.0}[decay]
    state = torch.randn(batch, n_heads, head_dim, head_dim) if carried else None
    tensors = (q, k, v, beta, log_decay, state)
    return [None if x is None else x.to(DEVICE).to(dtype).double() for x in tensors]


def with_gradients(function, tensors: list[Tensor | None], dtypes: list[torch.dtype]) -> dict[str, Tensor]:
    """Output, final state, and the gradients of a fixed linear function of both."""
    leaves = [
        None if x is None else x.detach().to(d, copy=True).requires_grad_()
        for x, d in zip(tensors, dtypes, strict=True)
    ]
    o, state = function(*leaves)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtypes[0]).to(x) for x in (o, state)]
    torch.autograd.backward((o, state), weights)
    gradients = {f"d{n}": x.grad for n, x in zip(NAMES, leaves, strict=True) if x is not None}
    return {"o": o.detach(), "state": state.detach(), **gradients}


def chunkwise_at(dtype: torch.dtype, *, feature_map, scale, read_chunk):
    """The rule by chunks of 64 in plain PyTorch, every matrix product in `dtype`: what a careful user would write."""

    def times(a: Tensor, b: Tensor) -> Tensor:
        return (a.to(dtype) @ b.to(dtype)).float()

    def run(q, k, v, beta, log_decay, state):
        n = k.shape[2] if k.dim() == 5 else 1
        if k.dim() == 5:
            q = torch.nn.functional.pad(q.unsqueeze(2), (0, 0, 0, 0, n - 1, 0)).flatten(1, 2)
            k, v, beta = k.flatten(1, 2), v.flatten(1, 2), beta.flatten(1, 2)
        q, k = (map_features(x.float(), feature_map).to(dtype).float().transpose(1, 2) for x in (q, k))
        v = v.float().transpose(1, 2)
        beta = None if beta is None else beta.float().transpose(1, 2)
        g = q.new_zeros(q.shape[:3]) if log_decay is None else log_decay.float().transpose(1, 2)
        S = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]) if state is None else state.float()
        outputs = []
        for first in range(0, q.shape[2], 64):
            at = slice(first, first + 64)
            Q, K, V, G = q[:, :, at], k[:, :, at], v[:, :, at], g[:, :, at].cumsum(2)
            D = (G.unsqueeze(3) - G.unsqueeze(2)).tril().exp().tril()
            U = V
            if beta is not None:
                b = beta[:, :, at].unsqueeze(3)
                A = (b * times(K, K.mT) * D).tril(-1)
                R = b * (V - G.exp().unsqueeze(3) * times(K, S))
                U = torch.linalg.solve_triangular(torch.eye(A.shape[-1], device=A.device) + A, R, upper=False)
            outputs.append(G.exp().unsqueeze(3) * times(Q, S) + times(times(Q, K.mT) * D, U))
            last = G[:, :, -1:].unsqueeze(3)
            S = last.exp() * S + times(K.mT, (last.squeeze(3) - G).exp().unsqueeze(3) * U)
        o = torch.cat(outputs, 2).transpose(1, 2)[:, n - 1 :: n] * scale
        return o.to(dtype), S

    assert read_chunk is None
    return run


def check(*, dtype, feature_map="silu_l2", read_chunk=None, **case) -> None:
    tensors = inputs(dtype=dtype, **case)
    scale = case["head_dim"] ** -0.5
    options = {"feature_map": feature_map, "scale": scale, "read_chunk": read_chunk}
    stored = [dtype] * 3 + [torch.float32] * 3
    truth = with_gradients(lambda *x: definition.fast_weight(*x, **options), tensors, [torch.float64] * 6)
    ours = with_gradients(lambda *x: fast_weight_operator.fast_weight(*x, **options), tensors, stored)
    if dtype == torch.float32 or read_chunk is not None:
        other = with_gradients(lambda *x: definition.fast_weight(*x, **options), tensors, stored)
    else:
        other = with_gradients(chunkwise_at(dtype, **options), tensors, stored)
    factor = FACTOR[dtype]
    if dtype == torch.bfloat16 and case.get("keys") == "identical":
        factor = 5.0  # what all keys read alike cancels in a product with T, which is stored in 16 bits
    exact_decay = truth.pop("dlog_decay", None)
    assert_as_good_as_torch(ours, other, truth, factor=factor)
    if exact_decay is not None:  # in 16 bits a difference of what is read and what was written
        slack = 1.0 if dtype == torch.float32 else 1.5
        assert_as_good_as_torch(ours, other, {"dlog_decay": exact_decay}, factor=slack * factor)


RULES = ("additive", "decay", "delta", "gated_delta", "delta_product")


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_kernels_of_every_rule_are_as_good_as_torch(rule, dtype):
    check(rule=rule, dtype=dtype, head_dim=32, n_tokens=100 if dtype == torch.float16 else 70)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("n_tokens", [1, 31, 32, 33])
def test_lengths_around_a_tile(n_tokens):
    check(rule="gated_delta", dtype=torch.float32, head_dim=16, n_tokens=n_tokens, carried=n_tokens > 1)


@pytest.mark.usefixtures("poisoned_memory")
def test_heads_of_256_columns():
    check(rule="gated_delta", dtype=torch.float16, head_dim=256, n_tokens=70)


@pytest.mark.parametrize("feature_map", ["identity", "elu_plus_one", "relu_l2"])
def test_every_feature_map_has_its_gradient_in_the_kernel(feature_map):
    check(rule="decay", dtype=torch.float32, head_dim=16, n_tokens=40, feature_map=feature_map)


@pytest.mark.parametrize("strength", ["up to 1", "some zero"])
@pytest.mark.parametrize("keys", ["correlated", "identical"])
def test_keys_that_repeat_and_writes_that_are_off(keys, strength):
    check(rule="delta", dtype=torch.float32, head_dim=32, n_tokens=70, keys=keys, strength=strength)


@pytest.mark.parametrize("head_dim", [16, 32])
@pytest.mark.parametrize("rule", ["decay", "gated_delta"])
def test_float32_keeps_its_digits_where_a_tile_forgets_everything_again_and_again(rule, head_dim):
    """Up to e^-30 a token: a tile's logarithms add up to hundreds, and most of what was written is never read."""
    check(rule=rule, dtype=torch.float32, head_dim=head_dim, n_tokens=70, decay="strong")


def test_writes_of_beta_zero_change_a_state_by_less_than_half_precision_shows():
    q, k, v, beta, _, state = (
        x if x is None else x.half() for x in inputs(rule="delta", dtype=torch.float16, head_dim=32, n_tokens=16)
    )
    options = {"feature_map": "silu_l2", "scale": 1.0, "read_chunk": None}
    final = fast_weight_operator.fast_weight(q, k, v, torch.zeros_like(beta), None, state, **options)[1]
    assert relative_error(final, state) < torch.finfo(torch.float16).eps / 2


@pytest.mark.parametrize("read_chunk", [1, 7, 16, 32, 50])
def test_reading_the_state_at_a_chunks_start(read_chunk):
    check(rule="gated_delta", dtype=torch.float32, head_dim=16, n_tokens=110, read_chunk=read_chunk)


@pytest.mark.parametrize("shift", [5, 40])
def test_a_shift_reads_older_keys_and_values_without_a_copy(shift):
    tensors = inputs(rule="gated_delta", dtype=torch.float32, head_dim=16, n_tokens=80)
    options = {"feature_map": "silu_l2", "scale": 1.0, "read_chunk": None}

    def delayed(q, k, v, beta, log_decay, state):
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, shift, 0))[:, :80] for x in (k, v))
        return definition.fast_weight(q, k, v, beta, log_decay, state, **options)

    truth = with_gradients(delayed, tensors, [torch.float64] * 6)
    same = with_gradients(delayed, tensors, [torch.float32] * 6)
    ours = with_gradients(
        lambda *x: fast_weight_operator.fast_weight(*x, **options, shift=shift), tensors, [torch.float32] * 6
    )
    assert_as_good_as_torch(ours, same, truth, factor=4.0)


def test_changing_a_token_leaves_earlier_outputs_bit_identical():
    q, k, v, beta, log_decay, state = (
        x.to(torch.float32) for x in inputs(rule="gated_delta", dtype=torch.float32, head_dim=16, n_tokens=70)
    )
    options = {"feature_map": "silu_l2", "scale": 1.0, "read_chunk": None}
    before = fast_weight_operator.fast_weight(q, k, v, beta, log_decay, state, **options)[0]
    for x in (q, k, v, beta, log_decay):
        x[:, 45] += 0.5
    after = fast_weight_operator.fast_weight(q, k, v, beta, log_decay, state, **options)[0]
    assert torch.equal(before[:, :45], after[:, :45])
    assert not torch.equal(before[:, 45:], after[:, 45:])


def test_two_parts_with_a_carried_state_are_the_whole():
    tensors = [x.float() for x in inputs(rule="gated_delta", dtype=torch.float32, head_dim=16, n_tokens=70)]
    options = {"feature_map": "silu_l2", "scale": 1.0, "read_chunk": None}
    whole, final = fast_weight_operator.fast_weight(*tensors, **options)
    one, state = fast_weight_operator.fast_weight(*(x[:, :41] for x in tensors[:5]), tensors[5], **options)
    two, state = fast_weight_operator.fast_weight(*(x[:, 41:] for x in tensors[:5]), state, **options)
    torch.testing.assert_close(torch.cat([one, two], 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_the_kernel_of_one_token_is_the_rule(rule):
    tensors = [
        None if x is None else x.float() for x in inputs(rule=rule, dtype=torch.float32, head_dim=32, n_tokens=1)
    ]
    options = {"feature_map": "relu_l2", "scale": 0.5, "read_chunk": None}
    with torch.no_grad():
        ours = fast_weight_operator.fast_weight(*tensors, **options)
    for x, truth in zip(ours, definition.fast_weight(*tensors, **options), strict=True):
        torch.testing.assert_close(x, truth, rtol=1e-5, atol=1e-5)


def test_replicas_under_vmap_are_one_call_each():
    cases = [inputs(rule="delta", dtype=torch.float32, head_dim=16, n_tokens=n) for n in (33, 33, 33)]
    stacked = [torch.stack([c[i].float() for c in cases]) for i in range(4)]
    stacked[1][1] += 1.0

    def run(q, k, v, beta):
        return fast_weight_operator.fast_weight(
            q, k, v, beta, None, None, feature_map="silu_l2", scale=1.0, read_chunk=None
        )[0]

    each = torch.stack([run(*(x[i] for x in stacked)) for i in range(3)])
    assert torch.equal(torch.vmap(run)(*stacked), each)


def test_under_vmap_a_batch_of_one_may_be_shared_by_all_replicas_or_a_slice_of_something_larger():
    q, k, v, beta = (x.float() for x in inputs(rule="delta", dtype=torch.float32, head_dim=16, n_tokens=33)[:4])
    q, k, v, beta = (x[:1] for x in (q, k, v, beta))
    gapped = torch.stack([q, q + 1, q - 1], 1)[:, :2].movedim(1, 0)

    def run(q, k):
        return fast_weight_operator.fast_weight(
            q, k, v, beta, None, None, feature_map="silu_l2", scale=1.0, read_chunk=None
        )[0]

    each = torch.stack([run(x, k) for x in gapped])
    assert torch.equal(torch.vmap(run, in_dims=(0, None))(gapped, k), each)
    assert torch.equal(torch.vmap(run)(gapped, k.expand(2, *k.shape)), each)


def test_the_custom_operators_keep_pytorchs_contract():
    q, k, v, beta, log_decay, state = (
        x.float().requires_grad_() for x in inputs(rule="gated_delta", dtype=torch.float32, head_dim=16, n_tokens=40)
    )
    torch.library.opcheck(
        fast_weight_operator.fast_weight_forward,
        (q, k, v, beta, log_decay, state, 1, 1.0, 0, 0, True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


if CUDA:  # what the interpreter cannot show: compiled kernels in bfloat16, at sizes that fill tiles and programs
    SETTINGS = list(
        pairwise(
            {
                "rule": RULES,
                "dtype": (torch.bfloat16, torch.float32),
                "head_dim": (128, 64, 32, 16),
                "n_tokens": (1, 15, 63, 64, 65, 100, 1000, 4096),
                "keys": ("random", "correlated", "identical"),
                "strength": ("up to 1", "up to 2", "some zero"),
                "decay": ("mild", "none", "strong"),
                "carried": (True, False),
            }
        )
    )

    @pytest.mark.gpu
    @pytest.mark.usefixtures("poisoned_memory")
    @pytest.mark.parametrize(
        "case", SETTINGS, ids=lambda c: "-".join(str(x).removeprefix("torch.") for x in c.values())
    )
    def test_fast_weight_kernels_are_as_good_as_torch_on_this_card(case):
        check(**case)

    @pytest.mark.gpu
    @pytest.mark.usefixtures("poisoned_memory")
    @pytest.mark.parametrize("rule", RULES)
    def test_fast_weight_kernels_of_heads_of_256_columns_on_this_card(rule):
        check(rule=rule, dtype=torch.bfloat16, head_dim=256, n_tokens=200)

    @pytest.mark.gpu
    @pytest.mark.parametrize("read_chunk", [16, 50, 64, 100, 256])
    def test_fast_weight_kernels_read_at_chunk_starts_on_this_card(read_chunk):
        tensors = inputs(rule="gated_delta", dtype=torch.bfloat16, head_dim=128, n_tokens=600)
        options = {"feature_map": "silu_l2", "scale": 128**-0.5, "read_chunk": read_chunk}
        truth = with_gradients(lambda *x: definition.fast_weight(*x, **options), tensors, [torch.float64] * 6)
        stored = [torch.bfloat16] * 3 + [torch.float32] * 3
        ours = with_gradients(lambda *x: fast_weight_operator.fast_weight(*x, **options), tensors, stored)
        errors = {name: relative_error(ours[name], exact) for name, exact in truth.items()}
        assert max(errors.values()) < 1e-2, errors

    @pytest.mark.gpu
    @pytest.mark.parametrize("rule", ["additive", "decay", "delta", "gated_delta"])
    @pytest.mark.parametrize("head_dim", [32, 64, 128])
    @pytest.mark.parametrize("n_tokens", [16, 63, 64])
    def test_fast_weight_kernels_of_one_tile_carry_a_state_on_this_card(rule, head_dim, n_tokens):
        """With the number of tiles, one, known to the compiler, the loop went and dinitial_state was wrong."""
        tensors = inputs(rule=rule, dtype=torch.bfloat16, head_dim=head_dim, n_tokens=n_tokens)
        options = {"feature_map": "silu_l2", "scale": 0.1, "read_chunk": None}
        truth = with_gradients(lambda *x: definition.fast_weight(*x, **options), tensors, [torch.float64] * 6)
        stored = [torch.bfloat16] * 3 + [torch.float32] * 3
        ours = with_gradients(lambda *x: fast_weight_operator.fast_weight(*x, **options), tensors, stored)
        errors = {name: relative_error(ours[name], exact) for name, exact in truth.items()}
        assert max(errors.values()) < 1.5e-2, errors

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
    @pytest.mark.parametrize("head_dim", [32, 64, 128])
    @pytest.mark.parametrize("rule", ["additive", "delta", "gated_delta"])
    def test_fast_weight_launches_repeat_bit_by_bit(rule, head_dim, dtype):
        """Twenty runs: a race between registers and the tensor core shows as a run that differs."""
        tensors = inputs(rule=rule, dtype=dtype, head_dim=head_dim, n_tokens=1024, batch=4, n_heads=8)
        options = {"feature_map": "silu_l2", "scale": 1.0, "read_chunk": None}
        runs = [
            with_gradients(
                lambda *x: fast_weight_operator.fast_weight(*x, **options), tensors, [dtype] * 3 + [torch.float32] * 3
            )
            for _ in range(20)
        ]
        for run in runs[1:]:
            for name, x in runs[0].items():
                assert torch.equal(x, run[name]), name
