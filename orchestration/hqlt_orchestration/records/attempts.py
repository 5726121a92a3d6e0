"""One try at one seed of a trial: its name in the ledger, and its files."""

from dataclasses import dataclass
from pathlib import Path

LOG_FILE = "log.txt"


@dataclass(frozen=True, order=True)
class AttemptKey:
    """One try at one seed of a trial. Who has it in the ledger may commit its result, once."""

    number: int
    seed: int
    attempt: int


def replica_folder(trial_folder: Path, seed: int) -> Path:
    """Where `run_trial` keeps the checkpoints of one seed, and we its log."""
    return trial_folder / f"seed-{seed:d}"
