from io import StringIO

import pytest
from hqlt_orchestration.driving.progress import Estimate, ProgressView, Standing
from rich.console import Console

STANDING = Standing("replicate", 3, 16, 2, 1, "normalised validation accuracy", "0.9834", 12, 5400.0)


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "file"])
def test_a_user_sees_trials_done_the_best_the_front_failures_and_the_end(terminal: bool) -> None:
    output = StringIO()
    console = Console(file=output, width=80, force_terminal=terminal, color_system=None)
    with ProgressView("small", console) as view:
        view.show(STANDING)
        view.say("trial 7 ran out of memory")
    shown = output.getvalue()
    for part in ("3/16", "0.9834", "12 on the front", "1 failed", "90 min left", "trial 7 ran out of memory"):
        assert part in shown


def test_the_end_is_estimated_from_what_this_process_did() -> None:
    now = 100.0
    estimate = Estimate(clock=lambda: now)
    estimate.start(10)
    assert estimate.seconds_left(10, 20) is None
    now = 120.0
    assert estimate.seconds_left(14, 20) == pytest.approx(30.0)
    assert estimate.seconds_left(20, 20) == 0.0
