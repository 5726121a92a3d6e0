"""What a driver tells MLflow, as it happens: records into its spool, for which nothing waits."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hqlt_dashboards.front import front_hypervolume
from hqlt_search_space.study import Study
from hqlt_search_space.trial import ReplicaResult, StudyResults, Trial

from hqlt_orchestration.records.attempts import AttemptKey
from hqlt_orchestration.records.ledger import Ledger
from hqlt_orchestration.records.store import Store
from hqlt_orchestration.records.tables import Phase, State, TrialRow
from hqlt_orchestration.tracking import told

if TYPE_CHECKING:
    from hqlt_orchestration.tracking.spool import Spool


class Teller:
    """Tells of one phase at a time; without a spool, of nothing."""

    def __init__(self, study: Study, store: Store, ledger: Ledger, spool: "Spool | None") -> None:
        self._study = study
        self._store = store
        self._ledger = ledger
        self._spool = spool
        self._phase: Phase = "search"
        self._front: set[int] = set()  # the trials that MLflow shows on the front

    def _put(self, record: told.Record) -> None:
        if self._spool is not None:
            self._spool.put(record)

    def phase_begins(self, phase: Phase) -> None:
        self._phase = phase
        self._put(told.phase_begins(phase, self._ledger.study(self._study.name)))

    def phase_ends(self) -> None:
        self._put(told.phase_ends(self._phase))

    def trial_begins(self, row: TrialRow, trial: Trial) -> None:
        self._put(told.trial_begins(self._phase, row, trial))

    def measured(self, key: AttemptKey, step: int, metrics: Mapping[str, float], **stamp: int) -> None:
        """Metrics of one seed; `unix_ms` says when, if it was not now."""
        seeds = self._study.seeds
        if self._phase == "replicate":
            assert self._study.replication is not None
            seeds = self._study.replication.seeds
        self._put(told.measured(self._phase, key.number, key.seed, step, metrics, n_seeds=len(seeds)) | stamp)

    def ended(self, key: AttemptKey, result: ReplicaResult, measured: set[int]) -> None:
        """The result of one seed, of whose curve the steps `measured` have been told."""
        for point in result.curve:  # a worker goes on for a while after its driver was killed, and nobody hears of it
            if point.step not in measured:
                self.measured(key, point.step, point.metrics)
        self.measured(key, result.step, told.final_metrics(result))

    def trial_ends(
        self, row: TrialRow, state: State, replicas: tuple[ReplicaResult, ...], objectives: Mapping[str, float]
    ) -> None:
        name = self._study.name
        obituary = told.died_of(state, self._ledger.attempts(name, row.number)) if state == "quarantined" else None
        folder = self._store.trial_folder(name, row.number)
        self._put(told.trial_ends(self._phase, row, state, replicas, objectives, folder, obituary))

    def front_moves(self, results: StudyResults, *, last: bool = False) -> None:
        """Hypervolume, and the rank of the trials that came to or left the front; at the last of every trial."""
        if self._spool is None:
            return
        ranks = told.front_ranks(self._study, results.trials)
        front = {number for number, rank in ranks.items() if rank == 0}
        changed = set(ranks) if last else front ^ self._front
        if changed:
            self._front = front
            moved = {number: ranks[number] for number in sorted(changed)}
            self._put(told.front_moves(self._phase, len(ranks), front_hypervolume(results), moved))
