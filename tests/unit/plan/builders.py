"""Configurations of tiny runs whose files do not exist, and a device that is easy to reckon with."""

from __future__ import annotations

from typing import Any

from mhmoe_vl.config import validate_config
from mhmoe_vl.plan.devices import Device
from mhmoe_vl.train.config import RunConfig

TASKS: dict[str, dict[str, Any]] = {
    "pretrain": {"kind": "pretrain", "visual_codebook": "absent.safetensors"},
    "vqa": {"kind": "vqa", "answers": "absent.json"},
    "nlvr2": {"kind": "nlvr2"},
    "captioning": {"kind": "captioning"},
    "language_modeling": {"kind": "language_modeling"},
    "retrieval": {"kind": "retrieval"},
    "classification": {"kind": "classification", "classes": "absent.json"},
}
SOURCES = {
    "pretrain": ("image", "text", "pair"),
    "vqa": ("vqa",),
    "nlvr2": ("nlvr2",),
    "captioning": ("pair",),
    "language_modeling": ("text",),
    "retrieval": ("pair",),
    "classification": ("class",),
}


def make_run(
    task: str = "pretrain",
    *,
    model: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    **changes: Any,
) -> RunConfig:
    """32 wide, two blocks (the second is sparse), 16 patches, 14 tokens of text, 12 samples a step; ``options`` are the
    task's."""
    if task == "language_modeling":
        model = {"modalities": ["text"]} | (model or {})
    tree = {
        "out": "unused",
        "task": TASKS[task] | (options or {}),
        "model": {
            "dim": 32, "depth": 2, "num_heads": 2, "ffn_dim": 64, "image_size": 32, "patch_size": 8, "vocab_size": 50,
            "max_text_length": 16, "num_visual_codes": 24,
            "moe": {"num_experts": 4, "num_heads": 4, "match": "none"},
        } | (model or {}),
        "data": {
            "train": {kind: {"kind": kind, "shards": "absent"} for kind in SOURCES[task]},
            "text_tokenizer": "absent.json", "text_length": 14, "batch_size": 12,
        } | changes.pop("data", {}),
        "optimizer": {"warmup_steps": 1},
        "max_steps": 10,
        **changes,
    }  # fmt: skip
    return validate_config(RunConfig, tree)


def make_device(kind: str = "cpu", **changes: Any) -> Device:
    """1 GFLOP/s, 1 GB/s, 1 GB, two devices in a node, 0.1 GB/s inside and 0.01 GB/s outside."""
    fields: dict[str, Any] = {
        "name": "toy", "kind": kind, "matmul_flops": {"float32": 1e9, "bfloat16": 1e9}, "half_speed_width": 0.0,
        "attention_flops": {"float32": 1e9, "bfloat16": 1e9}, "memory_bandwidth": 1e9, "function_bandwidth": 1e9,
        "memory": 10**9, "num_per_node": 2, "intra_node_bandwidth": 1e8, "inter_node_bandwidth": 1e7,
        "call_seconds": None, "reached": 1.0, "source": "toy",
    }  # fmt: skip
    return Device(**(fields | changes))
