"""What the loader hands to a task.

Shape suffixes: B samples, P patches, R rows of text, L text tokens, A answers. A text is a row, unless texts are
packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from mhmoe_vl.data.masking import IGNORE
from mhmoe_vl.data.rows import Piece, pack_pieces, pieces_of


@dataclass(frozen=True)
class Example:
    """One sample, before it is put into a batch. Fields as in :class:`Batch`, without the first dimension.

    Attributes:
        row_length: of rows that texts of any length are packed into; None for a row per text.
    """

    sample_id: str
    seed: int
    image: Tensor | None = None
    right_image: Tensor | None = None
    image_mask: Tensor | None = None
    image_codes: Tensor | None = None
    text_ids: list[int] | None = None
    text_targets: list[int] | None = None
    answer_scores: Tensor | None = None
    label: int | None = None
    other_label: int | None = None
    label_share: Tensor | None = None
    row_length: int | None = None
    num_bytes: int | None = None
    num_characters: int | None = None


@dataclass(frozen=True)
class Batch:
    """Samples of one kind; fields that the kind does not have are None.

    Attributes:
        sample_ids: which samples these are.
        seed: int64 ``[B]``, the seed of every sample.
        image: uint8 ``[B, 3, H, W]``; for image pairs the left one.
        right_image: the right image of a pair of images.
        image_mask: bool ``[B, P]``, True where the patch is hidden and to be predicted.
        image_codes: int64 ``[B, P]``, the code of every patch where the shards have them (``data.*.codes``).
        text_ids: int64 ``[R, L]``, masked where the objective masks, padded on the right.
        text_valid: bool ``[R, L]``, False for padding.
        text_targets: int64 ``[R, L]``, -100 where nothing is predicted.
        text_positions: int64 ``[R, L]`` of packed texts; 0 where another text begins, and in padding.
        text_seed: int64 ``[R, L]`` of packed texts, the seed of the sample that each token is of.
        num_bytes, num_characters: int64 ``[B]`` of packed texts: size in UTF-8 and in Unicode characters.
        answer_scores: float32 ``[B, A]``, soft VQA targets.
        label: int64 ``[B]``; -1 where it is not known.
        other_label: int64 ``[B]``, of what was mixed into the image.
        label_share: float32 ``[B]``, the share of ``label``; the rest is ``other_label``'s.
        problems: one line for each broken sample that was replaced by its neighbour.
    """

    sample_ids: tuple[str, ...]
    seed: Tensor
    image: Tensor | None = None
    right_image: Tensor | None = None
    image_mask: Tensor | None = None
    image_codes: Tensor | None = None
    text_ids: Tensor | None = None
    text_valid: Tensor | None = None
    text_targets: Tensor | None = None
    text_positions: Tensor | None = None
    text_seed: Tensor | None = None
    num_bytes: Tensor | None = None
    num_characters: Tensor | None = None
    answer_scores: Tensor | None = None
    label: Tensor | None = None
    other_label: Tensor | None = None
    label_share: Tensor | None = None
    problems: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.sample_ids)

    def to(self, device: torch.device) -> Batch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function) -> Batch:  # type: ignore[no-untyped-def]
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: function(tensor) for name, tensor in tensors.items()})


def collate(examples: Sequence[Example], template: Example, *, pad_id: int, problems: Sequence[str] = ()) -> Batch:
    """Stack examples; texts are padded to the longest, or packed.

    Args:
        template: an example of this kind; says which fields exist, and their shapes, when ``examples`` is empty (a
            rank without samples must still run every module).
    """

    def stacked(name: str) -> Tensor | None:
        like = getattr(template, name)
        if like is None:
            return None
        if not examples:
            return like.new_empty(0, *like.shape)
        return torch.stack([getattr(example, name) for example in examples])

    text_ids = text_valid = text_targets = text_positions = text_seed = None
    if template.row_length is not None:
        pieces = [piece for example in examples for piece in _pieces(example, template.row_length)]
        rows = pack_pieces(pieces, template.row_length)
        length = max((sum(len(ids) for ids, _, _ in row) for row in rows), default=2)
        text_ids = _padded([[i for ids, _, _ in row for i in ids] for row in rows], length, pad_id)
        text_targets = _padded([[t for _, targets, _ in row for t in targets] for row in rows], length, IGNORE)
        text_valid = text_targets != IGNORE
        text_positions = _padded([[p for ids, _, _ in row for p in range(len(ids))] for row in rows], length, 0)
        text_seed = _padded([[seed for ids, _, seed in row for _ in ids] for row in rows], length, 0)
    elif template.text_ids is not None:
        texts = [example.text_ids or [] for example in examples]
        length = max((len(ids) for ids in texts), default=2)
        text_ids = _padded(texts, length, pad_id)
        text_valid = _padded([[1] * len(ids) for ids in texts], length, 0).bool()
        if template.text_targets is not None:
            text_targets = _padded([example.text_targets or [] for example in examples], length, IGNORE)

    def numbers(name: str) -> Tensor | None:
        if getattr(template, name) is None:
            return None
        return torch.tensor([getattr(example, name) for example in examples], dtype=torch.long)

    return Batch(
        sample_ids=tuple(example.sample_id for example in examples),
        seed=torch.tensor([example.seed for example in examples], dtype=torch.long),
        image=stacked("image"),
        right_image=stacked("right_image"),
        image_mask=stacked("image_mask"),
        image_codes=stacked("image_codes"),
        text_ids=text_ids,
        text_valid=text_valid,
        text_targets=text_targets,
        text_positions=text_positions,
        text_seed=text_seed,
        num_bytes=numbers("num_bytes"),
        num_characters=numbers("num_characters"),
        answer_scores=stacked("answer_scores"),
        label=numbers("label"),
        other_label=numbers("other_label"),
        label_share=stacked("label_share"),
        problems=tuple(problems),
    )


def _pieces(example: Example, row_length: int) -> list[Piece]:
    assert example.text_ids is not None
    assert example.text_targets is not None
    return pieces_of(example.text_ids, example.text_targets, example.seed, row_length)


def _padded(rows: Sequence[Sequence[int]], length: int, value: int) -> Tensor:
    padded = torch.full((len(rows), length), value, dtype=torch.long)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids, dtype=torch.long)
    return padded
