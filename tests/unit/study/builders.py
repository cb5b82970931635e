"""Configurations of tiny studies, whose runs need no files to be looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def study_tree(folder: Path, **changes: Any) -> dict[str, Any]:
    """SMoE and MH-MoE on pairs of 32-px images and texts."""
    run = {
        "out": "unused",
        "task": {"kind": "pretrain", "visual_codebook": "unused"},
        "model": {
            "dim": 64, "depth": 2, "num_heads": 2, "ffn_dim": 256, "image_size": 32, "patch_size": 16,
            "vocab_size": 300, "max_text_length": 24, "num_visual_codes": 16, "moe": {"num_experts": 4, "num_heads": 2},
        },
        "data": {
            "train": {"pair": {"kind": "pair", "shards": "unused"}}, "text_tokenizer": "unused", "text_length": 16,
            "batch_size": 6,
        },
        "max_steps": 4,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return {
        "title": "tiny",
        "out": str(folder / "out"),
        "arms": {"smoe": {"ffn": "smoe"}, "mhmoe": {"ffn": "mhmoe"}},
        "baseline": "smoe",
        "tasks": {"masked": {"config": str(folder / "run.yaml"), "metrics": ["pair_mlm"]}},
        "seeds": [0, 1],
        **changes,
    }
