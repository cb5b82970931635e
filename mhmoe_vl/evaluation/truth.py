"""What is true of a split, read from its shards without decoding an image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mhmoe_vl.data.decode import captions_of, decode_json
from mhmoe_vl.data.samples import class_of, image_id_of
from mhmoe_vl.data.shards import ShardReader, find_shards, read_index
from mhmoe_vl.errors import DataError


def vqa_annotations(shards: Sequence[str]) -> list[dict[str, Any]]:
    """One official-style annotation per question, with the question's text added.

    Raises:
        DataError: other shards, or a split without answers.
    """
    annotations = []
    for _, members in _members(shards, "vqa"):
        fields = decode_json(members["json"])
        for question in fields["questions"]:
            if "answers" not in question:
                raise DataError(
                    f"{', '.join(shards)}: question {question['question_id']} has no answers (a test split?)"
                )
            annotations.append(
                question
                | {"image_id": fields["image_id"], "answers": [{"answer": answer} for answer in question["answers"]]}
            )
    return annotations


def nlvr2_examples(shards: Sequence[str]) -> list[dict[str, Any]]:
    """Identifier, sentence and label (bool) of every example.

    Raises:
        DataError: other shards, or an example without a label.
    """
    examples = [
        example for _, members in _members(shards, "nlvr2") for example in decode_json(members["json"])["examples"]
    ]
    for example in examples:
        if example.get("label") is None:
            raise DataError(f"{', '.join(shards)}: example {example['identifier']} has no label (a test split?)")
    return examples


def captions_by_image(shards: Sequence[str]) -> dict[str, list[str]]:
    """All captions of every image, by its id, in the order of the shards.

    Raises:
        DataError: other shards.
    """
    captions: dict[str, list[str]] = {}
    for key, members in _members(shards, "pair"):
        captions.setdefault(image_id_of(members, key), []).extend(captions_of(members))
    return captions


def caption_references(shards: Sequence[str]) -> dict[int, list[str]]:
    """All captions of every image id.

    Raises:
        DataError: other shards, or image ids that are not whole numbers.
    """
    references: dict[int, list[str]] = {}
    for image_id, captions in captions_by_image(shards).items():
        if not image_id.lstrip("-").isdigit():
            raise DataError(
                f"{', '.join(shards)}: image id '{image_id}' is not a whole number, as caption scoring needs"
            )
        references.setdefault(int(image_id), []).extend(captions)
    return references


def labelled_images(shards: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Key and class of every image.

    Raises:
        DataError: other shards.
    """
    for key, members in _members(shards, "class"):
        yield key, class_of(members)


def class_labels(shards: Sequence[str]) -> dict[str, str]:
    """The class of every image, by the key of its sample.

    Raises:
        DataError: other shards, or an image that comes twice.
    """
    labels: dict[str, str] = {}
    for key, name in labelled_images(shards):
        if key in labels:
            raise DataError(f"{', '.join(shards)}: two images are called {key}; score the data sets one by one")
        labels[key] = name
    return labels


def _members(shards: Sequence[str], kind: str) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    """Key and members that are not images, of every sample."""
    reader = ShardReader()
    for path in find_shards(list(shards)):
        index = read_index(path)
        if index.kind != kind:
            raise DataError(f"{path}: is a shard of kind '{index.kind}', and '{kind}' is needed here")
        for sample in index.samples:
            wanted = {name: place for name, place in sample.members.items() if name in ("json", "txt")}
            yield sample.key, reader.read(index, sample._replace(members=wanted))
