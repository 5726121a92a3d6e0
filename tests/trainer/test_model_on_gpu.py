"""A whole model on a card: every kernel in its place, against plain PyTorch on the same card."""

from pathlib import Path

import pytest
import torch
from hqlt_search_space.arch import Arch
from hqlt_search_space.study_file import load_study
from hqlt_trainer.model import Model, ModelState, build_model
from hqlt_trainer.precision import autocast
from torch import Tensor
from torch.nn import functional

pytestmark = [
    pytest.mark.gpu,
    # Triton's tutorial-level warnings of `torch.compile`, and what PyTorch itself does in no fixed order.
    pytest.mark.filterwarnings("ignore"),
]

N_TOKENS = 300
VOCABULARY = 50
STUDY = Path(__file__).parents[2] / "search_space/studies/paper_expressivity.yaml"
CELLS = load_study(STUDY).by_task()[0].cells()


def arch(short_conv: int | None) -> Arch:
    """The three blends, attention and the delta rule."""
    common = {"n_heads": 4, "short_conv": short_conv, "output_gate": short_conv is not None}
    hybrid = {**common, "kind": "hybrid", "rule": {"kind": "delta"}, "mixing": "dynamic_vector", "window": 64}
    blends = [{"kind": "synchronous"}, {"kind": "delayed_streaming", "delay_beta": False}, {"kind": "delayed_chunk"}]
    layers = [
        *({**hybrid, "blend": blend} for blend in blends),
        {**common, "kind": "attention", "window": None},
        {**common, "kind": "fast_weight", "rule": {"kind": "gated_delta"}},
    ]
    return Arch.model_validate({"d_model": 256, "mlp_inner": 512, "layers": layers})


def model(backend: str, short_conv: int | None = None) -> Model:
    return build_model(arch(short_conv), VOCABULARY, init_std=0.1, device="cuda", backend=backend)  # type: ignore[arg-type]


def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (2, N_TOKENS), generator=torch.Generator().manual_seed(0)).cuda()


def logits_and_gradients(model: Model, precision: str, inputs: Tensor | None = None) -> dict[str, Tensor]:
    inputs = tokens() if inputs is None else inputs
    with autocast(torch.device("cuda"), precision):
        logits = model(inputs)
    functional.cross_entropy(logits.float().flatten(0, 1), inputs.roll(-1, 1).flatten()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == truth.keys()
    return {name: ((found[name].double() - x.double()).norm() / x.double().norm()).item() for name, x in truth.items()}


@pytest.mark.parametrize("short_conv", [None, 4], ids=["plain", "convolution and gate"])
def test_logits_and_every_gradient_are_those_of_plain_pytorch(short_conv):
    torch.backends.cuda.matmul.allow_tf32 = False
    truth = logits_and_gradients(model("chunked", short_conv), "float32")
    ours = errors(logits_and_gradients(model("auto", short_conv), "float32"), truth)
    assert max(ours.values()) < 2e-5, ours
    narrow = errors(logits_and_gradients(model("auto", short_conv), "bfloat16"), truth)
    plain = errors(logits_and_gradients(model("chunked", short_conv), "bfloat16"), truth)
    wrong = {name: (error, plain[name]) for name, error in narrow.items() if not error < 2 * plain[name] + 1e-2}
    assert not wrong


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.label)
def test_the_papers_small_models_are_those_of_plain_pytorch(cell):
    def run(backend: str, precision: str) -> dict[str, Tensor]:
        small = build_model(cell.config.arch, VOCABULARY, init_std=0.1, device="cuda", backend=backend)  # type: ignore[arg-type]
        return logits_and_gradients(small, precision, tokens()[:, :40])

    torch.backends.cuda.matmul.allow_tf32 = False
    truth = run("chunked", "float32")
    ours, plain = errors(run("auto", "bfloat16"), truth), errors(run("chunked", "bfloat16"), truth)
    wrong = {name: (error, plain[name]) for name, error in ours.items() if not error < 2 * plain[name] + 1e-2}
    assert not wrong


@torch.no_grad()
def test_decoding_a_token_at_a_time_is_the_whole_sequence():
    decoder, state, steps = model("auto"), None, []
    for column in tokens()[:, :70].unbind(1):
        logits, state = decoder.step(column, state)
        assert isinstance(state, ModelState)
        steps.append(logits)
    whole = {"logits": decoder(tokens()[:, :70])}
    assert errors({"logits": torch.stack(steps, 1)}, whole)["logits"] < 1e-5


def test_torch_compile_sees_one_graph():
    compiled = model("auto")
    whole = torch.compile(compiled, fullgraph=True)
    with autocast(torch.device("cuda"), "bfloat16"):
        found = {"logits": whole(tokens()).detach()}
        eager = {"logits": compiled(tokens()).detach()}
    assert errors(found, eager)["logits"] < 2e-2


def test_the_same_step_twice_is_the_same_to_the_bit():
    first, second = (logits_and_gradients(model("triton"), "bfloat16") for _ in range(2))
    for name, x in first.items():
        if name != "embedding.weight":  # torch adds its rows up in no fixed order
            assert torch.equal(x, second[name]), name
