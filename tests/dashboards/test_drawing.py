import itertools

from hqlt_dashboards.curves import curves_chart
from hqlt_dashboards.drawing import MOST_TICKS, byte_ticks, page
from hqlt_dashboards.plots import front_chart
from hypothesis import given
from hypothesis import strategies as st


def test_a_page_of_two_charts_holds_plotly_once(make_results):
    results = make_results(2)
    text = page("both", [front_chart(results), curves_chart(results, "train_loss_nats")])
    assert text.count("* plotly.js v") == 1
    assert text.count('id="chart-') == 2
    assert "max-width: 820px" in text  # and no narrower window has to be scrolled
    assert '"width":820' not in text


@given(st.lists(st.integers(1, 2**44), min_size=1, max_size=5))
def test_an_axis_of_bytes_has_few_ticks_evenly_spread_from_the_smallest_value_on(values):
    ticks = byte_ticks("state_bytes", values)
    if len(set(values)) == 1:
        assert ticks == []
        return
    assert 2 <= len(ticks) <= MOST_TICKS
    assert ticks[0] <= min(values)
    neighbours = list(itertools.pairwise(ticks))
    assert all(before < after for before, after in neighbours)
    assert len({after - before for before, after in neighbours}) == 1 or len({a / b for b, a in neighbours}) == 1
