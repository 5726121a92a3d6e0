import pytest
import torch
from hqlt_kernels.rotary import rotate
from hqlt_kernels.window_attention import chunked, window_attention
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def make(length: int, cached: int = 0, batch: int = 2, heads: int = 2, key: int = 6, value: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length + cached)
    shapes = [(length, key), (length + cached, key), (length + cached, value)]
    return [
        torch.randn(batch, n, heads, width, generator=generator, dtype=torch.float64).requires_grad_()
        for n, width in shapes
    ]


def by_torch(q: Tensor, k: Tensor, v: Tensor, window, chunk_aligned=False, position=0, scale=None) -> Tensor:
    """torch's attention with the mask spelled out."""
    query = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None]
    key = torch.arange(k.shape[1])
    seen = key <= query
    if chunk_aligned:
        seen &= (position + key) // window == (position + query) // window
    elif window is not None:
        seen &= key > query - window
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale).transpose(1, 2)


def with_gradients(function, inputs: list[Tensor]) -> list[Tensor]:
    o = function(*inputs)
    weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(o.dtype)
    return [o.detach(), *torch.autograd.grad((o * weight).sum(), inputs)]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for name, a, b in zip(("o", "q", "k", "v"), found, expected, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", ["definition", "chunked"])
@pytest.mark.parametrize("window", [None, 1, 3, 16, 64, 300])
@pytest.mark.parametrize("length", [1, 15, 63, 65, 130])
def test_a_window_is_torchs_attention_under_a_mask(length, window, backend):
    inputs = make(length)
    found = with_gradients(lambda q, k, v: window_attention(q, k, v, window=window, backend=backend), inputs)
    assert_equal(found, with_gradients(lambda q, k, v: by_torch(q, k, v, window), inputs))


@pytest.mark.parametrize("backend", ["definition", "chunked"])
@pytest.mark.parametrize("position", [0, 5])
@pytest.mark.parametrize("window", [1, 4, 48, 100])
def test_chunk_aligned_queries_see_their_chunk_only(window, position, backend):
    inputs = make(130)
    options = {"window": window, "chunk_aligned": True, "position": position}
    found = with_gradients(lambda q, k, v: window_attention(q, k, v, backend=backend, **options), inputs)
    assert_equal(found, with_gradients(lambda q, k, v: by_torch(q, k, v, **options), inputs))


@settings(deadline=None, max_examples=60)
@given(
    length=st.integers(1, 100),
    cached=st.integers(0, 60),
    window=st.none() | st.integers(1, 120),
    chunk_aligned=st.booleans(),
    position=st.integers(0, 50),
    heads=st.integers(1, 3),
    key=st.integers(1, 5),
    value=st.integers(1, 5),
)
def test_any_shape_with_a_cache_in_front_is_torchs_attention(
    length, cached, window, chunk_aligned, position, heads, key, value
):
    inputs = make(length, cached, batch=1, heads=heads, key=key, value=value)
    options = {
        "window": window,
        "chunk_aligned": chunk_aligned and window is not None,
        "position": position,
        "scale": 0.7,
    }
    found = with_gradients(lambda q, k, v: window_attention(q, k, v, backend="chunked", **options), inputs)
    assert_equal(found, with_gradients(lambda q, k, v: by_torch(q, k, v, **options), inputs))


@pytest.mark.parametrize("backend", ["definition", "chunked"])
def test_rotation_inside_is_rotation_outside(backend):
    q, k, v = make(20, cached=9, key=8)
    found = window_attention(q, k, v, window=7, rope_base=100.0, position=3, backend=backend)
    torch.testing.assert_close(found, by_torch(rotate(q, 100.0, 12), rotate(k, 100.0, 3), v, 7))


def test_one_token_at_a_time_on_a_cache_is_the_whole():
    q, k, v = make(30, key=8)
    whole = window_attention(q, k, v, window=6, rope_base=1e4)
    for t in range(30):
        oldest = max(0, t - 5)
        keys, values = k[:, oldest : t + 1], v[:, oldest : t + 1]
        one = window_attention(q[:, t : t + 1], keys, values, window=6, rope_base=1e4, position=oldest)
        torch.testing.assert_close(one[:, 0], whole[:, t])


@pytest.mark.parametrize("window", [None, 5])
def test_weights_that_are_computed_again_give_the_same_gradients(window, monkeypatch):
    inputs = make(100)
    saved = with_gradients(lambda q, k, v: window_attention(q, k, v, window=window), inputs)
    monkeypatch.setattr(chunked, "LARGEST_SAVED", 0)
    assert_equal(with_gradients(lambda q, k, v: window_attention(q, k, v, window=window), inputs), saved)


@pytest.mark.parametrize("options", [{"window": 16}, {"window": None}, {"window": 16, "chunk_aligned": True}], ids=str)
def test_gradients_match_finite_differences(options):
    inputs = make(9, cached=2, batch=1, heads=1, key=2, value=2)
    assert torch.autograd.gradcheck(lambda q, k, v: window_attention(q, k, v, **options), inputs)


@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["soft", "nearly one-hot"])
@pytest.mark.parametrize("window", [None, 8, 64])
def test_in_float32_blocks_are_no_worse_than_torch(window, scale, assert_no_worse_than_torch):
    inputs = make(200)
    narrow = [x.detach().float().requires_grad_() for x in inputs]
    truth = with_gradients(
        lambda q, k, v: by_torch(q, k, v, window, scale=scale), [x.detach().double().requires_grad_() for x in narrow]
    )
    same = with_gradients(lambda q, k, v: by_torch(q, k, v, window, scale=scale), narrow)
    fast = with_gradients(lambda q, k, v: window_attention(q, k, v, window=window, scale=scale), narrow)
    for name, *results in zip(("o", "q", "k", "v"), fast, same, truth, strict=True):
        assert_no_worse_than_torch(*results, name=name)


@pytest.mark.parametrize("options", [{"window": 16}, {"window": None}, {"window": 16, "chunk_aligned": True}], ids=str)
def test_a_token_changes_nothing_before_it_and_nothing_out_of_its_window(options):
    q, k, v = (x.detach().float() for x in make(130))
    before = window_attention(q, k, v, **options)
    for x in (k, v):
        x[:, 70] = 3.0
    after = window_attention(q, k, v, **options)
    unchanged = (before == after).all(-1).all(-1).all(0)
    assert unchanged[:70].all()
    assert not unchanged[70]
    last_to_see = {"16": 86, "None": 130, "16-aligned": 80}[
        str(options["window"]) + "-aligned" * ("chunk_aligned" in options)
    ]
    assert unchanged[last_to_see:].all()
    assert not unchanged[70:last_to_see].any()


def test_sixteen_bit_inputs_are_computed_in_float32():
    inputs = [x.detach().bfloat16() for x in make(50)]
    o = window_attention(*inputs, window=8)
    assert o.dtype == torch.bfloat16
    torch.testing.assert_close(o.float(), by_torch(*(x.float() for x in inputs), 8), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("window", [None, 8])
def test_vmap_over_replicas_is_a_loop_over_replicas(window):
    replicas = [make(60, key=4) for _ in range(3)]
    stacked = [torch.stack(columns).detach().requires_grad_() for columns in zip(*replicas, strict=True)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return window_attention(q, k, v, window=window, rope_base=10.0)

    o = torch.func.vmap(attend)(*stacked)
    gradients = torch.autograd.grad(o.square().sum(), stacked)
    for i, inputs in enumerate(replicas):
        alone = attend(*inputs)
        torch.testing.assert_close(o[i], alone)
        for found, expected in zip(gradients, torch.autograd.grad(alone.square().sum(), inputs), strict=True):
            torch.testing.assert_close(found[i], expected)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"window": 0}, "window is 0; a query sees at least its own key"),
        ({"window": None, "chunk_aligned": True}, "chunk_aligned needs a window"),
        ({"k": torch.ones(1, 2, 2, 4), "v": torch.ones(1, 2, 2, 4)}, "3 queries for 2 keys"),
        ({"v": torch.ones(1, 4, 2, 4)}, "do not fit together"),
        ({"rope_base": 10.0, "q": torch.ones(1, 3, 2, 5), "k": torch.ones(1, 3, 2, 5)}, "an even width, got 5"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_a_mistake_is_answered_with_what_would_be_right(change, sentence):
    arguments = {name: torch.ones(1, 3, 2, 4) for name in "qkv"} | {"window": 2} | change
    with pytest.raises(ValueError, match=sentence):
        window_attention(**arguments)
