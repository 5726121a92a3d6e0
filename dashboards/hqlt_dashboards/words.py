"""How names and values are written for a reader: an arch in one line, a metric with its unit, a number that fits."""

from hqlt_search_space.arch import Arch
from hqlt_search_space.mixers import Attention, DelayedChunk, DelayedStreaming, FastWeight, Hybrid, Mixer
from hqlt_search_space.rules import Additive, Decay, Delta, DeltaProduct, GatedDelta, Rule

_UNITS = {"_bytes": "bytes", "_nats": "nats a token", "_seconds": "s"}
"""Endings of names that are units and not words; others (`tokens_per_second`) read as they stand."""

_CAPITALS = {"kv": "KV", "fw": "FW", "flops": "FLOPs"}


def describe(arch: Arch) -> str:
    """The mixers of `arch`, first layer to last, in one line; layers that repeat are counted.

    What is named: blend, rule, window (`W8`; `full` is all keys) and mixing, and in brackets what is not the usual
    choice. Widths and what all layers share (convolution, gates, positions) are not.

    >>> from hqlt_search_space.mixers import Attention, FastWeight, Hybrid
    >>> describe(Arch(d_model=8, mlp_inner=8, layers=(Hybrid(n_heads=2, window=8),) * 2))
    'hybrid synchronous delta W8 dynamic_vector x2'
    >>> describe(Arch(d_model=8, mlp_inner=8, layers=(*(FastWeight(n_heads=2),) * 3, Attention(n_heads=2)) * 2))
    '(fast_weight delta x3, attention full) x2'
    """
    layers = [_mixer(layer) for layer in arch.layers]
    n_layers = len(layers)
    period = next(p for p in range(1, n_layers + 1) if n_layers % p == 0 and layers == layers[:p] * (n_layers // p))
    repeats = n_layers // period
    line = _runs(layers[:period])
    if repeats == 1:
        return line
    return f"({line}) x{repeats}" if period > 1 else f"{line} x{repeats}"


def mixer_kinds(arch: Arch) -> str:
    """The kinds of mixer in `arch` without details, in the order of the layers: what a picture colours by.

    >>> from hqlt_search_space.mixers import Attention, FastWeight
    >>> mixer_kinds(Arch(d_model=8, mlp_inner=8, layers=(FastWeight(n_heads=2), Attention(n_heads=2)) * 2))
    'fast_weight + attention'
    """
    return " + ".join(dict.fromkeys(layer.kind for layer in arch.layers))


def spoken(name: str) -> str:
    """A metric's, cost's or axis's name as words, so that it can break over lines.

    >>> spoken("normalised_validation_accuracy")
    'normalised validation accuracy'
    """
    return name.replace("_", " ")


def counted(count: int, thing: str) -> str:
    """`count` things.

    >>> counted(1, "trial"), counted(12, "trial")
    ('1 trial', '12 trials')
    """
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def duration(seconds: float) -> str:
    """`seconds` as people say it: 40 s, 12 min, 3.5 h.

    >>> [duration(s) for s in (8.2, 130.0, 12_000.0)]
    ['8 s', '2 min', '3.3 h']
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def axis_label(name: str) -> str:
    """A metric's or cost's name with its unit.

    >>> axis_label("kv_cache_bytes"), axis_label("validation_loss_nats"), axis_label("tokens_per_second")
    ('KV cache (bytes)', 'Validation loss (nats a token)', 'Tokens per second')
    >>> axis_label("normalised_validation_accuracy"), axis_label("flops_per_token")
    ('Normalised validation accuracy (0 = chance, 1 = perfect)', 'FLOPs per token')
    """
    unit = ""
    if "accuracy" in name:
        unit = "0 = chance, 1 = perfect" if "normalised" in name else "share correct"
    elif name == "parameters":
        unit = "count"
    for ending, of_ending in _UNITS.items():
        if name.endswith(ending):
            name, unit = name.removesuffix(ending), of_ending
    words = " ".join(_CAPITALS.get(word, word) for word in name.split("_"))
    label = words[0].upper() + words[1:]
    return f"{label} ({unit})" if unit else label


def format_value(name: str, value: float, digits: int = 4) -> str:
    """`value` of the metric or cost `name`, short: `digits` digits, with a prefix for bytes and large counts.

    >>> format_value("state_bytes", 4096), format_value("parameters", 374_100_000), format_value("accuracy", 0.96666)
    ('4 KiB', '374.1M', '0.9667')
    """
    if name.endswith("bytes"):
        return _with_prefix(value, 1024, [" B", " KiB", " MiB", " GiB", " TiB"], digits)
    if abs(value) >= 10_000:
        return _with_prefix(value, 1000, ["", "k", "M", "G", "T", "P", "E", "Z", "Y"], digits)
    return f"{value:.{digits}g}"


def _with_prefix(value: float, base: int, prefixes: list[str], digits: int) -> str:
    size = 0
    while size + 1 < len(prefixes) and abs(float(f"{value:.{digits}g}")) >= base:
        value /= base
        size += 1
    # Below the base there are at most four digits before the point; `g` must not turn 1023 into 1.02e+03.
    return f"{value:.{max(digits, len(str(int(abs(value)))))}g}{prefixes[size]}"


def _runs(layers: list[str]) -> str:
    """Neighbours that are equal, counted."""
    runs: list[tuple[str, int]] = []
    for layer in layers:
        if runs and runs[-1][0] == layer:
            runs[-1] = (layer, runs[-1][1] + 1)
        else:
            runs.append((layer, 1))
    return ", ".join(layer if count == 1 else f"{layer} x{count}" for layer, count in runs)


def _mixer(mixer: Mixer) -> str:
    match mixer:
        case Attention():
            return f"attention {_window(mixer.window)}"
        case FastWeight():
            return f"fast_weight {_rule(mixer.rule)}"
        case Hybrid():
            mixing = f"{mixer.mixing}(branch_norm)" if mixer.branch_norm else mixer.mixing
            return f"hybrid {_blend(mixer)} {_rule(mixer.rule)} {_window(mixer.window)} {mixing}"


def _window(window: int | None) -> str:
    return "full" if window is None else f"W{window}"


def _blend(mixer: Hybrid) -> str:
    match mixer.blend:
        case DelayedStreaming(delay_beta=True):
            return "delayed_streaming(delay_beta)"
        case DelayedChunk(fw_chunk=int(chunk)):
            return f"delayed_chunk({chunk})"
        case _:
            return mixer.blend.kind


def _rule(rule: Rule) -> str:
    usual = type(rule)()
    details: list[str] = []
    if isinstance(rule, DeltaProduct):
        details.append(str(rule.n_householder))
    if isinstance(rule, Delta | GatedDelta | DeltaProduct) and rule.beta_range == 1:
        details.append("beta < 1")
    if isinstance(rule, Decay) and rule.decay == "fixed":
        details.append("fixed")
    if isinstance(rule, Additive) and rule.normaliser == "heads":
        details.append("norm over heads")
    if isinstance(rule, Additive) and rule.normaliser == "none":
        details.append("no norm")
    if rule.feature_map != usual.feature_map:
        details.append(rule.feature_map)
    return f"{rule.kind}({', '.join(details)})" if details else rule.kind
