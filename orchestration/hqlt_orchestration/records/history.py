"""A study's sampling history in Optuna's own tables, written in a transaction for a trial's start and one for its end.

Optuna's storage writes a trial parameter by parameter, with a look at the earlier trials for each: 18 ms of processor
time for a trial of nine parameters, against 2 here, which was most of what the platform cost. What is written is what
Optuna would have written (tests/orchestration/test_history.py compares), so its own tools read it.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState

from hqlt_orchestration.records.database import BUSY_TIMEOUT_S, configure_sqlite, patiently, store_errors

NUMBER = "hqlt_number"  # the trial's number in the ledger, as an attribute of its Optuna trial
_trials = models.TrialModel.__table__
_params = models.TrialParamModel.__table__
_user_attributes = models.TrialUserAttributeModel.__table__
_system_attributes = models.TrialSystemAttributeModel.__table__
_values = models.TrialValueModel.__table__


def create_optuna_tables(url: str, engine: sa.Engine) -> None:
    """Make Optuna's tables at `url`, which `engine` reaches. Not safe against others who do the same: see `Ledger`.

    All in one transaction, as Optuna would not: a process killed between a table and its indexes would leave one that
    takes two studies of the same name, since an index is made with its table or never.
    """
    with engine.connect() as connection, connection.begin():
        models.BaseModel.metadata.create_all(connection)
    storage = RDBStorage(url, _engine_options(url))
    storage.remove_session()
    storage.engine.dispose()


def _engine_options(url: str) -> dict[str, Any]:
    """What Optuna's storage hands to its engine."""
    return {"connect_args": {"timeout": BUSY_TIMEOUT_S}} if url.startswith("sqlite") else {"pool_pre_ping": True}


def open_optuna(url: str) -> BaseStorage:
    """Optuna's storage at `url`, whose tables are there, cached in memory."""
    return get_storage(_open_tables(url))


def _open_tables(url: str) -> RDBStorage:
    options = _engine_options(url)
    storage = patiently(url, lambda: RDBStorage(url, options, skip_table_creation=True, skip_compatibility_check=True))
    if url.startswith("sqlite"):
        sa.event.listen(storage.engine, "connect", lambda connection, _record: configure_sqlite(connection))
    return storage


def stored_history(url: str, name: str) -> dict[int, list[FrozenTrial]]:
    """A study's trials in Optuna's tables, by their number in the ledger; nothing is written."""
    found: dict[int, list[FrozenTrial]] = {}
    with store_errors(url):
        storage = _open_tables(url)
        try:
            for trial in storage.get_all_trials(storage.get_study_id_from_name(name), deepcopy=False):
                found.setdefault(trial.user_attrs[NUMBER], []).append(trial)
        except KeyError:  # the study's first driver died before it wrote any
            return {}
        finally:
            storage.remove_session()
            storage.engine.dispose()
    return found


def delete_from_optuna(url: str, name: str) -> None:
    """Remove a study's sampling history; nothing happens if there is none."""
    with contextlib.suppress(KeyError):
        optuna.delete_study(study_name=name, storage=open_optuna(url))


def write_start(
    tx: sa.Connection,
    study_id: int,
    params: Mapping[str, Any],
    distributions: Mapping[str, BaseDistribution],
    user_attributes: Mapping[str, Any],
    system_attributes: Mapping[str, Any],
) -> tuple[int, int]:
    """Add a RUNNING trial in the transaction `tx`, which must hold the write lock. Returns its Optuna id and number."""
    number: int = tx.execute(sa.select(sa.func.count()).where(_trials.c.study_id == study_id)).scalar_one()
    started = _trials.insert().values(study_id=study_id, number=number, state=TrialState.RUNNING, datetime_start=_now())
    trial_id: int = tx.execute(started.returning(_trials.c.trial_id)).scalar_one()
    _insert(
        tx,
        _params,
        [
            {
                "trial_id": trial_id,
                "param_name": name,
                "param_value": distributions[name].to_internal_repr(value),
                "distribution_json": distribution_to_json(distributions[name]),
            }
            for name, value in params.items()
        ],
    )
    for table, attributes in ((_user_attributes, user_attributes), (_system_attributes, system_attributes)):
        rows = [
            {"trial_id": trial_id, "key": key, "value_json": json.dumps(value)} for key, value in attributes.items()
        ]
        _insert(tx, table, rows)
    return trial_id, number


def find_start(tx: sa.Connection, study_id: int, number: int) -> tuple[int, int] | None:
    """Optuna's id and number of the trial that is `number` in the ledger, or None."""
    found = tx.execute(
        sa.select(_trials.c.trial_id, _trials.c.number)
        .join(_user_attributes, _user_attributes.c.trial_id == _trials.c.trial_id)
        .where(
            _trials.c.study_id == study_id,
            _user_attributes.c.key == NUMBER,
            _user_attributes.c.value_json == json.dumps(number),
        )
    ).first()
    return None if found is None else (found.trial_id, found.number)


def write_end(tx: sa.Connection, trial_id: int, state: TrialState, values: Sequence[float] | None) -> bool:
    """End a RUNNING trial in the transaction `tx`. Returns False, and changes nothing, if it has ended already."""
    running = sa.and_(_trials.c.trial_id == trial_id, _trials.c.state == TrialState.RUNNING)
    ended = tx.execute(_trials.update().where(running).values(state=state, datetime_complete=_now()))
    if not ended.rowcount:
        return False
    finite = models.TrialValueModel.TrialValueType.FINITE
    rows = [
        {"trial_id": trial_id, "objective": index, "value": value, "value_type": finite}
        for index, value in enumerate(values or ())
    ]
    _insert(tx, _values, rows)
    return True


def _insert(tx: sa.Connection, table: Any, rows: list[dict[str, Any]]) -> None:
    if rows:
        tx.execute(table.insert(), rows)


def _now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)
