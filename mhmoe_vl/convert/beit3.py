"""Released BEiT-3 checkpoints as runs: weights to start from, or a fine-tuned model to evaluate; and the way back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from mhmoe_vl.config import dump_config
from mhmoe_vl.convert.answer2label import read_answer2label
from mhmoe_vl.convert.released_file import read_tensors, write_tensors
from mhmoe_vl.convert.starting_point import UNREAD, model_of, refuse_existing, write_starting_point
from mhmoe_vl.data.files import write_atomically
from mhmoe_vl.distributed.weights import load_weights
from mhmoe_vl.errors import ConfigError
from mhmoe_vl.models.beit3 import (
    ReleasedModel,
    from_released,
    kind_of_ours,
    recognize,
    require_expressible,
    to_released,
)
from mhmoe_vl.models.cost import encoder_cost
from mhmoe_vl.train import run_directory
from mhmoe_vl.train.build import build_task, load_tokenizer
from mhmoe_vl.train.config import RunConfig

#: Settings of a model that its weights do not show.
_OF_TRAINING = ("drop_path", "checkpoint_activations", "moe", "num_visual_codes")
_OUTPUTS = {"vqa": "vqa_head.classifier.3.weight", "classification": "classification_head.linear.weight"}


def from_beit3(
    checkpoint: Path,
    out: Path,
    *,
    config: RunConfig | None = None,
    answer2label: Path | None = None,
    num_heads: int | None = None,
    keep_unknown: bool = False,
) -> str:
    """Write the directory ``out``, from which training can start, and with ``config`` evaluate too.

    Args:
        config: of a fine-tuning on the same task: tokenizer, answers and data; the model section must be the file's.
        answer2label: the released VQA code's list of answers, in place of the configuration's.

    Returns:
        Two lines for people.

    Raises:
        UserError: the file is no such checkpoint, the configuration is of another model or task, or ``out`` exists.
    """
    refuse_existing(out)
    tensors = read_tensors(checkpoint)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    released = recognize(shapes, str(checkpoint), num_heads=num_heads)
    if config is not None:
        require_same(config, released, checkpoint)
    weights, unread = from_released(tensors, released, str(checkpoint), keep_unknown=keep_unknown)
    model = released.model
    if config is not None:
        config = config.model_copy(update={"out": str(out), "init_from": None})
        if answer2label is not None:
            config = _with_answers(config, answer2label, out)
        config = run_directory.prepare(config)
        _require_fitting(config, weights, checkpoint)
        model = config.model
        cost = encoder_cost(model, num_text_tokens=config.data.text_length)
        write_atomically(out / run_directory.COST, json.dumps(asdict(cost), indent=2).encode() + b"\n")
        write_atomically(out / run_directory.CONFIG, dump_config(config).encode())
    write_starting_point(out, model, weights, unread=unread)
    num_params = sum(tensor.numel() for tensor in tensors.values())
    use = f"start from it with init_from={out}"
    if config is not None:
        use = f"evaluate it with python -m eval.{config.task.kind} --run {out}, or {use}"
    return f"{checkpoint}: BEiT-3 {released.size}, {released.kind}, {num_params / 1e6:.1f}M parameters\n{out}: {use}\n"


def to_beit3(run: Path, out: Path) -> str:
    """Write the weights of a run as the released code reads them.

    Returns:
        A line for people.

    Raises:
        UserError: the released code has no such model, or ``out`` exists.
    """
    model = model_of(run)
    try:
        require_expressible(model)
    except ValueError as error:
        raise ConfigError(f"{run}: {error}") from None
    weights = load_weights(run / run_directory.WEIGHTS)
    kind = kind_of_ours(weights)
    num_outputs = weights[_OUTPUTS[kind]].shape[0] if kind in _OUTPUTS else 0
    unread = load_weights(run / UNREAD) if (run / UNREAD).is_file() else {}
    released = ReleasedModel(kind, model, num_outputs)
    tensors = to_released(weights, released, unread, str(run))
    write_tensors(out, tensors)
    return f"{out}: BEiT-3 {released.size}, {kind}, {len(tensors)} tensors\n"


def require_same(config: RunConfig, released: ReleasedModel, checkpoint: Path) -> None:
    """Refuse a configuration of another task or model than a checkpoint's.

    Raises:
        ConfigError: naming the settings that would be right.
    """
    if config.task.kind != released.kind:
        raise ConfigError(
            f"task.kind: '{config.task.kind}', but {checkpoint} is of '{released.kind}'; without --config it becomes "
            "weights to start from"
        )
    theirs, ours = released.model.model_dump(mode="json"), config.model.model_dump(mode="json")
    wrong = [f"model.{n}={_yaml(theirs[n])}" for n in theirs if n not in _OF_TRAINING and theirs[n] != ours[n]]
    if config.task.kind == "nlvr2" and not config.task.input_norm:
        wrong.append("task.input_norm=true")
    if wrong:
        raise ConfigError(f"the configuration is not that of {checkpoint}; set {' '.join(wrong)}")


def _require_fitting(config: RunConfig, weights: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Refuse files of the configuration that do not fit the weights, such as a list of answers.

    Raises:
        ConfigError: naming the first tensor that is of another shape.
    """
    load_tokenizer(config)
    with torch.device("meta"):
        own = build_task(config).state_dict()
    for name in sorted(own.keys() | weights.keys()):
        there = list(weights[name].shape) if name in weights else "absent"
        here = list(own[name].shape) if name in own else "absent"
        if there != here:
            raise ConfigError(
                f"{checkpoint}: {name} is {there} there and {here} by the configuration; answers or classes must be "
                "those that it was trained with"
            )


def _with_answers(config: RunConfig, answer2label: Path, out: Path) -> RunConfig:
    if config.task.kind != "vqa":
        raise ConfigError(f"--answer2label: is for task 'vqa', and the configuration is of '{config.task.kind}'")
    answers = out / run_directory.ANSWERS
    content = read_answer2label(answer2label)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(answers, json.dumps(content, indent=1).encode())
    return config.model_copy(update={"task": config.task.model_copy(update={"answers": str(answers)})})


def _yaml(value: object) -> str:
    return json.dumps(value).replace(" ", "").replace('"', "")
