"""Metrics, knock-outs and gates against what they say they are."""

import math

import pytest
import torch
from hqlt_search_space.arch import Arch
from hqlt_search_space.mixers import Attention, Hybrid, Mixer
from hqlt_search_space.tasks import LanguageModelling, Parity, Task
from hqlt_trainer.evaluation import EvaluationData, evaluate, knock_outs, mean_gates, scored_logits
from hqlt_trainer.mixers import HybridLayer
from hqlt_trainer.model import Model, build_model
from hqlt_trainer.tasks import build_task

PARITY = Parity(
    train_length={"low": 3, "high": 10},
    test_length={"low": 5, "high": 30},
    n_validation=40,
    n_test=50,  # type: ignore[arg-type]
)


def _data(task: Task = PARITY, context: int = 30) -> EvaluationData:
    return EvaluationData(build_task(task), "validation", context, "cpu")


def _model(*mixers: Mixer, vocab: int = 3) -> Model:
    return build_model(Arch(d_model=8, mlp_inner=8, layers=mixers), vocab, init_std=0.5, seed=4)


def test_metrics_are_means_over_the_scored_positions() -> None:
    model, data = _model(Hybrid(n_heads=2, window=4)), _data()
    losses, right, lengths = [], [], []
    for batch in build_task(PARITY).evaluation_batches("validation", 1, "cpu"):
        place = int(batch.lengths[0]) - 1
        logits = model(batch.inputs)[0, place].double()
        target = int(batch.targets[0, place])
        losses.append(-torch.log_softmax(logits, 0)[target].item())
        right.append(int(logits.argmax()) == target)
        lengths.append(place + 1)
    metrics = evaluate(model, data, "float32")
    accuracy = sum(right) / len(right)
    assert metrics["validation_loss_nats"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert metrics["validation_accuracy"] == accuracy
    assert metrics["normalised_validation_accuracy"] == pytest.approx(2 * accuracy - 1)
    for bucket in data.buckets:
        inside = [ok for ok, length in zip(right, lengths, strict=True) if bucket.low <= length <= bucket.high]
        assert metrics[f"validation_accuracy_{bucket.label}"] == pytest.approx(sum(inside) / len(inside))


def test_language_is_scored_in_bits_per_byte(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(60):
        (folder / f"{i}.txt").write_text(f"file {i}: " + "the same words again and again. " * 8)
    task = LanguageModelling(corpus=str(folder), context=16, n_validation_bytes=500, n_test_bytes=500)
    model = _model(Attention(n_heads=2), vocab=257)
    torch.nn.init.zeros_(model.head.weight)  # every byte equally likely
    data = _data(task, 16)
    metrics = evaluate(model, data, "float32")
    targets = [target for batch in data.batches for target in batch.targets.flatten().tolist() if target >= 0]
    n_bytes = sum(target < 256 for target in targets)
    assert n_bytes < len(targets)  # the mark of a document is told as well, but is no byte
    assert metrics["validation_bits_per_byte"] == pytest.approx(math.log2(257) * len(targets) / n_bytes, rel=1e-6)
    assert "validation_accuracy" not in metrics


def test_scored_logits_are_the_models_logits_where_there_is_a_target() -> None:
    model = _model(Hybrid(n_heads=2, window=4), Hybrid(n_heads=2, window=4))
    inputs = torch.randint(3, (2, 6))
    targets = torch.tensor([[-1, 2, -1, -1, 0, -1], [1, -1, -1, -1, -1, -1]])
    logits, scored = scored_logits(model, inputs, targets)
    assert scored.tolist() == [2, 0, 1]
    torch.testing.assert_close(logits, model(inputs)[targets >= 0])


def test_knock_outs_tell_which_memory_a_model_relies_on() -> None:
    model, data = _model(Hybrid(n_heads=2, window=4, mixing="static_scalar")), _data()
    layer = model.mixers[0]
    assert isinstance(layer, HybridLayer)
    with torch.no_grad():
        layer.mixing_scalars.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))  # KV-memory only
    with_both = evaluate(model, data, "float32")
    kv, fw = knock_outs(model, data, "float32")
    assert (kv.silenced, fw.silenced) == ("kv", "fw")
    assert fw.metrics == with_both
    assert kv.metrics != with_both
    assert evaluate(model, data, "float32") == with_both


def test_a_model_without_hybrid_layers_has_no_knock_outs_and_no_gates() -> None:
    model, data = _model(Attention(n_heads=2)), _data()
    assert knock_outs(model, data, "float32") == ()
    assert mean_gates(model, data, "float32") == ()


def test_mean_gates_are_the_factors_of_each_learned_mixing() -> None:
    mixings = ("static_scalar", "dynamic_scalar", "dynamic_vector", "separate_vector", "sum")
    model = _model(*(Hybrid(n_heads=2, window=4, mixing=mixing) for mixing in mixings))
    static = model.mixers[0]
    assert isinstance(static, HybridLayer)
    with torch.no_grad():
        static.mixing_scalars.copy_(torch.tensor([[0.5, 0.7], [2.0, 4.0]]))
        for layer in model.mixers[1:]:
            layer.in_proj.weight.zero_()  # every sigmoid at its middle
    gates = mean_gates(model, _data(), "float32")
    assert [gate.layer for gate in gates] == [0, 1, 2, 3]
    assert [(gate.kv, gate.fw) for gate in gates] == [
        pytest.approx(pair, rel=1e-6) for pair in ((0.6, 3.0), (0.5, 0.5), (0.5, 0.5), (0.5, 0.5))
    ]


def test_convex_gates_add_up_to_one_and_ignore_padding() -> None:
    model = _model(Hybrid(n_heads=2, window=4))
    (gate,) = mean_gates(model, _data(), "float32")
    assert gate.kv + gate.fw == pytest.approx(1)
    layer = model.mixers[0]
    total, tokens = 0.0, 0
    for batch in build_task(PARITY).evaluation_batches("validation", 1, "cpu"):
        hidden = model.blocks[0].mixer_norm(model.embedding(batch.inputs))  # type: ignore[operator, union-attr]
        logits = (hidden @ layer.in_proj.weight.T).split(layer.widths, -1)[5]
        total += torch.sigmoid(logits).mean(-1).sum().item()
        tokens += batch.inputs.numel()
    assert gate.fw == pytest.approx(total / tokens, rel=1e-5)
