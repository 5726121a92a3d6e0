import pytest
import torch
from hqlt_kernels.blend import blend
from torch import Tensor
from triton_cases import CUDA, DEVICE, assert_as_good_as_torch, blend_operator, relative_error

# On a GPU the poisoned memory's switch warns of what PyTorch itself does in no fixed order.
pytestmark = pytest.mark.filterwarnings("ignore:.*deterministic")

NAMES = ("q", "k", "v", "beta", "log_decay", "gate")
TIMINGS = ("synchronous", "delayed_streaming", "delayed_chunk")


def inputs(*, dtype, head_dim=32, n_tokens=90, beta=True, decay=False, gate=True, batch=1) -> list[Tensor | None]:
    torch.manual_seed(0)
    shape = (batch, n_tokens, 2)
    q, k, v, g = (torch.randn(*shape, head_dim).to(dtype).double() for _ in range(4))
    strength = torch.rand(shape).double() if beta else None
    log_decay = -torch.rand(shape).double() * 0.3 if decay else None
    return [None if x is None else x.to(DEVICE) for x in (q, k, v, strength, log_decay, g if gate else None)]


def with_gradients(function, tensors: list[Tensor | None], dtypes: list[torch.dtype]) -> dict[str, Tensor]:
    leaves = [
        None if x is None else x.detach().to(d, copy=True).requires_grad_()
        for x, d in zip(tensors, dtypes, strict=True)
    ]
    outputs = {n: x for n, x in zip(("kv", "fw", "mixed"), function(*leaves), strict=True) if x is not None}
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in outputs.values()]
    torch.autograd.backward(list(outputs.values()), weights)
    named = [(n, x) for n, x in zip(NAMES, leaves, strict=True) if x is not None]
    gradients = {f"d{n}": torch.zeros_like(x) if x.grad is None else x.grad for n, x in named}
    return {**{n: x.detach() for n, x in outputs.items()}, **gradients}


def fused(*, fw_chunk=None, **options):
    """The operator as `blend` calls it on a CUDA device."""
    fw_chunk = options["window"] if fw_chunk is None else fw_chunk
    return lambda *x: blend_operator.blend(*x, fw_chunk=fw_chunk, **options)


def public(backend, **options):
    def run(q, k, v, beta, log_decay, gate):
        return blend(q, k, v, beta=beta, log_decay=log_decay, gate=gate, backend=backend, **options)[:3]

    return run


def check(*, dtype=torch.float32, timing, window=16, delay_beta=False, fw_chunk=None, **case) -> None:
    options = {"timing": timing, "window": window, "delay_beta": delay_beta, "kv_rope_base": 1e4}
    options |= {"feature_map": "silu_l2"} | ({} if fw_chunk is None else {"fw_chunk": fw_chunk})
    tensors = inputs(dtype=dtype, **case)
    stored = [dtype] * 3 + [torch.float32] * 2 + [dtype]
    truth = with_gradients(public("definition", **options), tensors, [torch.float64] * 6)
    same = with_gradients(public("chunked", **options), tensors, stored)
    ours = with_gradients(fused(**options), tensors, stored)
    assert_as_good_as_torch(ours, same, truth, factor=4.0)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("decay", [False, True], ids=["delta", "gated_delta"])
@pytest.mark.parametrize("timing", TIMINGS)
def test_one_operator_is_the_blend_and_all_its_gradients(timing, decay):
    check(timing=timing, decay=decay)


@pytest.mark.parametrize(
    "case",
    [
        {"timing": "delayed_streaming", "delay_beta": True, "decay": True},
        {"timing": "delayed_streaming", "window": 200},
        {"timing": "delayed_chunk", "window": 24, "fw_chunk": 48, "decay": True},
        {"timing": "synchronous", "window": None, "gate": False},
        {"timing": "synchronous", "beta": False},
    ],
    ids=["beta travels", "nothing leaves the window", "long chunks", "all keys, no gate", "additive"],
)
def test_options_of_the_blend(case):
    check(**case)


SHORT = [
    {"timing": "synchronous", "window": 8, "n_tokens": 40},
    {"timing": "synchronous", "window": None, "n_tokens": 64, "decay": True, "gate": False},
    {"timing": "synchronous", "window": 3, "n_tokens": 1, "beta": False, "features": "elu_plus_one"},
    {"timing": "delayed_streaming", "window": 8, "n_tokens": 40, "decay": True},
    {"timing": "delayed_streaming", "window": 1, "n_tokens": 15, "beta": False, "features": "elu_plus_one"},
    {"timing": "delayed_streaming", "window": 16, "n_tokens": 10, "gate": False},
    {"timing": "delayed_chunk", "window": 16, "n_tokens": 40, "decay": True},
    {"timing": "delayed_chunk", "window": 5, "fw_chunk": 10, "n_tokens": 33, "gate": False, "features": "relu_l2"},
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", SHORT, ids=lambda c: "-".join(map(str, c.values())))
def test_a_short_sequence_is_one_program_with_all_its_gradients(case):
    dtype, allowed = (torch.bfloat16, 3e-2) if CUDA else (torch.float16, 2.5e-3)  # of one token most: nothing averages
    options = {"timing": case["timing"], "window": case["window"], "delay_beta": False, "kv_rope_base": None}
    options |= {"feature_map": case.get("features", "silu_l2"), "fw_chunk": case.get("fw_chunk")}
    sizes = {name: case[name] for name in ("n_tokens", "beta", "decay", "gate") if name in case}
    tensors = inputs(dtype=dtype, **sizes)
    assert blend_operator._is_short(tensors[0].to(dtype), tensors[2].to(dtype), 0.0)
    truth = with_gradients(public("definition", **options), tensors, [torch.float64] * 6)
    ours = with_gradients(fused(**options), tensors, [dtype] * 3 + [torch.float32] * 2 + [dtype])
    errors = {name: relative_error(ours[name], exact) for name, exact in truth.items()}
    assert max(errors.values()) < allowed, errors


LINEAR = [
    {"timing": "synchronous", "window": 8, "n_tokens": 40},
    {"timing": "synchronous", "window": None, "n_tokens": 64, "head_dim": 64},
    {"timing": "delayed_streaming", "window": 8, "n_tokens": 40},
    {"timing": "delayed_streaming", "window": 40, "n_tokens": 15},  # nothing leaves the window
    {"timing": "delayed_chunk", "window": 8, "n_tokens": 63, "gate": False},
    {"timing": "delayed_chunk", "window": 16, "fw_chunk": 64, "n_tokens": 40},  # nothing is read
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.bfloat16] if CUDA else [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("normaliser", ["time", "heads"])
@pytest.mark.parametrize("case", LINEAR, ids=lambda c: "-".join(map(str, c.values())))
def test_a_normaliser_is_in_the_one_program_with_all_its_gradients(case, normaliser, dtype, monkeypatch):
    if dtype == torch.float32:  # is not one program by choice, but would be right
        monkeypatch.setattr(blend_operator, "is_short", lambda *_: True)
    options = {"timing": case["timing"], "window": case["window"], "fw_chunk": case.get("fw_chunk")}
    options |= {"normaliser": normaliser, "feature_map": "elu_plus_one", "delay_beta": False, "kv_rope_base": None}
    sizes = {name: case[name] for name in ("n_tokens", "head_dim", "gate") if name in case}
    tensors = inputs(dtype=dtype, beta=False, **sizes)
    stored = [dtype] * 6
    truth = with_gradients(public("definition", **options), tensors, [torch.float64] * 6)
    same = with_gradients(public("chunked", **options), tensors, stored)
    assert_as_good_as_torch(with_gradients(fused(**options), tensors, stored), same, truth, factor=2)


def test_of_one_token_linear_attention_with_a_normaliser_answers_its_value_whatever_the_query():
    dtype = torch.bfloat16 if CUDA else torch.float16
    tensors = inputs(dtype=dtype, beta=False, gate=False, n_tokens=1)
    run = fused(
        timing="synchronous", window=8, delay_beta=False, feature_map="elu_plus_one", kv_rope_base=None,
        normaliser="time",
    )  # fmt: skip
    found = with_gradients(run, tensors, [dtype] * 6)
    assert torch.equal(found["fw"], tensors[2].to(dtype))
    assert max(found["dq"].abs().max(), found["dk"].abs().max()) < 1e-2


@pytest.mark.parametrize(
    ("dtype", "n_tokens", "linear"),
    [
        (torch.float32, 90, {}),
        (torch.float16, 20, {}),
        (torch.float16, 20, {"normaliser": "heads", "feature_map": "elu_plus_one"}),
    ],
    ids=["scans", "short", "normaliser over heads"],
)
def test_replicas_under_vmap_are_one_call_each(dtype, n_tokens, linear):
    tensors = [x.to(dtype) for x in inputs(dtype=dtype, n_tokens=n_tokens, batch=3) if x is not None]
    stacked = [x.unsqueeze(1) for x in tensors]
    options = {"timing": "synchronous", "window": 8, "delay_beta": False, "kv_rope_base": None}
    run = fused(**options | {"feature_map": "silu_l2"} | linear)

    def mixed(q, k, v, beta, gate):
        return run(q, k, v, None if linear else beta, None, gate)[2]

    each = torch.stack([mixed(*(x[i] for x in stacked)) for i in range(3)])
    assert torch.equal(torch.vmap(mixed)(*stacked), each)


CONTRACT = ("test_schema", "test_autograd_registration", "test_faketensor")


def test_the_custom_operator_keeps_pytorchs_contract():
    q, k, v, beta, log_decay, gate = (
        x.float().requires_grad_() for x in inputs(dtype=torch.float32, decay=True, n_tokens=40)
    )
    arguments = (q, k, v, beta, log_decay, gate, 16, 1e4, False, 1, 0, 1.0, 0, 0, True)
    torch.library.opcheck(blend_operator.blend_forward, arguments, test_utils=CONTRACT)


def test_the_custom_operator_keeps_it_with_a_normaliser():
    q, k, v, gate = (
        x.half().requires_grad_() for x in inputs(dtype=torch.float16, n_tokens=20, beta=False) if x is not None
    )
    arguments = (q, k, v, None, None, gate, 16, 0.0, False, 2, 2, 1.0, 0, 0, True)
    torch.library.opcheck(blend_operator.blend_forward, arguments, test_utils=CONTRACT)


def test_the_operator_is_traced_into_one_graph():
    leaves = [x.float().requires_grad_() for x in inputs(dtype=torch.float32, decay=True, n_tokens=40)]
    run = fused(timing="delayed_streaming", window=8, delay_beta=True, feature_map="silu_l2", kv_rope_base=1e4)
    traced = torch.compile(lambda *x: run(*x)[2] * 2, backend="aot_eager", fullgraph=True)
    for x, y in zip(
        torch.autograd.grad(traced(*leaves).square().sum(), leaves),
        torch.autograd.grad((run(*leaves)[2] * 2).square().sum(), leaves),
        strict=True,
    ):
        assert torch.equal(x, y)


if CUDA:
    SMALL = {"head_dim": 128, "n_tokens": 200}

    def a_call(dtype=torch.bfloat16, timing="synchronous"):
        options = {"timing": timing, "window": 64, "feature_map": "silu_l2", "kv_rope_base": 1e4}
        tensors = [x for x in inputs(dtype=dtype, **SMALL) if x is not None]
        leaves = [x.to(torch.float32 if i == 3 else dtype).requires_grad_() for i, x in enumerate(tensors)]
        return leaves, lambda q, k, v, beta, gate: blend(q, k, v, beta=beta, gate=gate, **options).mixed

    def gradients(run, leaves: list[Tensor]) -> list[Tensor]:
        for x in leaves:
            x.grad = None
        run(*leaves).float().square().sum().backward()
        return [x.grad for x in leaves]

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
    @pytest.mark.parametrize("timing", TIMINGS)
    def test_blend_kernels_are_right_on_this_card(timing, dtype):
        options = {"timing": timing, "window": 64, "feature_map": "silu_l2", "kv_rope_base": 1e4}
        tensors = inputs(dtype=dtype, **SMALL)
        stored = [dtype] * 3 + [torch.float32] * 2 + [dtype]
        truth = with_gradients(public("definition", **options), tensors, [torch.float64] * 6)
        ours = with_gradients(public("triton", **options), tensors, stored)
        for name, exact in truth.items():
            assert relative_error(ours[name], exact) < (1e-2 if dtype == torch.bfloat16 else 2e-6), name

    @pytest.mark.gpu
    @pytest.mark.parametrize("timing", TIMINGS)
    def test_blend_compiles_in_one_graph(timing):
        leaves, run = a_call(timing=timing)
        compiled = torch.compile(run, fullgraph=True)
        for x, y in zip(gradients(compiled, leaves), gradients(run, leaves), strict=True):
            assert relative_error(x, y.double()) < 1e-2

    @pytest.mark.gpu
    def test_blend_is_captured_in_a_cuda_graph():
        leaves, run = a_call()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            eager = [x.clone() for x in gradients(run, leaves)]
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = gradients(run, leaves)
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(captured, eager, strict=True))

    @pytest.mark.gpu
    def test_blend_under_autocast_and_checkpointing_gives_the_same_gradients():
        leaves, run = a_call()
        plain = [x.clone() for x in gradients(run, leaves)]
        again = gradients(lambda *x: torch.utils.checkpoint.checkpoint(run, *x, use_reentrant=False), leaves)
        assert all(torch.equal(x, y) for x, y in zip(plain, again, strict=True))
        wide = [x.detach().float().requires_grad_() for x in leaves]
        with torch.autocast("cuda", torch.bfloat16):
            assert torch.equal(run(*wide).to(torch.bfloat16), run(*leaves))
