"""Whether the disk has room for what a study is going to write."""

import shutil
from itertools import islice
from pathlib import Path

from hqlt_dashboards.words import counted, format_value
from hqlt_search_space.cost import costs
from hqlt_search_space.errors import ResourceError
from hqlt_search_space.study import Study

from hqlt_orchestration.commands.plan import some_configs
from hqlt_orchestration.records.store import Store

BYTES_A_PARAMETER = 12  # in a checkpoint: the weight and AdamW's two moments, float32
CHECKPOINT_OVERHEAD_BYTES = 64 * 1024  # states, manifest, headers, blocks that are not full
KEPT = 2  # checkpoints of a replica that stay; one more is there while it is written
REPLICA_BYTES = 100_000  # results, curves and logs, in the folder, the ledger and MLflow
FEW = 200  # combinations that are all looked at; of larger spaces a sample
N_SAMPLED = 20


def check_room(study: Study, n_left: int, store: Store) -> str | None:
    """A warning if the disk may fill before the `n_left` trials that are left have run; None if it will not.

    What MLflow shows are links to the same checkpoints. Removing those off the front (`hqlt study gc`) makes room.

    Raises:
        ResourceError: not even the trials that run first can write their checkpoints.
    """
    sizes = checkpoint_bytes(study)
    n_seeds = len(study.seeds)
    first = max(sizes) * (KEPT + 1) * study.budget.parallel * n_seeds
    all_of_it = (sum(sizes) / len(sizes) * KEPT + REPLICA_BYTES) * n_left * n_seeds
    free = shutil.disk_usage(_existing(store.data)).free
    if free < first:
        raise ResourceError(
            f"{store.data} has {_size(free)} free, and {counted(study.budget.parallel, 'trial')} at a time may need "
            f"{_size(first)} for checkpoints; free some space, or give another folder with --data"
        )
    if free < all_of_it:
        return (
            f"{store.data} has {_size(free)} free, and this study may come to write {_size(all_of_it)}: it would "
            f"pause; `hqlt study gc {study.name}` removes the checkpoints of trials off the front"
        )
    return None


def checkpoint_bytes(study: Study) -> list[float]:
    """What a checkpoint takes, of each of the study's models or of a sample of them."""
    if study.search is None:
        configs = [cell.config for cell in study.cells()]
    elif study.n_combinations <= FEW:
        configs = [config for _, config in study.configs()]
    else:
        configs = list(islice(some_configs(study), N_SAMPLED))
    return [costs(config)["parameters"] * BYTES_A_PARAMETER + CHECKPOINT_OVERHEAD_BYTES for config in configs] or [0.0]


def _existing(folder: Path) -> Path:
    """`folder`, or the nearest one above it that is there: they are on the same disk."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _size(n_bytes: float) -> str:
    return format_value("bytes", n_bytes)
