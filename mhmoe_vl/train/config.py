"""Everything that a run is made of. Component configurations live beside their component; this file composes them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mhmoe_vl.config import Config
from mhmoe_vl.data.image import AugmentConfig
from mhmoe_vl.data.shards import is_url
from mhmoe_vl.data.stream import STREAMED_KINDS
from mhmoe_vl.distributed.expert_parallel import nearest_divisors
from mhmoe_vl.models.config import ModelConfig
from mhmoe_vl.tasks.captioning import CaptioningConfig
from mhmoe_vl.tasks.classification import ClassificationConfig
from mhmoe_vl.tasks.language_modeling import LanguageModelingConfig
from mhmoe_vl.tasks.nlvr2 import Nlvr2Config
from mhmoe_vl.tasks.pretrain import PretrainConfig
from mhmoe_vl.tasks.retrieval import RetrievalConfig
from mhmoe_vl.tasks.visual_tokenizer import VisualTokenizerConfig
from mhmoe_vl.tasks.vqa import VqaConfig
from mhmoe_vl.train.optimizer import OptimizerConfig

Positive = Annotated[int, Field(gt=0)]
Ratio = Annotated[float, Field(ge=0, le=1)]

#: Kinds of shard that each task reads.
SOURCE_KINDS = {
    "pretrain": ("image", "text", "pair"),
    "language_modeling": ("text",),
    "vqa": ("vqa",),
    "nlvr2": ("nlvr2",),
    "captioning": ("pair",),
    "retrieval": ("pair",),
    "classification": ("class",),
    # Of pairs and classes it takes the image.
    "visual_tokenizer": ("image", "pair", "class"),
}


class SourceConfig(Config):
    """Shards that are read together.

    Attributes:
        kind: ``image``, ``text``, ``pair``, ``vqa``, ``nlvr2`` or ``class``.
        shards: directories, files, globs or brace patterns of indexed shards; for training on images, texts and pairs
            also URLs, which are streamed and not exactly resumable.
        weight: share of each step, on any scale; left alone where ``data.sampling_alpha`` decides.
        stream_buffer: undecoded samples that each reader of a stream keeps to draw from.
        codes: the shards have the visual codes of their images (``data_prep.tokenize_images``); pretraining takes the
            stored views and their codes, view e mod V in epoch e, in place of drawing crops and calling the tokenizer.
    """

    kind: Literal["image", "text", "pair", "vqa", "nlvr2", "class"]
    shards: tuple[str, ...] | str
    weight: Annotated[float, Field(gt=0)] = 1.0
    stream_buffer: Positive = 1000
    codes: bool = False

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.shards,) if isinstance(self.shards, str) else self.shards

    @property
    def is_stream(self) -> bool:
        """Whether there are URLs among the shards."""
        return any(is_url(path) for path in self.paths)


class DataConfig(Config):
    """What is read and how it becomes tensors.

    Attributes:
        train: sources of the training mixture, by name.
        validation: held-out sources; each is scored on its own.
        text_tokenizer: ``tokenizer.json``; that of the model, where the task reads no text. A visual tokenizer has
            none.
        text_length: tokens per text, ``<s>`` and ``</s>`` included; of language modeling, tokens per packed row.
        batch_size: samples per optimizer step, over all ranks and sources.
        sampling_alpha: shares of the sources in proportion to ``size ** sampling_alpha``, size being the number of
            samples, instead of weights by hand (XLM, arXiv 1901.07291, section 3.1). 1 keeps the natural shares, 0
            makes all equal; XLM takes 0.5 for the tokenizer and 0.7 for training.
        validation_batch_size: samples per rank and forward pass.
        center_crop: validation and evaluation resize the short side of an image and cut the middle out, as ImageNet is
            scored; else they resize the whole image to a square.
        num_workers: loader processes per rank; 0 loads in the training process.
    """

    train: dict[str, SourceConfig]
    validation: dict[str, SourceConfig] = Field(default_factory=dict)
    text_tokenizer: str | None = None
    text_length: Annotated[int, Field(ge=4)] = 64
    batch_size: Positive
    sampling_alpha: Ratio | None = None
    validation_batch_size: Positive = 64
    augment: AugmentConfig = AugmentConfig()
    center_crop: bool = False
    image_mask_ratio: Ratio = 0.4
    text_mask_ratio: Ratio = 0.15
    pair_text_mask_ratio: Ratio = 0.5
    num_workers: Annotated[int, Field(ge=0)] = 0


class RunConfig(Config):
    """One run of ``python -m mhmoe_vl.train``.

    Attributes:
        out: run directory; a run that exists there is resumed.
        init_from: run directory whose weights to start from (encoder, and heads of the same name and shape).
        precision: ``auto`` is bfloat16 autocast on GPUs that have it, else float32.
        strategy: how parameters are spread over ranks; ``auto`` is ``ddp`` with several ranks, and ``fsdp`` if experts
            are spread.
        expert_parallel: number of ranks over which the experts of each layer are spread; it must divide the number of
            processes and that of the experts (see ``model.moe.num_experts_multiple``). Results do not depend on it.
        num_micro_batches: forward and backward passes per optimizer step, whatever the number of ranks.
        max_bad_steps: steps in a row that may be skipped because the loss or a gradient is not finite.
        keep_checkpoints: how many of the newest checkpoints to keep.
    """

    out: str
    seed: int = 0
    task: Annotated[
        PretrainConfig
        | LanguageModelingConfig
        | VqaConfig
        | Nlvr2Config
        | CaptioningConfig
        | RetrievalConfig
        | ClassificationConfig
        | VisualTokenizerConfig,
        Field(discriminator="kind"),
    ]
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    max_steps: Positive
    num_micro_batches: Positive = 1
    init_from: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    strategy: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    expert_parallel: Positive = 1
    log_every: Positive = 10
    validate_every: Positive | None = None
    checkpoint_every: Positive | None = None
    keep_checkpoints: Positive = 2
    max_bad_steps: Positive = 3

    @model_validator(mode="after")
    def _check(self) -> Self:
        allowed = SOURCE_KINDS[self.task.kind]
        for split in ("train", "validation"):
            for name, source in getattr(self.data, split).items():
                if source.kind not in allowed:
                    raise ValueError(
                        f"data.{split}.{name}.kind: '{source.kind}' cannot feed task '{self.task.kind}', "
                        f"which reads {', '.join(allowed)}"
                    )
                if source.is_stream and (split == "validation" or source.kind not in STREAMED_KINDS):
                    raise ValueError(
                        f"data.{split}.{name}.shards: URLs are streamed for training on {', '.join(STREAMED_KINDS)} "
                        "only; copy these shards to a local or mounted folder"
                    )
                if source.codes:
                    self._check_codes(f"data.{split}.{name}", source)
        if not self.data.train:
            raise ValueError("data.train: needs at least one source")
        if isinstance(self.task, VisualTokenizerConfig):
            self._check_visual_tokenizer(self.task)
        elif self.data.text_tokenizer is None:
            raise ValueError(
                f"data.text_tokenizer: missing, and task '{self.task.kind}' needs one; make it with "
                "python -m data_prep.train_text_tokenizer"
            )
        if self.data.text_length > self.model.max_text_length:
            raise ValueError(
                f"data.text_length: {self.data.text_length} exceeds model.max_text_length {self.model.max_text_length}"
            )
        if self.data.sampling_alpha is not None:
            self._check_sampling()
        if isinstance(self.task, LanguageModelingConfig):
            self._check_language_modeling()
        if self.optimizer.warmup_steps >= self.max_steps:
            raise ValueError(
                f"optimizer.warmup_steps: {self.optimizer.warmup_steps} must be below max_steps {self.max_steps}"
            )
        if self.expert_parallel > 1:
            self._check_expert_parallel()
        return self

    def _check_codes(self, key: str, source: SourceConfig) -> None:
        if self.task.kind != "pretrain" or source.kind == "text":
            raise ValueError(f"{key}.codes: only pretraining on images and pairs predicts visual codes; leave it out")
        if source.is_stream:
            raise ValueError(
                f"{key}.codes: a stream has no epochs, by which stored views are taken; copy these shards to a local "
                "or mounted folder"
            )
        augment = self.data.augment
        changes = ("color_jitter", "rand_augment", "auto_augment", "random_erasing")
        asked_for = [f"data.augment.{name}" for name in changes if getattr(augment, name)]
        if key.startswith("data.train.") and asked_for:
            raise ValueError(
                f"{key}.codes: codes were made from crops and mirror images, and would not be those of images that are "
                f"changed further; leave out {' and '.join(asked_for)}"
            )
        if key.startswith("data.validation.") and self.data.center_crop:
            raise ValueError(
                f"{key}.codes: codes were made from whole images, and data.center_crop cuts the middle out; leave out "
                "one of them"
            )

    def _check_sampling(self) -> None:
        for name, source in self.data.train.items():
            if source.is_stream:
                raise ValueError(
                    f"data.sampling_alpha: nobody knows the size of the streamed source '{name}'; give every source a "
                    "weight instead"
                )
            if source.weight != 1.0:
                raise ValueError(
                    f"data.train.{name}.weight: {source.weight} beside data.sampling_alpha={self.data.sampling_alpha}, "
                    "which decides the shares; leave one of them out"
                )

    def _check_language_modeling(self) -> None:
        if self.model.modalities != ("text",):
            raise ValueError(
                f"model.modalities: {list(self.model.modalities)}, but task 'language_modeling' reads text alone, and "
                "what it does not use must not count as its parameters; set model.modalities=[text]"
            )
        for name, source in self.data.train.items():
            if source.is_stream:
                raise ValueError(
                    f"data.train.{name}.shards: task 'language_modeling' reads indexed shards, whose sizes say how "
                    "documents are cut; copy these to a local or mounted folder"
                )

    def _check_visual_tokenizer(self, task: VisualTokenizerConfig) -> None:
        if self.model.modalities != ("vision",):
            raise ValueError(
                f"model.modalities: {list(self.model.modalities)}, but task 'visual_tokenizer' reads images alone, and "
                "what it does not use must not count as its parameters; set model.modalities=[vision]"
            )
        num_patches = self.data.batch_size * self.model.num_patches
        if num_patches < task.num_codes:
            raise ValueError(
                f"task.num_codes: {task.num_codes} codes begin as centres of a step's patches, and data.batch_size="
                f"{self.data.batch_size} has {num_patches}; use at least data.batch_size="
                f"{-(-task.num_codes // self.model.num_patches)}"
            )

    def _check_expert_parallel(self) -> None:
        degree, model = self.expert_parallel, self.model
        if self.strategy not in ("auto", "fsdp"):
            raise ValueError(f"expert_parallel: {degree} needs strategy=fsdp (or auto), not '{self.strategy}'")
        if model.ffn == "dense":
            raise ValueError(f"expert_parallel: {degree} needs experts, and model.ffn is dense; use expert_parallel=1")
        if model.ffn == "mhmoe_head_parallel":
            if model.moe.num_heads % degree:
                nearest = nearest_divisors(model.moe.num_heads, degree)
                raise ValueError(
                    f"expert_parallel: {degree} must divide the {model.moe.num_heads} heads (model.moe.num_heads) that "
                    f"{model.ffn} spreads over processes; use {nearest}"
                )
            if model.moe.capacity_factor is not None:
                raise ValueError(
                    f"expert_parallel: {degree} exchanges whole heads, which cannot have a capacity; use "
                    "model.moe.capacity_factor=null"
                )
        num_experts = model.ffn_shape.num_experts
        if num_experts % degree:
            is_derived = model.moe.match == "flops" and model.ffn not in ("smoe", "xmoe")
            multiple = degree * -(-num_experts // degree)
            remedy = f"num_experts_multiple={degree}" if is_derived else f"num_experts={multiple}"
            raise ValueError(
                f"expert_parallel: {degree} must divide the {num_experts} experts of a layer; use "
                f"{nearest_divisors(num_experts, degree)}, or model.moe.{remedy}"
            )
