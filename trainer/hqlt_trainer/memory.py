"""How much of a GPU's memory the training of some seeds takes, by arithmetic. No torch here: whoever shares a GPU among
trials asks."""

from collections.abc import Sequence

from hqlt_search_space.cost import BYTES, parameters, saved_bytes_per_token
from hqlt_search_space.tasks import context_length, training_length, vocab_size
from hqlt_search_space.trial import Config

from hqlt_trainer.stacking import stacking

EVALUATION_TOKENS = {"cpu": 2**14, "cuda": 2**18}
"""Tokens in an evaluation batch at the longest length: enough to fill the device, on a CPU few enough for its cache."""

CUDA_BYTES = 896 * 2**20
"""Of a process beside what torch allocates: CUDA's context and the compiled kernels. 823 MiB on an H200."""

MARGIN = 1.2
"""For the gaps that an allocator leaves."""


def gpu_bytes(config: Config, seeds: Sequence[int]) -> int:
    """What a process takes of a GPU that trains `seeds` of `config`, as it stacks them, and judges them.

    The states of the largest stack (16 bytes a parameter and seed), what its training batches save, and what an
    evaluation batch has in use at a time, 12 d + 3 inner numbers a token; `MARGIN` on all that, and `CUDA_BYTES`. Both
    batches count because a captured step keeps its memory while the model is judged. The paper's synthetic models
    (parity at batch 1024, bfloat16, one seed) had 0.4 to 1.0 GiB in training and 1.3 to 1.8 GiB in evaluation on an
    H200; this says 1.2 to 1.8 times the sum.
    """
    arch, recipe, vocab = config.arch, config.recipe, vocab_size(config.task)
    stacked = max(len(stack) for stack in stacking(config, seeds, "cuda").stacks)
    training_tokens = stacked * (recipe.batch // recipe.accumulation) * training_length(config.task)
    training = training_tokens * saved_bytes_per_token(arch, vocab, recipe.precision)
    evaluation_tokens = max(EVALUATION_TOKENS["cuda"], context_length(config.task))
    evaluation = evaluation_tokens * (12 * arch.d_model + 3 * arch.mlp_inner) * BYTES[recipe.precision]
    return round(MARGIN * (stacked * 16 * parameters(arch, vocab) + training + evaluation)) + CUDA_BYTES


def gpu_bytes_measured(peak_bytes: int) -> int:
    """The same from the peak of allocated memory that such a training has had.

    Twice the peak: it is the larger of training's and evaluation's, and the allocator holds both.
    """
    return 2 * peak_bytes + CUDA_BYTES
