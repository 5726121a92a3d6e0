"""Which trials to stop early: asynchronous successive halving with non-dominated ranking, stopping variant.

A trial that reaches a rung is compared with everyone who has reached it, and goes on if it is among the best 1 / eta.
With several objectives "best" is the front it stands on and, inside a front, its place in an epsilon-net: the next
point is always the one farthest from those already placed. A constant objective such as state bytes makes most trials
non-dominated, and the net then keeps an even spread of them instead of one corner.

Source: Schmucker, Donini, Zafar, Salinas, Archambeau 2021, "Multi-objective Asynchronous Successive Halving",
arXiv:2106.12639. Learning curves stay in our own tables: Optuna does not prune with several objectives.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from hqlt_dashboards.front import ranks

Key = TypeVar("Key", bound=Hashable)
Point = Sequence[float]


def goes_on(rung: Mapping[Key, Point], mine: Key, *, eta: float, min_competitors: int) -> bool:
    """Whether the replica `mine` continues past a rung; every objective in `rung` is minimised.

    With fewer than `min_competitors` at the rung everyone goes on. At least one goes on, whatever eta is. A pure
    function of the rung's table: the order in which the others arrived does not matter.

    >>> goes_on({"a": (0.1,), "b": (0.2,), "c": (0.3,)}, "c", eta=3, min_competitors=3)
    False
    """
    if len(rung) < min_competitors:
        return True
    n_kept = max(1, int(len(rung) / eta))
    return any(tuple(rung[key]) == tuple(rung[mine]) for key in priority(rung)[:n_kept])  # equals go on together


def priority(rung: Mapping[Key, Point]) -> list[Key]:
    """The keys from best to worst: by front, and inside a front by epsilon-net. Equal points keep the order of keys."""
    keys = sorted(rung, key=repr)
    fronts: dict[int, list[Key]] = {}
    for key, rank in zip(keys, ranks([tuple(rung[key]) for key in keys]), strict=True):
        fronts.setdefault(rank, []).append(key)
    return [key for rank in sorted(fronts) for key in _epsilon_net(rung, fronts[rank])]


def _epsilon_net(rung: Mapping[Key, Point], front: list[Key]) -> list[Key]:
    """A front, starting with its best in the first objective, each next the farthest from all before it.

    Objectives are scaled to their range within the front, so that bytes do not drown accuracies.
    """
    columns = list(zip(*(rung[key] for key in front), strict=True))
    lows = [min(column) for column in columns]
    ranges = [(max(column) - low) or 1.0 for column, low in zip(columns, lows, strict=True)]
    scaled = {
        key: tuple((x - low) / width for x, low, width in zip(rung[key], lows, ranges, strict=True)) for key in front
    }
    first = min(front, key=lambda key: scaled[key])
    net, left = [first], [key for key in front if key is not first]
    distance = {key: _squared_distance(scaled[key], scaled[first]) for key in left}
    while left:
        farthest = max(left, key=lambda key: distance[key])  # the first of equals
        left.remove(farthest)
        net.append(farthest)
        for key in left:
            distance[key] = min(distance[key], _squared_distance(scaled[key], scaled[farthest]))
    return net


def _squared_distance(a: Point, b: Point) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
