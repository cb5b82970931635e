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
from mhmoe_vl.data.decode import (
    captions_of,
    clean_document,
    clean_text,
    decode_image,
    decode_json,
    decode_text,
    image_member,
)
from mhmoe_vl.data.image import ImageTransform
from mhmoe_vl.data.masking import mask_patches, mask_text
from mhmoe_vl.data.shards import IndexedSample
from mhmoe_vl.data.stored_codes import StoredCodes
from mhmoe_vl.data.text import TextTokenizer
from mhmoe_vl.errors import DataError


class SampleBuilder(ABC):
    """Builds examples from shards of one kind.

    Attributes:
        shard_kinds: kinds of shard it reads.
    """

    shard_kinds: tuple[str, ...]

    def num_items(self, sample: IndexedSample) -> int:
        """How many examples there are in a sample, known from its index entry alone."""
        return sample.num_items

    @abstractmethod
    def __call__(self, members: Mapping[str, bytes], item: int, *, key: str, seed: int, epoch: int = 0) -> Example:
        """The example of one item.

        Args:
            epoch: of the source, for what is not drawn by ``seed``.

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
    """Images for masked image modeling, or whole for a visual tokenizer; those of pairs and of classes too.

    Args:
        masking: None hides nothing.
        codes: where the shards have the codes of their images.
    """

    shard_kinds = ("image", "pair", "class")

    def __init__(
        self, transform: ImageTransform, masking: PatchMasking | None, codes: StoredCodes | None = None
    ) -> None:
        self.transform, self.masking, self.codes = transform, masking, codes

    def __call__(self, members: Mapping[str, bytes], item: int, *, key: str, seed: int, epoch: int = 0) -> Example:
        image, codes = _image_and_codes(members, self.transform, self.codes, seed=seed, epoch=epoch)
        mask = None if self.masking is None else self.masking(np.random.default_rng(seed))
        return Example(key, seed, image=image, image_mask=mask, image_codes=codes)


class TextSamples(SampleBuilder):
    """Texts for masked language modeling; of a long document a random window."""

    shard_kinds = ("text",)

    def __init__(self, tokenizer: TextTokenizer, length: int, mask_ratio: float) -> None:
        self.tokenizer, self.length, self.mask_ratio = tokenizer, length, mask_ratio

    def __call__(self, members: Mapping[str, bytes], item: int, *, key: str, seed: int, epoch: int = 0) -> Example:
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


class DocumentSamples(SampleBuilder):
    """Documents for causal language modeling: all of their tokens, each predicted once.

    A document of more than ``segment_bytes`` is several items, so that an item has a limit and none of a document is
    lost: the size in the index says how many, and white space near the limit says where one ends (no token is cut in
        half; the
    white space itself is not predicted). A segment starts with ``<s>``, and the last one of a document ends with
    ``</s>``.

    Args:
        row_length: of the rows that items are packed into; a longer item takes several.
    """

    shard_kinds = ("text",)

    #: How far before its limit a segment may end for the sake of white space.
    _LOOK_BACK = 256

    def __init__(self, tokenizer: TextTokenizer, row_length: int, segment_bytes: int) -> None:
        if segment_bytes <= self._LOOK_BACK:
            raise ValueError(f"segment_bytes={segment_bytes} must be more than {self._LOOK_BACK}")
        self.tokenizer, self.row_length, self.segment_bytes = tokenizer, row_length, segment_bytes

    def num_items(self, sample: IndexedSample) -> int:
        size = sample.members["txt"].size if "txt" in sample.members else 1
        return max(1, -(-size // self.segment_bytes))

    def __call__(self, members: Mapping[str, bytes], item: int, *, key: str, seed: int, epoch: int = 0) -> Example:
        data = _member(members, "txt")
        text = clean_document(decode_text(data[self._cut(data, item) : self._cut(data, item + 1)]))
        if not text:
            raise DataError("text is empty")
        ids = [self.tokenizer.bos_id, *self.tokenizer.ordinary_tokens(text)]
        if (item + 1) * self.segment_bytes >= len(data):
            ids.append(self.tokenizer.eos_id)
        return Example(
            key if len(data) <= self.segment_bytes else f"{key}/{item}",
            seed,
            text_ids=ids[:-1],
            text_targets=ids[1:],
            row_length=self.row_length,
            num_bytes=len(text.encode()),
            num_characters=len(text),
        )

    def _cut(self, data: bytes, number: int) -> int:
        """Where segment ``number`` begins: behind the last white space before its limit, else at a character."""
        limit = number * self.segment_bytes
        if limit == 0 or limit >= len(data):
            return min(limit, len(data))
        for place in range(limit, limit - self._LOOK_BACK, -1):
            if data[place - 1 : place].isspace():
                return place
        for place in range(limit, limit - 4, -1):
            if data[place] & 0b1100_0000 != 0b1000_0000:
                return place  # no character is cut in half
        return limit


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
        codes: StoredCodes | None = None,
    ) -> None:
        self.transform, self.tokenizer, self.length = transform, tokenizer, length
        self.mask_ratio, self.masking, self.include_end, self.codes = mask_ratio, masking, include_end, codes

    def __call__(self, members: Mapping[str, bytes], item: int, *, key: str, seed: int, epoch: int = 0) -> Example:
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
        image, codes = _image_and_codes(members, self.transform, self.codes, seed=seed, epoch=epoch)
        return Example(
            image_id_of(members, key),
            seed,
            image=image,
            image_mask=None if self.masking is None else self.masking(rng),
            image_codes=codes,
            text_ids=ids,
            text_targets=targets,
        )


class VqaSamples(SampleBuilder):
    """Questions with soft scores for each answer of the answer list."""

    shard_kinds = ("vqa",)

    def __init__(
        self, transform: ImageTransform, tokenizer: TextTokenizer, length: int, answers: Sequence[str]
    ) -> None:
        self.transform, self.tokenizer, self.length = transform, tokenizer, length
        self.answer_index = {answer: index for index, answer in enumerate(answers)}

    def __call__(self, members: Mapping[str, bytes], item: int, *, key: str, seed: int, epoch: int = 0) -> Example:
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

    def __call__(self, members: Mapping[str, bytes], item: int, *, key: str, seed: int, epoch: int = 0) -> Example:
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


class ClassSamples(SampleBuilder):
    """Images with the number of their class in a list of classes."""

    shard_kinds = ("class",)

    def __init__(self, transform: ImageTransform, classes: Sequence[str]) -> None:
        self.transform = transform
        self.class_index = {name: index for index, name in enumerate(classes)}

    def __call__(self, members: Mapping[str, bytes], item: int, *, key: str, seed: int, epoch: int = 0) -> Example:
        name = class_of(members)
        if name not in self.class_index:
            raise DataError(f"class '{name}' is not in the list of classes; pack with --classes of the training set")
        image = self.transform(decode_image(image_member(members)), seed)
        return Example(key, seed, image=image, label=self.class_index[name])


def class_of(members: Mapping[str, bytes]) -> str:
    """The class of an image.

    Raises:
        DataError: it has none.
    """
    name = decode_json(_member(members, "json")).get("class")
    if not isinstance(name, str):
        raise DataError("the sample's json has no string 'class'")
    return name


def image_id_of(members: Mapping[str, bytes], key: str) -> str:
    """The data set's own id of an image, or the key of its sample."""
    fields = decode_json(members["json"]) if "json" in members else {}
    return str(fields.get("image_id", key))


def _image_and_codes(
    members: Mapping[str, bytes], transform: ImageTransform, stored: StoredCodes | None, *, seed: int, epoch: int
) -> tuple[Tensor, Tensor | None]:
    """The image of a sample; with stored codes the view of it that they belong to, and they."""
    view, codes = (None, None) if stored is None else stored.of(members, epoch)
    return transform(decode_image(image_member(members)), seed, view), codes


def _member(members: Mapping[str, bytes], name: str) -> bytes:
    if name not in members:
        raise DataError(f"the sample has no .{name} member")
    return members[name]


def _item(fields: Mapping[str, Any], name: str, item: int) -> dict[str, Any]:
    try:
        return fields[name][item]
    except (KeyError, IndexError, TypeError):
        raise DataError(f"the sample's json has no {name}[{item}]") from None
