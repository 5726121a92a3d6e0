"""How a user ends a study that runs: in good order, or at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """Ctrl-C, SIGTERM and a terminal that is closed: the first asks the loop to end in good order, the second ends the
    process. What somebody has chosen to ignore (`nohup`) stays ignored.
    """

    def __init__(self) -> None:
        self.asked = False
        self._heard: list[signal.Signals] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Handle the signals meanwhile. Only the main thread can; elsewhere nothing is handled."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        asking = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.getsignal(number) for number in asking}
        self._heard = [number for number in asking if before[number] != signal.SIG_IGN]
        self.listen()
        try:
            yield
        finally:
            for number in self._heard:
                signal.signal(number, before[number])
            self._heard = []

    def listen(self) -> None:
        """Handle the signals that are watched, whoever has taken them meanwhile: Ray does when it starts."""
        for number in self._heard:
            signal.signal(number, self._ask)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
