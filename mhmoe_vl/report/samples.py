"""Samples of an evaluated split with what the model predicted for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from mhmoe_vl.data.decode import captions_of, decode_image, decode_json, image_member
from mhmoe_vl.data.loader import ShardDataset
from mhmoe_vl.data.plan import permuted
from mhmoe_vl.data.samples import class_of, image_id_of
from mhmoe_vl.errors import DataError
from mhmoe_vl.evaluation.caption_scores import load_caption_results
from mhmoe_vl.evaluation.classification_accuracy import load_class_predictions
from mhmoe_vl.evaluation.nlvr2_accuracy import load_nlvr2_predictions
from mhmoe_vl.evaluation.retrieval_recall import caption_names, load_rankings
from mhmoe_vl.evaluation.truth import captions_by_image
from mhmoe_vl.evaluation.vqa_accuracy import load_vqa_results, vqa_accuracy
from mhmoe_vl.report.collect import RunRecord
from mhmoe_vl.report.pictures import data_uri
from mhmoe_vl.train.build import build_dataset
from mhmoe_vl.train.config import SourceConfig

SHARD_KINDS = {"vqa": "vqa", "nlvr2": "nlvr2", "captioning": "pair", "retrieval": "pair", "classification": "class"}
PREDICTIONS = {
    "vqa": "vqa_predictions.json",
    "nlvr2": "nlvr2_predictions.csv",
    "captioning": "caption_predictions.json",
    "retrieval": "retrieval_rankings.json",
    "classification": "class_predictions.json",
}

Members = Mapping[str, bytes]
SampleT = TypeVar("SampleT")


@dataclass(frozen=True)
class VqaSample:
    """A question about a picture; ``humans`` has the number of annotators for each answer, ``credit`` is the official
    accuracy of the prediction, 0 to 1."""

    image: str
    question: str
    prediction: str
    humans: list[tuple[str, int]]
    credit: float


@dataclass(frozen=True)
class Nlvr2Sample:
    """A sentence about two pictures, judged and true label."""

    left: str
    right: str
    sentence: str
    prediction: bool
    label: bool


@dataclass(frozen=True)
class CaptionSample:
    """A picture with the generated caption and those of people."""

    image: str
    prediction: str
    references: list[str]


@dataclass(frozen=True)
class RetrievalSample:
    """A picture with the captions that it finds first, each with whether it is its own, and its own captions."""

    image: str
    found: list[tuple[str, bool]]
    captions: list[str]


@dataclass(frozen=True)
class ClassSample:
    """A picture with its class and the classes that the model thinks of first."""

    image: str
    predictions: list[str]
    label: str


def sample_order(num_items: int) -> Iterator[int]:
    """All items, in an order that a hash decides: nobody has picked the first ones."""
    return (permuted(position, num_items, "report") for position in range(num_items))


def evaluated_shards(run: RunRecord, shards: list[str] | None) -> list[str]:
    """``shards`` if they are named, else those that the run was validated on; empty if there are none."""
    if shards is not None:
        return shards
    return [path for source in run.config.data.validation.values() for path in source.paths]


def vqa_samples(run: RunRecord, shards: list[str], *, num_samples: int) -> list[VqaSample]:
    """Questions with predictions.

    Raises:
        DataError: the predictions are those of other shards, the split has no answers, or something is damaged.
    """
    predictions = load_vqa_results(run.directory / PREDICTIONS["vqa"])

    def build(members: Members, item: int, key: str) -> VqaSample:
        question = decode_json(members["json"])["questions"][item]
        _require_truth(question.get("answers"), run)
        number = question["question_id"]
        prediction = _of(predictions, number, run)
        annotation = question | {"answers": [{"answer": answer} for answer in question["answers"]]}
        return VqaSample(
            image=data_uri(decode_image(image_member(members))),
            question=question["question"],
            prediction=prediction,
            humans=Counter(question["answers"]).most_common(3),
            credit=vqa_accuracy({number: prediction}, [annotation]).per_question[number],
        )

    return _first(run, shards, build, num_samples)


def nlvr2_samples(run: RunRecord, shards: list[str], *, num_samples: int) -> list[Nlvr2Sample]:
    """Sentences with judgements; see :func:`vqa_samples`."""
    predictions = load_nlvr2_predictions(run.directory / PREDICTIONS["nlvr2"])

    def build(members: Members, item: int, key: str) -> Nlvr2Sample:
        example = decode_json(members["json"])["examples"][item]
        _require_truth(example.get("label"), run)
        return Nlvr2Sample(
            left=data_uri(decode_image(image_member(members, "left"))),
            right=data_uri(decode_image(image_member(members, "right"))),
            sentence=example["sentence"],
            prediction=_of(predictions, example["identifier"], run),
            label=bool(example["label"]),
        )

    return _first(run, shards, build, num_samples)


def caption_samples(run: RunRecord, shards: list[str], *, num_samples: int) -> list[CaptionSample]:
    """Pictures with generated captions; see :func:`vqa_samples`."""
    predictions = load_caption_results(run.directory / PREDICTIONS["captioning"])

    def build(members: Members, item: int, key: str) -> CaptionSample:
        return CaptionSample(
            image=data_uri(decode_image(image_member(members))),
            prediction=_of(predictions, int(image_id_of(members, "-1")), run),
            references=captions_of(members),
        )

    return _first(run, shards, build, num_samples)


def retrieval_samples(run: RunRecord, shards: list[str], *, num_samples: int) -> list[RetrievalSample]:
    """Pictures with the three best captions of the whole split; see :func:`vqa_samples`."""
    rankings = load_rankings(run.directory / PREDICTIONS["retrieval"]).whole
    captions = captions_by_image(shards)
    owned = [(text, image) for image, of_image in captions.items() for text in of_image]
    by_name = dict(zip(caption_names(captions), owned, strict=True))

    def build(members: Members, item: int, key: str) -> RetrievalSample:
        image_id = image_id_of(members, key)
        best = [_of(by_name, name, run) for name in _of(rankings.captions_of, image_id, run)[:3]]
        found = [(text, owner == image_id) for text, owner in best]
        return RetrievalSample(data_uri(decode_image(image_member(members))), found, captions[image_id])

    return _first(run, shards, build, num_samples)


def class_samples(run: RunRecord, shards: list[str], *, num_samples: int) -> list[ClassSample]:
    """Pictures with the three best classes; see :func:`vqa_samples`."""
    predictions = load_class_predictions(run.directory / PREDICTIONS["classification"])

    def build(members: Members, item: int, key: str) -> ClassSample:
        best = _of(predictions, key, run)[:3]
        return ClassSample(data_uri(decode_image(image_member(members))), best, class_of(members))

    return _first(run, shards, build, num_samples)


def _of(predictions: Mapping[Any, Any], name: Any, run: RunRecord) -> Any:
    if name not in predictions:
        raise DataError(
            f"{run.directory / PREDICTIONS[run.task]}: has no prediction for {name} of the shards; name the evaluated "
            f"shards with --{run.task}-data"
        )
    return predictions[name]


def _require_truth(truth: Any, run: RunRecord) -> None:
    if truth is None:
        raise DataError(
            f"{run.directory}: its samples have no true answers (a test split?); name shards of a split that has them "
            f"with --{run.task}-data"
        )


def _first(
    run: RunRecord, shards: list[str], build: Callable[[Members, int, str], SampleT], num_samples: int
) -> list[SampleT]:
    """The first ``num_samples`` that :func:`sample_order` gives."""
    dataset: ShardDataset = build_dataset(
        run.config,
        {"report": SourceConfig(kind=SHARD_KINDS[run.task], shards=tuple(shards))},  # type: ignore[arg-type]
        training=False,
    )
    source = dataset.indexed("report")
    samples = []
    for number in islice(sample_order(len(source)), num_samples):
        index, indexed, item = source.locate(number)
        samples.append(build(dataset.reader.read(index, indexed), item, indexed.key))
    return samples
