"""Where the figures of a run go: ``metrics.jsonl``, TensorBoard, and the terminal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

METRICS = "metrics.jsonl"


class MetricsWriter:
    """Appends records to ``metrics.jsonl`` and their numbers to TensorBoard; only the main rank has one.

    Args:
        num_steps_done: records of later steps are dropped from an existing file: a resumed run computes them again.
    """

    def __init__(self, run_directory: Path, *, num_steps_done: int) -> None:
        self.path = run_directory / METRICS
        _drop_records_after(self.path, num_steps_done)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run_directory / "tensorboard"), purge_step=num_steps_done + 1)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One record. ``kind`` is ``train``, ``validation`` or ``experts``; nested values stay out of TensorBoard."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_metrics(run_directory: Path, kind: str) -> list[dict[str, Any]]:
    """All records of one kind, in order; an unfinished last line is left out."""
    path = run_directory / METRICS
    if not path.is_file():
        return []
    return [record for record in _records(path) if record["kind"] == kind]


def _records(path: Path) -> list[dict[str, Any]]:
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break  # the process died while writing it
    return records


def _drop_records_after(path: Path, num_steps_done: int) -> None:
    if not path.is_file():
        return
    kept = [record for record in _records(path) if record["step"] <= num_steps_done]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    os.replace(temporary, path)


class ProgressBar:
    """A bar on a terminal; elsewhere one plain line per logged record. Silent on ranks other than the main one."""

    def __init__(self, title: str, total: int, *, start: int = 0, enabled: bool = True) -> None:
        self.title, self.total, self.enabled = title, total, enabled
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if enabled and console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=console,
            )
            self._bar.start()
            self._task = self._bar.add_task(title, total=total, completed=start, figures="")

    def update(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def show(self, step: int, figures: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=figures)
        elif self.enabled:
            sys.stderr.write(f"{self.title} {step}/{self.total} {figures}\n")
            sys.stderr.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
