"""Predictions of a trained task over a whole split: every sample once, gathered from all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mhmoe_vl.data.batch import Batch
from mhmoe_vl.data.text import TextTokenizer
from mhmoe_vl.distributed.collectives import gather_objects, gather_rows, share_of_rank
from mhmoe_vl.errors import DataError
from mhmoe_vl.evaluation.beam_search import BeamSettings, beam_search
from mhmoe_vl.evaluation.classification_accuracy import NUM_BEST
from mhmoe_vl.tasks.captioning import CaptioningTask
from mhmoe_vl.tasks.classification import ClassificationTask
from mhmoe_vl.tasks.nlvr2 import Nlvr2Task
from mhmoe_vl.tasks.retrieval import RetrievalTask
from mhmoe_vl.tasks.vqa import VqaTask


@torch.no_grad()
def predict_vqa(task: VqaTask, batches: Iterable[Batch], answers: Sequence[str]) -> dict[int, str]:
    """The best answer of the list for every question id. Collective."""
    task.eval()
    predictions: dict[str, str] = {}
    for batch in batches:
        _require_whole(batch)
        best = task.logits(batch)[0].argmax(-1).tolist()
        predictions |= {name: answers[index] for name, index in zip(batch.sample_ids, best, strict=True)}
    return {int(name): answer for name, answer in _gathered(predictions).items()}


@torch.no_grad()
def predict_nlvr2(task: Nlvr2Task, batches: Iterable[Batch]) -> dict[str, bool]:
    """Whether the sentence is true, for every identifier. Collective."""
    task.eval()
    predictions: dict[str, bool] = {}
    for batch in batches:
        _require_whole(batch)
        best = task.logits(batch)[0].argmax(-1).tolist()
        predictions |= {name: bool(label) for name, label in zip(batch.sample_ids, best, strict=True)}
    return _gathered(predictions)


@torch.no_grad()
def predict_captions(
    task: CaptioningTask, batches: Iterable[Batch], tokenizer: TextTokenizer, settings: BeamSettings
) -> dict[int, str]:
    """A caption for every image id. Collective."""
    task.eval()
    captions: dict[str, str] = {}
    for batch in batches:
        _require_whole(batch)
        assert batch.image is not None
        for name, ids in zip(batch.sample_ids, beam_search(task, batch.image, tokenizer, settings), strict=True):
            captions[name] = tokenizer.decode(ids)
    try:
        return {int(name): caption for name, caption in _gathered(captions).items()}
    except ValueError as error:
        raise DataError(
            f"image ids must be whole numbers for caption scoring: {error}; repack with numeric ids"
        ) from None


@torch.no_grad()
def predict_classes(task: ClassificationTask, batches: Iterable[Batch], classes: Sequence[str]) -> dict[str, list[str]]:
    """The five best classes of every image, best first. Collective."""
    task.eval()
    predictions: dict[str, list[str]] = {}
    for batch in batches:
        _require_whole(batch)
        logits_BC = task.logits(batch)[0]
        best_BK = logits_BC.topk(min(NUM_BEST, logits_BC.shape[1])).indices.tolist()
        predictions |= {
            name: [classes[index] for index in best] for name, best in zip(batch.sample_ids, best_BK, strict=True)
        }
    return _gathered(predictions)


@torch.no_grad()
def embed_images(task: RetrievalTask, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """``[D]`` of length 1 for every image id, on the CPU. Collective.

    Raises:
        DataError: broken samples, or an image that comes twice.
    """
    task.eval()
    names: list[str] = []
    parts: list[Tensor] = []
    for batch in batches:
        _require_whole(batch)
        assert batch.image is not None
        names += batch.sample_ids
        parts.append(task.embed_images(batch.image)[0])
    embeddings = _gathered_rows(names, parts, task)
    num_images = sum(gather_objects(len(names)))
    if len(embeddings) < num_images:
        raise DataError(f"{num_images - len(embeddings)} of {num_images} images have the id of another one")
    return embeddings


@torch.no_grad()
def embed_texts(
    task: RetrievalTask, texts: Sequence[str], tokenizer: TextTokenizer, *, text_length: int, batch_size: int
) -> dict[str, Tensor]:
    """``[D]`` of length 1 for every different text, on the CPU. Collective; every rank gives the same texts.

    Args:
        text_length: longer texts are cut, as in training.
        batch_size: texts per rank and forward pass; texts of similar length go together.
    """
    task.eval()
    device = task.logit_scale.device
    ids_of = {text: tokenizer.encode(text, text_length) for text in dict.fromkeys(texts)}
    own = share_of_rank(sorted(ids_of, key=lambda text: len(ids_of[text])))
    parts: list[Tensor] = []
    for start in range(0, len(own), batch_size):
        rows = [ids_of[text] for text in own[start : start + batch_size]]
        length = max(map(len, rows))
        ids_BL = torch.tensor([row + [tokenizer.pad_id] * (length - len(row)) for row in rows], device=device)
        valid_BL = torch.tensor([[position < len(row) for position in range(length)] for row in rows], device=device)
        parts.append(task.embed_texts(ids_BL, valid_BL)[0])
    return _gathered_rows(own, parts, task)


def _gathered_rows(names: Sequence[str], parts: list[Tensor], task: RetrievalTask) -> dict[str, Tensor]:
    none = task.logit_scale.new_zeros(0, task.config.dim, dtype=torch.float32)
    rows, _ = gather_rows(torch.cat([none, *parts]).cpu())
    of_ranks = [name for part in gather_objects(list(names)) for name in part]
    return dict(zip(of_ranks, rows, strict=True))


def _require_whole(batch: Batch) -> None:
    """A broken sample must not be replaced by its neighbour where every sample is scored."""
    if batch.problems:
        raise DataError(f"cannot evaluate on broken samples: {batch.problems[0]}")


def _gathered(predictions: dict[str, Any]) -> dict[str, Any]:
    return {name: value for part in gather_objects(predictions) for name, value in part.items()}
