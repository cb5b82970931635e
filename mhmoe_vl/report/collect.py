"""What a run directory says about its run, without loading the model."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhmoe_vl.config import dump_config
from mhmoe_vl.errors import ConfigError, DataError
from mhmoe_vl.evaluation.score_card import ScoreCard
from mhmoe_vl.models.config import ModelConfig
from mhmoe_vl.train import run_directory
from mhmoe_vl.train.config import RunConfig
from mhmoe_vl.train.metrics import read_metrics

#: Tasks in the order of the report.
TASKS = ("pretrain", "vqa", "nlvr2", "captioning", "retrieval", "classification")


@dataclass(frozen=True)
class RunRecord:
    """Everything that one run has written about itself.

    Attributes:
        starts: environments of the starts that trained, in the order of steps; empty if the run has none.
        train, validation, experts: records of ``metrics.jsonl``, in the order of steps.
        card: result of the evaluation; None for pretraining and for runs that are not evaluated yet.
    """

    directory: Path
    config: RunConfig
    starts: list[dict[str, Any]]
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    experts: list[dict[str, Any]]
    card: ScoreCard | None

    @property
    def task(self) -> str:
        return self.config.task.kind

    @property
    def config_yaml(self) -> str:
        return dump_config(self.config)

    @property
    def environment_json(self) -> str:
        return json.dumps(self.starts[0] if len(self.starts) == 1 else self.starts, indent=2, ensure_ascii=False)

    @property
    def commands(self) -> list[str]:
        """The different command lines that trained the run, in their order, for a shell."""
        return list(dict.fromkeys(_command(start) for start in self.starts if start.get("command")))


def _command(start: dict[str, Any]) -> str:
    program, *arguments = start["command"]
    if program != "__main__.py":
        return shlex.join([program, *arguments])
    num_processes = start.get("world_size", 1)
    launcher = ["torchrun", "--nproc-per-node", str(num_processes)] if num_processes > 1 else ["python"]
    return shlex.join([*launcher, "-m", "mhmoe_vl.train", *arguments])


def read_run(directory: Path, *, task: str) -> RunRecord:
    """Read the run of ``task`` in ``directory``.

    Raises:
        ConfigError: not a run directory, or a run of another task.
        DataError: a file in it that is not what its name says.
    """
    config = run_directory.load_run(directory)
    if config.task.kind != task:
        raise ConfigError(f"{directory}: is a run of task '{config.task.kind}'; give it as --{config.task.kind}")
    card_file = directory / f"{task}_score.json"
    return RunRecord(
        directory=directory,
        config=config,
        starts=run_directory.starts_of(directory),
        train=read_metrics(directory, "train"),
        validation=read_metrics(directory, "validation"),
        experts=read_metrics(directory, "experts"),
        card=read_score_card(card_file) if card_file.is_file() else None,
    )


def read_score_card(path: Path) -> ScoreCard:
    """Read what :meth:`ScoreCard.write` has written.

    Raises:
        DataError: unreadable, or not a score card.
    """
    fields = run_directory.read_json_object(path)
    try:
        return ScoreCard(**fields | {"notes": tuple(fields.get("notes", ()))})
    except TypeError as error:
        raise DataError(f"{path}: not a score card ({error}); evaluate the run again with python -m eval") from None


def cost_parity(model: ModelConfig) -> str:
    """One line: the feed-forward layers of the sparse blocks, and how far their cost is from the reference SMoE's."""
    if model.ffn == "dense":
        return f"dense: every block has a feed-forward layer of width {model.ffn_dim}, no experts"
    shape, moe = model.ffn_shape, model.moe
    heads = f", {shape.num_heads} heads" if shape.num_heads > 1 else ""
    where = "every block" if moe.every == 1 else f"one block of {moe.every}"
    return (
        f"{model.ffn} in {where}: {shape.num_experts} experts of width {shape.ffn_dim}, top-{shape.top_k}{heads}; "
        f"against the reference SMoE ({moe.num_experts} experts of width {model.ffn_dim}, top-{moe.top_k}): "
        f"FLOPs {shape.flops_mismatch:+.2%}, parameters {shape.params_mismatch:+.2%}"
    )
