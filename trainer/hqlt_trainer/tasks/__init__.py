"""What a model is trained and judged on: `build_task` turns a task's description into its batches."""

from typing import TYPE_CHECKING, assert_never

from hqlt_search_space import tasks

if TYPE_CHECKING:
    from hqlt_trainer.tasks.batch import TaskData


def build_task(task: tasks.Task) -> "TaskData":
    """The batches, chance level and reference scores of `task`. Reads the corpus if it has one.

    Raises:
        DataError: the corpus cannot be used, or is not the one whose hash the task carries.
        ValueError: the task `nothing`, which has no data.
    """
    # Imported here, so that whoever only needs the name of this package does not load torch.
    from hqlt_trainer.tasks.formal_language import FormalLanguageData
    from hqlt_trainer.tasks.language_modelling import LanguageModellingData
    from hqlt_trainer.tasks.mqar import MqarData

    match task:
        case tasks.Parity() | tasks.EvenPairs() | tasks.CycleNavigation() | tasks.ModularArithmetic():
            return FormalLanguageData(task)
        case tasks.Mqar():
            return MqarData(task)
        case tasks.LanguageModelling():
            return LanguageModellingData(task)
        case tasks.Nothing():
            raise ValueError("the task 'nothing' trains nothing and has no data")
        case _:
            assert_never(task)
