import pytest
import torch
from hqlt_kernels.packed import first_tokens
from hqlt_kernels.rotary import rotate
from hqlt_kernels.window_attention import definition
from torch import Tensor
from triton_cases import CUDA, DEVICE, assert_as_good_as_torch, pairwise, window_operator

# On a GPU the poisoned memory's switch warns of what PyTorch itself does in no fixed order.
pytestmark = pytest.mark.filterwarnings("ignore:.*deterministic")

FACTOR = {torch.float32: 4.0, torch.bfloat16: 2.0, torch.float16: 2.0}


def with_gradients(function, tensors: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in tensors]
    o = function(*leaves)
    weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    o.backward(weights.to(tensors[0].dtype).to(o))
    return {"o": o.detach(), **{f"d{n}": x.grad for n, x in zip("qkv", leaves, strict=True)}}


def masked_at(dtype: torch.dtype, *, window, rope_base, chunk_aligned, position, scale):
    """Attention with a mask of all pairs, products in `dtype`, rotation and softmax in float32."""

    def run(q, k, v):
        n_queries, n_keys = q.shape[1], k.shape[1]
        if rope_base is not None:
            q = rotate(q.float(), rope_base, position + n_keys - n_queries)
            k = rotate(k.float(), rope_base, position)
        q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
        query = torch.arange(n_keys - n_queries, n_keys, device=q.device)[:, None]
        key = torch.arange(n_keys, device=q.device)[None, :]
        seen = key <= query
        if window is not None:
            seen &= key >= (query - (position + query) % window if chunk_aligned else query - window + 1)
        scores = (q @ k.mT).float() * scale
        p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return (p.to(dtype) @ v).transpose(1, 2)

    return run


def check(
    *, dtype, head_dim, n_tokens, window, rope_base=1e4, chunk_aligned=False, position=0, n_keys=None, n_heads=2
) -> None:
    torch.manual_seed(n_tokens)
    n_keys = n_tokens if n_keys is None else n_keys
    tensors = [torch.randn(1, n, n_heads, head_dim).to(DEVICE).to(dtype).double() for n in (n_tokens, n_keys, n_keys)]
    options = {"window": window, "chunk_aligned": chunk_aligned, "position": position, "scale": head_dim**-0.5}

    def exact(q, k, v):
        if rope_base is not None:
            q, k = rotate(q, rope_base, position + n_keys - n_tokens), rotate(k, rope_base, position)
        return definition.window_attention(q, k, v, **options)

    truth = with_gradients(exact, tensors, torch.float64)
    same = with_gradients(masked_at(dtype, rope_base=rope_base, **options), tensors, dtype)
    ours = with_gradients(
        lambda *x: window_operator.window_attention(*x, rope_base=rope_base, **options), tensors, dtype
    )
    assert_as_good_as_torch(ours, same, truth, factor=FACTOR[dtype])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("window", [2, 16, 33, 80, None])
def test_window_kernels_are_as_good_as_torch(window, dtype):
    check(dtype=dtype, head_dim=32, n_tokens=100, window=window)


def test_a_window_of_one_key_is_its_value():
    q, k, v = (torch.randn(1, 40, 2, 32, device=DEVICE) for _ in range(3))
    o = window_operator.window_attention(q, k, v, window=1, rope_base=1e4, chunk_aligned=False, position=0, scale=1.0)
    torch.testing.assert_close(o, v, rtol=1e-6, atol=1e-7)  # a GPU multiplies float32 in three tf32 parts


@pytest.mark.parametrize(("window", "position"), [(16, 0), (16, 5), (50, 7), (300, 30)])
def test_windows_that_start_at_chunks(window, position):
    check(
        dtype=torch.float32, head_dim=32, n_tokens=90, window=window, chunk_aligned=True, position=position,
        rope_base=None,
    )  # fmt: skip


@pytest.mark.parametrize(("n_tokens", "n_keys", "window"), [(1, 77, None), (5, 40, 20), (65, 70, 300)])
def test_queries_behind_a_cache_of_keys(n_tokens, n_keys, window):
    check(dtype=torch.float32, head_dim=32, n_tokens=n_tokens, n_keys=n_keys, window=window, position=3)


@pytest.mark.parametrize("chunk_aligned", [False, True])
def test_packed_sequences_of_a_near_window_are_those_of_each_alone(chunk_aligned):
    torch.manual_seed(0)
    lengths = [40, 1, 0, 31, 32, 33]
    starts = first_tokens(torch.tensor([0, *lengths]).cumsum(0).to(DEVICE), sum(lengths)).unsqueeze(0)
    q, k, v = (torch.randn(1, sum(lengths), 2, 32, device=DEVICE) for _ in range(3))
    options = {"window": 20, "rope_base": 1e4, "chunk_aligned": chunk_aligned, "position": 7, "scale": 0.2}

    def each_alone(*packed):
        parts = zip(*(x.split(lengths, 1) for x in packed), strict=True)
        return torch.cat([window_operator.window_attention(*x, **options) for x in parts if x[0].shape[1]], 1)

    found = with_gradients(
        lambda *x: window_operator.window_attention(*x, starts=starts, **options), [q, k, v], torch.float32
    )
    for name, x in with_gradients(each_alone, [q, k, v], torch.float32).items():
        torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-5)


def test_all_keys_of_a_long_sequence_in_16_bits():
    """There PyTorch's flash attention takes over, between our rotations."""
    dtype = torch.bfloat16 if CUDA else torch.float16
    check(dtype=dtype, head_dim=32, n_tokens=270, window=None)
    check(dtype=dtype, head_dim=32, n_tokens=260, window=300, rope_base=None)


def test_turning_at_many_positions_asks_for_few_tables():
    x = torch.randn(1, 2, 1, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    before = window_operator._table.cache_info().misses
    for position in range(0, 500, 25):
        y = window_operator.turn(x, 100.0, position, False)
        torch.testing.assert_close(y, rotate(x, 100.0, position), rtol=1e-5, atol=1e-5)
    assert window_operator._table.cache_info().misses - before <= 2


def test_changing_a_token_leaves_earlier_outputs_bit_identical():
    torch.manual_seed(0)
    options = {"window": 20, "rope_base": 1e4, "chunk_aligned": False, "position": 0, "scale": 1.0}
    q, k, v = (torch.randn(1, 70, 2, 32, device=DEVICE) for _ in range(3))
    before = window_operator.window_attention(q, k, v, **options)
    for x in (q, k, v):
        x[:, 45] += 0.5
    after = window_operator.window_attention(q, k, v, **options)
    assert torch.equal(before[:, :45], after[:, :45])
    assert torch.equal(before[:, 65:], after[:, 65:]), "a token is seen outside its window"
    assert not torch.equal(before[:, 45:65], after[:, 45:65])


@pytest.mark.parametrize("window", [16, 80])
def test_the_custom_operator_keeps_pytorchs_contract(window):
    q, k, v = (torch.randn(1, 40, 2, 32, device=DEVICE, requires_grad=True) for _ in range(3))
    torch.library.opcheck(
        window_operator.window_forward,
        (q, k, v, None, window, 1e4, False, 0, 1.0, True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


if CUDA:
    SETTINGS = list(
        pairwise(
            {
                "window": (1, 16, 50, 64, 128, 1024, None),
                "n_tokens": (1, 15, 63, 64, 65, 100, 1000, 4096),
                "dtype": (torch.bfloat16, torch.float32),
                "head_dim": (128, 64, 32),
                "rope_base": (1e4, None),
            }
        )
    )

    @pytest.mark.gpu
    @pytest.mark.usefixtures("poisoned_memory")
    @pytest.mark.parametrize(
        "case", SETTINGS, ids=lambda c: "-".join(str(x).removeprefix("torch.") for x in c.values())
    )
    def test_window_kernels_are_as_good_as_torch_on_this_card(case):
        check(**case)

    @pytest.mark.gpu
    @pytest.mark.parametrize(
        "window", [64, 128, 1000]
    )  # all keys are PyTorch's flash attention, whose dq has no fixed order
    @pytest.mark.parametrize("head_dim", [32, 64, 128])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
    def test_window_launches_repeat_bit_by_bit(dtype, head_dim, window):
        """Twenty runs: a race between registers and the tensor core shows as a run that differs."""
        torch.manual_seed(0)
        tensors = [torch.randn(4, 1024, 8, head_dim, device=DEVICE, dtype=dtype) for _ in range(3)]
        options = {"window": window, "rope_base": 1e4, "chunk_aligned": False, "position": 0, "scale": 0.1}
        runs = [
            with_gradients(lambda *x: window_operator.window_attention(*x, **options), tensors, dtype)
            for _ in range(20)
        ]
        for run in runs[1:]:
            for name, x in runs[0].items():
                assert torch.equal(x, run[name]), name
