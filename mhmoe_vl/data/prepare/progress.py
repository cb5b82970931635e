"""Progress of long preparation work on stderr: a bar on a terminal, an occasional line in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

ResultT = TypeVar("ResultT")

_SECONDS_BETWEEN_LINES = 15.0
_SECONDS_BETWEEN_REFRESHES = 0.1


def show_progress(
    results: Iterable[ResultT], *, label: str, amount: Callable[[ResultT], int], total: int | None = None
) -> Iterator[ResultT]:
    """Pass ``results`` through and count ``amount`` of each, for example ``packing coco: 12000 of 113287``.

    Args:
        total: sum of all amounts; None if nobody knows it before the end.
    """
    console = Console(stderr=True)
    of_total = "" if total is None else f" of {total}"
    seconds_between = _SECONDS_BETWEEN_REFRESHES if console.is_terminal else _SECONDS_BETWEEN_LINES
    done, last_shown = 0, time.monotonic()
    columns: list[ProgressColumn] = [SpinnerColumn(), TextColumn("{task.description}: {task.completed}" + of_total)]
    if total is not None:
        columns.append(BarColumn())
    columns.append(TimeElapsedColumn())
    if total is not None:
        columns += [TextColumn("left"), TimeRemainingColumn()]
    # Without a refresh thread: worker processes may be forked while the bar is shown.
    with Progress(*columns, console=console, auto_refresh=False, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total)
        for result in results:
            done += amount(result)
            bar.update(task, completed=done)
            if time.monotonic() - last_shown > seconds_between:
                last_shown = time.monotonic()
                if console.is_terminal:
                    bar.refresh()
                else:
                    sys.stderr.write(f"{label}: {done}{of_total}\n")
            yield result
