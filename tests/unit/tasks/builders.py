"""Tiny tasks in float64, and batches for them."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from mhmoe_vl.data.batch import Batch
from mhmoe_vl.models.teachers import PixelTeacher
from mhmoe_vl.models.visual_codebook import VisualCodebook
from mhmoe_vl.tasks.base import MicroBatch, Task
from mhmoe_vl.tasks.captioning import CaptioningConfig, CaptioningTask
from mhmoe_vl.tasks.classification import ClassificationConfig, ClassificationTask
from mhmoe_vl.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask
from mhmoe_vl.tasks.nlvr2 import Nlvr2Config, Nlvr2Task
from mhmoe_vl.tasks.pretrain import PretrainConfig, PretrainTask
from mhmoe_vl.tasks.retrieval import RetrievalConfig, RetrievalTask
from mhmoe_vl.tasks.visual_tokenizer import VisualTokenizerConfig, VisualTokenizerTask
from mhmoe_vl.tasks.vqa import VqaConfig, VqaTask
from tests.unit.models.builders import make_config, patch_masks, randomize, texts

TASKS = (
    "pretrain",
    "vqa",
    "nlvr2",
    "captioning",
    "language_modeling",
    "retrieval",
    "classification",
    "visual_tokenizer",
)
NUM_ANSWERS = 7
NUM_CLASSES = 5


def make_task(kind: str, ffn: str = "mhmoe", *, options: dict[str, Any] | None = None, **changes: Any) -> Task:
    """A task whose every parameter is random; ``options`` are the task's, ``changes`` the model's."""
    if kind == "language_modeling":
        changes = {"modalities": ("text",)} | changes
    if kind == "visual_tokenizer":
        changes = {"modalities": ("vision",)} | changes
    model, options = make_config(ffn, **changes), options or {}
    task: Task
    if kind == "pretrain":
        codes = torch.rand(model.num_visual_codes, 3 * 4**2, generator=torch.Generator().manual_seed(0)) * 2 - 1
        task = PretrainTask(model, PretrainConfig(visual_codebook="unused", **options), VisualCodebook(codes, 4))
    elif kind == "vqa":
        task = VqaTask(model, VqaConfig(answers="unused", **options), NUM_ANSWERS)
    elif kind == "nlvr2":
        task = Nlvr2Task(model, Nlvr2Config(**options))
    elif kind == "language_modeling":
        task = LanguageModelingTask(model, LanguageModelingConfig(**options))
    elif kind == "retrieval":
        task = RetrievalTask(model, RetrievalConfig(**options))
    elif kind == "classification":
        task = ClassificationTask(model, ClassificationConfig(classes="unused", **options), NUM_CLASSES)
    elif kind == "visual_tokenizer":
        sizes = {"num_codes": 6, "code_dim": 5, "revival_share": 0.0}
        task = VisualTokenizerTask(model, VisualTokenizerConfig(**(sizes | options)), PixelTeacher(4))
        # In the middle of training.
        codes = torch.randn(task.codebook.codes_KC.shape, generator=torch.Generator().manual_seed(0))
        task.codebook.codes_KC.copy_(torch.nn.functional.normalize(codes, dim=-1))
        task.codebook.usage_K.fill_(1.0)
        task.codebook.num_updates.fill_(9)
    else:
        task = CaptioningTask(model, CaptioningConfig(**options))
    randomize(task)
    task.double()
    if isinstance(task, PretrainTask):
        task.codebook.float()
    return task


def byte_images(num: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, 3, 16, 16), generator=generator, dtype=torch.uint8)


def make_batch(kind: str, num: int, *, seed: int = 0) -> Batch:
    """Batches of every kind of shard, with texts of different lengths, and of tasks that take other parts of them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 7, (num,), generator=generator)
    valid = torch.arange(6).expand(num, -1) < lengths[:, None]
    ids = texts(num, 6, seed=seed)
    hidden = valid & (torch.rand(num, 6, generator=generator) < 0.5)
    if kind == "language_modeling":
        # Rows of two documents, the second of which begins at token 2 (or is not there).
        return Batch(
            sample_ids=tuple(f"{kind}-{number}" for number in range(num)),
            seed=torch.arange(num),
            text_ids=ids,
            text_valid=valid,
            text_targets=torch.where(valid, texts(num, 6, seed=seed + 1), -100),
            text_positions=torch.where(valid, torch.tensor([0, 1, 0, 1, 2, 3]), 0),
            text_seed=2 * torch.arange(num)[:, None] + torch.tensor([0, 0, 1, 1, 1, 1]),
            num_bytes=torch.arange(10, 10 + num),
            num_characters=torch.arange(7, 7 + num),
        )
    everything = Batch(
        sample_ids=tuple(f"{kind}-{number}" for number in range(num)),
        seed=torch.arange(num),
        image=byte_images(num, seed=seed),
        right_image=byte_images(num, seed=seed + 100),
        image_mask=patch_masks(num, seed=seed),
        text_ids=ids,
        text_valid=valid,
        text_targets=torch.where(hidden, texts(num, 6, seed=seed + 1), -100),
        answer_scores=torch.rand(num, NUM_ANSWERS, generator=generator),
        label=torch.randint(0, NUM_CLASSES if kind == "classification" else 2, (num,), generator=generator),
    )
    has = {
        "image": ("image", "image_mask"),
        "text": ("text_ids", "text_valid", "text_targets"),
        "pair": ("image", "image_mask", "text_ids", "text_valid", "text_targets"),
        "captioning": ("image", "text_ids", "text_valid", "text_targets"),
        "vqa": ("image", "text_ids", "text_valid", "answer_scores"),
        "nlvr2": ("image", "right_image", "text_ids", "text_valid", "label"),
        "retrieval": ("image", "text_ids", "text_valid"),
        "classification": ("image", "label"),
        "visual_tokenizer": ("image",),
    }[kind]
    absent = {f.name: None for f in fields(Batch) if f.name not in ("sample_ids", "seed", "problems", *has)}
    return replace(everything, **absent)


def make_micro_batch(kind: str, num: int) -> MicroBatch:
    kinds = ("image", "text", "pair") if kind == "pretrain" else (kind,)
    return {name: make_batch(name, num, seed=seed) for seed, name in enumerate(kinds)}


def take(batches: MicroBatch, start: int, end: int) -> MicroBatch:
    """Samples ``start`` to ``end`` of every source."""

    def of_one(batch: Batch) -> Batch:
        tensors = {f.name: getattr(batch, f.name) for f in fields(batch) if isinstance(getattr(batch, f.name), Tensor)}
        rows = {name: tensor[start:end] for name, tensor in tensors.items()}
        return replace(batch, sample_ids=batch.sample_ids[start:end], **rows)

    return {name: of_one(batch) for name, batch in batches.items()}


def gradients(task: Task) -> dict[str, Tensor]:
    """Gradient of every parameter, and zeros where there is none."""
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in task.named_parameters()}
