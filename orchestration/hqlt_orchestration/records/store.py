"""Where a user's things live: one folder, and the databases in it unless others were named."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hqlt_search_space.errors import StoreError

if TYPE_CHECKING:
    from hqlt_orchestration.records.ledger import Ledger

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")  # as the study schema has it


@dataclass(frozen=True)
class Store:
    """The data folder, and the URLs of the study database and of MLflow where they are elsewhere.

    hqlt.db                      Optuna's tables and the ledger
    mlflow.db, mlflow-artifacts  what `hqlt ui` shows
    studies/NAME/trials/N        checkpoints and logs of trial N, a folder for each seed
    studies/NAME/spool           what MLflow is still to be told
    reruns                       what `hqlt rerun` made
    """

    data: Path
    database: str | None = None
    mlflow: str | None = None

    @property
    def url(self) -> str:
        return self.database or f"sqlite:///{self.data.resolve() / 'hqlt.db'}"

    @property
    def mlflow_uri(self) -> str:
        return self.mlflow or f"sqlite:///{self.data.resolve() / 'mlflow.db'}"

    @property
    def artifacts(self) -> Path:
        return self.data / "mlflow-artifacts"

    def study_folder(self, study: str) -> Path:
        """Absolute, because a worker's current folder need not be ours; always inside the data folder.

        Raises:
            StoreError: `study` is not a name that a study file can have; somebody else wrote it into the ledger.
        """
        if not _NAME.fullmatch(study):
            raise StoreError(f"{study[:200]!r} in the ledger is no name of a study; hqlt did not write that")
        return self.data.resolve() / "studies" / study

    def refuse_links(self, study: str) -> None:
        """Nothing that hqlt writes or removes for `study` may be elsewhere: there are no links in its folder.

        Raises:
            StoreError: there is one.
        """
        folder = self.study_folder(study)
        found = [folder, *(Path(at, name) for at, folders, files in os.walk(folder) for name in (*folders, *files))]
        for path in found:
            if path.is_symlink():
                raise StoreError(
                    f"{path} is a link; hqlt follows none in a study's folder: put what it points to there"
                )

    def trial_folder(self, study: str, number: int) -> Path:
        return self.study_folder(study) / "trials" / f"{number:04d}"

    def spool_folder(self, study: str) -> Path:
        return self.study_folder(study) / "spool"

    def open(self) -> "Ledger":
        """The ledger, made if it is new.

        Raises:
            StoreError: the folder or database cannot be used.
        """
        from hqlt_orchestration.records.ledger import Ledger

        return Ledger(self.url)

    def open_existing(self) -> "Ledger":
        """The ledger, for commands that only read.

        Raises:
            StoreError: nothing has been stored here yet, or the database cannot be used.
        """
        if self.database is None and not (self.data / "hqlt.db").exists():
            raise StoreError(
                f"no studies in {self.data}; run one with `hqlt study run FILE`, or name its --data folder"
            )
        return self.open()
