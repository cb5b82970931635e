"""Predictions of a trained task over a whole split: every sample once, gathered from all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from mhmoe_vl.data.batch import Batch
from mhmoe_vl.data.text import TextTokenizer
from mhmoe_vl.distributed.collectives import gather_objects
from mhmoe_vl.errors import DataError
from mhmoe_vl.evaluation.beam_search import BeamSettings, beam_search
from mhmoe_vl.tasks.captioning import CaptioningTask
from mhmoe_vl.tasks.nlvr2 import Nlvr2Task
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


def _require_whole(batch: Batch) -> None:
    """A broken sample must not be replaced by its neighbour where every sample is scored."""
    if batch.problems:
        raise DataError(f"cannot evaluate on broken samples: {batch.problems[0]}")


def _gathered(predictions: dict[str, Any]) -> dict[str, Any]:
    return {name: value for part in gather_objects(predictions) for name, value in part.items()}
