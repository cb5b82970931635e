"""Several processes on this machine: copies of the same command, which share the cells by their locks."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mhmoe_vl.errors import UserError
from mhmoe_vl.study.cells import Plan
from mhmoe_vl.study.execute import is_finished
from mhmoe_vl.train.metrics import ProgressBar
from mhmoe_vl.train.stop import STOPPED, stop_signals

logger = logging.getLogger(__name__)

#: Below ``out``: what the workers print.
LOGS = "logs"


class WorkerError(UserError):
    """A worker failed; its own error is the last line of its log."""

    exit_code = 70


def run_workers(plan: Plan, arguments: Sequence[str], *, num_workers: int) -> None:
    """Start ``num_workers`` processes with the command line ``arguments`` and wait for them.

    Raises:
        WorkerError: one of them failed; the others have saved and stopped.
        SystemExit: with :data:`STOPPED`, once asked to stop; all have saved.
    """
    logs = plan.out / LOGS
    logs.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {"OMP_NUM_THREADS": str(max(1, cores // num_workers))} | os.environ
    command = [sys.executable, "-m", "mhmoe_vl.study", *arguments, "--only-run"]
    paths = [logs / f"worker{number}.log" for number in range(num_workers)]
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for path in paths:
            with path.open("ab") as log:
                workers.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        _wait(plan, workers, paths)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGTERM)
        for worker in workers:
            worker.wait()


def _wait(plan: Plan, workers: list[subprocess.Popen[bytes]], logs: list[Path]) -> None:
    num_cells, num_shown = len(plan.cells), -1
    unfinished = list(plan.cells)
    with stop_signals(announce=True) as stop, ProgressBar("cells", num_cells) as bar:
        while True:
            # What is finished stays so: a look at hundreds of cells would take time from those who run them.
            unfinished = [cell for cell in unfinished if not is_finished(plan, cell)]
            num_done = num_cells - len(unfinished)
            if num_done != num_shown:
                bar.update(num_done)
                bar.show(num_done, "finished")
                num_shown = num_done
            codes = [worker.poll() for worker in workers]
            failed = [(code, log) for code, log in zip(codes, logs, strict=True) if code]
            if stop or any(code == STOPPED for code, _ in failed):
                raise SystemExit(STOPPED)
            if failed:
                code, log = failed[0]
                lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                last = lines[-1].removeprefix("error: ") if lines else "no message"
                raise WorkerError(f"{log}: a worker ended with exit code {code}: {last}")
            if all(code == 0 for code in codes):
                return
            time.sleep(0.5)
