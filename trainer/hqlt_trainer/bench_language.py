"""`python -m hqlt_trainer.bench_language`: how fast one GPU trains a language model of the paper.

The step is the one that `hqlt` trains with (`replicas.Stack`): forward, loss, backward, clipping, AdamW, as a CUDA
graph after three launched steps. Tokens are random and lie in host memory; reading a corpus is not part of a step.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import torch
from hqlt_search_space.paper import LANGUAGE_VOCABULARY, MODELS, paper_arch
from hqlt_search_space.recipe import Recipe
from hqlt_search_space.trial import Runtime

from hqlt_trainer.environment import reproducible
from hqlt_trainer.model import build_model
from hqlt_trainer.replicas import EAGER_STEPS, MicroBatch, Stack, StepData

GIB = 2**30


def measure(model: str, size: str, batch: int, context: int, steps: int, profile: bool) -> None:
    """Trains for `steps` steps and prints milliseconds a step, tokens a second and the most memory in use."""
    arch = paper_arch(model, size)
    recipe = Recipe(steps=10**6, batch=batch, precision="bfloat16", learning_rate=1e-3, clip=1.0)
    with reproducible(Runtime(device="cuda")):
        built = build_model(arch, LANGUAGE_VOCABULARY, device="cuda")
        n_parameters = sum(p.numel() for p in built.parameters())
        print(f"{model} {size}: {n_parameters / 1e6:.1f}M parameters, batch {batch} x {context}, bfloat16", flush=True)
        stack = Stack([built], [recipe], torch.device("cuda"))
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(LANGUAGE_VOCABULARY, (batch, context + 1), generator=generator)
        part = MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].flatten(), None)
        data = StepData((part,), torch.tensor([batch * context]))
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        for step in range(EAGER_STEPS):
            stack.take_step(step, data)
        first = stack.tallies()[0].loss_sum / EAGER_STEPS
        print(f"  the first {EAGER_STEPS} steps: {time.perf_counter() - started:.1f} s, loss {first:.3f}", flush=True)
        for step in range(EAGER_STEPS, EAGER_STEPS + 2):
            stack.take_step(step, data)
        stack.tallies()
        stack.forget_losses()
        started = time.perf_counter()
        for step in range(steps):
            stack.take_step(EAGER_STEPS + 2 + step, data)
        counted = stack.tallies()[0]
        seconds = (time.perf_counter() - started) / steps
        how = "captured" if stack.not_captured is None else f"launched from Python ({stack.not_captured})"
        used, reserved = torch.cuda.max_memory_allocated() / GIB, torch.cuda.memory_reserved() / GIB
        mean = counted.loss_sum / counted.loss_count
        print(
            f"  {1e3 * seconds:.1f} ms a step, {batch * context / seconds / 1e3:.1f} k tokens/s, {how}\n"
            f"  {used:.1f} GiB in use at most, {reserved:.1f} GiB held; loss {mean:.3f}, "
            f"{counted.skipped} steps skipped",
            flush=True,
        )
        if profile:
            print(table_of_kernels(stack, data), flush=True)


def table_of_kernels(stack: Stack, data: StepData, steps: int = 2) -> str:
    """Milliseconds a step of each kind of kernel, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as run:
        for _ in range(steps):
            stack.take_step(10, data)
        torch.cuda.synchronize()
    rows = sorted(run.key_averages(), key=lambda row: -row.self_device_time_total)
    total = sum(row.self_device_time_total for row in rows)
    lines = [f"  {'ms a step':>9} {'share':>6} {'calls':>6}  kernel ({total / steps / 1e3:.1f} ms in all)"]
    for row in rows[:40]:
        ms = row.self_device_time_total / steps / 1e3
        lines.append(
            f"  {ms:9.2f} {100 * row.self_device_time_total / total:5.1f}% {row.count // steps:6d}  {row.key[:110]}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition(": ")[2].partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="hqlt_synchronous")
    parser.add_argument("--size", choices=("340m", "1.3b"), default="340m")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--profile", action="store_true", help="print what the kernels of a step take")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: there is no CUDA device here, and this measures one")
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    measure(options.model, options.size, options.batch, options.context, options.steps, options.profile)
    return 0


if __name__ == "__main__":
    sys.exit(main())
