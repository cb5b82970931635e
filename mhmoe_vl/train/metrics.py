"""Where the figures of a run go: ``metrics.jsonl``, TensorBoard, and the terminal."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from torch.utils.tensorboard import SummaryWriter

from mhmoe_vl.errors import OutputError

METRICS = "metrics.jsonl"

logger = logging.getLogger(__name__)


class MetricsWriter:
    """Appends records to ``metrics.jsonl`` and their numbers to TensorBoard; only the main rank has one.

    A disk that is full for a while does not end a run: records wait in memory until they can be written.

    Args:
        num_steps_done: records of later steps are dropped from an existing file: a resumed run computes them again.

    Raises:
        OutputError: the files cannot be opened.
    """

    def __init__(self, run_directory: Path, *, num_steps_done: int) -> None:
        self.path = run_directory / METRICS
        self._waiting: list[bytes] = []
        try:
            _drop_records_after(self.path, num_steps_done)
            # Unbuffered: what could not be written must not be tried again behind our back.
            self._file = self.path.open("ab", buffering=0)
            self._board: SummaryWriter | None = SummaryWriter(
                str(run_directory / "tensorboard"), purge_step=num_steps_done + 1
            )
        except OSError as error:
            raise OutputError(f"{run_directory}: cannot write metrics: {error.strerror or error}") from None

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One record. ``kind`` is ``train``, ``validation`` or ``experts``; nested values stay out of TensorBoard.

        Numbers that are not finite become null: NaN is not JSON.
        """
        self._waiting.append(_line({"kind": kind, "step": step, **values}))
        self._append()
        try:
            for name, value in values.items():
                if self._board is not None and isinstance(value, int | float):
                    self._board.add_scalar(f"{kind}/{name}", value, step)
        except OSError as error:
            self._end_board(error)

    def close(self) -> None:
        """Write what still waits; what cannot be written now is lost, and said to be."""
        self._append()
        self._file.close()
        try:
            if self._board is not None:
                self._board.close()
        except OSError as error:
            self._end_board(error)
        if self._waiting:
            logger.warning("%s: the last %d records could not be written and are lost", self.path, len(self._waiting))

    def _append(self) -> None:
        """Write what waits, all or nothing: a record must not follow half of another."""
        lines = b"".join(self._waiting)
        size = self._file.seek(0, os.SEEK_END)
        num_written = 0
        try:
            while num_written < len(lines):
                num_written += self._file.write(lines[num_written:])
        except OSError as error:
            self._file.truncate(size)
            if len(self._waiting) == 1:
                logger.warning(
                    "%s: cannot write: %s; records wait in memory until it can", self.path, error.strerror or error
                )
            return
        self._waiting.clear()

    def _end_board(self, error: OSError) -> None:
        """TensorBoard's writer does not recover."""
        logger.warning(
            "%s: TensorBoard gets no more events until the run is resumed: %s",
            self.path.parent,
            error.strerror or error,
        )
        self._board = None


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(_finite(record), allow_nan=False).encode() + b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


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
    temporary.write_bytes(b"".join(map(_line, kept)))
    os.replace(temporary, path)


class ProgressBar:
    """A bar on a terminal; elsewhere one plain line per logged record. Silent on ranks other than the main one."""

    def __init__(self, title: str, total: int, *, start: int = 0, enabled: bool = True) -> None:
        self.title, self.total, self.enabled = title, total, enabled
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if enabled and console.is_terminal:
            # What does not wrap keeps its width: on a narrow terminal the bar alone gets shorter.
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                TimeRemainingColumn(table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[figures]}"),
                console=console,
            )
            self._bar.start()
            self._task = self._bar.add_task(title, total=total, completed=start, figures="")

    def update(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def show(self, step: int, figures: str) -> None:
        """Figures of the last interval, beside the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=figures)
        else:
            self._print(step, figures)

    def note(self, step: int, figures: str) -> None:
        """Figures that stay, above the bar, however many lines they take."""
        if self._bar is not None:
            self._bar.console.print(f"{self.title} {step}/{self.total} {figures}", markup=False, highlight=False)
        else:
            self._print(step, figures)

    def _print(self, step: int, figures: str) -> None:
        # What is printed often goes to a file on the disk that may be full.
        with suppress(OSError):
            if self.enabled:
                sys.stderr.write(f"{self.title} {step}/{self.total} {figures}\n")
                sys.stderr.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
