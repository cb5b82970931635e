"""From a configuration to the objects of a run."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path

import torch

from mhmoe_vl.data.coded_views import CodesOrigin
from mhmoe_vl.data.files import sha256_of
from mhmoe_vl.data.image import ImageTransform
from mhmoe_vl.data.loader import ShardDataset, Source
from mhmoe_vl.data.mixing import Mixing
from mhmoe_vl.data.plan import MixturePlan
from mhmoe_vl.data.samples import (
    ClassSamples,
    DocumentSamples,
    ImageSamples,
    Nlvr2Samples,
    PairSamples,
    PatchMasking,
    SampleBuilder,
    TextSamples,
    VqaSamples,
)
from mhmoe_vl.data.stored_codes import StoredCodes
from mhmoe_vl.data.stream import StreamSource
from mhmoe_vl.data.text import TextTokenizer
from mhmoe_vl.distributed.weights import load_weights
from mhmoe_vl.errors import ConfigError, DataError
from mhmoe_vl.models.config import MODALITIES, ModelConfig
from mhmoe_vl.models.embeddings import resize_positions
from mhmoe_vl.models.teachers import Teacher, build_teacher
from mhmoe_vl.models.visual_tokenizer import AnyVisualTokenizer, load_visual_tokenizer
from mhmoe_vl.tasks.base import Task
from mhmoe_vl.tasks.captioning import CaptioningConfig, CaptioningTask
from mhmoe_vl.tasks.classification import ClassificationConfig, ClassificationTask
from mhmoe_vl.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask
from mhmoe_vl.tasks.nlvr2 import Nlvr2Config, Nlvr2Task
from mhmoe_vl.tasks.pretrain import PretrainConfig, PretrainTask
from mhmoe_vl.tasks.retrieval import RetrievalConfig, RetrievalTask
from mhmoe_vl.tasks.visual_tokenizer import VisualTokenizerConfig, VisualTokenizerTask
from mhmoe_vl.tasks.vqa import VqaConfig, VqaTask
from mhmoe_vl.train import run_directory
from mhmoe_vl.train.config import RunConfig, SourceConfig

logger = logging.getLogger(__name__)


def build_task(config: RunConfig) -> Task:
    """The task's model with fresh weights, the same for the same seed.

    Raises:
        ConfigError: a codebook that does not fit the model.
        DataError: a file that the task needs is missing or malformed.
    """
    torch.manual_seed(config.seed)
    model, task = config.model, config.task
    codebook, teacher, num_answers, num_classes = None, None, 0, 0
    if isinstance(task, PretrainConfig):
        codebook = load_tokenizer_of(task, model)
    if isinstance(task, VqaConfig):
        num_answers = len(load_answers(task.answers))
    if isinstance(task, ClassificationConfig):
        num_classes = len(load_classes(task.classes))
    if isinstance(task, VisualTokenizerConfig):
        teacher = build_teacher(
            task.teacher, task.teacher_weights, image_size=model.image_size, patch_size=model.patch_size
        )
    return assemble_task(config, codebook=codebook, teacher=teacher, num_answers=num_answers, num_classes=num_classes)


def load_tokenizer_of(task: PretrainConfig, model: ModelConfig) -> AnyVisualTokenizer:
    """The visual tokenizer that gives a pretraining its targets.

    Raises:
        ConfigError: it does not fit the model.
        DataError: no such file, or no visual tokenizer.
    """
    codebook = load_visual_tokenizer(task.visual_codebook)
    for name, found, wanted in (
        ("num_visual_codes", codebook.num_codes, model.num_visual_codes),
        ("patch_size", codebook.patch_size, model.patch_size),
    ):
        if found != wanted:
            raise ConfigError(
                f"model.{name}: {wanted}, but {task.visual_codebook} has {found}; set model.{name}={found}"
            )
    return codebook


def assemble_task(
    config: RunConfig,
    *,
    codebook: AnyVisualTokenizer | None,
    num_answers: int,
    num_classes: int,
    teacher: Teacher | None = None,
) -> Task:
    """The task from a configuration and what its files hold: the visual tokenizer of pretraining, the answers of VQA,
    the classes of classification, the teacher of a visual tokenizer."""
    model, task = config.model, config.task
    if isinstance(task, PretrainConfig):
        assert codebook is not None
        return PretrainTask(model, task, codebook)
    if isinstance(task, LanguageModelingConfig):
        return LanguageModelingTask(model, task)
    if isinstance(task, VqaConfig):
        return VqaTask(model, task, num_answers=num_answers)
    if isinstance(task, Nlvr2Config):
        return Nlvr2Task(model, task)
    if isinstance(task, RetrievalConfig):
        return RetrievalTask(model, task)
    if isinstance(task, ClassificationConfig):
        return ClassificationTask(model, task, num_classes=num_classes)
    if isinstance(task, VisualTokenizerConfig):
        assert teacher is not None
        return VisualTokenizerTask(model, task, teacher)
    return CaptioningTask(model, task)


def load_answers(path: str | Path) -> list[str]:
    """The answer list that ``data_prep.pack_vqa`` wrote.

    Raises:
        DataError: absent or malformed.
    """
    return _load_list(path, "answers", "an answer list", "data_prep.pack_vqa")


def load_classes(path: str | Path) -> list[str]:
    """The class list that ``data_prep.pack_classes`` wrote.

    Raises:
        DataError: absent or malformed.
    """
    return _load_list(path, "classes", "a class list", "data_prep.pack_classes")


def _load_list(path: str | Path, key: str, what: str, program: str) -> list[str]:
    try:
        items = json.loads(Path(path).read_text())[key]
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such {what.partition(' ')[2]}; {program} writes {key}.json beside the shards"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not {what}: {error}") from None
    if not isinstance(items, list) or not items or not all(isinstance(item, str) for item in items):
        raise DataError(f"{path}: '{key}' must be a list of strings with at least one")
    return items


def load_tokenizer(config: RunConfig) -> TextTokenizer:
    """The text tokenizer, checked against the model's vocabulary.

    Raises:
        ConfigError: the run reads no text, or the vocabulary is too small.
        DataError: absent or malformed.
    """
    if config.data.text_tokenizer is None:
        raise ConfigError(
            f"{config.out}: is a run of task '{config.task.kind}' and has no text tokenizer; what it has trained is "
            f"its {run_directory.VISUAL_TOKENIZER}"
        )
    tokenizer = TextTokenizer.load(config.data.text_tokenizer)
    if tokenizer.num_tokens > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size: {config.model.vocab_size} is too small for {config.data.text_tokenizer}, which has "
            f"{tokenizer.num_tokens} tokens; set model.vocab_size={tokenizer.num_tokens} or more"
        )
    return tokenizer


def build_dataset(config: RunConfig, sources: dict[str, SourceConfig], *, training: bool) -> ShardDataset:
    """Sources of one split, with augmentation only in training.

    Validation has its own fixed seed, so that its masks are the same in every run and at every step.

    Raises:
        ConfigError: shards with visual codes that are not those of the run's tokenizer and views.
        DataError: shards, or a file that the task needs, are missing or malformed.
    """
    tokenizer = None if config.data.text_tokenizer is None else load_tokenizer(config)
    mixing = _mixing(config) if training else None
    built: dict[str, Source | StreamSource] = {}
    for name, source in sources.items():
        codes = _stored_codes(config, training=training) if source.codes else None
        samples = _build_samples(config, source, tokenizer, codes, training=training)
        if source.is_stream:
            built[name] = StreamSource(name, source.paths, samples, buffer_size=source.stream_buffer)
        else:
            indexed = built[name] = Source(name, source.paths, samples, mixing)
            if codes is not None:
                for shard in indexed.shards:
                    codes.check(f"data.{'train' if training else 'validation'}.{name}", shard)
    pad_id = 0 if tokenizer is None else tokenizer.pad_id
    return ShardDataset(built, seed=config.seed if training else 0, pad_id=pad_id)


def _mixing(config: RunConfig) -> Mixing | None:
    task = config.task
    if not isinstance(task, ClassificationConfig) or not (task.mixup or task.cutmix):
        return None
    return Mixing(task.mixup, task.cutmix)


def build_plan(config: RunConfig, dataset: ShardDataset) -> MixturePlan:
    """The order of the training data.

    Raises:
        ConfigError: a source is too light to give a sample to every step.
    """
    num_items = dataset.num_items()
    weights = {name: source.weight for name, source in config.data.train.items()}
    if config.data.sampling_alpha is not None:
        weights = sampling_weights(num_items, config.data.sampling_alpha)
    return MixturePlan(
        num_items=num_items,
        weights=weights,
        batch_size=config.data.batch_size,
        seed=config.seed,
    )


def sampling_weights(num_items: Mapping[str, int | None], alpha: float) -> dict[str, float]:
    """Shares in proportion to ``n ** alpha`` of sources of n items (XLM, arXiv 1901.07291, section 3.1).

    Rounded, so that the last bit of a power, in which machines differ, decides nothing.
    """
    scaled = {name: float(size or 0) ** alpha for name, size in num_items.items()}
    return {name: round(weight / sum(scaled.values()), 9) for name, weight in scaled.items()}


def data_checksums(dataset: ShardDataset) -> dict[str, str | None]:
    """One checksum per source over those of its shards, in their order, wherever they lie; None for a stream."""
    checksums: dict[str, str | None] = {}
    for name, source in dataset.sources.items():
        if isinstance(source, StreamSource):
            checksums[name] = None
            continue
        of_shards = "".join(f"{shard.sha256} {shard.num_items}\n" for shard in source.shards)
        checksums[name] = hashlib.sha256(of_shards.encode()).hexdigest()[:16]
    return checksums


def _stored_codes(config: RunConfig, *, training: bool) -> StoredCodes:
    """What the codes in shards must be, to be those that the run's own visual tokenizer would give."""
    model, task, augment = config.model, config.task, config.data.augment
    assert isinstance(task, PretrainConfig)
    origin = CodesOrigin(
        tokenizer=sha256_of(task.visual_codebook),
        image_size=model.image_size,
        crop_scale=augment.crop_scale if training else None,
        flip=augment.flip if training else False,
    )
    num_patches = (model.image_size // model.patch_size) ** 2
    return StoredCodes(origin, num_patches=num_patches, num_codes=model.num_visual_codes)


def _build_samples(
    config: RunConfig,
    source: SourceConfig,
    tokenizer: TextTokenizer | None,
    codes: StoredCodes | None,
    *,
    training: bool,
) -> SampleBuilder:
    data, model, task = config.data, config.model, config.task
    transform = ImageTransform(model.image_size, data.augment if training else None, center_crop=data.center_crop)
    if isinstance(task, VisualTokenizerConfig):
        return ImageSamples(transform, None)
    assert tokenizer is not None
    masking = PatchMasking(model.image_size // model.patch_size, data.image_mask_ratio)
    if source.kind == "image":
        return ImageSamples(transform, masking, codes)
    if isinstance(task, LanguageModelingConfig):
        return DocumentSamples(tokenizer, data.text_length, task.segment_size(data.text_length))
    if source.kind == "text":
        return TextSamples(tokenizer, data.text_length, data.text_mask_ratio)
    if source.kind == "vqa":
        assert isinstance(task, VqaConfig)
        return VqaSamples(transform, tokenizer, data.text_length, load_answers(task.answers))
    if source.kind == "nlvr2":
        return Nlvr2Samples(transform, tokenizer, data.text_length)
    if source.kind == "class":
        assert isinstance(task, ClassificationConfig)
        return ClassSamples(transform, load_classes(task.classes))
    if isinstance(task, CaptioningConfig):
        return PairSamples(transform, tokenizer, data.text_length, task.mask_ratio, None, include_end=True)
    if isinstance(task, RetrievalConfig):
        return PairSamples(transform, tokenizer, data.text_length, 0.0, None)
    return PairSamples(transform, tokenizer, data.text_length, data.pair_text_mask_ratio, masking, codes=codes)


def initial_weights(task: Task, directory: str) -> dict[str, torch.Tensor]:
    """Those weights of the run in ``directory`` that ``task`` can start from: its encoder, and heads of the same shape.

    Position tables of another image size are resized by the encoder's own rule. A final norm, and a modality, that
    ``task`` does without are left out.

    Args:
        task: may be on the meta device.

    Raises:
        CheckpointError: the run has no readable weights.
        ConfigError: the encoders do not have the same architecture, naming the first differences.
    """
    weights = load_weights(Path(directory) / run_directory.WEIGHTS)
    weights = {name: tensor for name, tensor in weights.items() if not _is_left_out(name, task.config)}
    own = task.state_dict()
    weights = {name: _resized(name, tensor, own) for name, tensor in weights.items()}
    problems = [
        f"{name} is {list(weights[name].shape) if name in weights else 'absent'} there and {list(own[name].shape)} here"
        for name in own
        if name.startswith("encoder.") and (name not in weights or weights[name].shape != own[name].shape)
    ]
    problems += [f"{name} is not in this model" for name in weights if name.startswith("encoder.") and name not in own]
    if problems:
        raise ConfigError(
            f"init_from: {directory}: {len(problems)} tensors of the encoder differ: {'; '.join(problems[:3])}; "
            "use the model section of that run's config.yaml"
        )
    return {name: tensor for name, tensor in weights.items() if name in own and tensor.shape == own[name].shape}


def transfer_weights(task: Task, directory: str) -> None:
    """Start from another run's weights; heads that it does not have stay fresh.

    Raises:
        CheckpointError, ConfigError: as :func:`initial_weights`.
    """
    fitting, own = initial_weights(task, directory), task.state_dict()
    task.load_state_dict(fitting, strict=False)
    fresh = sorted({name.split(".")[0] for name in own if name not in fitting})
    logger.info("%d of %d tensors from %s; fresh: %s", len(fitting), len(own), directory, ", ".join(fresh) or "none")


def _is_left_out(name: str, model: ModelConfig) -> bool:
    """Whether the weight is of a part of the encoder that ``model`` has chosen not to have."""
    parts = name.split(".")
    if parts[0] != "encoder":
        return False
    if parts[1] == "norm" and not model.final_norm:
        # The task's head begins with a norm of its own, which takes the place of this one.
        return True
    absent = [modality for modality in MODALITIES if modality not in model.modalities]
    return any(part in (modality, f"{modality}_embedding") for modality in absent for part in parts)


def _resized(name: str, tensor: torch.Tensor, own: dict[str, torch.Tensor]) -> torch.Tensor:
    if name != "encoder.vision_embedding.positions" or name not in own or own[name].shape == tensor.shape:
        return tensor
    side = math.isqrt(own[name].shape[1] - 1)
    return resize_positions(tensor, (side, side))
