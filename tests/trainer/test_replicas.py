"""Replicas that train together: each is what it would be alone, and none notices another."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hqlt_search_space.arch import Arch
from hqlt_search_space.errors import TrialPausedError
from hqlt_search_space.recipe import Recipe
from hqlt_search_space.tasks import ModularArithmetic, Mqar, Parity, Task
from hqlt_search_space.trial import ReplicaResult, Runtime, Trial, TrialResult
from hqlt_trainer import replicas
from hqlt_trainer import stacking as rule
from hqlt_trainer.environment import reproducible
from hqlt_trainer.model import Model, build_model
from hqlt_trainer.optimiser import optimiser_tensors
from hqlt_trainer.replicas import MAX_BAD_STEPS, Stack, StepData, feed, step_data, step_data_of_rows
from hqlt_trainer.run import run_trial
from hqlt_trainer.stacking import stacking
from hqlt_trainer.tasks import build_task
from hqlt_trainer.tasks.batch import Batch, TaskData
from pydantic import TypeAdapter

CPU = torch.device("cpu")
PARITY: dict[str, Any] = {
    "kind": "parity",
    "train_length": {"low": 3, "high": 9},
    "test_length": {"low": 8, "high": 12},
    "n_validation": 32,
    "n_test": 32,
}
HYBRID: dict[str, Any] = {"kind": "hybrid", "n_heads": 2, "window": 4, "short_conv": 3, "output_gate": True}
LAYERS: dict[str, list[dict[str, Any]]] = {
    "hybrid": [HYBRID, {"kind": "attention", "n_heads": 2, "short_conv": 3}],
    "gated": [
        {**HYBRID, "rule": {"kind": "gated_delta"}, "blend": {"kind": "delayed_streaming"}, "mixing": "static_scalar"},
        {**HYBRID, "rule": {"kind": "decay"}, "mixing": "dynamic_scalar", "branch_norm": True},
    ],
    "products": [
        {"kind": "fast_weight", "n_heads": 2, "rule": {"kind": "delta_product", "n_householder": 2}},
        {**HYBRID, "blend": {"kind": "delayed_chunk"}, "mixing": "concat"},
    ],
    "additive": [
        {"kind": "fast_weight", "n_heads": 2, "rule": {"kind": "additive", "normaliser": "time"}},
        {**HYBRID, "mixing": "separate_vector"},
    ],
}
NAMES_OF_TIME = {"tokens_per_second", "train_seconds", "wall_seconds", "peak_memory_bytes", "checkpoint"}


def _arch(layers: str = "hybrid") -> Arch:
    return Arch.model_validate({"d_model": 8, "mlp_inner": 8, "layers": LAYERS[layers]})


def _recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate({"steps": 20, "batch": 4, "learning_rate": 0.01, "warmup_fraction": 0, **changes})


def _models(arch: Arch, count: int, vocab_size: int = 3) -> list[Model]:
    return [build_model(arch, vocab_size, seed=seed, init_std=0.5).double() for seed in range(count)]


def _data(task_data: TaskData, step: int, seeds: list[int], recipe: Recipe) -> StepData:
    return step_data([task_data.train_batch(step, recipe.batch, seed, "cpu") for seed in seeds], recipe.accumulation)


def _weights(model: Model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("task", [Parity.model_validate(PARITY), Mqar(length=16, n_pairs=2, vocab_size=16)])
@pytest.mark.parametrize("layers", LAYERS)
def test_a_replica_in_a_stack_has_the_weights_it_gets_alone(layers: str, task: Parity | Mqar) -> None:
    task_data = build_task(task)
    recipes = [_recipe(clip=0.5, accumulation=2, learning_rate=rate) for rate in (0.01, 0.003, 0.02)]
    together = Stack(_models(_arch(layers), 3, task_data.vocab_size), recipes, CPU)
    alone = [
        Stack([model], [recipe], CPU)
        for model, recipe in zip(_models(_arch(layers), 3, task_data.vocab_size), recipes, strict=True)
    ]
    for step in range(4):
        together.take_step(step, _data(task_data, step, [0, 1, 2], recipes[0]))
        for seed, stack in enumerate(alone):
            stack.take_step(step, _data(task_data, step, [seed], recipes[0]))
    for i, stack in enumerate(alone):
        weights = _weights(together.members[i])
        for name, expected in _weights(stack.model).items():
            assert (weights[name] - expected).norm() <= 1e-12 * expected.norm(), name
        assert together.tallies()[i].loss_sum == pytest.approx(stack.tallies()[0].loss_sum, rel=1e-12)
        lengths = [task_data.train_batch(step, recipes[0].batch, i, "cpu").lengths for step in range(4)]
        assert together.tallies()[i].tokens == stack.tallies()[0].tokens == int(torch.cat(lengths).sum())


@pytest.mark.parametrize("how", ["leaves", "diverges"])
def test_the_others_do_not_notice_who_leaves_the_stack(how: str) -> None:
    task_data, recipe = build_task(Parity.model_validate(PARITY)), _recipe(clip=1.0)
    complete, other = (Stack(_models(_arch(), 3), [recipe] * 3, CPU) for _ in range(2))
    for step in range(MAX_BAD_STEPS + 5):
        data = _data(task_data, step, [0, 1, 2], recipe)
        if step == 2 and how == "leaves":
            other.leave(1)
            last = _weights(other.members[1])
        if step == 2 and how == "diverges":
            with torch.no_grad():
                other.members[1].norm.weight[0] = torch.nan
            last = _weights(other.members[1])
        complete.take_step(step, data)
        other.take_step(step, data)
    for i in (0, 2):
        expected = _weights(complete.members[i])
        assert all(torch.equal(weight, expected[name]) for name, weight in _weights(other.members[i]).items())
    assert [t for i, t in enumerate(complete.tallies()) if i != 1] == [
        t for i, t in enumerate(other.tallies()) if i != 1
    ]
    now = _weights(other.members[1])
    assert all(torch.equal(weight, now[name]) or name == "norm.weight" for name, weight in last.items())
    left = other.tallies()[1]
    assert left.has_diverged == (how == "diverges")
    assert left.steps == (2 if how == "leaves" else 2 + MAX_BAD_STEPS + 1)


@pytest.mark.parametrize("count", [1, 2])
def test_a_skipped_step_changes_neither_weights_nor_moments(count: int) -> None:
    recipe = _recipe(clip=1.0)
    stack = Stack(_models(_arch(), count), [recipe] * count, CPU)
    batch = Batch(torch.ones(2, 4, dtype=torch.long), torch.tensor([[-1, -1, -1, 1]] * 2), torch.tensor([4, 4]))
    data = step_data([batch] * count, 1)
    stack.take_step(0, data)
    member, optimiser = stack.members[-1], stack.optimisers[-1]
    with torch.no_grad():
        member.norm.weight[0] = torch.inf
    moments = {name: tensor.clone() for name, tensor in optimiser_tensors(member, optimiser).items()}
    weights = _weights(member)
    stack.take_step(1, data)
    tally = stack.tallies()[-1]
    assert (tally.skipped, tally.bad_in_a_row, tally.loss_count, tally.steps) == (1, 1, 1, 2)
    assert moments.keys()
    assert all(torch.equal(moments[name], now) for name, now in optimiser_tensors(member, optimiser).items())
    assert all(torch.equal(weights[name], now) for name, now in _weights(member).items())


@pytest.mark.parametrize("count", [1, 3])
def test_a_joint_update_is_that_of_each_replicas_own_optimiser(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    task_data = build_task(Parity.model_validate(PARITY))
    recipes = [_recipe(clip=0.5, learning_rate=rate) for rate in (0.01, 0.003, 0.02)][:count]
    stacks = [Stack(_models(_arch(), count), recipes, CPU)]
    monkeypatch.setattr(replicas, "updates_jointly", lambda stack, device: True)
    stacks.append(Stack(_models(_arch(), count), recipes, CPU))
    for step in range(6):
        for stack in stacks:
            if step == 2 and count == 3:
                stack.leave(1)
            head = stack.members[0].head.weight
            kept = head.detach().clone()
            if step == 3:  # a step that the first replica skips
                head.data[0, 0] = torch.nan
            stack.take_step(step, _data(task_data, step, list(range(count)), recipes[0]))
            if step == 3:
                head.data.copy_(kept)
    own, joint = stacks
    assert joint._joint is not None
    assert [tally.skipped for tally in joint.tallies()] == [1, 0, 0][:count]
    assert [(t.steps, t.skipped) for t in joint.tallies()] == [(t.steps, t.skipped) for t in own.tallies()]
    for member, other in zip(own.members, joint.members, strict=True):
        for name, weight in _weights(member).items():
            torch.testing.assert_close(_weights(other)[name], weight, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("task", [Parity.model_validate(PARITY), ModularArithmetic()], ids=["parity", "arithmetic"])
@pytest.mark.parametrize(("batch", "accumulation"), [(6, 1), (6, 3), (6, 4)])
def test_a_step_that_makes_its_data_has_those_made_for_its_seeds_beforehand(
    task: Parity | ModularArithmetic, batch: int, accumulation: int
) -> None:
    task_data, seeds = build_task(task), [3, 0, 7]
    source = task_data.row_source(seeds, batch, 5, "cpu")
    assert not isinstance(source, str)
    for step in (5, 6, 7):
        made = step_data_of_rows(source(), accumulation)
        expected = step_data([task_data.train_batch(step, batch, seed, "cpu") for seed in seeds], accumulation)
        assert all(torch.equal(a, b) for a, b in zip(made.tensors, expected.tensors, strict=True))


@pytest.mark.parametrize("task", [Mqar(), ModularArithmetic(brackets=True)], ids=["mqar", "brackets"])
def test_data_that_a_step_cannot_make_come_with_the_reason(task: Mqar | ModularArithmetic) -> None:
    task_data = build_task(task)
    with feed(task_data, _recipe(), [1, 2], 18, "cpu") as (data, why):
        assert why == task_data.row_source([1, 2], 4, 18, "cpu")
        for step, found in enumerate(data, start=18):
            expected = _data(task_data, step, [1, 2], _recipe())
            assert isinstance(found, StepData)
            assert all(torch.equal(a, b) for a, b in zip(found.tensors, expected.tensors, strict=True))
    assert step == 19


def test_micro_batches_make_the_same_step_as_the_whole_batch() -> None:
    task_data = build_task(Parity.model_validate(PARITY))
    weights = []
    for accumulation in (1, 4):
        recipe = _recipe(accumulation=accumulation, clip=0.1, batch=8)
        stack = Stack(_models(_arch(), 2), [recipe] * 2, CPU)
        for step in range(5):
            stack.take_step(step, _data(task_data, step, [0, 1], recipe))
        weights.append(_weights(stack.members[1]))
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-9, atol=1e-12)


def _trial(**changes: Any) -> Trial:
    recipe = {"steps": 12, "batch": 4, "learning_rate": 0.01, **changes.pop("recipe", {})}
    arch = {"d_model": 8, "mlp_inner": 8, "layers": LAYERS["hybrid"]}
    return Trial.model_validate(
        {"config": {"arch": arch, "recipe": recipe, "task": PARITY}, "seeds": (0, 1, 2), "rungs": (4, 8), **changes}
    )


def _what_a_rerun_repeats(replica: ReplicaResult) -> dict[str, Any]:
    return replica.model_dump(exclude=NAMES_OF_TIME)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> TrialResult:
    return run_trial(_trial(), tmp_path_factory.mktemp("unbroken"))


def test_seeds_train_in_a_stack_and_the_result_says_so(unbroken: TrialResult) -> None:
    assert unbroken.notes == ("seeds trained in stacks of 3: 4 x 9 x 8 values each on cpu",)
    assert [replica.seed for replica in unbroken.replicas] == [0, 1, 2]
    assert len({replica.weights_sha256 for replica in unbroken.replicas}) == 3
    assert all(len(replica.curve) == 12 for replica in unbroken.replicas)


def test_the_curves_are_those_of_seeds_that_train_alone(unbroken: TrialResult, tmp_path: Path) -> None:
    alone = run_trial(_trial(seeds=(1,)), tmp_path).replicas[0]
    for point, expected in zip(unbroken.replicas[1].curve, alone.curve, strict=True):
        assert point.step == expected.step
        assert point.metrics == pytest.approx(expected.metrics, rel=1e-4)
    assert unbroken.replicas[1].metrics == pytest.approx(alone.metrics, rel=1e-4)


@pytest.mark.parametrize("step", [0, 4, 7, 11])
def test_a_stack_paused_anywhere_ends_as_the_unbroken_one(step: int, unbroken: TrialResult, tmp_path: Path) -> None:
    polls = iter(range(100))
    with pytest.raises(TrialPausedError, match=f"paused at step {step} "):
        run_trial(_trial(), tmp_path, cancelled=lambda: next(polls) == step)
    resumed = run_trial(_trial(), tmp_path)
    for replica, expected in zip(resumed.replicas, unbroken.replicas, strict=True):
        assert _what_a_rerun_repeats(replica) == _what_a_rerun_repeats(expected)


@pytest.mark.parametrize("lost", ["damaged", "absent"])
def test_a_stack_continues_where_all_its_replicas_have_a_checkpoint(
    lost: str, unbroken: TrialResult, tmp_path: Path
) -> None:
    polls = iter(range(100))
    with pytest.raises(TrialPausedError):
        run_trial(_trial(), tmp_path, cancelled=lambda: next(polls) == 6)
    newest = tmp_path / "seed-1/checkpoints/step-6"
    if lost == "damaged":
        (newest / "model.safetensors").write_bytes(b"x")
    else:
        newest.rename(newest.with_name("step-6.tmp"))
    told: list[tuple[int, int]] = []
    resumed = run_trial(_trial(), tmp_path, on_metrics=lambda seed, step, metrics: told.append((seed, step)))
    assert told[:3] == [(0, 5), (1, 5), (2, 5)]
    for replica, expected in zip(resumed.replicas, unbroken.replicas, strict=True):
        assert _what_a_rerun_repeats(replica) == _what_a_rerun_repeats(expected)


def test_a_replica_stopped_at_a_rung_changes_nothing_for_the_others_even_across_a_pause(
    unbroken: TrialResult, tmp_path: Path
) -> None:
    def on_rung(seed: int, step: int, metrics: dict[str, float]) -> bool:
        return seed != 1 or step < 8

    polls = iter(range(100))
    with pytest.raises(TrialPausedError):
        run_trial(_trial(), tmp_path, on_rung, cancelled=lambda: next(polls) == 10)
    resumed = run_trial(_trial(), tmp_path, on_rung)
    assert [(replica.status, replica.step) for replica in resumed.replicas] == [
        ("complete", 12),
        ("stopped", 8),
        ("complete", 12),
    ]
    assert "seed 1: kept the result of an earlier call" in resumed.notes
    for i in (0, 2):
        assert _what_a_rerun_repeats(resumed.replicas[i]) == _what_a_rerun_repeats(unbroken.replicas[i])
    assert resumed.replicas[1].curve == unbroken.replicas[1].curve[:8]


def test_a_large_step_trains_seeds_one_after_the_other() -> None:
    def sizes(batch: int, n_seeds: int) -> list[int]:
        seeds = tuple(range(n_seeds))
        found = stacking(_trial(recipe={"batch": batch}).config, seeds, "cpu")
        assert [seed for stack in found.stacks for seed in stack] == list(seeds)
        assert bool(found.reason) == (n_seeds > 1)
        for stack in found.stacks:  # whoever asks again about one stack gets it back
            assert stacking(_trial(recipe={"batch": batch}).config, stack, "cpu").stacks == (stack,)
        return [len(stack) for stack in found.stacks]

    assert sizes(910, 10) == [5, 5]  # 910 x 9 x 8 values: eight replicas fit, and stacks are even
    assert sizes(911, 3) == [1, 1, 1]
    assert sizes(4, 1) == [1]


def test_a_stack_too_large_for_memory_trains_its_seeds_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limits in (rule.STACKED_VALUES, rule.STACK_VALUES):
        monkeypatch.setitem(limits, "cpu", 2**62)
    layer = {"kind": "attention", "n_heads": 1, "positions": "none"}
    arch = Arch.model_validate({"d_model": 2**22, "mlp_inner": 1, "layers": [layer]})
    trial = _trial(seeds=(0, 1))
    trial = trial.model_copy(update={"config": trial.config.model_copy(update={"arch": arch})})
    result = run_trial(trial, tmp_path)
    assert "a stack of 2 ran out of memory at step 0; its seeds trained alone" in result.notes
    assert [replica.reason for replica in result.replicas] == ["out_of_memory"] * 2


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.parametrize("leaves", [None, 1])
@pytest.mark.parametrize(
    "task", [Parity(), ModularArithmetic(), Mqar(length=32, vocab_size=64)], ids=["parity", "arithmetic", "mqar"]
)
def test_a_captured_step_is_the_step_that_is_launched_from_python(
    task: Parity | ModularArithmetic | Mqar, leaves: int | None
) -> None:
    task_data, recipe = build_task(task), _recipe(batch=64, steps=40, clip=1.0)
    arch = Arch.model_validate({"d_model": 64, "mlp_inner": 64, "layers": LAYERS["hybrid"]})
    weights, tallies = [], []
    for captured in (False, True):
        models = [build_model(arch, task_data.vocab_size, seed=seed, device="cuda") for seed in range(3)]
        stack = Stack(models, [recipe] * 3, torch.device("cuda"))
        if not captured:
            stack.not_captured = "not asked for"
        with reproducible(Runtime(device="cuda")), feed(task_data, recipe, range(3), 0, "cuda") as (data, _):
            for step, step_of_all in enumerate(data):
                if step == 20 and leaves is not None:
                    stack.leave(leaves)
                stack.take_step(step, step_of_all)
        assert (stack.not_captured is None) == captured
        weights.append([_weights(member) for member in stack.members])
        tallies.append(stack.tallies())
    assert [tally.steps for tally in tallies[1]] == [20 if i == leaves else 40 for i in range(3)]
    assert tallies[0] == tallies[1]
    for launched, replayed in zip(*weights, strict=True):
        assert all(torch.equal(weight, replayed[name]) for name, weight in launched.items())


CANNOT_BE_CAPTURED = """
import torch
from hqlt_search_space.arch import Arch
from hqlt_search_space.recipe import Recipe
from hqlt_search_space.tasks import Parity
from hqlt_trainer.model import build_model
from hqlt_trainer.replicas import Stack, feed
from hqlt_trainer.tasks import build_task
device = torch.device("cuda")
task_data, recipe = build_task(Parity()), Recipe(steps=10, batch=64, learning_rate=0.01)
layer = {"kind": "hybrid", "n_heads": 2, "window": 8}
arch = Arch.model_validate({"d_model": 64, "mlp_inner": 64, "layers": [layer]})
weights, stream = [], torch.cuda.current_stream()
for looks in (False, True):
    stack = Stack([build_model(arch, task_data.vocab_size, device=device)], [recipe], device)
    if not looks:
        stack.not_captured = "not asked for"
    def make():
        made = source()
        if looks:
            made.tokens.sum().item()
        return made
    with feed(task_data, recipe, [0], 0, "cuda") as (data, _):
        for step, source in enumerate(data):
            stack.take_step(step, make)
    assert torch.cuda.current_stream() == stream
    assert [tally.steps for tally in stack.tallies()] == [10]
    weights.append([parameter.detach().clone() for parameter in stack.model.parameters()])
assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))
print(stack.not_captured)
"""


@pytest.mark.gpu
def test_a_step_that_reads_a_number_back_is_launched_from_python_as_if_nobody_had_tried_to_capture_it() -> None:
    """In a process of its own: where PyTorch lacks pull request 180395, a capture that failed spoils the later ones."""
    ran = subprocess.run(
        [sys.executable, "-c", CANNOT_BE_CAPTURED], capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "not permitted when stream is capturing" in ran.stdout


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("layers", ["hybrid", "gated"])
def test_a_replica_in_a_stack_on_a_gpu_has_the_weights_it_gets_alone(
    layers: str, precision: str, tolerance: float
) -> None:
    task_data = build_task(Parity())
    # With a small epsilon a gradient of almost zero moves its weight as much as any other, up or down.
    recipes = [
        _recipe(batch=16, steps=6, clip=1.0, epsilon=0.01, precision=precision, learning_rate=rate)
        for rate in (0.01, 0.003, 0.02)
    ]
    arch = Arch.model_validate({"d_model": 64, "mlp_inner": 64, "layers": LAYERS[layers]})

    def trained(seeds: list[int]) -> list[dict[str, torch.Tensor]]:
        models = [build_model(arch, 3, seed=seed, init_std=0.1, device="cuda") for seed in seeds]
        stack = Stack(models, [recipes[seed] for seed in seeds], torch.device("cuda"))
        with reproducible(Runtime(device="cuda")), feed(task_data, recipes[0], seeds, 0, "cuda") as (data, _):
            for step, step_of_all in enumerate(data):
                stack.take_step(step, step_of_all)
        assert stack.not_captured is None
        return [_weights(member) for member in stack.members]

    for together, (alone,) in zip(trained([0, 1, 2]), map(trained, ([0], [1], [2])), strict=True):
        for name, expected in alone.items():
            assert (together[name] - expected).norm() <= tolerance * expected.norm(), name


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.parametrize(
    ("task", "copied"), [(PARITY, False), ({"kind": "mqar", "length": 32, "vocab_size": 64}, True)]
)
def test_a_result_says_when_data_are_copied_to_the_gpu(task: dict[str, Any], copied: bool, tmp_path: Path) -> None:
    trial = _trial(runtime=Runtime(device="cuda"))
    config = trial.config.model_copy(update={"task": TypeAdapter(Task).validate_python(task)})
    notes = run_trial(trial.model_copy(update={"config": config}), tmp_path).notes
    assert any("made on the CPU and copied to the GPU" in note for note in notes) == copied
