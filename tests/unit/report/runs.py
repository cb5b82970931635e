"""Tiny shards and run directories for the tests of the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mhmoe_vl.config import dump_config, validate_config
from mhmoe_vl.data.prepare.scan import scan_shard
from mhmoe_vl.data.prepare.text_tokenizer import train_tokenizer
from mhmoe_vl.data.shards import write_index
from mhmoe_vl.evaluation.score_card import ScoreCard
from mhmoe_vl.models.visual_codebook import VisualCodebook
from mhmoe_vl.train.config import RunConfig
from tests.unit.data.files import image_bytes, write_tar

WORDS = "a small red square above the large blue circle on dark green ground what color is it"
NUM_CODES = 8
PATCH = 16

MODEL = {
    "dim": 32,
    "depth": 2,
    "num_heads": 2,
    "ffn_dim": 64,
    "image_size": 2 * PATCH,
    "patch_size": PATCH,
    "vocab_size": 400,
    "max_text_length": 32,
    "num_visual_codes": NUM_CODES,
    "moe": {"num_experts": 4, "num_heads": 2, "match": "none"},
}

CARD = ScoreCard(
    task="vqa",
    metric="accuracy (official evaluator, 2021)",
    score=43.217,
    majority=21.5,
    blind=30.25,
    n=1234,
    details={"answer type number": 12.625},
    cost={
        "num_params": 7654321,
        "num_active_params": 765432,
        "flops_per_token": 98765,
        "num_assignments_per_token": 2,
        "train_seconds": 4567.8,
        "train_samples_per_second": 135.7,
        "trained_on": "2 x Some GPU",
    },
    notes=("blind is the question-only prior",),
)


def write_shard(path: Path, kind: str, samples: Sequence[tuple[dict[str, Any], Sequence[str]]]) -> Path:
    """A shard of 32-px PNG images; each sample is its json and the names of its images."""
    members = []
    for number, (fields, images) in enumerate(samples):
        members += [(f"{number:04d}.{name}", image_bytes(number, size=(32, 32), format="PNG")) for name in images]
        members.append((f"{number:04d}.json", json.dumps(fields).encode()))
    write_tar(path, members)
    write_index(replace(scan_shard(path, kind=kind), path=path))
    return path


def write_pairs(path: Path, num_images: int = 12) -> Path:
    """Images 0, 1, ... with two captions each."""
    captions = ["a small red square above the circle", "the large blue circle"]
    samples = [({"image_id": number, "captions": captions}, ["png"]) for number in range(num_images)]
    return write_shard(path, "pair", samples)


def write_tokenizer(path: Path) -> Path:
    train_tokenizer([WORDS] * 4, vocab_size=MODEL["vocab_size"]).save(str(path))  # type: ignore[arg-type]
    return path


def write_codebook(path: Path) -> Path:
    """Codes of one gray value each, from black to white."""
    grays = torch.linspace(-1, 1, NUM_CODES)
    path.write_bytes(VisualCodebook(grays[:, None].expand(-1, 3 * PATCH**2).clone(), PATCH).serialized())
    return path


def run_config(out: Path, task: dict[str, Any], source: dict[str, Any], tokenizer: Path, **other: Any) -> RunConfig:
    """A run that trains and validates on one source."""
    tree = {
        "out": str(out),
        "seed": 5,
        "task": task,
        "model": MODEL,
        "data": {
            "train": {"source": source},
            "validation": {"source": source},
            "text_tokenizer": str(tokenizer),
            "text_length": 16,
            "batch_size": 8,
        },
        "optimizer": {"warmup_steps": 1},
        "max_steps": 4,
        "log_every": 2,
        "validate_every": 2,
        "device": "cpu",
    }
    return validate_config(RunConfig, tree | other)


def write_run(config: RunConfig, *, records: Sequence[dict[str, Any]] = (), card: ScoreCard | None = None) -> Path:
    """The directory of a run as training and evaluation leave it, without weights."""
    directory = Path(config.out)
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(dump_config(config))
    (directory / "environment.json").write_text(json.dumps({"command": ["__main__.py", "--config", "x.yaml"]}))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if card is not None:
        card.write(directory / f"{card.task}_score.json")
    return directory
