"""Caption scores as published for COCO: BLEU, ROUGE-L, CIDEr, METEOR and SPICE over Penn Treebank tokens.

The arithmetic is pycocoevalcap's. Its own ``COCOEvalCap`` is not used, because it needs Java for every score and
downloads models for SPICE before it prints any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from mhmoe_vl.errors import ConfigError, DataError, suggest
from mhmoe_vl.evaluation import java_metrics
from mhmoe_vl.evaluation.java_metrics import MetricUnavailableError, TokensById
from mhmoe_vl.evaluation.ptb_tokenizer import ptb_tokenize
from mhmoe_vl.evaluation.results_files import check_same_ids, name_ids, read_results, write_results

TokenizerChoice = Literal["auto", "java", "python"]

#: Metrics that need Java; the others are always computed.
JAVA_METRICS = {"METEOR": java_metrics.meteor, "SPICE": java_metrics.spice}
METRICS = ("BLEU", "ROUGE_L", "CIDEr", *JAVA_METRICS)

# Below this many images CIDEr says more about the idf of the set than about the captions.
_FEW_IMAGES = 100


@dataclass(frozen=True)
class CaptionScores:
    """Corpus scores as fractions (a CIDEr of 1.2 is printed as 120).

    ``n`` captions were scored out of ``num_images`` with references; ``num_empty`` of them have no token.
    ``meteor`` and ``spice`` are None where they were not computed; ``unavailable`` says why. ``notes`` are remarks to
    print beside the scores. ``cider_per_image`` has the image ids of the predictions.
    """

    bleu_1: float
    bleu_2: float
    bleu_3: float
    bleu_4: float
    rouge_l: float
    cider: float
    meteor: float | None
    spice: float | None
    n: int
    num_images: int
    num_empty: int
    tokenizer: Literal["java", "python"]
    unavailable: Mapping[str, str]
    notes: tuple[str, ...]
    cider_per_image: Mapping[int, float] = field(repr=False)

    @property
    def coverage(self) -> float:
        """Share of the images with references that have a prediction."""
        return self.n / self.num_images

    def percent(self) -> dict[str, float | None]:
        """Scores times 100 under their usual names; None for what was not computed."""
        fractions = {
            "BLEU-1": self.bleu_1,
            "BLEU-2": self.bleu_2,
            "BLEU-3": self.bleu_3,
            "BLEU-4": self.bleu_4,
            "METEOR": self.meteor,
            "ROUGE-L": self.rouge_l,
            "CIDEr": self.cider,
            "SPICE": self.spice,
        }
        return {name: None if value is None else 100 * value for name, value in fractions.items()}


@dataclass(frozen=True)
class TokenizedCaptions:
    """Tokens of one hypothesis and of all references per image, in one order, and what tokenized them."""

    hypotheses: TokensById
    references: TokensById
    tokenizer: Literal["java", "python"]


def score_captions(
    predictions: Mapping[int, str],
    references: Mapping[int, Sequence[str]],
    *,
    metrics: Sequence[str] = METRICS,
    tokenizer: TokenizerChoice = "auto",
    allow_subset: bool = False,
) -> CaptionScores:
    """Score ``{image_id: caption}`` against ``{image_id: captions}``.

    ``metrics`` chooses METEOR and SPICE; BLEU, ROUGE-L and CIDEr are always computed. ``tokenizer="auto"`` takes the
    jar where Java works and else the Python tokenizer, which gives the same tokens. With ``allow_subset`` images
    without a prediction are left out, and only the references of the others make CIDEr's document frequencies.

    Raises:
        DataError: missing or unknown image ids, an image without references, or references without any word.
        ConfigError: unknown metric or tokenizer, or ``tokenizer="java"`` where it does not work.
    """
    for metric in metrics:
        if metric not in METRICS:
            raise ConfigError(f"metrics: '{metric}' is none of {', '.join(METRICS)}{suggest(metric, list(METRICS))}")
    if not references or not predictions:
        raise DataError(f"captions: {len(predictions)} predictions and {len(references)} references; nothing to score")
    check_same_ids(predictions, references, what="captions", allow_missing=allow_subset)
    without = [image_id for image_id in predictions if not references[image_id]]
    if without:
        raise DataError(f"references: {name_ids('empty', without)}; every image needs at least one caption")
    captions = tokenize_captions(predictions, references, tokenizer=tokenizer)
    return score_tokenized(captions, metrics=metrics, num_images=len(references))


def tokenize_captions(
    predictions: Mapping[int, str], references: Mapping[int, Sequence[str]], *, tokenizer: TokenizerChoice = "auto"
) -> TokenizedCaptions:
    """Tokenize the predictions and the references of their images, each as one text like pycocoevalcap.

    Images are in the order of ``references``, because an abbreviation at the end of a caption is read with
    the beginning of the next one.

    Raises:
        ConfigError: unknown tokenizer, or ``"java"`` where it does not work.
    """
    if tokenizer not in ("auto", "java", "python"):
        raise ConfigError(f"tokenizer: '{tokenizer}' is none of auto, java, python")
    image_ids = [image_id for image_id in references if image_id in predictions]
    hypotheses = [predictions[image_id] for image_id in image_ids]
    flat = [caption for image_id in image_ids for caption in references[image_id]]
    used: Literal["java", "python"] = "python"
    if tokenizer == "java" or (tokenizer == "auto" and java_metrics.java_runtime()):
        try:
            tokens, reference_tokens = java_metrics.jar_tokenize(hypotheses), java_metrics.jar_tokenize(flat)
            used = "java"
        except MetricUnavailableError as error:
            if tokenizer == "java":
                raise ConfigError(f"tokenizer 'java': {error}; or choose 'python'") from None
    if used == "python":
        tokens, reference_tokens = ptb_tokenize(hypotheses), ptb_tokenize(flat)
    remaining = iter(reference_tokens)
    return TokenizedCaptions(
        hypotheses={image_id: [caption] for image_id, caption in zip(image_ids, tokens, strict=True)},
        references={image_id: [next(remaining) for _ in references[image_id]] for image_id in image_ids},
        tokenizer=used,
    )


def score_tokenized(captions: TokenizedCaptions, *, metrics: Sequence[str], num_images: int) -> CaptionScores:
    """The scores of :func:`score_captions` for captions that are tokenized; ``num_images`` gives the coverage.

    Raises:
        DataError: no reference has a word.
    """
    hypotheses, references = captions.hypotheses, captions.references
    if not any(caption for group in references.values() for caption in group):
        raise DataError("references: no caption has a word after tokenization, so nothing can be scored")
    (bleu_1, bleu_2, bleu_3, bleu_4), _ = Bleu(4).compute_score(references, hypotheses, verbose=0)
    rouge_l, _ = Rouge().compute_score(references, hypotheses)
    cider, cider_per_image = Cider().compute_score(references, hypotheses)
    java_scores, unavailable = _java_scores(captions, metrics)
    num_empty = sum(not caption for (caption,) in hypotheses.values())
    return CaptionScores(
        bleu_1=float(bleu_1),
        bleu_2=float(bleu_2),
        bleu_3=float(bleu_3),
        bleu_4=float(bleu_4),
        rouge_l=float(rouge_l),
        cider=float(cider),
        meteor=java_scores.get("METEOR"),
        spice=java_scores.get("SPICE"),
        n=len(hypotheses),
        num_images=num_images,
        num_empty=num_empty,
        tokenizer=captions.tokenizer,
        unavailable=unavailable,
        notes=tuple(_notes(len(hypotheses), num_images, num_empty)),
        cider_per_image=dict(zip(hypotheses, map(float, cider_per_image), strict=True)),
    )


def load_caption_results(path: str | Path) -> dict[int, str]:
    """Read an official results file, a JSON list of ``{"image_id": int, "caption": str}``.

    Raises:
        DataError: unreadable file, malformed row, or an image that occurs twice.
    """
    return read_results(path, id_key="image_id", text_key="caption")


def write_caption_results(path: str | Path, predictions: Mapping[int, str]) -> None:
    """Write the official results file, which the evaluation server takes too.

    Raises:
        OutputError: the file cannot be written.
    """
    write_results(path, predictions, id_key="image_id", text_key="caption")


def _java_scores(captions: TokenizedCaptions, metrics: Sequence[str]) -> tuple[dict[str, float], dict[str, str]]:
    scores: dict[str, float] = {}
    unavailable: dict[str, str] = {}
    for name, compute in JAVA_METRICS.items():
        if name not in metrics:
            unavailable[name] = "not requested"
            continue
        try:
            scores[name] = compute(captions.references, captions.hypotheses)
        except MetricUnavailableError as error:
            unavailable[name] = f"unavailable: {error}"
    return scores, unavailable


def _notes(n: int, num_images: int, num_empty: int) -> list[str]:
    notes = []
    if n == 1:
        notes.append("CIDEr of a single image is 0 by construction: its idf weights come from the evaluated images")
    elif n < _FEW_IMAGES:
        notes.append(f"CIDEr takes its idf weights from the {n} evaluated images: not comparable with other sets")
    if n < num_images:
        notes.append(
            f"{n} of {num_images} images have a prediction ({100 * n / num_images:.1f} %); the rest is left out"
        )
    if num_empty:
        notes.append(f"{num_empty} of {n} predicted captions have no word and score 0")
    return notes
