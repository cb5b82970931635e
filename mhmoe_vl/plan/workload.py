"""What one rank computes per micro-batch: sequences, tokens, predictions and FLOPs of every source, and the task itself
without the files that a run needs. All from the configuration; texts count at their full length.

Shape suffixes: B samples, P patches, L text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mhmoe_vl.data.batch import Batch
from mhmoe_vl.data.masking import IGNORE
from mhmoe_vl.data.plan import MixturePlan
from mhmoe_vl.models.cost import blocks_flops_per_token
from mhmoe_vl.models.visual_codebook import VisualCodebook
from mhmoe_vl.models.visual_tokenizer import AnyVisualTokenizer
from mhmoe_vl.tasks.base import Task
from mhmoe_vl.tasks.captioning import CaptioningConfig
from mhmoe_vl.tasks.classification import ClassificationConfig
from mhmoe_vl.tasks.language_modeling import LanguageModelingConfig
from mhmoe_vl.tasks.pretrain import PretrainConfig, PretrainTask
from mhmoe_vl.tasks.retrieval import RetrievalConfig, RetrievalTask
from mhmoe_vl.tasks.vqa import VqaConfig
from mhmoe_vl.train.build import assemble_task, load_answers, load_classes, load_tokenizer_of
from mhmoe_vl.train.config import RunConfig

#: Answers of VQAv2 seen at least nine times in training and validation: what a plan assumes without an answer list.
NUM_VQA_ANSWERS = 3129

#: Classes of ImageNet-1k: what a plan assumes without a class list.
NUM_IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Sample:
    """One sample of a source on its way through the model.

    Attributes:
        num_sequences: passes through the encoder; NLVR2 has two images per sample.
        num_image_tokens, num_text_tokens: of each sequence, class token included; 0 without image or text.
        num_masked_patches, num_masked_tokens: predictions of visual codes and of text tokens.
        is_packed: a sequence is a row of documents, whose attention mask is one of pairs of tokens.
        is_apart: image and text are sequences of their own, as in retrieval.
        has_codes: its visual codes were stored beside it, so that no tokenizer runs.
    """

    num_sequences: int
    num_image_tokens: int
    num_text_tokens: int
    num_masked_patches: int = 0
    num_masked_tokens: int = 0
    is_packed: bool = False
    is_apart: bool = False
    has_codes: bool = False

    @property
    def num_tokens(self) -> int:
        return self.num_sequences * (self.num_image_tokens + self.num_text_tokens)

    @property
    def passes(self) -> tuple[Sample, ...]:
        """What goes through the encoder at once."""
        if not self.is_apart:
            return (self,)
        return replace(self, num_text_tokens=0, is_apart=False), replace(self, num_image_tokens=0, is_apart=False)


def samples_of(config: RunConfig) -> dict[str, Sample]:
    """What a sample of each training source is."""
    model, data, task = config.model, config.data, config.task
    num_image = 1 + (0 if getattr(task, "blind", False) else model.num_patches)
    num_text = data.text_length
    masked_patches = round(data.image_mask_ratio * model.num_patches)
    samples = {}
    for name, source in data.train.items():
        if isinstance(task, LanguageModelingConfig):
            # A full row: as much as a document that is not cut takes, with the others of its row.
            samples[name] = Sample(1, 0, num_text, 0, num_text, is_packed=True)
        elif isinstance(task, PretrainConfig):
            samples[name] = {
                "image": Sample(1, num_image, 0, masked_patches),
                "text": Sample(1, 0, num_text, 0, _num_masked(data.text_mask_ratio, num_text - 2)),
                "pair": Sample(
                    1, num_image, num_text, masked_patches, _num_masked(data.pair_text_mask_ratio, num_text - 2)
                ),
            }[source.kind]
            samples[name] = replace(samples[name], has_codes=source.codes)
        elif isinstance(task, CaptioningConfig):
            # The end token may be hidden too.
            samples[name] = Sample(1, num_image, num_text, 0, _num_masked(task.mask_ratio, num_text - 1))
        elif isinstance(task, RetrievalConfig):
            samples[name] = Sample(1, num_image, num_text, is_apart=True)
        elif isinstance(task, ClassificationConfig):
            samples[name] = Sample(1, num_image, 0)
        else:
            samples[name] = Sample(2 if task.kind == "nlvr2" else 1, num_image, num_text)
    return samples


def _num_masked(ratio: float, num_candidates: int) -> int:
    """As :func:`mhmoe_vl.data.masking.mask_text` chooses."""
    return max(1, round(ratio * num_candidates)) if ratio else 0


def samples_per_step(config: RunConfig) -> dict[str, int]:
    """Samples that each source gives to the first step, over all ranks (others differ by one).

    Raises:
        ConfigError: a source is too light to give a sample to every step.
    """
    return {name: len(numbers) for name, numbers in _order_of(config).numbers(0).items()}


def busiest_share(
    config: RunConfig, costs: Mapping[str, SampleCost], *, world_size: int, num_micro_batches: int
) -> dict[str, int]:
    """Samples of each source that one rank has in one micro-batch of the first step, where that is most work."""
    shares = []
    for index in range(num_micro_batches):
        dealt = list(_order_of(config).deal(0, index, num_micro_batches, world_size))
        # Of the ranks that the same sources give one sample more, one is the first of some source.
        shares += [
            {source: len(numbers[(rank - first) % world_size :: world_size]) for source, numbers, first in dealt}
            for rank in sorted({first for _, _, first in dealt})
        ]
    return max(shares, key=lambda share: sum(costs[name].training_flops * number for name, number in share.items()))


def _order_of(config: RunConfig) -> MixturePlan:
    sources = config.data.train
    return MixturePlan(
        num_items=dict.fromkeys(sources),
        weights={name: source.weight for name, source in sources.items()},
        batch_size=config.data.batch_size,
        seed=config.seed,
    )


def build_task_without_files(config: RunConfig, *, device: str = "meta") -> Task:
    """The task of a run whose files need not exist: in place of a visual tokenizer k-means patches are taken, of lists
    of answers or classes such as long as those of VQAv2 and ImageNet-1k.

    On another device than ``meta``, weights and codes are random.

    Raises:
        ConfigError: a visual tokenizer that exists and does not fit the model.
        DataError: a file that exists and cannot be read.
    """
    model, task = config.model, config.task
    codebook: AnyVisualTokenizer | None = None
    if isinstance(task, PretrainConfig) and Path(task.visual_codebook).is_file():
        codebook = load_tokenizer_of(task, model).to(device)
    with torch.device(device):
        if isinstance(task, PretrainConfig) and codebook is None:
            codes_KC = torch.rand(model.num_visual_codes, 3 * model.patch_size**2) * 2 - 1
            codebook = VisualCodebook(codes_KC, model.patch_size)
        num_answers = num_classes = 0
        if isinstance(task, VqaConfig):
            num_answers = len(load_answers(task.answers)) if Path(task.answers).is_file() else NUM_VQA_ANSWERS
        if isinstance(task, ClassificationConfig):
            num_classes = len(load_classes(task.classes)) if Path(task.classes).is_file() else NUM_IMAGENET_CLASSES
        return assemble_task(config, codebook=codebook, num_answers=num_answers, num_classes=num_classes)


@dataclass(frozen=True)
class SampleCost:
    """Matrix products of one sample, as in :mod:`mhmoe_vl.models.cost`. The similarities of retrieval, ``4 D`` for each
    pair that a pair is compared with, are left out.

    Attributes:
        forward_flops: of encoder and heads.
        trained_flops: of these, what has a backward pass: all, or of a linear probe the head.
        target_flops: of the visual tokenizer, which has no backward pass.
    """

    forward_flops: int
    trained_flops: int
    target_flops: int

    @property
    def useful_flops(self) -> int:
        """Forward and backward pass, the latter at twice the former; nothing that is recomputed."""
        return self.forward_flops + 2 * self.trained_flops

    @property
    def training_flops(self) -> int:
        """The useful ones, and the targets."""
        return self.useful_flops + self.target_flops


def sample_cost(task: Task, sample: Sample) -> SampleCost:
    """FLOPs of one sample."""
    model = task.config
    encoder = 0
    for one in sample.passes:
        encoder += one.num_tokens * blocks_flops_per_token(model, one.num_image_tokens + one.num_text_tokens)
    num_patches = max(0, sample.num_image_tokens - 1)
    patch_size = 3 * model.patch_size**2
    encoder += sample.num_sequences * 2 * num_patches * patch_size * model.dim
    heads = sum(num_rows * matrix_flops(head) for one in sample.passes for head, num_rows in heads_of(task, one))
    targets = 0
    if isinstance(task, PretrainTask) and num_patches > 0 and not sample.has_codes:
        targets = tokenizer_flops(task.codebook, num_patches)
    return SampleCost(
        forward_flops=encoder + heads,
        trained_flops=heads if is_frozen(task) else encoder + heads,
        target_flops=targets,
    )


def tokenizer_flops(tokenizer: AnyVisualTokenizer, num_patches: int) -> int:
    """FLOPs of the codes of an image."""
    patch_size = 3 * tokenizer.patch_size**2
    if isinstance(tokenizer, VisualCodebook):
        return 2 * num_patches * patch_size * tokenizer.num_codes
    model, num_tokens = tokenizer.encoder.config, num_patches + 1
    per_patch = 2 * patch_size * model.dim + matrix_flops(tokenizer.code_head) + 2 * tokenizer.codes_KC.numel()
    return num_tokens * blocks_flops_per_token(model, num_tokens) + num_patches * per_patch


def is_frozen(task: Task) -> bool:
    """Whether the heads alone are trained."""
    return not any(parameter.requires_grad for parameter in task.encoder.parameters())


def heads_of(task: Task, sample: Sample) -> list[tuple[nn.Module, int]]:
    """Heads that a pass of a sample goes through, each with the number of its predictions."""
    if isinstance(task, RetrievalTask):
        return [(task.vision_head if sample.num_image_tokens else task.text_head, 1)]
    if isinstance(task, PretrainTask):
        heads = [(task.mim_head, sample.num_masked_patches), (task.mlm_head, sample.num_masked_tokens)]
        return [(head, rows) for head, rows in heads if rows]
    rows = sample.num_masked_tokens or 1
    return [(head, rows) for name, head in task.named_children() if name.endswith("_head")]


def matrix_flops(module: nn.Module) -> int:
    """FLOPs of a row through all linear layers of ``module``."""
    return sum(2 * linear.weight.numel() for linear in module.modules() if isinstance(linear, nn.Linear))


def synthetic_batch(
    config: RunConfig,
    source: str,
    num_samples: int,
    *,
    num_answers: int = NUM_VQA_ANSWERS,
    num_classes: int = NUM_IMAGENET_CLASSES,
) -> Batch:
    """Random samples of a source with exactly the shapes of :func:`samples_of`, on the default device and generator."""
    model, sample = config.model, samples_of(config)[source]
    task, num_patches = config.task, model.num_patches
    has_image, has_text = sample.num_image_tokens > 0, sample.num_text_tokens > 0
    text_ids = torch.randint(0, model.vocab_size, (num_samples, sample.num_text_tokens)) if has_text else None
    image_size = (num_samples, 3, model.image_size, model.image_size)
    targets = None
    if text_ids is not None and sample.is_packed:
        targets = torch.randint(0, model.vocab_size, text_ids.shape)
    elif text_ids is not None and sample.num_masked_tokens:
        # Any but <s>; the exact places do not change the work.
        hidden_BL = nn.functional.pad(_chosen(num_samples, text_ids.shape[1] - 1, sample.num_masked_tokens), (1, 0))
        targets = torch.where(hidden_BL, text_ids, IGNORE)
    seed = torch.randint(0, 2**62, (num_samples,))
    num_labels = {"nlvr2": 2, "classification": num_classes}.get(task.kind)
    packed: dict[str, Any] = {}
    if text_ids is not None and sample.is_packed:
        packed = {
            "text_positions": torch.arange(text_ids.shape[1]).expand_as(text_ids),
            "text_seed": seed[:, None].expand_as(text_ids),
            "num_bytes": torch.full((num_samples,), 4 * text_ids.shape[1]),
            "num_characters": torch.full((num_samples,), 4 * text_ids.shape[1]),
        }
    return Batch(
        sample_ids=tuple(f"{source}-{number}" for number in range(num_samples)),
        seed=seed,
        image=torch.randint(0, 256, image_size, dtype=torch.uint8) if has_image else None,
        right_image=torch.randint(0, 256, image_size, dtype=torch.uint8) if sample.num_sequences == 2 else None,
        image_mask=_chosen(num_samples, num_patches, sample.num_masked_patches) if sample.num_masked_patches else None,
        text_ids=text_ids,
        text_valid=None if text_ids is None else torch.ones_like(text_ids, dtype=torch.bool),
        text_targets=targets,
        **packed,
        answer_scores=torch.rand(num_samples, num_answers) if task.kind == "vqa" else None,
        label=None if num_labels is None else torch.randint(0, num_labels, (num_samples,)),
    )


def _chosen(num_rows: int, num_columns: int, num_chosen: int) -> Tensor:
    """Bool ``[rows, columns]`` with ``num_chosen`` in each row, at random."""
    return torch.rand(num_rows, num_columns).argsort(-1).argsort(-1) < num_chosen
