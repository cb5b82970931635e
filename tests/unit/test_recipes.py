"""The configurations of BEiT-3's fine-tunings hold what unilm/beit3 publishes, typed here from its commands and
defaults.

Of base and large: learning rate, layer decay, weight decay, drop path, epochs, epochs of warm-up, batch, image size,
tokens of text, activation checkpointing, RandAugment.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from eval.captioning import CaptioningEvaluation
from mhmoe_vl.config import load_config
from mhmoe_vl.train.config import RunConfig

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = ("lr", "layer_decay", "weight_decay", "drop_path", "epochs", "warmup_epochs", "batch", "size", "tokens",
         "checkpointing", "randaug")  # fmt: skip
PUBLISHED: dict[tuple[str, str], tuple[Any, ...]] = {
    ("vqa", "base"): (3e-5, 1.0, 0.01, 0.1, 10, 1, 128, 480, 64, False, True),
    ("vqa", "large"): (2e-5, 1.0, 0.01, 0.15, 10, 1, 128, 480, 64, True, True),
    ("nlvr2", "base"): (7e-4, 0.65, 0.2, 0.2, 20, 5, 256, 224, 64, False, False),
    ("nlvr2", "large"): (3e-4, 0.85, 0.2, 0.2, 20, 5, 256, 224, 64, True, False),
    ("captioning", "base"): (4e-5, 1.0, 0.05, 0.1, 10, 1, 256, 480, 32, True, True),
    ("captioning", "large"): (8e-6, 1.0, 0.05, 0.1, 10, 1, 256, 480, 32, True, True),
    ("retrieval", "base"): (2e-4, 0.65, 0.05, 0.2, 15, 3, 3072, 384, 64, True, False),
    ("retrieval", "large"): (5e-5, 0.85, 0.05, 0.2, 15, 3, 3072, 384, 64, True, False),
    ("imagenet", "base"): (7e-4, 0.65, 0.05, 0.15, 50, 5, 1024, 224, 64, False, False),
    ("imagenet", "large"): (2e-4, 0.8, 0.05, 0.25, 50, 5, 1024, 224, 64, True, False),
}
#: Questions of VQAv2 train, statements, captions of Karpathy's train and restval, captions, images.
NUM_EXAMPLES = {"vqa": 443757, "nlvr2": 86373, "captioning": 566747, "retrieval": 566747, "imagenet": 1281167}
FINETUNE = {"imagenet": "classification"}


def recipes() -> list[tuple[str, str, Path]]:
    """Task, size and file: base twice, with our own pretraining and from released weights."""
    found = []
    for task, size in PUBLISHED:
        found.append((task, size, CONFIGS / "beit3" / (f"{task}.yaml" if size == "base" else f"{task}_{size}.yaml")))
        if size == "base":
            found.append((task, size, CONFIGS / "finetune" / f"{FINETUNE.get(task, task)}.yaml"))
    return found


@pytest.mark.parametrize(("task", "size", "path"), recipes(), ids=lambda value: getattr(value, "stem", value))
def test_a_recipe_is_what_is_published(task: str, size: str, path: Path) -> None:
    config = load_config(RunConfig, path)
    optimizer, augment = config.optimizer, config.data.augment
    published = dict(zip(NAMES, PUBLISHED[task, size], strict=True))
    # Incomplete batches are left out there.
    steps_per_epoch = NUM_EXAMPLES[task] // published["batch"]
    assert {
        "lr": optimizer.learning_rate,
        "layer_decay": optimizer.layer_decay,
        "weight_decay": optimizer.weight_decay,
        "drop_path": config.model.drop_path,
        "epochs": round(config.max_steps / steps_per_epoch, 1),
        "warmup_epochs": round(optimizer.warmup_steps / steps_per_epoch, 1),
        "batch": config.data.batch_size,
        "size": config.model.image_size,
        "tokens": config.data.text_length,
        "checkpointing": config.model.checkpoint_activations,
        "randaug": augment.rand_augment,
    } == published
    # Defaults of run_beit3_finetuning.py, and what VQA and ImageNet set.
    assert optimizer.learning_rate * optimizer.final_ratio == pytest.approx(1e-6, rel=5e-3)
    assert optimizer.betas == ((0.9, 0.98) if task == "vqa" else (0.9, 0.999))
    assert optimizer.head_factor == (20 if task == "vqa" else 1)
    assert (optimizer.epsilon, optimizer.clip_norm, optimizer.ema_decay) == (1e-8, None, None)
    assert (config.seed, config.num_micro_batches, augment.flip) == (42, 1, True)
    is_imagenet = task == "imagenet"
    assert augment.crop_scale == (0.08 if is_imagenet else 0.5)
    assert augment.auto_augment == ("rand-m9-mstd0.5-inc1" if is_imagenet else None)
    assert augment.random_erasing == (0.25 if is_imagenet else 0)
    assert config.model.image_normalization == ("imagenet" if is_imagenet else "half")
    assert config.data.center_crop == is_imagenet
    if is_imagenet:
        assert config.task.kind == "classification"
        assert (config.task.label_smoothing, config.task.mixup, config.task.cutmix) == (0.1, 0.8, 1.0)
    # Whatever the file does not say itself must not come from somewhere else.
    assert augment.color_jitter == 0
    assert (size == "large") == (config.model.depth == 24)


def test_captioning_hides_smooths_drops_and_searches_as_published() -> None:
    for path in ("finetune/captioning.yaml", "beit3/captioning.yaml", "beit3/captioning_large.yaml"):
        task = load_config(RunConfig, CONFIGS / path).task
        assert task.kind == "captioning"
        assert (task.mask_ratio, task.label_smoothing) == (0.7, 0.1)
        assert (task.drop_worst_ratio, task.drop_worst_after) == (0.2, 12000)
    parser = argparse.ArgumentParser()
    CaptioningEvaluation().add_arguments(parser)
    options = parser.parse_args([])
    assert (options.num_beams, options.length_penalty, options.max_length) == (3, 0.6, 32)


@pytest.mark.parametrize("name", ["vqa", "nlvr2", "captioning", "retrieval", "classification"])
def test_every_knob_is_written_down(name: str) -> None:
    """With where it comes from beside it, for whoever changes one."""
    lines = (CONFIGS / "finetune" / f"{name}.yaml").read_text().splitlines()
    knobs = ("learning_rate", "layer_decay", "head_factor", "betas", "epsilon", "weight_decay", "warmup_steps",
             "final_ratio", "clip_norm", "ema_decay", "batch_size", "image_size", "drop_path",
             "checkpoint_activations", "max_steps", "seed")  # fmt: skip
    for knob in knobs:
        (line,) = [line for line in lines if line.strip().startswith(f"{knob}:")]
        assert "--" in line.partition("#")[2], line
