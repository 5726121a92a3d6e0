"""Random settings of axes, sensible or not, for the properties that every model must have."""

from typing import get_args

import pytest
from hqlt_search_space.axes import AXES, MODEL_AXES, AxisValue
from hypothesis import strategies as st

FEW_VALUES: dict[str, list[AxisValue]] = {
    "ratio": ["1:0", "0:1", "1:1", "3:1", "1:2"],
    "window": [1, 3, 8, None],
    "attention_window": ["window", 4, None],
    "fw_chunk": ["window", 8, 24],
    "n_householder": [1, 2, 3],
    "short_conv": [None, 2, 4],
    "d_model": [16, 24, 48],
    "n_layers": [1, 2, 3, 5],
    "n_heads": [1, 2, 4, 5],
    "mlp_ratio": [None, 0.5, 2.0],
    "branch_norm": [False, True],
    "delay_beta": [False, True],
    "output_gate": [False, True],
}


def _values(axis: str) -> list[AxisValue]:
    return FEW_VALUES.get(axis) or list(get_args(AXES[axis].annotation))


@pytest.fixture(scope="session")
def model_settings() -> st.SearchStrategy[dict[str, AxisValue]]:
    """Any of the model's axes, each with any of a few values; many combinations make no sense."""
    return st.fixed_dictionaries({}, optional={axis: st.sampled_from(_values(axis)) for axis in MODEL_AXES})


@pytest.fixture(scope="session")
def sensible_settings() -> st.SearchStrategy[dict[str, AxisValue]]:
    """All of the model's axes with values that always make a model."""
    values = {axis: st.sampled_from(_values(axis)) for axis in MODEL_AXES if axis != "feature_map"}
    values |= {"n_heads": st.sampled_from([1, 2, 4]), "window": st.sampled_from([1, 3, 8])}
    values |= {"fw_chunk": st.sampled_from(["window", 24]), "n_layers": st.sampled_from([2, 3, 5])}
    return st.fixed_dictionaries(values)
