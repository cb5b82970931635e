"""Shards with images to shards that have the visual codes of views of these images as well."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from mhmoe_vl.data.coded_views import CODED_KINDS, MEMBER, CodedView, CodesOrigin, ImageView, dump_codes
from mhmoe_vl.data.decode import decode_image, image_member
from mhmoe_vl.data.files import sha256_of
from mhmoe_vl.data.image import AugmentConfig, ImageTransform
from mhmoe_vl.data.plan import stable_hash
from mhmoe_vl.data.prepare.packing import Packing, PackingReport, output_folder, write_data_set
from mhmoe_vl.data.prepare.shard_writer import ShardPlace, ShardResult, write_samples
from mhmoe_vl.data.shards import IndexedSample, ShardIndex, ShardReader, Skip, encode_json, find_shards, read_index
from mhmoe_vl.errors import ConfigError, DataError
from mhmoe_vl.models.visual_tokenizer import AnyVisualTokenizer, load_visual_tokenizer

#: Views that are encoded together.
_VIEWS_AT_ONCE = 64


@dataclass(frozen=True)
class Tokenization:
    """How images become codes.

    Attributes:
        tokenizer: file of the visual tokenizer.
        image_size: side of a view in pixels.
        num_views: of each image; with 0 or 1 it is the whole image.
        crop_scale, flip: how several views are drawn, as in ``data.augment`` of a run.
        seed: of the views; with the key of the sample and the number of the view it decides each of them.
        device: ``auto``, ``cpu`` or ``cuda``.
    """

    tokenizer: Path
    image_size: int
    num_views: int = 1
    crop_scale: float | None = 0.2
    flip: bool = True
    seed: int = 0
    device: str = "auto"

    @property
    def augment(self) -> AugmentConfig:
        """What views are drawn by."""
        if self.num_views < 2:
            return AugmentConfig(crop_scale=None, flip=False)
        return AugmentConfig(crop_scale=self.crop_scale, flip=self.flip)

    def origin(self) -> CodesOrigin:
        """What the codes will be known by.

        Raises:
            DataError: the tokenizer cannot be read.
        """
        augment = self.augment
        return CodesOrigin(sha256_of(self.tokenizer), self.image_size, augment.crop_scale, augment.flip)


def tokenize_images(
    shards: Sequence[str],
    options: Tokenization,
    *,
    directory: Path,
    name: str,
    num_workers: int = 1,
    overwrite: bool = False,
) -> PackingReport:
    """Write a data set with one shard for each of ``shards``: the same samples, and the codes of their images.

    The members that the index knows are kept byte for byte. Samples whose image cannot be decoded are left out. Can be
    interrupted and run again, as all packing.

    Raises:
        ConfigError: sizes that do not fit together, or views that could not differ.
        DataError: no shards, shards without images or of several kinds, or no tokenizer.
        OutputError: the folder holds something else, or cannot be written.
    """
    patch_size = load_visual_tokenizer(options.tokenizer).patch_size
    if options.image_size % patch_size:
        raise ConfigError(f"--image-size {options.image_size} must be a multiple of the {patch_size} px of a patch")
    if options.num_views > 1 and options.crop_scale is None and not options.flip:
        raise ConfigError(f"--views {options.num_views}: without crops and flips all views are the same; use --views 1")
    sources = [read_index(path) for path in find_shards(list(shards))]
    for source in sources:
        if source.kind not in CODED_KINDS:
            raise DataError(f"{source.path}: is a shard of kind '{source.kind}'; {', '.join(CODED_KINDS)} have codes")
        if source.kind != sources[0].kind:
            raise DataError(
                f"{source.path}: is a shard of kind '{source.kind}', and {sources[0].path} of kind "
                f"'{sources[0].kind}'; make two data sets of them"
            )
    origin = options.origin()
    settings = {**asdict(origin), "views": max(1, options.num_views), "seed": options.seed}
    packing = Packing(
        kind=sources[0].kind,
        directory=directory,
        name=name,
        samples_per_shard=None,
        num_workers=num_workers,
        overwrite=overwrite,
        settings=settings,
    )
    folder = output_folder(packing)
    jobs = (
        _Job(folder.place(f"{name}-{number:05d}.tar"), source, origin, options, is_alone=num_workers == 1)
        for number, source in enumerate(sources)
    )
    total = sum(source.num_samples for source in sources)
    return write_data_set(jobs, _write_shard, packing, folder, skipped=[], total=total, label="tokenizing")


@dataclass(frozen=True)
class _Job:
    """One shard; ``is_alone`` if no other process works on others."""

    place: ShardPlace
    source: ShardIndex
    origin: CodesOrigin
    options: Tokenization
    is_alone: bool


def _write_shard(job: _Job) -> ShardResult:
    decides = (job.source.sha256, asdict(job.origin), job.options.num_views, job.options.seed)
    plan = hashlib.sha256(encode_json(decides)).hexdigest()
    return write_samples(job.place, job.source.kind, plan, partial(_tokenized, job))


def _tokenized(job: _Job, skipped: list[Skip]) -> Iterator[dict[str, Any]]:
    """The samples of a shard with their codes."""
    num_at_once = max(1, _VIEWS_AT_ONCE // max(1, job.options.num_views))
    if not job.is_alone:
        torch.set_num_threads(1)  # a process for each core
    device = _device_named(job.options.device)
    tokenizer = _loaded(job.options.tokenizer, job.origin.tokenizer, device)
    samples = job.source.samples
    for start in range(0, len(samples), num_at_once):
        read = list(_read(job, samples[start : start + num_at_once], skipped))
        if not read:
            continue
        images = torch.stack([image for some in read for image in some.images]).to(device)
        codes = iter(tokenizer.encode(images).tolist())
        for some in read:
            coded = [CodedView(view, tuple(next(codes))) for view in some.views]
            yield {"__key__": some.key, **some.members, MEMBER: dump_codes(job.origin, coded)}


@dataclass(frozen=True)
class _Read:
    """A sample with views of its image, uint8 ``[3, size, size]`` each."""

    key: str
    members: dict[str, bytes]
    views: list[ImageView]
    images: list[torch.Tensor]


def _read(job: _Job, samples: Sequence[IndexedSample], skipped: list[Skip]) -> Iterator[_Read]:
    options, reader = job.options, ShardReader()
    drawing, looking = ImageTransform(options.image_size, options.augment), ImageTransform(options.image_size)
    for sample in samples:
        try:
            members = reader.read(job.source, sample)
            picture = decode_image(image_member(members))
        except DataError as error:
            where = f"{job.source.path.name}: {sample.key}"
            skipped.append(Skip(where, getattr(error, "reason", "unreadable"), str(error)))
            continue
        seeds = (stable_hash(f"{options.seed}/views/{sample.key}/{n}") for n in range(max(1, options.num_views)))
        views = [drawing.draw_view(picture, seed) for seed in seeds]
        yield _Read(sample.key, members, views, [looking(picture, 0, view) for view in views])


@cache
def _loaded(path: Path, sha256: str, device: torch.device) -> AnyVisualTokenizer:
    """Once in each process, for each content of the file."""
    return load_visual_tokenizer(path).to(device)


def _device_named(name: str) -> torch.device:
    """In the worker: CUDA that a parent has begun to use cannot be used after a fork."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: there is no CUDA device; use --device cpu")
    return torch.device(name)
