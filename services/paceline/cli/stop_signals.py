"""The signals that end `paceline up`."""

from __future__ import annotations

import asyncio
import signal


class StopSignals:
    """SIGTERM, SIGHUP and Ctrl-C ask for an orderly end; a second Ctrl-C for one at once."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.kill = asyncio.Event()

    def install(self) -> None:
        """Listen; call inside the running loop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            # nohup ignores SIGHUP, and means it.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                loop.add_signal_handler(number, self._note, number)

    def _note(self, number: signal.Signals) -> None:
        if self.stop.is_set() and number == signal.SIGINT:
            self.kill.set()
        self.stop.set()
