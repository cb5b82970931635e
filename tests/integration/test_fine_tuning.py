"""From a pretraining run to the tasks and their evaluation."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import eval.captioning
import eval.classification
import eval.nlvr2
import eval.retrieval
import eval.vqa
from mhmoe_vl.config import validate_config
from mhmoe_vl.data.shards import find_shards, read_index
from mhmoe_vl.distributed.weights import load_weights
from mhmoe_vl.errors import CheckpointError, ConfigError
from mhmoe_vl.report.samples import PREDICTIONS
from mhmoe_vl.train.build import build_task, initial_weights, transfer_weights
from mhmoe_vl.train.config import RunConfig
from mhmoe_vl.train.dry_run import dry_run
from mhmoe_vl.train.metrics import read_metrics
from mhmoe_vl.train.trained import load_trained
from tests.integration.runs import ALONE, FINE_TUNINGS, final_weights, fine_tuning, pretraining, train

PROGRAMS = {
    "vqa": eval.vqa,
    "nlvr2": eval.nlvr2,
    "captioning": eval.captioning,
    "retrieval": eval.retrieval,
    "classification": eval.classification,
}
#: Tasks whose text could be answered without the image.
WITH_TWIN = ("vqa", "nlvr2")


@pytest.fixture(scope="module")
def pretrained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrained") / "run"
    train(pretraining(shards, out, max_steps=2))
    return out


@pytest.fixture(scope="module")
def tuned(shards: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each task, two steps long."""
    folder = tmp_path_factory.mktemp("tuned")
    for task in PROGRAMS:
        train(fine_tuning(shards, folder / task, task, pretrained))
    return {task: folder / task for task in PROGRAMS}


@pytest.mark.parametrize("task", PROGRAMS)
def test_fine_tuning_learns_and_validates(tuned: dict[str, Path], task: str) -> None:
    losses = [record["loss"] for record in read_metrics(tuned[task], "train")]
    assert len(losses) == 2
    (scores,) = read_metrics(tuned[task], "validation")
    assert 0 <= scores[f"{task}_accuracy"] <= 1
    assert scores[task] > 0


@pytest.mark.parametrize("task", PROGRAMS)
def test_the_encoder_moves_and_new_heads_are_fresh(shards: Path, pretrained: Path, tmp_path: Path, task: str) -> None:
    """The MLM head is the captioner's; the heads of the other tasks are new."""
    built = build_task(validate_config(RunConfig, fine_tuning(shards, tmp_path, task, pretrained)))
    fresh = {name: tensor.clone() for name, tensor in built.state_dict().items()}
    source = load_weights(pretrained / "model.safetensors")
    transfer_weights(built, str(pretrained))
    for name, tensor in built.state_dict().items():
        expected = source[name] if name.startswith(("encoder.", "mlm_head.")) else fresh[name]
        assert torch.equal(tensor, expected), name
    assert any(name.startswith("mlm_head.") for name in fresh) == (task == "captioning")


def test_a_model_of_another_shape_is_refused(shards: Path, pretrained: Path, tmp_path: Path) -> None:
    tree = fine_tuning(shards, tmp_path / "run", "vqa", pretrained)
    tree["model"]["ffn"] = "smoe"
    refusal = r"init_from: .* tensors of the encoder differ: .*use the model section of"
    with pytest.raises(ConfigError, match=refusal):
        train(tree)
    with pytest.raises(ConfigError, match=refusal):
        dry_run(validate_config(RunConfig, tree))


def test_a_dry_run_reads_the_weights_to_start_from(shards: Path, pretrained: Path, tmp_path: Path) -> None:
    tree = fine_tuning(shards, tmp_path / "run", "captioning", pretrained)
    num_tensors = len(build_task(validate_config(RunConfig, tree)).state_dict())
    # Encoder and MLM head: all that a captioner has.
    assert f"starts from {pretrained}: {num_tensors} of {num_tensors} tensors" in dry_run(
        validate_config(RunConfig, tree)
    )
    tree["init_from"] = str(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="absent"):
        dry_run(validate_config(RunConfig, tree))


@pytest.mark.parametrize("task", ["vqa", "nlvr2"])
def test_larger_images_resize_the_positions(shards: Path, pretrained: Path, tmp_path: Path, task: str) -> None:
    """As VQA at 480 px starts from pretraining at 224: a bicubic picture of the table, the class token's apart."""
    tree = fine_tuning(shards, tmp_path / "run", task, pretrained)
    tree["model"]["image_size"] = 64
    name = "encoder.vision_embedding.positions"
    before = load_weights(pretrained / "model.safetensors")[name]
    assert before.shape == (1, 1 + 4, 16)
    table = before[0, 1:].T.reshape(1, 16, 2, 2)
    expected = F.interpolate(table, size=(4, 4), mode="bicubic").reshape(16, 16).T
    started = initial_weights(build_task(validate_config(RunConfig, tree)), str(pretrained))[name]
    torch.testing.assert_close(started, torch.cat([before[:, :1], expected[None]], dim=1))
    train(tree)
    trained = load_weights(tmp_path / "run" / "model.safetensors")[name]
    assert trained.shape == (1, 1 + 16, 16)
    assert 0 < (trained - started).abs().max() < 0.1


@pytest.mark.parametrize("task", PROGRAMS)
def test_evaluation_from_the_run_directory_alone(shards: Path, tuned: dict[str, Path], task: str) -> None:
    data = f"{FINE_TUNINGS[task][1]}-val"
    arguments = ["--run", str(tuned[task]), "--data", str(shards / data)]
    # The run as its own twin: what it scores is then a lower bound of the blind baseline.
    arguments += ["--blind-run", str(tuned[task])] if task in WITH_TWIN else []
    arguments += {"captioning": ["--metrics", "BLEU"], "retrieval": ["--fold-size", "4"]}.get(task, [])
    before = final_weights(tuned[task])
    assert PROGRAMS[task].main(arguments) == 0
    assert final_weights(tuned[task]) == before
    num_expected = sum(read_index(shard).num_items for shard in find_shards(str(shards / data)))
    assert len(predictions(tuned[task], task)) == num_expected
    card = json.loads((tuned[task] / f"{task}_score.json").read_text())
    assert card["n"] == num_expected
    assert task not in WITH_TWIN or card["blind"] >= card["score"]
    assert card["majority"] is not None
    assert card["seed"] == 0
    times = [record["step_seconds"] for record in read_metrics(tuned[task], "train")]
    assert card["cost"]["train_seconds"] == pytest.approx(sum(times), abs=0.1)  # one record per step
    assert card["cost"]["trained_on"].startswith("1 x ")
    assert card["command"] == " ".join(["python", "-m", f"eval.{task}", *arguments])
    assert 0 <= card["score"] <= 1000
    # Once more, in other batches: predictions must not depend on who shares a batch.
    first = predictions(tuned[task], task)
    assert PROGRAMS[task].main([*arguments, "--batch-size", "3"]) == 0
    assert predictions(tuned[task], task) == first


@pytest.mark.slow
def test_torchrun_evaluates(shards: Path, tuned: dict[str, Path]) -> None:
    """Two real processes; the program's own options must get past torchrun, which completes abbreviations of its."""
    card_file = tuned["vqa"] / "on_two.json"
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("-m", "eval.vqa", "--run-dir", str(tuned["vqa"])),
            *("--data", str(shards / "vqa-val"), "--out", str(card_file)),
        ],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("answers") == 1
    card = json.loads(card_file.read_text())
    assert card["n"] == sum(read_index(shard).num_items for shard in find_shards(str(shards / "vqa-val")))


def predictions(run: Path, task: str) -> list[Any]:
    text = (run / PREDICTIONS[task]).read_text()
    if task == "nlvr2":
        return list(csv.reader(text.splitlines()))
    found = json.loads(text)
    if task == "retrieval":
        assert len(found["folds"]["images_of"]) == len(found["whole"]["images_of"])
        return sorted(found["whole"]["captions_of"].items())
    return sorted(found.items()) if task == "classification" else found


def test_only_a_finished_run_of_the_task_is_evaluated(shards: Path, tuned: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a run of task 'vqa', and 'nlvr2' is needed"):
        load_trained(tuned["vqa"], ALONE, task_kind="nlvr2")
    with pytest.raises(ConfigError, match="not a run directory"):
        load_trained(tmp_path, ALONE, task_kind="vqa")
    train(pretraining(shards, tmp_path / "stopped"), stop_after=1)
    with pytest.raises(ConfigError, match="no weights; finish the run"):
        load_trained(tmp_path / "stopped", ALONE, task_kind="pretrain")


def test_weights_that_do_not_fit_are_one_line(tuned: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for file in tuned["vqa"].iterdir():
        if file.is_file():
            (run / file.name).write_bytes(file.read_bytes())
    (run / "model.safetensors").write_bytes((tuned["nlvr2"] / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*vqa_head") as caught:
        load_trained(run, ALONE, task_kind="vqa")
    assert "\n" not in str(caught.value)
