"""Progress of long preparation work on stderr: a bar on a terminal, an occasional line in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

ResultT = TypeVar("ResultT")

_SECONDS_BETWEEN_LINES = 15.0


def show_progress(results: Iterable[ResultT], *, label: str, amount: Callable[[ResultT], int]) -> Iterator[ResultT]:
    """Pass ``results`` through and count ``amount`` of each, for example ``packing coco: 12000``."""
    console = Console(stderr=True)
    done, last_line = 0, time.monotonic()
    columns = (SpinnerColumn(), TextColumn("{task.description}: {task.completed}"), TimeElapsedColumn())
    # Without a refresh thread: worker processes may be forked while the bar is shown.
    with Progress(*columns, console=console, auto_refresh=False, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        for result in results:
            done += amount(result)
            bar.update(task, completed=done, refresh=True)
            if not console.is_terminal and time.monotonic() - last_line > _SECONDS_BETWEEN_LINES:
                sys.stderr.write(f"{label}: {done}\n")
                last_line = time.monotonic()
            yield result
