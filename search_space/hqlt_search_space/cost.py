"""What a config costs, by arithmetic: parameters, FLOPs, and the bytes a decoder keeps. Nothing is built.

All FLOPs count a multiplication and an addition as two. Counted are products with weight matrices, the short
convolutions, scores and sums of attention, and FW-memory's own recurrence; not counted are norms, activations,
softmax, rotary embeddings and the elementwise part of mixing, which are of order d_model a token.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from hqlt_search_space.arch import Arch
from hqlt_search_space.mixers import Attention, DelayedChunk, DelayedStreaming, FastWeight, Hybrid, Mixer, Synchronous
from hqlt_search_space.recipe import Recipe
from hqlt_search_space.rules import Additive, Decay, DeltaProduct, GatedDelta, Rule
from hqlt_search_space.tasks import context_length, training_length, vocab_size
from hqlt_search_space.trial import Config

COSTS: Mapping[str, str] = MappingProxyType(
    {
        "parameters": "Trainable numbers, embedding and head included.",
        "flops_per_token": "Forward, averaged over the positions of the task's longest sequence.",
        "training_flops_per_token": "Three times the forward FLOPs at the length of training.",
        "training_flops": "Over all steps, batches and tokens of the longest training sequence.",
        "decode_flops": "One more token after the task's longest sequence.",
        "fw_state_bytes": "Fast-weight states of one sequence, in float32.",
        "kv_cache_bytes": "Keys and values that KV-memory keeps of one sequence, at the recipe's precision.",
        "state_bytes": "All that a decoder keeps between tokens: states, caches, convolutions, delayed writes.",
        "training_bytes": "A rough estimate of memory in training: weights, gradients, AdamW, saved activations.",
    }
)

_FLOAT32_BYTES = 4
BYTES = {"float32": 4, "bfloat16": 2}
"""Of a number, by a recipe's precision."""


def costs(config: Config) -> dict[str, float]:
    """Every cost of `COSTS`, at the lengths and vocabulary of the config's task."""
    arch, recipe, task = config.arch, config.recipe, config.task
    vocab, context, trained = vocab_size(task), context_length(task), training_length(task)
    training_flops_per_token = 3 * flops_per_token(arch, vocab, trained)
    return {
        "parameters": parameters(arch, vocab),
        "flops_per_token": flops_per_token(arch, vocab, context),
        "training_flops_per_token": training_flops_per_token,
        "training_flops": training_flops_per_token * trained * recipe.batch * recipe.steps,
        "decode_flops": decode_flops(arch, vocab, context),
        "fw_state_bytes": fw_state_bytes(arch),
        "kv_cache_bytes": kv_cache_bytes(arch, context, BYTES[recipe.precision]),
        "state_bytes": state_bytes(arch, context, BYTES[recipe.precision]),
        "training_bytes": training_bytes(arch, vocab, trained, recipe),
    }


def parameters(arch: Arch, vocab: int) -> int:
    """Trainable numbers. Per layer: the mixer's, 3 d inner of the MLP, two norms of d. Then embedding, head, norm."""
    d = arch.d_model
    mixers = sum(_mixer_weights(layer, d) + _mixer_scalars(layer, d) for layer in arch.layers)
    return mixers + arch.n_layers * (3 * d * arch.mlp_inner + 2 * d) + 2 * vocab * d + d


def flops_per_token(arch: Arch, vocab: int, context: int) -> float:
    """Forward FLOPs, averaged over the positions 1 to `context` of one sequence. The embedding is a lookup."""
    return _weight_flops(arch, vocab) + sum(
        _memory_flops(layer, arch.d_model, mean_visible_keys(layer, context)) for layer in arch.layers
    )


def decode_flops(arch: Arch, vocab: int, context: int) -> float:
    """Forward FLOPs of a token after `context` tokens at most, each layer with the most keys that it sees by then."""
    return _weight_flops(arch, vocab) + sum(
        _memory_flops(layer, arch.d_model, visible_keys(layer, context)) for layer in arch.layers
    )


def fw_state_bytes(arch: Arch) -> int:
    """Fast-weight states of one sequence: a float32 matrix of D x D a head, D x (D + 1) with `normaliser: time`."""
    return _FLOAT32_BYTES * sum(_fw_state_numbers(layer, arch.d_model) for layer in arch.layers)


def kv_cache_bytes(arch: Arch, context: int, bytes_per_number: int) -> int:
    """The keys and values that KV-memory needs of past tokens, at the most in a sequence of `context` tokens."""
    return bytes_per_number * sum(2 * cached_keys(layer, context) * arch.d_model for layer in arch.layers)


def state_bytes(arch: Arch, context: int, bytes_per_number: int) -> int:
    """Everything a decoder keeps of one sequence between tokens, at the most in `context` tokens.

    Fast-weight states, KV caches, the last taps - 1 inputs of each convolution, and what waits to be written to
    FW-memory beyond what the KV cache holds.
    """
    convolutions = sum(_conv_state_numbers(layer, arch.d_model) * bytes_per_number for layer in arch.layers)
    waiting = sum(_waiting_bytes(layer, arch.d_model, context, bytes_per_number) for layer in arch.layers)
    return fw_state_bytes(arch) + kv_cache_bytes(arch, context, bytes_per_number) + convolutions + waiting


_SAVED_WIDTHS = {"attention": (4, 9), "fast_weight": (8, 19), "hybrid": (12, 23)}
"""Numbers that a layer's mixer keeps a token for its backward, in units of d_model: at the recipe's precision, and in
float32, which the memories compute in. Counted with torch's hooks on saved tensors at d 128 with short convolutions and
gates; the largest of a kind's rules, blends and mixings stands for all."""


def training_bytes(arch: Arch, vocab: int, length: int, recipe: Recipe) -> int:
    """Roughly what training one replica holds at once: 16 bytes a parameter, and what a micro-batch saves.

    Weights, gradients and two moments are float32. Saved per token and layer: what the mixer keeps (`_SAVED_WIDTHS`),
    and three times the inner width of the MLP; per token the logits and their gradient in float32. Attention is taken
    to save no scores. On a CPU within 0.6 and 1.6 of what is counted there (tests/trainer/test_memory.py); fused
    kernels keep less.
    """
    tokens = recipe.batch // recipe.accumulation * length
    return 16 * parameters(arch, vocab) + tokens * saved_bytes_per_token(arch, vocab, recipe.precision)


def saved_bytes_per_token(arch: Arch, vocab: int, precision: Literal["float32", "bfloat16"]) -> int:
    """What a token of a training batch keeps in memory from the forward to the backward pass."""
    saved = 2 * vocab * _FLOAT32_BYTES
    for layer in arch.layers:
        at_precision, in_float32 = _SAVED_WIDTHS[layer.kind]
        saved += (at_precision * arch.d_model + 3 * arch.mlp_inner) * BYTES[precision]
        saved += in_float32 * arch.d_model * _FLOAT32_BYTES
    return saved


def mean_visible_keys(mixer: Mixer, context: int) -> float:
    """Keys that KV-memory's query sees, averaged over positions 1 to `context`; 0 without KV-memory.

    Through a window W: min(t, W). In a `delayed_chunk`: 1 to W, counted from the chunk's start.
    """
    if isinstance(mixer, FastWeight):
        return 0.0
    window = min(mixer.window or context, context)
    if isinstance(mixer, Hybrid) and isinstance(mixer.blend, DelayedChunk):
        chunks, rest = divmod(context, window)
        return (chunks * window * (window + 1) / 2 + rest * (rest + 1) / 2) / context
    return window - window * (window - 1) / (2 * context)


def visible_keys(mixer: Mixer, context: int) -> int:
    """Keys that KV-memory's query sees at the most; 0 without KV-memory."""
    return 0 if isinstance(mixer, FastWeight) else min(mixer.window or context, context)


def cached_keys(mixer: Mixer, context: int) -> int:
    """Keys that KV-memory holds between tokens at the most; 0 without KV-memory.

    All that are visible, but in a `delayed_chunk` one less: a full chunk is not seen again.
    """
    if isinstance(mixer, Hybrid) and isinstance(mixer.blend, DelayedChunk):
        assert mixer.window is not None
        return min(mixer.window - 1, context)
    return visible_keys(mixer, context)


def _householder_steps(rule: Rule) -> int:
    return rule.n_householder if isinstance(rule, DeltaProduct) else 1


def _has_beta(rule: Rule) -> bool:
    return not isinstance(rule, Additive | Decay)


def _decays(rule: Rule) -> bool:
    return isinstance(rule, Decay | GatedDelta)


def _has_computed_decay(rule: Rule) -> bool:
    return isinstance(rule, GatedDelta) or (isinstance(rule, Decay) and rule.decay == "data_dependent")


def _conv_channels(mixer: Mixer, d: int) -> int:
    """Channels of q, k and v together."""
    steps = 1 if isinstance(mixer, Attention) else _householder_steps(mixer.rule)
    return d + 2 * steps * d


def _mixer_weights(mixer: Mixer, d: int) -> int:
    """Entries of the mixer's matrices and filters: each is one multiplication and one addition a token."""
    heads = mixer.n_heads
    n = _conv_channels(mixer, d) * d + d * d  # q, k, v and o
    n += d * d if mixer.output_gate else 0
    n += _conv_channels(mixer, d) * (mixer.short_conv or 0)
    if isinstance(mixer, Attention):
        return n
    n += d * heads * _householder_steps(mixer.rule) if _has_beta(mixer.rule) else 0
    n += d * heads if _has_computed_decay(mixer.rule) else 0
    if isinstance(mixer, Hybrid):
        gates = {"dynamic_scalar": 2 * heads, "dynamic_vector": d, "separate_vector": 2 * d}
        n += d * gates.get(mixer.mixing, 0)
        n += d * d if mixer.mixing == "concat" else 0  # o_proj takes both branches
    return n


def _mixer_scalars(mixer: Mixer, d: int) -> int:
    """Parameters that scale or shift single numbers."""
    if isinstance(mixer, Attention):
        return 0
    heads, head_width = mixer.n_heads, d // mixer.n_heads
    n = head_width  # output_norm
    n += 2 * heads if _has_computed_decay(mixer.rule) else 0  # A_log, dt_bias
    if isinstance(mixer, Hybrid):
        n += 2 * heads if mixer.mixing == "static_scalar" else 0
        n += head_width if mixer.mixing == "concat" else 0
        n += 2 * head_width if mixer.branch_norm else 0
    return n


def _weight_flops(arch: Arch, vocab: int) -> int:
    """Two FLOPs for each matrix entry a token meets."""
    d = arch.d_model
    mixers = sum(_mixer_weights(layer, d) for layer in arch.layers)
    return 2 * (mixers + arch.n_layers * 3 * d * arch.mlp_inner + vocab * d)


def _memory_flops(mixer: Mixer, d: int, visible_keys: float) -> float:
    """FLOPs a token of the two memories themselves.

    KV: 2 D for a score and 2 D for the weighted sum, a key and head. FW, for a state of K x V a head: read 2 K V,
    write 2 K V, and with the delta rule predict 2 K V, each Householder step; decay K V. This is the recurrence; a
    chunked kernel does more.
    """
    kv = 4 * d * visible_keys
    if isinstance(mixer, Attention):
        return kv
    rule = mixer.rule
    key_width = d // mixer.n_heads
    value_width = key_width + _normaliser_columns(rule)
    state = key_width * value_width
    write = (4 if _has_beta(rule) else 2) * _householder_steps(rule)
    decay = 1 if _decays(rule) else 0
    published_normaliser = 3 * key_width if isinstance(rule, Additive) and rule.normaliser == "heads" else 0
    return kv + mixer.n_heads * ((2 + write + decay) * state + published_normaliser)


def _normaliser_columns(rule: Rule) -> int:
    return 1 if isinstance(rule, Additive) and rule.normaliser == "time" else 0


def _fw_state_numbers(mixer: Mixer, d: int) -> int:
    if isinstance(mixer, Attention):
        return 0
    key_width = d // mixer.n_heads
    return mixer.n_heads * key_width * (key_width + _normaliser_columns(mixer.rule))


def _conv_state_numbers(mixer: Mixer, d: int) -> int:
    return _conv_channels(mixer, d) * (mixer.short_conv - 1) if mixer.short_conv else 0


def _waiting_bytes(mixer: Mixer, d: int, context: int, bytes_per_number: int) -> int:
    """What a delayed blend keeps of tokens not yet written to FW-memory, and KV-memory does not need.

    In `delayed_streaming` these are the window's tokens, in `delayed_chunk` those since the start of FW-memory's
    chunk: the keys and values of every Householder step and, where they belong to their token, beta and decay.
    """
    if not isinstance(mixer, Hybrid) or isinstance(mixer.blend, Synchronous):
        return 0
    if isinstance(mixer.blend, DelayedStreaming):
        tokens, with_scalars = visible_keys(mixer, context), mixer.blend.delay_beta
    else:
        chunk = mixer.window if mixer.blend.fw_chunk == "window" else mixer.blend.fw_chunk
        assert chunk is not None
        tokens, with_scalars = min(chunk - 1, context), True
    steps = _householder_steps(mixer.rule)
    scalars = mixer.n_heads * (steps * _has_beta(mixer.rule) + _decays(mixer.rule)) * with_scalars
    keys_and_values = 2 * d * (steps * tokens - cached_keys(mixer, context))
    return keys_and_values * bytes_per_number + tokens * scalars * _FLOAT32_BYTES
