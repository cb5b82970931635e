"""Being asked to stop: a signal ends the step, the run saves and exits."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

#: Exit code of a run that was asked to stop and saved: "try again later" in sysexits.
STOPPED = 75

# The cursor, which the progress bar hides, comes back: a second Ctrl-C leaves no time for it.
_NOTICE = b"\x1b[?25h\nstopping after this step, and saving; Ctrl-C once more stops at once, without saving\n"


@contextmanager
def stop_signals(*, announce: bool) -> Iterator[list[int]]:
    """A list that becomes non-empty once SIGTERM, SIGUSR1 or SIGINT (Ctrl-C) arrives; a second SIGINT ends the process.

    Args:
        announce: say so on a terminal, where somebody waits.
    """
    received: list[int] = []
    own_process = os.getpid()

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            # Ctrl-C goes to the loader's forked workers as well.
            if announce and os.getpid() == own_process and sys.stderr.isatty():
                # Not through sys.stderr: its buffer may be in use where the signal struck.
                os.write(sys.stderr.fileno(), _NOTICE)

    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    previous = {number: signal.signal(number, receive) for number in signals}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
