"""Top-1 and top-5 accuracy of image classification, and of answering with the commonest classes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mhmoe_vl.errors import DataError
from mhmoe_vl.evaluation.results_files import check_same_ids, write_text

#: Classes of an image that are predicted, best first.
NUM_BEST = 5


@dataclass(frozen=True)
class ClassificationScore:
    """Shares of ``n`` images whose class is the first of the prediction, or among its first five."""

    top_1: float
    top_5: float
    n: int


def classification_accuracy(predictions: Mapping[str, Sequence[str]], labels: Mapping[str, str]) -> ClassificationScore:
    """Score ``{image: classes, best first}`` against ``{image: class}``.

    Raises:
        DataError: missing or unknown images, or no images.
    """
    if not labels:
        raise DataError("classification: there are no images, so there is nothing to score")
    check_same_ids(predictions, labels, what="classes of images")
    places = [list(predictions[image][:NUM_BEST]) for image in labels]
    right = [label in best[:1] for best, label in zip(places, labels.values(), strict=True)]
    among = [label in best for best, label in zip(places, labels.values(), strict=True)]
    return ClassificationScore(sum(right) / len(labels), sum(among) / len(labels), len(labels))


def commonest_classes(labels: Iterable[str]) -> list[str]:
    """The five commonest, the first in the alphabet among equals, so that runs agree."""
    counts = Counter(labels)
    return sorted(counts, key=lambda name: (-counts[name], name))[:NUM_BEST]


def write_class_predictions(path: str | Path, predictions: Mapping[str, Sequence[str]]) -> None:
    """Write one JSON object, image -> classes, best first.

    Raises:
        OutputError: the file cannot be written.
    """
    lines = (f"{json.dumps(image)}: {json.dumps(list(classes))}" for image, classes in predictions.items())
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def load_class_predictions(path: str | Path) -> dict[str, list[str]]:
    """Read what :func:`write_class_predictions` writes.

    Raises:
        DataError: unreadable, or something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(content, dict) or not all(
        isinstance(classes, list) and all(isinstance(name, str) for name in classes) for classes in content.values()
    ):
        raise DataError(f"{path}: must be an object that maps every image to a list of classes")
    return content
