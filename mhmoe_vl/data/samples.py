"""From the members of a shard's sample to an :class:`Example`: one small class per kind of data.

Every builder is called with the members, the number of the item inside the sample, and the seed that all its
randomness comes from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mhmoe_vl.data.batch import Example
from mhmoe_vl.data.decode import captions_of, clean_text, decode_image, decode_json, decode_text, image_member
from mhmoe_vl.data.image import ImageTransform
from mhmoe_vl.data.masking import mask_patches, mask_text
from mhmoe_vl.data.text import TextTokenizer
from mhmoe_vl.errors import DataError


class SampleBuilder(ABC):
    """Builds examples from shards of one kind.

    Attributes:
        shard_kinds: kinds of shard it reads.
    """

    shard_kinds: tuple[str, ...]

    @abstractmethod
    def __call__(self, members: Mapping[str, bytes], item: int, *, key: str, seed: int) -> Example:
        """The example of one item.

        Raises:
            DataError: a member is missing or cannot be decoded.
        """


class PatchMasking:
    """Block-wise masks of a fixed share of the patches."""

    def __init__(self, grid: int, ratio: float) -> None:
        self.grid = grid
        self.num_masked = round(ratio * grid**2)

    def __call__(self, rng: np.random.Generator) -> Tensor:
        return torch.from_numpy(mask_patches((self.grid, self.grid), self.num_masked, rng))


class ImageSamples(SampleBuilder):
    """Images for masked image modeling, those of pairs too."""

    shard_kinds = ("image", "pair")

    def __init__(self, transform: ImageTransform, masking: PatchMasking) -> None:
        self.transform, self.masking = transform, masking

    def __call__(self, members: Mapping[str, bytes], item: int, *, key: str, seed: int) -> Example:
        image = self.transform(decode_image(image_member(members)), seed)
        return Example(key, seed, image=image, image_mask=self.masking(np.random.default_rng(seed)))


class TextSamples(SampleBuilder):
    """Texts for masked language modeling; of a long document a random window."""

    shard_kinds = ("text",)

    def __init__(self, tokenizer: TextTokenizer, length: int, mask_ratio: float) -> None:
        self.tokenizer, self.length, self.mask_ratio = tokenizer, length, mask_ratio

    def __call__(self, members: Mapping[str, bytes], item: int, *, key: str, seed: int) -> Example:
        rng = np.random.default_rng(seed)
        text = clean_text(decode_text(_member(members, "txt")))
        if not text:
            raise DataError("text is empty")
        first, *body, last = self.tokenizer.encode(text, max_length=len(text.encode()) + 2)
        room = self.length - 2
        if len(body) > room:
            start = int(rng.integers(0, len(body) - room + 1))
            body = body[start : start + room]
        ids, targets = mask_text([first, *body, last], self.mask_ratio, self.tokenizer, rng)
        return Example(key, seed, text_ids=ids, text_targets=targets)


class PairSamples(SampleBuilder):
    """Images with one of their captions, drawn anew each epoch; both sides may be masked."""

    shard_kinds = ("pair",)

    def __init__(
        self,
        transform: ImageTransform,
        tokenizer: TextTokenizer,
        length: int,
        mask_ratio: float,
        masking: PatchMasking | None,
        *,
        include_end: bool = False,
    ) -> None:
        self.transform, self.tokenizer, self.length = transform, tokenizer, length
        self.mask_ratio, self.masking, self.include_end = mask_ratio, masking, include_end

    def __call__(self, members: Mapping[str, bytes], item: int, *, key: str, seed: int) -> Example:
        rng = np.random.default_rng(seed)
        captions = captions_of(members)
        if not captions:
            raise DataError("the image has no caption")
        caption = captions[int(rng.integers(len(captions)))]
        ids, targets = mask_text(
            self.tokenizer.encode(caption, self.length),
            self.mask_ratio,
            self.tokenizer,
            rng,
            include_end=self.include_end,
        )
        image = self.transform(decode_image(image_member(members)), seed)
        mask = None if self.masking is None else self.masking(rng)
        return Example(
            image_id_of(members, key), seed, image=image, image_mask=mask, text_ids=ids, text_targets=targets
        )


class VqaSamples(SampleBuilder):
    """Questions with soft scores for each answer of the answer list."""

    shard_kinds = ("vqa",)

    def __init__(
        self, transform: ImageTransform, tokenizer: TextTokenizer, length: int, answers: Sequence[str]
    ) -> None:
        self.transform, self.tokenizer, self.length = transform, tokenizer, length
        self.answer_index = {answer: index for index, answer in enumerate(answers)}

    def __call__(self, members: Mapping[str, bytes], item: int, *, key: str, seed: int) -> Example:
        question = _item(decode_json(_member(members, "json")), "questions", item)
        scores = torch.zeros(len(self.answer_index))
        for answer, score in question.get("labels", {}).items():
            if answer in self.answer_index:
                scores[self.answer_index[answer]] = score
        return Example(
            str(question["question_id"]),
            seed,
            image=self.transform(decode_image(image_member(members)), seed),
            text_ids=self.tokenizer.encode(clean_text(question["question"]), self.length),
            answer_scores=scores,
        )


class Nlvr2Samples(SampleBuilder):
    """A sentence and two images."""

    shard_kinds = ("nlvr2",)

    def __init__(self, transform: ImageTransform, tokenizer: TextTokenizer, length: int) -> None:
        self.transform, self.tokenizer, self.length = transform, tokenizer, length

    def __call__(self, members: Mapping[str, bytes], item: int, *, key: str, seed: int) -> Example:
        example = _item(decode_json(_member(members, "json")), "examples", item)
        label = example.get("label")
        return Example(
            example["identifier"],
            seed,
            image=self.transform(decode_image(image_member(members, "left")), seed),
            right_image=self.transform(decode_image(image_member(members, "right")), seed + 1),
            text_ids=self.tokenizer.encode(clean_text(example["sentence"]), self.length),
            label=-1 if label is None else int(label),
        )


def image_id_of(members: Mapping[str, bytes], key: str) -> str:
    """The data set's own id of an image, or the key of its sample."""
    fields = decode_json(members["json"]) if "json" in members else {}
    return str(fields.get("image_id", key))


def _member(members: Mapping[str, bytes], name: str) -> bytes:
    if name not in members:
        raise DataError(f"the sample has no .{name} member")
    return members[name]


def _item(fields: Mapping[str, Any], name: str, item: int) -> dict[str, Any]:
    try:
        return fields[name][item]
    except (KeyError, IndexError, TypeError):
        raise DataError(f"the sample's json has no {name}[{item}]") from None
