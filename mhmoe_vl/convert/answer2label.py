"""The list of answers that the released VQA code writes and its classifiers are numbered by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mhmoe_vl.data.prepare.answer_list import ANSWERS_FORMAT
from mhmoe_vl.errors import DataError


def read_answer2label(path: Path) -> dict[str, Any]:
    """Content of an ``answers.json`` with the answers of ``answer2label.txt``, whose lines are
    ``{"answer": "net", "label": 0}`` in the order of labels.

    Raises:
        DataError: absent or of another form.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    answers = []
    for number, line in enumerate(lines):
        try:
            fields = json.loads(line)
            answer, label = fields["answer"], int(fields["label"])
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path}: line {number + 1}: not of the form " + '{"answer": "net", "label": 0}') from None
        if label != number:
            raise DataError(f"{path}: line {number + 1}: label {label}, and labels must count up from 0")
        answers.append(str(answer))
    if not answers:
        raise DataError(f"{path}: holds no answers")
    return {"format": ANSWERS_FORMAT, "num_answers": len(answers), "answers": answers}
