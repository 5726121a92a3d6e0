"""The front of a study: its members, the ranks behind it, and the volume it dominates.

A `Point` is a trial's objectives with every one turned to be minimised: (-accuracy, state_bytes).
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from hqlt_search_space.trial import Objective, ReplicaResult, StudyResults, TrialRecord
from numpy.typing import NDArray

from hqlt_dashboards.seeds import Estimate, estimate, readings

Point = Sequence[float]
Bounds = Mapping[str, tuple[float | None, float | None]]
"""(min, max) of a cost by its name, as in `StudyResults.constraints`."""

MARGIN = 0.1  # of the range seen: far enough that the worst point seen still adds to the volume


@dataclass(frozen=True, slots=True)
class FrontMember:
    """A trial on the front with the values that put it there.

    `values` are means over the fresh seeds if `replicated`, else what the search saw. `estimates` has the objectives
    that were measured over seeds (a cost is exact and has none).
    """

    record: TrialRecord
    values: dict[str, float]
    estimates: dict[str, Estimate]
    replicated: bool
    n_seeds: int
    n_failed: int


def front(
    records: Sequence[TrialRecord], objectives: Sequence[Objective], constraints: Bounds | None = None
) -> tuple[TrialRecord, ...]:
    """The trials that no other trial beats, the best in the first objective first.

    Only complete trials with every objective, within the constraints, compete. A trial is beaten by one that is at
    least as good in every objective and better in one, so trials that tie in all of them stand side by side; of
    several records of one config the one with the lowest number counts.

    Values of two kinds never compete: once every member of the search's front has been replicated, the front is drawn
    again among the replicated trials alone, on their means over fresh seeds. Until then it is the search's own.
    """
    competitors = list(_competitors(records, constraints or {}))
    members = _non_dominated(competitors, objectives, replicated=False)
    if is_replicated(members):
        members = _non_dominated([r for r in competitors if r.replication], objectives, replicated=True) or members
    return members


def is_replicated(members: Sequence[TrialRecord]) -> bool:
    """Whether the front `members` can stand, or stands, on replication means."""
    return bool(members) and all(record.replication for record in members)


def front_members(results: StudyResults) -> tuple[FrontMember, ...]:
    """The front of `results` with its values and intervals: what tables, pictures and exports show."""
    members = front(results.trials, results.objectives, results.constraints)
    replicated = is_replicated(members) and None not in [
        point(record, results.objectives, replicated=True) for record in members
    ]
    return tuple(_member(record, results.objectives, replicated) for record in members)


def fresh_replicas(record: TrialRecord) -> tuple[ReplicaResult, ...]:
    """The replication of `record` without the search's own seeds: selection made those too good."""
    searched = {replica.seed for replica in record.replicas}
    return tuple(replica for replica in record.replication if replica.seed not in searched)


def values_by_objective(
    record: TrialRecord, objectives: Sequence[Objective], *, replicated: bool = False
) -> dict[str, float] | None:
    """Objective -> value as the user knows it; None if one is missing (no result yet, or every fresh seed failed)."""
    values: dict[str, float] = {}
    for name in (objective.name for objective in objectives):
        value = _replication_mean(record, name) if replicated else record.objectives.get(name)
        if value is None:
            return None
        values[name] = value
    return values


def point(record: TrialRecord, objectives: Sequence[Objective], *, replicated: bool = False) -> Point | None:
    """The objectives of `record`, all to be minimised; None where `values_by_objective` is."""
    values = values_by_objective(record, objectives, replicated=replicated)
    return None if values is None else tuple(_sign(objective) * values[objective.name] for objective in objectives)


def ranks(points: Sequence[Point]) -> list[int]:
    """The front that each point belongs to: 0 if nothing dominates it, 1 if only points of rank 0 do, and so on.

    All objectives are minimised; equal points share a rank. NaN raises ValueError: a trial without a result has no
    point. Cost: O(n k m) for n points, m objectives and k points that no other equals, in the worst case n^2 m.

    >>> ranks([(1.0, 2.0), (2.0, 1.0), (2.0, 2.0), (3.0, 3.0), (1.0, 2.0)])
    [0, 0, 1, 2, 0]
    """
    if not points:
        return []
    unique, position = np.unique(_checked(points), axis=0, return_inverse=True)  # np.unique sorts lexicographically
    rank_of = np.zeros(len(unique), dtype=np.int64)
    remaining, rank = np.arange(len(unique)), 0
    while remaining.size:
        members = _first_front(unique[remaining])
        rank_of[remaining[members]] = rank
        remaining, rank = remaining[~members], rank + 1
    return [int(r) for r in rank_of[position.ravel()]]


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Volume dominated by `points` and bounded by `reference`; all objectives are minimised.

    Points on or outside a face of the reference box contribute nothing. NaN raises ValueError (a trial without a
    result has no point), and so does minus infinity.

    Exact for any number of objectives. A sweep for two, O(n log n); a sweep with a staircase for three (Fonseca,
    Paquete, Lopez-Ibanez 2006; the staircase is a list here, so n^2 moves of a pointer at worst); above that, the
    exclusive volumes of While, Bradstreet, Barone 2012 (WFG), one objective less at each step.

    >>> hypervolume([(1.0, 2.0), (2.0, 1.0)], reference=(3.0, 3.0))
    3.0
    >>> hypervolume([], reference=(3.0, 3.0))
    0.0
    """
    corner = _checked([reference])[0]
    if not points:
        return 0.0
    array = _checked(points)
    if array.shape[1] != corner.size:
        raise ValueError(f"points have {array.shape[1]} objectives, the reference point has {corner.size}")
    if np.isneginf(array).any() or not np.isfinite(corner).all():
        raise ValueError("a point at minus infinity, or a reference point that is not finite, bounds no volume")
    inside = np.unique(array[(array < corner).all(axis=1)], axis=0)
    return _volume(inside[_first_front(inside)], corner)


def front_hypervolume(results: StudyResults) -> float:
    """The volume dominated by the front of `results`, bounded by its `reference_point`; 0 without a front."""
    members = front_members(results)
    points = [tuple(_sign(o) * member.values[o.name] for o in results.objectives) for member in members]
    return hypervolume(points, reference_point(results)) if points else 0.0


def reference_point(results: StudyResults) -> Point:
    """The worst corner that the volume of a study is bounded by, every objective turned to be minimised.

    Per objective: 0 for an accuracy (a normalised one is 0 at chance); the constraint's limit for a cost that has
    one; otherwise the worst value seen so far, plus a tenth of the range seen. The last kind moves while a study
    runs, so two volumes compare only within one state of a study.

    Raises:
        ValueError: an objective needs the worst value seen, and no trial is complete.
    """
    seen = [
        point(record, results.objectives, replicated=replicated)
        for record in _competitors(results.trials, results.constraints)
        for replicated in ((False, True) if record.replication else (False,))
    ]
    columns = list(zip(*(p for p in seen if p is not None), strict=True))
    return tuple(
        _worst(objective, columns[i] if columns else (), results.constraints)
        for i, objective in enumerate(results.objectives)
    )


def _worst(objective: Objective, seen: Sequence[float], constraints: Bounds) -> float:
    minimum, maximum = constraints.get(objective.name, (None, None))
    limit = maximum if objective.direction == "minimize" else minimum
    if limit is not None:
        return _sign(objective) * limit
    if objective.direction == "maximize" and "accuracy" in objective.name:
        return 0.0
    if not seen:
        raise ValueError(f"no complete trial yet: the worst {objective.name} is unknown")
    worst, best = max(seen), min(seen)
    # With a single value the range is 0, and a point on the box would have no volume.
    return worst + (MARGIN * (worst - best) or MARGIN * abs(worst) or MARGIN)


def _competitors(records: Iterable[TrialRecord], constraints: Bounds) -> Iterable[TrialRecord]:
    """Complete records within the constraints, the lowest number of each config, by number."""
    seen: set[str] = set()
    for record in sorted(records, key=lambda record: record.number):
        if record.state != "complete" or not _within(record.costs, constraints) or record.trial_id in seen:
            continue
        seen.add(record.trial_id)
        yield record


def _within(costs: Mapping[str, float], constraints: Bounds) -> bool:
    """Whether no constraint is broken. A cost that is not recorded was not asked for, and breaks none."""
    return all(
        (minimum is None or costs[name] >= minimum) and (maximum is None or costs[name] <= maximum)
        for name, (minimum, maximum) in constraints.items()
        if name in costs
    )


def _non_dominated(
    records: Sequence[TrialRecord], objectives: Sequence[Objective], *, replicated: bool
) -> tuple[TrialRecord, ...]:
    pairs = [(p, r) for r in records if (p := point(r, objectives, replicated=replicated)) is not None]
    best = [pair for pair, rank in zip(pairs, ranks([p for p, _ in pairs]), strict=True) if rank == 0]
    return tuple(record for _, record in sorted(best, key=lambda pair: (tuple(pair[0]), pair[1].number)))


def _member(record: TrialRecord, objectives: Sequence[Objective], replicated: bool) -> FrontMember:
    replicas = fresh_replicas(record) if replicated else record.replicas
    measured = {o.name: list(readings(replicas, o.name).values()) for o in objectives if o.name not in record.costs}
    values = values_by_objective(record, objectives, replicated=replicated)
    assert values is not None, f"trial {record.number} is on the front and has no values"
    n_complete = sum(replica.status == "complete" for replica in replicas)
    return FrontMember(
        record=record,
        values=values,
        estimates={name: estimate(found) for name, found in measured.items() if found},
        replicated=replicated,
        n_seeds=n_complete,
        n_failed=len(replicas) - n_complete,
    )


def _replication_mean(record: TrialRecord, name: str) -> float | None:
    """Mean of `name` over the fresh seeds; a cost is the same for every seed. None if no fresh seed has a value."""
    if name in record.costs:
        return record.costs[name]
    found = readings(fresh_replicas(record), name)
    return estimate(list(found.values())).mean if found else None


def _sign(objective: Objective) -> float:
    return 1.0 if objective.direction == "minimize" else -1.0


def _checked(points: Sequence[Point]) -> NDArray[np.float64]:
    """`points` as an array (points, objectives)."""
    if len({len(p) for p in points}) != 1:
        raise ValueError(f"points have different numbers of objectives: {sorted({len(p) for p in points})}")
    array = np.asarray(points, dtype=np.float64)
    if array.shape[1] == 0:
        raise ValueError("a point needs at least one objective")
    if np.isnan(array).any():
        raise ValueError("a point holds NaN: a trial without a result has no point")
    return array


def _first_front(unique: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which rows no other row dominates. Rows are distinct and in lexicographic order."""
    members = np.zeros(len(unique), dtype=bool)
    remaining = np.arange(len(unique))
    while remaining.size:
        # Whatever could dominate the lexicographically first row would stand before it.
        first, remaining = remaining[0], remaining[1:]
        members[first] = True
        remaining = remaining[(unique[remaining] < unique[first]).any(axis=1)]
    return members


def _volume(points: NDArray[np.float64], corner: NDArray[np.float64]) -> float:
    """Hypervolume of distinct points that do not dominate each other, all strictly inside `corner`."""
    if not len(points):
        return 0.0
    if corner.size == 1:
        return float(corner[0] - points[:, 0].min())
    if corner.size == 2:
        return _area(points, corner)
    if corner.size == 3:
        return _volume_of_three(points, corner)
    # Worst last objective first. What point i adds to the points after it is a slab of constant depth, because those
    # points are at least as good as i in the last objective: depth times an exclusive volume of one objective less.
    ordered = points[np.argsort(-points[:, -1], kind="stable")]
    total = 0.0
    for i, p in enumerate(ordered):
        shadow = np.unique(np.maximum(ordered[i + 1 :, :-1], p[:-1]), axis=0)
        overlap = _volume(shadow[_first_front(shadow)], corner[:-1])
        total += float(corner[-1] - p[-1]) * (float(np.prod(corner[:-1] - p[:-1])) - overlap)
    return total


def _area(points: NDArray[np.float64], corner: NDArray[np.float64]) -> float:
    ordered = points[np.argsort(points[:, 0])]  # the second objective then falls
    heights = np.concatenate([corner[1:], ordered[:-1, 1]]) - ordered[:, 1]
    return float(((corner[0] - ordered[:, 0]) * heights).sum())


def _volume_of_three(points: NDArray[np.float64], corner: NDArray[np.float64]) -> float:
    """Sweep along the third objective; a staircase holds the area that the points so far dominate in the first two."""
    right, top, end = (float(c) for c in corner)
    xs, ys = [float("-inf"), right], [top, float("-inf")]  # x rises, y falls; a sentinel at each end
    volume = area = 0.0
    depth = 0.0
    for x, y, z in points[np.argsort(points[:, 2], kind="stable")].tolist():
        volume += area * (z - depth)
        depth = z
        i = bisect_left(xs, x)
        if ys[i - 1] <= y:
            continue
        left, step, j = x, ys[i - 1], i
        while ys[j] >= y:  # the steps that this point covers
            area += (xs[j] - left) * (step - y)
            left, step, j = xs[j], ys[j], j + 1
        area += (xs[j] - left) * (step - y)
        xs[i:j], ys[i:j] = [x], [y]
    return volume + area * (end - depth)
