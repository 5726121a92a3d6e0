"""Between Optuna's samplers and Optuna's tables: suggestions stay in memory until they are known to be wanted."""

import copy
from collections.abc import Container, Sequence
from datetime import datetime
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hqlt_orchestration.records.database import patiently, store_errors

_HELD = -1  # the Optuna id of a trial that is held


def new_trial(trial_id: int, number: int) -> FrozenTrial:
    """A trial that runs, of which nothing is known yet."""
    return FrozenTrial(
        number=number,
        state=TrialState.RUNNING,
        value=None,
        datetime_start=datetime.now(),
        datetime_complete=None,
        params={},
        distributions={},
        user_attrs={},
        system_attrs={},
        intermediate_values={},
        trial_id=trial_id,
    )


class Holding(BaseStorage):
    """An Optuna storage that holds a new trial back until it is known to be wanted.

    Samplers write to the trial that they are asked for, parameter by parameter, a transaction each. Here those writes
    stay in memory: a trial that is dropped leaves no trace, and one that is wanted is written in one transaction.
    They also read the whole history many times for one suggestion; it is read once, by `look`. The rest goes through.
    """

    def __init__(self, stored: BaseStorage, url: str) -> None:
        self.stored = stored
        self._url = url
        self.study_id = _HELD
        self.history: list[FrozenTrial] = []
        self._attributes: dict[str, Any] | None = None
        self.next_number: int | None = None
        self._held: FrozenTrial | None = None

    def look(self) -> list[FrozenTrial]:
        """The history as it is stored now, which is what samplers see until the next look."""
        with store_errors(self._url):
            stored = patiently(self._url, lambda: self.stored.get_all_trials(self.study_id, deepcopy=False))
        self.history = list(stored)
        self._attributes = None
        return self.history

    def let_go(self) -> FrozenTrial:
        """The trial that was held, which is now forgotten."""
        assert self._held is not None, "nothing was asked for"
        held, self._held, self.next_number = self._held, None, None
        return held

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        assert template_trial is None, "accepted trials are written to `stored`"
        number = len(self.history) if self.next_number is None else self.next_number
        self._held = new_trial(_HELD, number)
        return _HELD

    def _held_trial(self, trial_id: int) -> FrozenTrial:
        assert trial_id == _HELD, f"a sampler writes to the stored trial {trial_id}"
        assert self._held is not None, "nothing is held"
        return self._held

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        held = self._held_trial(trial_id)
        held.distributions[param_name] = distribution
        held.params[param_name] = distribution.to_external_repr(param_value_internal)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._held_trial(trial_id).system_attrs[key] = value

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._held_trial(trial_id).user_attrs[key] = value

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        raise NotImplementedError("learning curves stay out of Optuna: they crash TPE with several objectives")

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        return self.stored.set_trial_state_values(trial_id, state, values)

    def get_trial(self, trial_id: int) -> FrozenTrial:
        return self._held_trial(trial_id) if trial_id == _HELD else self.stored.get_trial(trial_id)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        seen = [trial for trial in self.history if states is None or trial.state in states]
        return copy.deepcopy(seen) if deepcopy else seen

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        return self.stored.create_new_study(directions, study_name)

    def delete_study(self, study_id: int) -> None:
        self.stored.delete_study(study_id)

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        self.stored.set_study_user_attr(study_id, key, value)

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self._attributes = None
        self.stored.set_study_system_attr(study_id, key, value)

    def get_study_id_from_name(self, study_name: str) -> int:
        return self.stored.get_study_id_from_name(study_name)

    def get_study_name_from_id(self, study_id: int) -> str:
        return self.stored.get_study_name_from_id(study_id)

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        return self.stored.get_study_directions(study_id)

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return self.stored.get_study_user_attrs(study_id)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        if self._attributes is None:
            self._attributes = self.stored.get_study_system_attrs(study_id)
        return dict(self._attributes)

    def get_all_studies(self) -> list[Any]:
        return self.stored.get_all_studies()
