"""Configurations of tiny runs, and training with the samples of every step written down."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mhmoe_vl.config import validate_config
from mhmoe_vl.distributed.world import World
from mhmoe_vl.tasks.base import MicroBatch
from mhmoe_vl.train import run
from mhmoe_vl.train.config import RunConfig
from mhmoe_vl.train.metrics import read_metrics
from mhmoe_vl.train.step import StepResult
from mhmoe_vl.train.stop import STOPPED

ALONE = World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))

#: Sample ids of each source, per step.
Consumed = list[dict[str, list[str]]]


def pretraining(shards: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Six samples a step in two micro-batches: one of each source, of which either of two ranks lacks one or two."""
    sources = {"image": "images", "text": "text", "pair": "pairs"}
    return {
        "out": str(out),
        "task": {"kind": "pretrain", "visual_codebook": str(shards / "codebook.safetensors")},
        "model": {
            "dim": 16,
            "depth": 2,
            "num_heads": 2,
            "ffn_dim": 32,
            "image_size": 32,
            "patch_size": 16,
            "vocab_size": 300,
            "max_text_length": 24,
            "num_visual_codes": 16,
            "drop_path": 0.5,
            "moe": {"num_experts": 4, "num_heads": 2, "match": "none", "selection_bias_rate": 0.01},
        },
        "data": {
            "train": {
                name: {"kind": name, "shards": str(shards / f"{folder}-train")} for name, folder in sources.items()
            },
            "text_tokenizer": str(shards / "tokenizer.json"),
            "text_length": 16,
            "batch_size": 6,
            "augment": {"crop_scale": 0.5, "flip": True},
        },
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 1},
        "num_micro_batches": 2,
        "max_steps": 4,
        "log_every": 1,
        "device": "cpu",
        **changes,
    }


#: Kind of shard of each fine-tuning task, and the folder of its shards less the split.
FINE_TUNINGS = {
    "vqa": ("vqa", "vqa"),
    "nlvr2": ("nlvr2", "nlvr2"),
    "captioning": ("pair", "pairs"),
    "retrieval": ("pair", "pairs"),
    "classification": ("class", "classes"),
}


def fine_tuning(shards: Path, out: Path, task: str, pretrained: Path) -> dict[str, Any]:
    """Two steps of a task, starting from ``pretrained``."""
    kind, folder = FINE_TUNINGS[task]
    tree = pretraining(shards, out, init_from=str(pretrained), max_steps=2)
    tree["task"] = {"kind": task}
    if task == "vqa":
        tree["task"]["answers"] = str(shards / "vqa-train" / "answers.json")
    if task == "classification":
        tree["task"]["classes"] = str(shards / "classes-train" / "classes.json")
    for split, name in (("train", "train"), ("validation", "val")):
        tree["data"][split] = {"x": {"kind": kind, "shards": str(shards / f"{folder}-{name}")}}
    return tree


def language_modeling(shards: Path, corpus: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Six documents of two languages a step, packed into rows of 16 tokens, in two micro-batches."""
    tree = pretraining(shards, out, **changes)
    tree["task"] = {"kind": "language_modeling", "segment_bytes": 512}
    tree["model"] |= {"modalities": ["text"], "positions": "rotary", "ffn": "mhmoe"}
    sources = {name: {"kind": "text", "shards": str(corpus / name)} for name in ("short", "long")}
    tree["data"] |= {"train": sources, "validation": sources, "sampling_alpha": 0.5}
    return tree


def write_config(path: Path, tree: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def train(
    tree: dict[str, Any],
    world: World = ALONE,
    *,
    stop_after: int | None = None,
    stop_signal: signal.Signals = signal.SIGTERM,
) -> Consumed:
    """Train, and return what this rank was given; ``stop_after`` so many steps rank 0 gets a signal."""
    consumed: Consumed = []
    whole_step = run.train_step

    def recorded(module: Any, optimizer: Any, micro_batches: Sequence[MicroBatch], **options: Any) -> StepResult:
        ids: dict[str, list[str]] = {}
        for micro_batch in micro_batches:
            for source, batch in micro_batch.items():
                ids.setdefault(source, []).extend(batch.sample_ids)
        consumed.append(ids)
        if len(consumed) == stop_after and world.is_main:
            os.kill(os.getpid(), stop_signal)
        return whole_step(module, optimizer, micro_batches, **options)

    with mock.patch.object(run, "train_step", recorded):
        if stop_after is None:
            run.train(validate_config(RunConfig, tree), world)
        else:
            with pytest.raises(SystemExit) as stopped:
                run.train(validate_config(RunConfig, tree), world)
            assert stopped.value.code == STOPPED
    return consumed


def tensors_of_checkpoint(out: Path, step: int) -> dict[str, bytes]:
    """Weights, buffers, and AdamW's moments and step counts, each as bytes; one entry per file that holds a part."""
    folder = out / "checkpoints" / f"step_{step:07d}"
    return {
        f"{file.name}: {name}": tensor.numpy().tobytes()
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def final_weights(out: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(out / "model.safetensors").items()}


def figures(out: Path) -> dict[int, dict[str, Any]]:
    """Everything that was logged per step, less what a clock says."""
    timed = ("samples_per_second", "tokens_per_second", "step_seconds")
    return {
        record["step"]: {name: value for name, value in record.items() if name not in timed}
        for record in read_metrics(out, "train")
    }
