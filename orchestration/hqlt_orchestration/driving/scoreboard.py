"""What a driver knows of its study's trials, so that it need not ask the ledger at every step."""

from dataclasses import replace

from hqlt_dashboards.front import front
from hqlt_dashboards.words import describe, format_value, spoken
from hqlt_search_space.study import Study
from hqlt_search_space.trial import StudyResults, TrialRecord, TrialResult

from hqlt_orchestration.driving.progress import Estimate, Standing
from hqlt_orchestration.records.ledger import Ledger
from hqlt_orchestration.records.results import by_trial, results_of, trial_record
from hqlt_orchestration.records.tables import FINISHED, Phase, ReplicaRow, State, TrialRow


class Scoreboard:
    """The trials that there are, the scores of those that have ended, and how far the phase is."""

    def __init__(self, study: Study, ledger: Ledger) -> None:
        self._study = study
        self._ledger = ledger
        self._estimate = Estimate()
        self._phase: Phase = "ablate" if study.ablation else "search"
        self._n_fresh = 0  # replicas of the replication, and those of them that have ended
        self._n_fresh_done = 0
        self.rows: dict[int, TrialRow] = {}
        self.records: dict[int, TrialRecord] = {}
        """The trials that have ended."""
        self.taken: set[str] = set()
        """The configs that the study has: a search's trials, one each."""
        self.budget = 0
        self.all_proposed = study.search is None
        """Whether no more trials will come, though the budget may have room."""
        self.read()

    def read(self) -> None:
        """Learn what other drivers, and people, have done meanwhile."""
        self.budget = self._ledger.study(self._study.name).budget
        replicas = by_trial(self._ledger.replicas(self._study.name))
        for row in self._ledger.trials(self._study.name):
            self.add(row)
            if row.state in FINISHED:
                self.records[row.number] = trial_record(self._study, row, replicas[row.number])

    def begin(self, phase: Phase) -> None:
        """Count from here on what this phase counts."""
        self.read()
        self._phase = phase
        if phase == "replicate":
            fresh = [replica for replica in self._ledger.replicas(self._study.name) if replica.phase == phase]
            self._n_fresh = len(fresh)
            self._n_fresh_done = sum(replica.state in FINISHED for replica in fresh)
        self._estimate.start(self.n_done)

    def add(self, row: TrialRow) -> None:
        """A trial that was proposed, here or elsewhere."""
        self.rows[row.number] = row
        self.taken.add(row.config.config_id)

    def end(self, number: int, state: State, last: TrialResult | None) -> TrialRecord:
        """All replicas that the trial was made with have ended, `last` the last of them: its score."""
        row = self.rows[number] = replace(self.rows[number], state=state)
        if last is not None and len(self._study.seeds) == 1:  # then it is the only one
            replicas = [ReplicaRow(number, self._study.seeds[0], row.phase, state, 1, 0, False, last)]
        else:
            replicas = self._ledger.replicas(self._study.name, number)
        self.records[number] = trial_record(self._study, row, replicas)
        return self.records[number]

    def end_fresh_seed(self, number: int) -> TrialRecord | None:
        """A fresh seed of a trial of the front has ended: its record, once all of its fresh seeds have."""
        self._n_fresh_done += 1
        replicas = self._ledger.replicas(self._study.name, number)
        self.records[number] = trial_record(self._study, self.rows[number], replicas)
        fresh = [replica for replica in replicas if replica.phase == "replicate"]
        return self.records[number] if all(replica.state in FINISHED for replica in fresh) else None

    def results(self) -> StudyResults:
        """The trials that have ended."""
        return results_of(self._study, self.budget, self.records.values())

    def front(self) -> tuple[TrialRecord, ...]:
        results = self.results()
        return front(results.trials, results.objectives, results.constraints)

    @property
    def n_total(self) -> int:
        """Of what the phase counts: trials, or in the replication replicas."""
        if self._phase == "replicate":
            return self._n_fresh
        return len(self.rows) if self.all_proposed else self.budget

    @property
    def n_done(self) -> int:
        return self._n_fresh_done if self._phase == "replicate" else len(self.records)

    def standing(self, n_running: int) -> Standing:
        """How far the phase is, for people."""
        # Trials on different tasks have no front together.
        members = self.front() if len(self._study.by_task()) == 1 else ()
        names = list(self._study.objectives)
        return Standing(
            phase=self._phase,
            done=self.n_done,
            total=self.n_total,
            running=n_running,
            failed=sum(record.state in ("failed", "quarantined") for record in self.records.values()),
            best=f"{spoken(names[0])} {_value(members[0], names[0])}" if members else None,
            front=tuple(
                f"trial {record.number}: {', '.join(_value(record, name) for name in names)}  "
                f"{describe(record.config.arch)}"
                for record in members
            ),
            seconds_left=self._estimate.seconds_left(self.n_done, self.n_total),
        )


def _value(record: TrialRecord, name: str) -> str:
    return format_value(name, record.objectives[name])
