"""Training a visual tokenizer: vector-quantised knowledge distillation (VQ-KD; BEiT v2, arXiv 2208.06366, section 2.2).

An encoder's patches are replaced by their nearest codes, from which a small decoder has to tell what a frozen teacher
sees in each patch. Gradients pass straight through the replacement; codes follow their patches by a moving average.

Shape suffixes: B images, P patches, N patches of a step, C width of a code, K codes, F features of the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mhmoe_vl.config import Config
from mhmoe_vl.data.batch import Batch
from mhmoe_vl.distributed.collectives import all_reduce_sum, any_rank, gather_rows
from mhmoe_vl.models.config import ModelConfig
from mhmoe_vl.models.drop_path import uniform_hash
from mhmoe_vl.models.ema_codebook import CodeStatistics, EmaCodebook, perplexity, quantization_error, race
from mhmoe_vl.models.feed_forward import LayerRouting
from mhmoe_vl.models.frozen import Frozen
from mhmoe_vl.models.teacher_decoder import TeacherDecoder
from mhmoe_vl.models.teachers import Teacher
from mhmoe_vl.models.visual_tokenizer import CodeHead
from mhmoe_vl.tasks.base import MicroBatch, Task, TaskOutput, at_least_float32

Positive = Annotated[int, Field(gt=0)]

#: Patches per code that k-means looks at, of the first step.
_KMEANS_PATCHES_PER_CODE = 32


class VisualTokenizerConfig(Config):
    """Visual tokenizer by distillation.

    Attributes:
        teacher: ``hog``, ``pixels``, ``random``, ``timm:<model>`` or ``open_clip:<model>``; docs/visual_tokenizer.md.
        teacher_weights: of a timm or open_clip model: a safetensors file, ``random``, the name of a pretrained tag of
            open_clip, or None for the model's default pretrained weights from the hub's cache or the network.
        num_codes, code_dim: of the codebook; BEiT v2: 8192 codes of 32 values.
        decoder_depth: blocks between codes and teacher; BEiT v2: 1 or 3.
        commitment_weight: of the squared distance between a patch and its code. 1 is equation 4 of the paper; the
            released code takes the mean over ``code_dim`` values, which is 1/32.
        codebook_decay: of the moving average that codes follow.
        revival_share: codes used less than this share of an even use begin anew at a badly fitting patch; 0 turns
            revival off. Not in BEiT v2.
    """

    kind: Literal["visual_tokenizer"] = "visual_tokenizer"
    teacher: str = "hog"
    teacher_weights: str | None = None
    num_codes: Annotated[int, Field(ge=2)] = 8192
    code_dim: Positive = 32
    decoder_depth: Positive = 1
    commitment_weight: Annotated[float, Field(ge=0)] = 1.0
    codebook_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    revival_share: Annotated[float, Field(ge=0, lt=0.5)] = 0.1


@dataclass
class TokenizedPatches:
    """The patches of one micro-batch, one after the other, without gradient.

    Attributes:
        vectors_NC: what the encoder makes of them, of length 1.
        codes_N: nearest code.
        draws_N: random numbers in [0, 1) that depend on the sample's seed and the place of the patch alone.
    """

    vectors_NC: Tensor
    codes_N: Tensor
    draws_N: Tensor


@dataclass
class FirstLook:
    """What there is of the patches of one batch before there are codes.

    Attributes:
        raw_NC: of the code head.
        draws_N: as in :class:`TokenizedPatches`.
        targets: sum and number of the teacher's features, as unit vectors.
        is_finite: bool scalar, of all of these.
    """

    raw_NC: Tensor
    draws_N: Tensor
    targets: CodeStatistics
    is_finite: Tensor


@dataclass
class TokenizerOutput(TaskOutput):
    """Result of one micro-batch, with its patches by source."""

    patches: dict[str, TokenizedPatches] = field(default_factory=dict)
    first_looks: list[FirstLook] = field(default_factory=list)


class VisualTokenizerTask(Task):
    """Encoder, codebook, decoder; the teacher is beside it.

    Figures: ``cosine`` (between prediction and teacher), ``commitment``; of every training step over all ranks
    ``codes_used``, ``codes_perplexity``, ``codes_revived``, and ``codes_average_perplexity`` of the moving average;
    of a whole validation ``codes_used``, ``codes_used_share`` and ``codes_perplexity``.
    """

    def __init__(self, model: ModelConfig, config: VisualTokenizerConfig, teacher: Teacher) -> None:
        super().__init__(model)
        self.task_config = config
        self.code_head = CodeHead(model.dim, config.code_dim)
        self.codebook = EmaCodebook(
            config.num_codes, config.code_dim, decay=config.codebook_decay, revival_share=config.revival_share
        )
        self.decoder = TeacherDecoder(
            model, code_dim=config.code_dim, depth=config.decoder_depth, num_features=teacher.num_features
        )
        self.teacher = Frozen(teacher)

    def num_targets(self, micro_batches: Sequence[MicroBatch]) -> dict[str, int]:
        num_images = sum(len(batch) for batches in micro_batches for batch in batches.values())
        return {"patches": num_images * self.config.num_patches}

    def forward(self, batches: MicroBatch, totals: Mapping[str, float], num_micro_batches: int = 1) -> TokenizerOutput:
        device = self.codebook.codes_KC.device
        output = TokenizerOutput(loss=torch.zeros((), device=device))
        if not self.has_started and not torch.is_grad_enabled():
            output.first_looks = [self._first_look(batch) for batch in batches.values()]
            return output
        routings: list[LayerRouting] = []
        for source, batch in batches.items():
            encoded = self.encoder(batch.image, sample_seed=batch.seed)
            routings += encoded.routings
            vectors_BPC = self.code_head(encoded.vision[:, 1:])
            patches = output.patches[source] = self._tokenized(vectors_BPC.detach().flatten(0, 1), batch.seed)
            codes_BPC = self.codebook.codes_KC[patches.codes_N].view_as(vectors_BPC)
            commitment_BP = (vectors_BPC - codes_BPC).square().sum(-1)
            # Straight through: the value of the code, the gradient of the vector.
            predicted_BPF = self.decoder(vectors_BPC + (codes_BPC - vectors_BPC).detach())
            predicted_BPF = at_least_float32(predicted_BPF)
            cosine_BP = F.cosine_similarity(predicted_BPF, self._targets(batch).to(predicted_BPF.dtype), dim=-1)
            loss_BP = 1 - cosine_BP + self.task_config.commitment_weight * commitment_BP
            output.loss = output.loss + loss_BP.sum() / max(1.0, totals["patches"])
            count = torch.tensor(cosine_BP.numel(), device=device)
            output.record("cosine", cosine_BP.sum(), count)
            output.record("commitment", commitment_BP.sum(), count)
            if not self.training:
                usage_K = torch.bincount(patches.codes_N, minlength=self.codebook.num_codes)
                output.usage_K["codes"] = output.usage_K["codes"] + usage_K if "codes" in output.usage_K else usage_K
        self.add_auxiliary_losses(output, routings, num_micro_batches)
        return output

    def _targets(self, batch: Batch) -> Tensor:
        """Unit vectors ``[B, P, F]``."""
        assert batch.image is not None
        features_BPF = self.teacher.on(batch.image.device)(batch.image)
        return F.normalize(at_least_float32(features_BPF), dim=-1)

    def _tokenized(self, vectors_NC: Tensor, seed_B: Tensor) -> TokenizedPatches:
        with torch.autocast(vectors_NC.device.type, enabled=False):
            codes_N = self.codebook.assign(vectors_NC)
        return TokenizedPatches(vectors_NC, codes_N, _draws(seed_B, self.config.num_patches))

    def _first_look(self, batch: Batch) -> FirstLook:
        encoded = self.encoder(batch.image, sample_seed=batch.seed)
        raw_NC = self.code_head.raw(encoded.vision[:, 1:]).flatten(0, 1)
        targets_NF = self._targets(batch).flatten(0, 1)
        is_finite = raw_NC.isfinite().all() & targets_NF.isfinite().all()
        return FirstLook(raw_NC, _draws(batch.seed, self.config.num_patches), _sum_of(targets_NF), is_finite)

    @property
    def has_started(self) -> bool:
        return self.codebook.has_started

    @torch.no_grad()
    def start(self, outputs: Sequence[TaskOutput]) -> None:
        """Centre the patches of the step, find codes among them by k-means, and tell the decoder the teacher's mean.
        Not if a patch is not finite: the step is going to be skipped, and the next one begins."""
        looks = [look for output in outputs for look in cast(TokenizerOutput, output).first_looks]
        if any_rank(not all(look.is_finite for look in looks)):
            return
        raw_NC = torch.cat([look.raw_NC for look in looks])
        center_C = _mean_over_ranks([_sum_of(raw_NC)])
        self.code_head.center_on(center_C)
        self.decoder.mean_F.copy_(_mean_over_ranks([look.targets for look in looks]))
        vectors_NC = F.normalize(raw_NC - center_C, dim=-1)
        limit = _KMEANS_PATCHES_PER_CODE * self.codebook.num_codes
        self.codebook.start(_first_of_all_ranks(vectors_NC, torch.cat([look.draws_N for look in looks]), limit))

    @torch.no_grad()
    def after_step(self, outputs: Sequence[TaskOutput]) -> None:
        super().after_step(outputs)
        patches, num_codes = _joined(outputs), self.codebook.num_codes
        local = CodeStatistics.of(patches.vectors_NC, patches.codes_N, num_codes)
        packed = all_reduce_sum(torch.cat([local.counts_K[:, None], local.sums_KC], dim=1))
        statistics = CodeStatistics(packed[:, 0], packed[:, 1:])
        # Vectors were compared with the codes as they were; badly fitting ones are where new codes are needed.
        error_N = quantization_error(patches.vectors_NC, self.codebook.codes_KC[patches.codes_N])
        self.codebook.update(statistics)
        numbers_R = self.codebook.dead_codes()
        if len(numbers_R):
            times_N = race(patches.draws_N, error_N)
            vectors_RC = _first_of_all_ranks(patches.vectors_NC, times_N, len(numbers_R))
            numbers_R = numbers_R[: len(vectors_RC)]
            self.codebook.revive(numbers_R, vectors_RC)
        one = torch.ones((), device=packed.device)
        for figure, value in (
            ("codes_used", (statistics.counts_K > 0).sum()),
            ("codes_perplexity", perplexity(statistics.counts_K)),
            ("codes_average_perplexity", self.codebook.usage_perplexity),
            ("codes_revived", one * len(numbers_R)),
        ):
            # The same on all ranks, so that their mean is it too.
            outputs[-1].record(figure, value, one)

    def origin(self) -> dict[str, Any]:
        """What a tokenizer's file says about its making."""
        config = self.task_config
        return {
            "teacher": config.teacher,
            "teacher_weights": config.teacher_weights,
            "num_updates": int(self.codebook.num_updates),
        }


def _joined(outputs: Sequence[TaskOutput]) -> TokenizedPatches:
    """All patches of this rank in a step."""
    parts = [part for output in outputs for part in cast(TokenizerOutput, output).patches.values()]
    return TokenizedPatches(
        torch.cat([part.vectors_NC for part in parts]),
        torch.cat([part.codes_N for part in parts]),
        torch.cat([part.draws_N for part in parts]),
    )


def _draws(seed_B: Tensor, num_patches: int) -> Tensor:
    """A random number in [0, 1) for every patch of samples, float64 ``[B * P]``."""
    # Two times 24 bits, so that no two of millions of patches are alike.
    high_PB, low_PB = uniform_hash(seed_B, 2 * num_patches).double().split(num_patches)
    return (high_PB + low_PB / 2**24).T.flatten()


def _sum_of(vectors_NC: Tensor) -> CodeStatistics:
    """As if all had one code."""
    return CodeStatistics.of(vectors_NC, torch.zeros(len(vectors_NC), dtype=torch.int64, device=vectors_NC.device), 1)


def _mean_over_ranks(parts: Sequence[CodeStatistics]) -> Tensor:
    """Of vectors that were summed up by :func:`_sum_of`, float32. Collective."""
    count_1, sum_1C = (all_reduce_sum(torch.stack(tensors).sum(0)) for tensors in zip(*parts, strict=True))
    return CodeStatistics(count_1, sum_1C).means_KC()[0]


def _first_of_all_ranks(vectors_NC: Tensor, times_N: Tensor, number: int) -> Tensor:
    """The vectors with the ``number`` smallest times, in their order; those that never come (infinity) are left out.
    The same on all ranks, and for any number of ranks. Collective."""
    order = times_N.argsort(stable=True)[:number]
    order = order[times_N[order].isfinite()]
    of_all_NC, _ = gather_rows(vectors_NC[order])
    times_N, _ = gather_rows(times_N[order])
    return of_all_NC[times_N.argsort(stable=True)[:number]]
