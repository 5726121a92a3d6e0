"""Fair comparisons: an arch brought to a given number of parameters, FLOPs or state bytes."""

from collections.abc import Iterator
from typing import Literal

from pydantic import ValidationError

from hqlt_search_space.arch import Arch
from hqlt_search_space.cost import costs
from hqlt_search_space.errors import MatchError
from hqlt_search_space.mixers import Attention, FastWeight
from hqlt_search_space.trial import Config

Quantity = Literal["parameters", "flops", "state"]

COST_OF: dict[Quantity, str] = {"parameters": "parameters", "flops": "flops_per_token", "state": "state_bytes"}
"""The cost that each quantity is."""

TOLERANCE: dict[Quantity, float] = {"parameters": 0.01, "flops": 0.01, "state": 0.05}
"""The largest residual, relative to the target, that still counts as matched."""

HEAD_WIDTHS = range(8, 257, 8)
"""Head widths that matching the state may choose."""

WINDOWS = (*range(1, 16), *range(16, 128, 8), *range(128, 4097, 64))
"""Windows that matching the state may choose."""


def matched(
    config: Config, quantity: Quantity, target: float, fixed: frozenset[str] = frozenset()
) -> tuple[Config, float]:
    """`config` with its arch brought as near to `target` as it goes, and the residual (reached - target) / target.

    Parameters and FLOPs are matched through the inner width of the MLP, which need not be a multiple of anything. The
    state is matched through `n_heads` (the state is d_model^2 / n_heads a layer) and, where all finite windows are
    equal, through that window, among `HEAD_WIDTHS` and `WINDOWS`; axes in `fixed` are left alone.

    Raises:
        MatchError: the nearest is further away than `TOLERANCE` allows.
    """
    if quantity == "state":
        candidates = _with_other_state(config, fixed)
    else:
        candidates = iter([_with_inner_for(config, COST_OF[quantity], target)])
    best, reached = min(
        ((candidate, costs(candidate)[COST_OF[quantity]]) for candidate in candidates),
        key=lambda pair: abs(pair[1] - target),
    )
    residual = (reached - target) / target if target else float(reached != 0)
    if abs(residual) > TOLERANCE[quantity]:
        raise MatchError(
            f"no model of this kind has {COST_OF[quantity]} {target:,.0f}: the nearest reachable has {reached:,.0f} "
            f"({residual:+.1%}; at most {TOLERANCE[quantity]:.0%} is allowed), with {_levers(best, quantity)}"
        )
    return best, residual


def _with_arch(config: Config, arch: Arch) -> Config:
    return config.model_copy(update={"arch": arch})


def _with_inner_for(config: Config, cost: str, target: float) -> Config:
    """The cost is linear in the MLP's inner width, so two points give the width."""

    def with_inner(inner: int) -> Config:
        return _with_arch(config, config.arch.model_copy(update={"mlp_inner": inner}))

    at_one, at_two = (costs(with_inner(inner))[cost] for inner in (1, 2))
    return with_inner(max(1, 1 + round((target - at_one) / (at_two - at_one))))


def _with_other_state(config: Config, fixed: frozenset[str]) -> Iterator[Config]:
    """All configs that other heads and another window give, the given one first."""
    yield config
    arch = config.arch
    has_fast_weights = any(not isinstance(layer, Attention) for layer in arch.layers)
    windows = {layer.window for layer in arch.layers if not isinstance(layer, FastWeight)} - {None}
    heads: list[int | None] = [None]
    if has_fast_weights and "n_heads" not in fixed:
        heads += [arch.d_model // width for width in HEAD_WIDTHS if arch.d_model % width == 0]
    sizes: list[int | None] = [None]
    if len(windows) == 1 and "window" not in fixed:
        sizes += WINDOWS
    for n_heads in heads:
        for window in sizes:
            layers = []
            for layer in arch.layers:
                changes = {} if n_heads is None else {"n_heads": n_heads}
                if window is not None and not isinstance(layer, FastWeight) and layer.window is not None:
                    changes["window"] = window
                layers.append(layer.model_copy(update=changes))
            try:
                yield _with_arch(config, Arch(d_model=arch.d_model, mlp_inner=arch.mlp_inner, layers=tuple(layers)))
            except ValidationError:
                continue  # an odd head width with rope, or an fw_chunk that the window does not divide


def _levers(config: Config, quantity: Quantity) -> str:
    if quantity != "state":
        return f"an MLP of inner width {config.arch.mlp_inner}"
    layer = config.arch.layers[0]
    windows = sorted({str(layer.window) for layer in config.arch.layers if not isinstance(layer, FastWeight)})
    return f"n_heads {layer.n_heads}" + (f" and window {', '.join(windows)}" if windows else "")
