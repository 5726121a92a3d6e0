"""Which implementations a config runs on. `python -m hqlt_trainer.backends STUDY.yaml` says it of an ablation's models.

In training and in evaluation, whose sequences may be longer. `--hopper` says what a Hopper GPU would take, in the
recipe's precision, with the packages that are installed here; it needs no GPU.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from hqlt_kernels.backends import BackendUnavailableError, Capability, Choice, Operator, choose_backend, keys_seen
from hqlt_kernels.blend.choice import choose_blend
from hqlt_search_space.errors import BackendError
from hqlt_search_space.mixers import Attention, FastWeight, Hybrid, Mixer
from hqlt_search_space.rules import Additive, DeltaProduct
from hqlt_search_space.study_file import load_study
from hqlt_search_space.tasks import context_length, training_length
from hqlt_search_space.trial import Backend, Config, Runtime

HOPPER: Capability = (9, 0)


def backends(config: Config, runtime: Runtime, capability: Capability | None = None) -> tuple[Backend, ...]:
    """What runs each operator, and why: in training, then what evaluation has beside it. `capability` is that of the
    GPU, None for the one that is here.

    Raises:
        BackendError: the runtime forces one that cannot run here.
    """
    lengths = (training_length(config.task), context_length(config.task))
    return tuple(dict.fromkeys(b for n in lengths for b in backends_at(config, runtime, n, capability)))


def backends_at(
    config: Config, runtime: Runtime, n_tokens: int, capability: Capability | None = None
) -> tuple[Backend, ...]:
    """`backends` for sequences of `n_tokens` alone."""
    try:
        found = [c for mixer in config.arch.layers for c in _choices(mixer, config, runtime, n_tokens, capability)]
    except BackendUnavailableError as error:
        raise BackendError(str(error)) from error
    return tuple(Backend(operator=c.operator, backend=c.backend, reason=c.reason) for c in dict.fromkeys(found))


def _choices(
    mixer: Mixer, config: Config, runtime: Runtime, n_tokens: int, capability: Capability | None
) -> Iterator[Choice]:
    dtype = torch.bfloat16 if config.recipe.precision == "bfloat16" else torch.float32
    head_dim = config.arch.d_model // mixer.n_heads
    if isinstance(mixer, Hybrid):
        blend = choose_blend(
            n_tokens=n_tokens,
            window=mixer.window,
            device=runtime.device,
            dtype=dtype,
            head_dim=head_dim,
            normaliser=mixer.rule.normaliser if isinstance(mixer.rule, Additive) else "none",
            several_writes=isinstance(mixer.rule, DeltaProduct),
            kv_positions=mixer.positions != "none",
            fw_positions=mixer.fw_positions != "none",
            capability=capability,
            forced=runtime.backend,
        )
        yield blend
        if blend.backend == "triton":
            return
    operators: list[Operator] = []
    if not isinstance(mixer, FastWeight):
        operators.append("window_attention")
    if not isinstance(mixer, Attention):
        operators.append(mixer.rule.kind)
    window = None if isinstance(mixer, FastWeight) else mixer.window
    for operator in operators:
        yield choose_backend(
            operator,
            device=runtime.device,
            dtype=dtype,
            head_dim=head_dim,
            keys=keys_seen(window, n_tokens),
            capability=capability,
            forced=runtime.backend,
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m hqlt_trainer.backends", description=__doc__)
    parser.add_argument("study", type=Path, help="the file of an ablation")
    parser.add_argument("--hopper", action="store_true", help="what a Hopper GPU would take")
    options = parser.parse_args(arguments)
    runtime = Runtime(device="cuda" if options.hopper or torch.cuda.is_available() else "cpu")
    capability = HOPPER if options.hopper else None
    for study in load_study(options.study).by_task():
        for what, n_tokens in (("training", training_length), ("evaluation", context_length)):
            print(f"{study.task.kind}, {what}, {n_tokens(study.task)} tokens")
            found: dict[str, list[str]] = {}
            for cell in study.cells():
                ways = backends_at(cell.config, runtime, n_tokens(study.task), capability)
                found.setdefault("; ".join(f"{b.operator}: {b.backend} ({b.reason})" for b in ways), []).append(
                    cell.label
                )
            for ways_in_words, labels in found.items():
                print(f"  {', '.join(labels)}\n      {ways_in_words}")


if __name__ == "__main__":
    main()
