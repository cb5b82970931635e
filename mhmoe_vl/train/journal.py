"""What a run notes about its steps, between one log line and the next."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mhmoe_vl.data.loader import MicroBatch
from mhmoe_vl.distributed.collectives import gather_objects
from mhmoe_vl.distributed.world import World
from mhmoe_vl.errors import DataError
from mhmoe_vl.moe import RoutingStats, share_active
from mhmoe_vl.moe.stats import ACTIVATION_THRESHOLDS
from mhmoe_vl.tasks.visual_tokenizer import VisualTokenizerConfig
from mhmoe_vl.train.alarm import CodebookAlarm, ExpertAlarm
from mhmoe_vl.train.config import RunConfig
from mhmoe_vl.train.metrics import MetricsWriter
from mhmoe_vl.train.step import Figures

logger = logging.getLogger(__name__)


class Journal:
    """Collects figures between log lines and turns them into records."""

    def __init__(self, config: RunConfig, world: World, writer: MetricsWriter | None, first_step: int) -> None:
        self.config, self.world, self.writer = config, world, writer
        self.figures = Figures()
        self.num_broken = self.num_skipped = 0
        self.last_problem = ""
        self._has_warned = False
        self._alarm = ExpertAlarm()
        self._codebook_alarm = (
            CodebookAlarm(config.task.num_codes) if isinstance(config.task, VisualTokenizerConfig) else None
        )
        self._since, self._time = first_step, time.perf_counter()

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if self.writer is not None:
            self.writer.write(kind, step, values)

    @contextmanager
    def not_training(self) -> Iterator[None]:
        """Around validation and saving, whose time is no part of the training speed."""
        start = time.perf_counter()
        yield
        self._time += time.perf_counter() - start

    def note_problems(self, micro_batches: list[MicroBatch]) -> int:
        """Write down this rank's broken samples; returns their number."""
        lines = [line for micro in micro_batches for batch in micro.values() for line in batch.problems]
        if lines:
            self.last_problem = lines[-1]
            path = Path(self.config.out) / f"broken_samples.rank{self.world.rank}.txt"
            try:
                with path.open("a", encoding="utf-8") as file:
                    file.writelines(f"{line}\n" for line in lines)
            except OSError as error:
                # A list to look at later is no reason to lose the run: the number is counted all the same.
                logger.warning("%s: cannot write: %s; not listed: %s", path, error.strerror or error, lines[-1])
        return len(lines)

    def count_broken(self, number: int) -> None:
        """Stop if broken samples are not exceptions. Collective.

        Args:
            number: of this step, over all ranks.

        Raises:
            DataError: more than 5 % of the samples since the last log line were broken; on all ranks alike.
        """
        self.num_broken += number
        if self.num_broken > max(20, 0.05 * self.config.data.batch_size * self.config.log_every):
            last = next(line for line in reversed(gather_objects(self.last_problem)) if line)
            error = DataError(f"{self.num_broken} broken samples since the last log line; the last: {last}")
            error.is_shared = True
            raise error

    def count_skipped(self, step: int) -> None:
        """Step number ``step`` changed nothing, because its loss or gradient was not finite; on all ranks alike."""
        self.num_skipped += 1
        if self.world.is_main and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "step %d: loss or gradient is not finite, the step is skipped; further ones are only counted, as "
                "skipped_steps",
                step,
            )

    def log(self, step: int, optimizer: torch.optim.Optimizer, grad_norm: float) -> str:
        """Write the ``train`` and ``experts`` records of the interval; return one line for the terminal."""
        values = self.figures.reduced()
        routing = self.figures.expert_load()
        seconds, steps = time.perf_counter() - self._time, step - self._since
        values |= {
            "learning_rate": max(group["lr"] / group["lr_scale"] for group in optimizer.param_groups),
            "grad_norm": grad_norm,
            "samples_per_second": steps * self.config.data.batch_size / seconds,
            "step_seconds": seconds / steps,
        }
        line = f"loss {values.get('loss', math.nan):.3f} {values['samples_per_second']:.0f} samples/s"
        if "tokens_per_step" in values:
            values["tokens_per_second"] = values["tokens_per_step"] / values["step_seconds"]
            line += f" {values['tokens_per_second']:,.0f} tokens/s"
        if routing:
            values["max_violation"] = max(stats.max_violation for stats in routing.values())
            line += f" load max {1 + values['max_violation']:.1f}x mean"
        if self.num_broken:
            values["broken_samples"] = self.num_broken
        if self.num_skipped:
            values["skipped_steps"] = self.num_skipped
            line += f" skipped {self.num_skipped} step{'s' if self.num_skipped > 1 else ''}"
        if self._codebook_alarm is not None and "codes_average_perplexity" in values:
            is_on, onset = self._codebook_alarm.check(values["codes_average_perplexity"])
            values["codebook_collapsed"] = float(is_on)
            line += f" codes {values['codes_used']:.0f} used, {values['codes_revived']:.0f} revived"
            if onset is not None and self.world.is_main:
                logger.warning("step %d: %s", step, onset)
        self.write("train", step, values)
        if routing:
            alarms, onsets = self._alarm.check(routing)
            for onset in onsets if self.world.is_main else ():
                logger.warning("step %d: %s", step, onset)
            self.write("experts", step, expert_record(routing) | {"alarms": alarms, "num_alarms": len(alarms)})
        self.figures, self.num_broken, self.num_skipped = Figures(), 0, 0
        self._since, self._time = step, time.perf_counter()
        return line


def expert_record(routing: dict[str, RoutingStats]) -> dict[str, Any]:
    """Load share of every expert, and what it says about balance, per pool and modality.

    ``activation`` has the share of experts whose load is above each of ``activation_thresholds`` times the mean.
    """
    return {
        "load": {name: [round(share, 6) for share in stats.load_share_E.tolist()] for name, stats in routing.items()},
        "entropy": {name: stats.load_entropy for name, stats in routing.items()},
        "num_dead": {name: stats.num_dead for name, stats in routing.items()},
        "activation_thresholds": list(ACTIVATION_THRESHOLDS),
        "activation": {name: share_active(stats.load_E, ACTIVATION_THRESHOLDS) for name, stats in routing.items()},
        "dropped": {name: float(s.num_dropped / s.load_E.sum().clamp_min(1)) for name, s in routing.items()},
    }
