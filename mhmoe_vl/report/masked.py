"""What a pretrained model makes of hidden patches and hidden words.

Shape suffixes: B samples, P patches, L text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from mhmoe_vl.analysis.codebook.measure import to_bytes
from mhmoe_vl.data.batch import Batch
from mhmoe_vl.data.masking import IGNORE
from mhmoe_vl.data.plan import SampleRef
from mhmoe_vl.data.text import TextTokenizer
from mhmoe_vl.distributed.world import World
from mhmoe_vl.models.visual_tokenizer import AnyVisualTokenizer
from mhmoe_vl.report.pictures import tensor_data_uri
from mhmoe_vl.report.samples import sample_order
from mhmoe_vl.tasks.pretrain import PretrainTask
from mhmoe_vl.train.build import build_dataset
from mhmoe_vl.train.trained import TrainedRun, load_trained

_GRAY = 128


@dataclass(frozen=True)
class MaskedImage:
    """The same picture four times, as data URIs.

    Attributes:
        masked: hidden patches in gray.
        predicted: hidden patches replaced by the mean patch of the code that the model predicts.
        reconstructed: every patch replaced by the mean patch of its own code, the best that a prediction can be.
        num_right, num_masked: hidden patches whose code was predicted exactly, and all hidden patches.
    """

    original: str
    masked: str
    predicted: str
    reconstructed: str
    num_right: int
    num_masked: int


@dataclass(frozen=True)
class Word:
    """A token of a text as the reader sees it.

    Attributes:
        text: what stands there, with the space before it.
        predicted: what the model puts there; None if it was not asked.
    """

    text: str
    predicted: str | None = None

    @property
    def is_right(self) -> bool:
        return self.predicted == self.text


@dataclass(frozen=True)
class MaskedSample:
    """One held-out sample with what was hidden of it."""

    sample_id: str
    image: MaskedImage | None
    words: list[Word]


def masked_samples(directory: Path, world: World, *, num_samples: int) -> dict[str, list[MaskedSample]]:
    """Predictions for samples of the validation sources of a finished pretraining run, by source.

    Image-text pairs alone if there are any, else all sources; masks are those of the run's own validation.

    Raises:
        ConfigError, CheckpointError: as :func:`load_trained`.
        DataError: the shards are gone or damaged.
    """
    trained = load_trained(directory, world, task_kind="pretrain")
    sources = trained.config.data.validation
    pairs = {name: source for name, source in sources.items() if source.kind == "pair"}
    dataset = build_dataset(trained.config, pairs or sources, training=False) if sources else None
    if dataset is None:
        return {}
    samples = {}
    for name in dataset.sources:
        refs = [SampleRef(name, 0, item) for item in islice(sample_order(len(dataset.indexed(name))), num_samples)]
        samples[name] = predict_masked(trained, dataset.batch(name, refs))
    return samples


@torch.no_grad()
def predict_masked(trained: TrainedRun, batch: Batch) -> list[MaskedSample]:
    """Predict what is hidden in each sample of a batch with images, texts or both."""
    task = cast(PretrainTask, trained.task)
    batch = batch.to(trained.world.device)
    encoded = task.encoder(batch.image, batch.text_ids, text_valid=batch.text_valid, image_mask=batch.image_mask)
    images: list[MaskedImage] | list[None] = [None] * len(batch)
    words: list[list[Word]] = [[] for _ in range(len(batch))]
    if batch.image is not None and batch.image_mask is not None:
        codes_BP = task.mim_head(encoded.vision[:, 1:]).argmax(-1)
        images = _masked_images(task.codebook, batch.image, batch.image_mask, codes_BP)
    if batch.text_ids is not None and batch.text_targets is not None:
        predicted_BL = task.mlm_head(encoded.text).argmax(-1)
        rows = zip(batch.text_ids.tolist(), batch.text_targets.tolist(), predicted_BL.tolist(), strict=True)
        words = [_words(trained.tokenizer, *row) for row in rows]
    return [MaskedSample(*fields) for fields in zip(batch.sample_ids, images, words, strict=True)]


def _masked_images(
    codebook: AnyVisualTokenizer, image_B3HW: Tensor, mask_BP: Tensor, predicted_BP: Tensor
) -> list[MaskedImage]:
    rows, columns = (side // codebook.patch_size for side in image_B3HW.shape[2:])
    true_BP = codebook.encode(image_B3HW)
    hidden_B1HW = (
        mask_BP.unflatten(1, (rows, columns))
        .repeat_interleave(codebook.patch_size, 1)
        .repeat_interleave(codebook.patch_size, 2)[:, None]
    )
    predicted = to_bytes(codebook.decode(predicted_BP, (rows, columns)))
    reconstructed = to_bytes(codebook.decode(true_BP, (rows, columns)))
    versions = (
        image_B3HW,
        image_B3HW.masked_fill(hidden_B1HW, _GRAY),
        torch.where(hidden_B1HW, predicted, image_B3HW),
        reconstructed,
    )
    pictures = [[tensor_data_uri(image) for image in version] for version in versions]
    num_right = ((predicted_BP == true_BP) & mask_BP).sum(1).tolist()
    num_masked = mask_BP.sum(1).tolist()
    return [MaskedImage(*fields) for fields in zip(*pictures, num_right, num_masked, strict=True)]


def _words(tokenizer: TextTokenizer, ids: list[int], targets: list[int], predicted: list[int]) -> list[Word]:
    """The text with the model's answer at every hidden place; special tokens are left out."""
    true = [target if target != IGNORE else shown for shown, target in zip(ids, targets, strict=True)]
    special = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id}
    words = []
    for place, (token, target) in enumerate(zip(true, targets, strict=True)):
        if token in special:
            continue
        before = [t for t in true[:place] if t not in special]
        text = _piece(tokenizer, before, token)
        words.append(Word(text) if target == IGNORE else Word(text, _piece(tokenizer, before, predicted[place])))
    return words


def _piece(tokenizer: TextTokenizer, before: list[int], token: int) -> str:
    """What ``token`` adds to the text before it. Some tokenizers show a token differently where a text starts, and all
    show the bytes of an unfinished character as a replacement character."""
    decode = tokenizer.tokenizer.decode
    # Without tokens there is nothing to decode, and CLIP's decoder panics in Rust.
    start = decode(before, skip_special_tokens=False) if before else ""
    whole = decode([*before, token], skip_special_tokens=False)
    return whole[len(start) :] if whole.startswith(start) else decode([token], skip_special_tokens=False)
