from io import StringIO

import pytest
from hqlt_orchestration.driving.progress import Estimate, ProgressView, Standing
from rich.console import Console

STANDING = Standing(
    phase="replicate",
    done=3,
    total=16,
    running=2,
    failed=1,
    best="normalised validation accuracy 0.9834",
    front=("trial 7: 0.9834, 1 KiB  fast_weight delta x24, attention full x24", "trial 1: 0.02, 256 B  attention W2"),
    seconds_left=5400.0,
)


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("terminal", ["xterm", "dumb", None], ids=lambda kind: kind or "file")
def test_a_user_sees_trials_done_running_failed_the_best_the_front_and_the_end(
    terminal: str | None, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", terminal or "xterm")
    output = StringIO()
    console = Console(file=output, width=width, force_terminal=terminal is not None, color_system=None, soft_wrap=True)
    with ProgressView("small", console) as view:
        view.show(STANDING)
        view.say("trial 7 ran out of memory")
    shown = output.getvalue()
    for part in ("3/16", "0.9834, 2 on the front", "2 running", "1 failed", "90 min left", "trial 7 ran out of memory"):
        assert part in shown
    assert ("trial 1: 0.02, 256 B  attention W2" in shown) == (terminal == "xterm")  # there the front is live


def test_the_end_is_estimated_from_what_this_process_did() -> None:
    now = 100.0
    estimate = Estimate(clock=lambda: now)
    estimate.start(10)
    assert estimate.seconds_left(10, 20) is None
    now = 120.0
    assert estimate.seconds_left(14, 20) == pytest.approx(30.0)
    assert estimate.seconds_left(20, 20) == 0.0
