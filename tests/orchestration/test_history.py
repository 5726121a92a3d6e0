from datetime import datetime
from pathlib import Path

import optuna
from hqlt_orchestration.records.history import open_optuna, write_end, write_start
from hqlt_orchestration.records.ledger import Ledger
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

PARAMS = {"rule": "delta", "window": None, "n_layers": 4, "learning_rate": 3e-3, "delay_beta": True}
DISTRIBUTIONS = {
    "rule": CategoricalDistribution(("additive", "delta")),
    "window": CategoricalDistribution((4, None)),
    "n_layers": IntDistribution(2, 8, step=2),
    "learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
    "delay_beta": CategoricalDistribution((False, True)),
}
ATTRIBUTES = {"nsga2:generation": 3, "tpe:relative_params:0": '{"a": 1}'}


def shape(trial: FrozenTrial) -> dict[str, object]:
    """All of a trial but its id and the moment."""
    return {
        "state": trial.state,
        "number": trial.number,
        "values": trial.values,
        "params": trial.params,
        "distributions": trial.distributions,
        "user": trial.user_attrs,
        "system": trial.system_attrs,
        "timed": (trial.datetime_start is not None, trial.datetime_complete is not None),
    }


def test_optuna_reads_back_what_it_would_have_written_itself(tmp_path: Path) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path}/hqlt.db")
    storage = open_optuna(ledger.url)
    names = ("theirs", "ours")
    theirs, ours = (
        optuna.create_study(study_name=name, storage=storage, directions=["minimize", "maximize"]) for name in names
    )
    ours_id = storage.get_study_id_from_name("ours")
    for values in ([1.0, -2.5], None):
        state = TrialState.COMPLETE if values else TrialState.FAIL
        template = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=PARAMS,
            distributions=DISTRIBUTIONS,
            user_attrs={"hqlt_number": 7},
            system_attrs=ATTRIBUTES,
        )
        trial_id = storage.create_new_trial(storage.get_study_id_from_name("theirs"), template)
        storage.set_trial_state_values(trial_id, state, values)
        with ledger.write() as tx:
            place = write_start(tx, ours_id, PARAMS, DISTRIBUTIONS, {"hqlt_number": 7}, ATTRIBUTES)
        running = ours.trials[-1]
        assert running.state == TrialState.RUNNING
        assert abs((running.datetime_start or datetime.min) - datetime.now()).total_seconds() < 60
        with ledger.write() as tx:
            assert write_end(tx, place[0], state, values)
            assert not write_end(tx, place[0], TrialState.FAIL, None)
    assert [shape(trial) for trial in ours.trials] == [shape(trial) for trial in theirs.trials]
