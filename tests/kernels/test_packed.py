import pytest
import torch
from hqlt_kernels.fast_weight import fast_weight
from hqlt_kernels.packed import Packed
from hqlt_kernels.window_attention import window_attention
from hypothesis import given
from hypothesis import strategies as st

LENGTHS = [5, 0, 1, 17]
BORDERS = torch.tensor([0, 5, 5, 6, 23])


def sequences(*tensors):
    """The packed tensors, sequence by sequence."""
    return zip(*(x.split(LENGTHS, 1) for x in tensors), strict=True)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any))
def test_padding_and_packing_give_back_what_was_packed(lengths):
    borders = torch.tensor([0, *lengths]).cumsum(0)
    x = torch.randn(1, sum(lengths), 2)
    layout = Packed.of(borders, sum(lengths), None)
    padded = layout.padded(x)
    assert torch.equal(layout.packed(padded), x)
    for row, length, part in zip(padded, lengths, x[0].split(lengths), strict=True):
        assert torch.equal(row[:length], part)
        assert not row[length:].any()


@pytest.mark.parametrize("feature_map", ["silu_l2", "elu_plus_one"])
def test_packed_fast_weights_are_those_of_each_sequence(feature_map):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 23, 2, 4, dtype=torch.float64).requires_grad_() for _ in range(3))
    beta = torch.rand(1, 23, 2, dtype=torch.float64) if feature_map == "silu_l2" else None
    log_decay = -torch.rand(1, 23, 2, dtype=torch.float64)
    state = torch.randn(4, 2, 4, 4, dtype=torch.float64)
    options = {"feature_map": feature_map, "read_chunk": 3}
    o, final = fast_weight(q, k, v, beta=beta, log_decay=log_decay, initial_state=state, cu_seqlens=BORDERS, **options)
    gradients = torch.autograd.grad((o.square().sum() + final.square().sum()), (q, k, v))
    parts = []
    strengths = (torch.zeros_like(log_decay) if beta is None else beta,)
    for i, (qs, ks, vs, gs, bs) in enumerate(sequences(q, k, v, log_decay, *strengths)):
        one = {"log_decay": gs, "initial_state": state[i : i + 1], "beta": None if beta is None else bs}
        parts.append(fast_weight(qs, ks, vs, **one, **options))
    each = torch.cat([p[0] for p in parts], 1)
    torch.testing.assert_close(o, each)
    torch.testing.assert_close(final, torch.cat([p[1] for p in parts]))
    total = each.square().sum() + sum(p[1].square().sum() for p in parts)
    torch.testing.assert_close(gradients, torch.autograd.grad(total, (q, k, v)))


def test_packed_attention_sees_its_own_sequence_only():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 23, 2, 4, dtype=torch.float64) for _ in range(3))
    options = {"window": 3, "rope_base": 1e4}
    o = window_attention(q, k, v, cu_seqlens=BORDERS, longest=17, **options)
    each = [window_attention(*part, **options) for part in sequences(q, k, v) if part[0].shape[1]]
    torch.testing.assert_close(o, torch.cat(each, 1))


def test_borders_that_are_none_are_refused():
    x = torch.randn(1, 4, 1, 4)
    with pytest.raises(ValueError, match="borders of sequences"):
        fast_weight(x, x, x, cu_seqlens=torch.tensor([4]))
    with pytest.raises(ValueError, match="batch of 1"):
        window_attention(*(x.expand(2, -1, -1, -1) for _ in range(3)), window=2, cu_seqlens=BORDERS)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", ["additive", "delta", "gated_delta"])
def test_packed_sequences_on_this_card_are_those_of_each_alone(rule, dtype):
    torch.manual_seed(0)
    lengths = [130, 1, 64, 63, 65, 0, 200]
    borders = torch.tensor([0, *lengths]).cumsum(0).cuda()
    total = sum(lengths)
    q, k, v = (torch.randn(1, total, 2, 64, device="cuda", dtype=dtype).requires_grad_() for _ in range(3))
    beta = 2 * torch.rand(1, total, 2, device="cuda") if "delta" in rule else None
    log_decay = -torch.rand(1, total, 2, device="cuda") if rule == "gated_delta" else None
    state = torch.randn(len(lengths), 2, 64, 64, device="cuda")

    def loss(o, final, attended):
        return o.float().square().sum() + final.square().sum() + attended.float().square().sum()

    options = {"feature_map": "silu_l2"}
    o, final = fast_weight(q, k, v, beta=beta, log_decay=log_decay, initial_state=state, cu_seqlens=borders, **options)
    attended = window_attention(q, k, v, window=50, rope_base=1e4, cu_seqlens=borders)
    gradients = torch.autograd.grad(loss(o, final, attended), (q, k, v))
    outputs, finals, alone = [], [], []
    for i, (start, end) in enumerate(zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True)):
        part = [None if x is None else x[:, start:end] for x in (q, k, v, beta, log_decay)]
        one = dict(zip(("beta", "log_decay"), part[3:], strict=True))
        each, after = fast_weight(*part[:3], **one, initial_state=state[i : i + 1], **options)
        outputs.append(each)
        finals.append(after)
        if end > start:
            alone.append(window_attention(*part[:3], window=50, rope_base=1e4))
    together = torch.cat(outputs, 1), torch.cat(finals), torch.cat(alone, 1)
    expected = torch.autograd.grad(loss(*together), (q, k, v))
    allowed = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for found, truth in zip((o, final, attended, *gradients), (*together, *expected), strict=True):
        assert ((found - truth).norm() / truth.norm()).item() < allowed
