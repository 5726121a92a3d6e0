"""What the README of search_space says is what the code has."""

from pathlib import Path

from hqlt_search_space.axes import AXES
from hqlt_search_space.cost import COSTS
from hqlt_search_space.documentation import axes_table
from hqlt_search_space.paper import MODELS

README = (Path(__file__).parents[2] / "search_space" / "README.md").read_text(encoding="utf-8")


def test_the_table_of_axes_is_fresh() -> None:
    """Renew it with: python -m hqlt_search_space.documentation"""
    assert axes_table() in README


def test_every_axis_has_a_meaning() -> None:
    assert [axis.name for axis in AXES.values() if not axis.meaning.endswith(".")] == []


def test_every_cost_is_explained() -> None:
    assert [name for name in COSTS if f"| `{name}` |" not in README] == []


def test_every_family_of_the_papers_models_is_in_the_table_of_sizes() -> None:
    families = ("transformer_pp", "deltanet", "hqlt_sum", "hqlt_dynamic_scalar", "hqlt_linear_attention")
    assert [name for name in families if f"`{name}`" not in README] == []
    assert set(families) < set(MODELS)
