"""NLVR2 accuracy and consistency, as of the official ``nlvr2/eval/metrics.py`` (lil-lab/nlvr)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mhmoe_vl.errors import DataError
from mhmoe_vl.evaluation.results_files import check_same_ids, name_ids, read_lines, write_text

_TRUTH = {"true": True, "false": False}


@dataclass(frozen=True)
class Nlvr2Score:
    """Fractions of 1: ``accuracy`` over ``n`` examples, ``consistency`` over ``num_groups`` groups.

    A group is one sentence with all of its image pairs; it is consistent if every pair is judged rightly.
    """

    accuracy: float
    consistency: float
    n: int
    num_groups: int


def nlvr2_accuracy(predictions: Mapping[str, bool], labels: Mapping[str, bool]) -> Nlvr2Score:
    """Score ``{identifier: judged true}`` against ``{identifier: true}``.

    Identifiers are ``split-set-pair-sentence``; the group of an example is its identifier without the pair.

    Raises:
        DataError: missing or unknown identifiers (the official program leaves silently), a malformed
            identifier, or no labels.
    """
    if not labels:
        raise DataError("NLVR2 labels: there are none, so there is nothing to score")
    check_same_ids(predictions, labels, what="NLVR2 predictions")
    group_is_right: dict[tuple[str, ...], bool] = {}
    num_right = 0
    for identifier, label in labels.items():
        right = predictions[identifier] == label
        num_right += right
        group = _group(identifier)
        group_is_right[group] = group_is_right.get(group, True) and right
    return Nlvr2Score(
        accuracy=num_right / len(labels),
        consistency=sum(group_is_right.values()) / len(group_is_right),
        n=len(labels),
        num_groups=len(group_is_right),
    )


def load_nlvr2_predictions(path: str | Path) -> dict[str, bool]:
    """Predictions of an official CSV without header: ``identifier,True`` or ``identifier,False`` in any case.

    Raises:
        DataError: unreadable file, malformed line, or an identifier that occurs twice.
    """
    pairs = []
    for line in read_lines(path):
        identifier, _, value = line.partition(",")
        pairs.append((identifier.strip(), value.strip()))
    return _truth_by_identifier(path, pairs)


def write_nlvr2_predictions(path: str | Path, predictions: Mapping[str, bool]) -> None:
    """Write the CSV that :func:`load_nlvr2_predictions` and the official program read.

    Raises:
        OutputError: the file cannot be written.
    """
    write_text(path, "".join(f"{identifier},{bool(value)}\n" for identifier, value in predictions.items()))


def _truth_by_identifier(path: str | Path, pairs: list[tuple[str, str]]) -> dict[str, bool]:
    truth: dict[str, bool] = {}
    repeated = []
    for number, (identifier, value) in enumerate(pairs, start=1):
        if value.lower() not in _TRUTH:
            raise DataError(f"{path}: entry {number} ({identifier}) is {value!r}, but must be True or False")
        if identifier in truth:
            repeated.append(identifier)
        truth[identifier] = _TRUTH[value.lower()]
    if repeated:
        raise DataError(f"{path}: {name_ids('repeated', repeated)}; each identifier must occur once")
    return truth


def _group(identifier: str) -> tuple[str, ...]:
    fields = identifier.split("-")
    if len(fields) < 4:
        raise DataError(f"NLVR2 identifier {identifier!r} must be split-set-pair-sentence, such as dev-850-0-0")
    return (*fields[:2], *fields[3:])
