"""From runs to the finished page."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mhmoe_vl
from mhmoe_vl.analysis.codebook.measure import measure_tokenizer
from mhmoe_vl.analysis.measure import analyse_experts
from mhmoe_vl.distributed.world import World
from mhmoe_vl.errors import DataError
from mhmoe_vl.report.codebook import CodebookView, view_codebook
from mhmoe_vl.report.collect import RunRecord, cost_parity
from mhmoe_vl.report.experts import AnalysisView, view_analysis
from mhmoe_vl.report.figures import score_bars
from mhmoe_vl.report.masked import MaskedSample, masked_samples
from mhmoe_vl.report.progress import expert_use, progress
from mhmoe_vl.report.samples import (
    PREDICTIONS,
    caption_samples,
    class_samples,
    evaluated_shards,
    nlvr2_samples,
    retrieval_samples,
    vqa_samples,
)
from mhmoe_vl.report.template import page_environment
from mhmoe_vl.train import run_directory
from mhmoe_vl.train.trained import load_trained

logger = logging.getLogger(__name__)

#: Runs as the page calls them.
TASK_NAMES = {
    "pretrain": "Pretraining",
    "vqa": "Visual question answering",
    "nlvr2": "Sentences about pairs of images (NLVR2)",
    "captioning": "Captioning",
    "retrieval": "Image-text retrieval",
    "classification": "Image classification",
}
_SAMPLES_OF: dict[str, Callable[..., list[Any]]] = {
    "vqa": vqa_samples,
    "nlvr2": nlvr2_samples,
    "captioning": caption_samples,
    "retrieval": retrieval_samples,
    "classification": class_samples,
}
#: Held-out images that the codes of the pretraining run are counted on.
_IMAGES_OF_CODEBOOK = 256
_CODES_SHOWN = 8


@dataclass(frozen=True)
class ReportOptions:
    """What the reader of the page will see.

    Attributes:
        shards: evaluated shards by task, where they are not those of the run's own validation.
        num_samples: samples with predictions per task; with 0 none are read.
        num_analysed: held-out samples of each source that the experts of the pretraining run are measured on; with 0
            they are not.
        command: the command line that made the report.
    """

    title: str
    shards: Mapping[str, list[str]]
    num_samples: int
    num_analysed: int
    command: str


def render_page(runs: Sequence[RunRecord], world: World, options: ReportOptions) -> str:
    """The whole page as one HTML document that needs no other file and no network.

    The same runs give the same bytes.

    Raises:
        UserError: a run, or shards that ``options`` name, cannot be read.
    """
    notes: list[str] = []
    masked: dict[str, list[MaskedSample]] = {}
    analyses: list[tuple[RunRecord, AnalysisView]] = []
    codebooks: list[CodebookView] = []
    try:
        codebooks = _codebooks(runs, options)
        masked = _masked(runs, world, options)
        analyses = _analyses(runs, world, options)
    except DataError as error:
        notes.append(_left_out("pretrain", error))
    samples: dict[str, list[Any]] = {}
    for run in (run for run in runs if run.task in _SAMPLES_OF):
        try:
            samples[run.task] = _samples(run, options)
        except DataError as error:
            # Shards that somebody named must be there; those of a run's own validation may be gone by now.
            if run.task in options.shards:
                raise
            notes.append(_left_out(run.task, error))
    sections = {
        "scores": [(run, run.card, score_bars(run.card)) for run in runs if run.card is not None],
        "parity": list(dict.fromkeys(cost_parity(run.config.model) for run in runs)),
        "progress": [(run, of_run) for run in runs if (of_run := progress(run)) is not None],
        "experts": [(run, use) for run in runs if (use := expert_use(run)) is not None],
        "analyses": analyses,
        "codebooks": codebooks,
        "masked": masked,
        "samples": samples,
        "notes": notes,
    }
    return (
        page_environment()
        .get_template("report.html.jinja")
        .render(
            sections,
            title=options.title,
            runs=runs,
            options=options,
            task_names=TASK_NAMES,
            version=mhmoe_vl.__version__,
        )
    )


def _masked(runs: Sequence[RunRecord], world: World, options: ReportOptions) -> dict[str, list[MaskedSample]]:
    """Of the pretraining run, once it has weights.

    Raises:
        DataError: the shards cannot be read.
    """
    if options.num_samples == 0:
        return {}
    return {
        source: samples
        for run in _pretrained(runs)
        for source, samples in masked_samples(run.directory, world, num_samples=options.num_samples).items()
    }


def _analyses(runs: Sequence[RunRecord], world: World, options: ReportOptions) -> list[tuple[RunRecord, AnalysisView]]:
    """Of the experts of the pretraining run, once it has weights.

    Raises:
        DataError: the shards cannot be read.
    """
    if options.num_analysed == 0:
        return []
    analyses = []
    for run in _pretrained(runs):
        if run.config.model.ffn != "dense" and run.config.data.validation:
            trained = load_trained(run.directory, world, task_kind=run.task)
            found = analyse_experts(trained, run.config.data.validation, num_samples=options.num_analysed)
            analyses.append((run, view_analysis(found)))
    return analyses


def _codebooks(runs: Sequence[RunRecord], options: ReportOptions) -> list[CodebookView]:
    """Of the visual tokenizer of the pretraining run, on its held-out images.

    Raises:
        DataError: the shards cannot be read.
    """
    if options.num_samples == 0:
        return []
    views = []
    for run in _pretrained(runs):
        sources = run.config.data.validation.values()
        shards = list(dict.fromkeys(path for source in sources if source.kind != "text" for path in source.paths))
        if shards:
            health = measure_tokenizer(
                run.directory / run_directory.CODEBOOK,
                shards,
                image_size=run.config.model.image_size,
                max_images=_IMAGES_OF_CODEBOOK,
                num_codes_shown=_CODES_SHOWN,
                num_pictures=0,
            )
            for warning in health.warnings:
                logger.warning("%s: visual tokenizer: %s", run.directory, warning)
            views.append(view_codebook(health))
    return views


def _pretrained(runs: Sequence[RunRecord]) -> list[RunRecord]:
    return [run for run in runs if run.task == "pretrain" and (run.directory / run_directory.WEIGHTS).is_file()]


def _samples(run: RunRecord, options: ReportOptions) -> list[Any]:
    """Of a fine-tuning run, once it has predictions for shards that are known.

    Raises:
        DataError: the shards cannot be read, or the predictions are those of other shards.
    """
    shards = evaluated_shards(run, options.shards.get(run.task))
    if options.num_samples == 0 or not shards or not (run.directory / PREDICTIONS[run.task]).is_file():
        return []
    return _SAMPLES_OF[run.task](run, shards, num_samples=options.num_samples)


def _left_out(task: str, error: DataError) -> str:
    """What the reader of the page is told instead of samples."""
    note = f"{TASK_NAMES[task]}: no samples: {error}"
    logger.warning("%s", note)
    return note
