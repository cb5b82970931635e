"""What is special about retrieval and linear probes as whole runs: other processes' pairs, and a frozen encoder."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import eval.classification
import eval.retrieval
from mhmoe_vl.analysis.measure import analyse_experts
from mhmoe_vl.config import validate_config
from mhmoe_vl.data.plan import SampleRef, permuted
from mhmoe_vl.distributed.world import World
from mhmoe_vl.errors import DataError
from mhmoe_vl.evaluation.predict import embed_images, embed_texts
from mhmoe_vl.evaluation.retrieval_recall import Rankings, rank_pairs
from mhmoe_vl.evaluation.truth import captions_by_image
from mhmoe_vl.tasks.retrieval import RetrievalTask
from mhmoe_vl.train.build import build_dataset
from mhmoe_vl.train.config import RunConfig
from mhmoe_vl.train.dry_run import dry_run
from mhmoe_vl.train.metrics import read_metrics
from mhmoe_vl.train.trained import load_trained
from tests.distributed.fork_harness import run_ranks
from tests.integration.runs import ALONE, figures, final_weights, fine_tuning, pretraining, tensors_of_checkpoint, train


@pytest.fixture(scope="module")
def pretrained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrained") / "run"
    train(pretraining(shards, out, max_steps=2))
    return out


def retrieval(shards: Path, out: Path, pretrained: Path, **changes: Any) -> dict[str, Any]:
    """Three steps of six pairs, all compared with each other."""
    return fine_tuning(shards, out, "retrieval", pretrained) | {"max_steps": 3, "num_micro_batches": 1} | changes


def probe(shards: Path, out: Path, pretrained: Path, **changes: Any) -> dict[str, Any]:
    tree = fine_tuning(shards, out, "classification", pretrained) | {"max_steps": 3} | changes
    # With partners from all images, whichever process a sample is on.
    tree["task"] |= {"linear_probe": True, "mixup": 0.8, "cutmix": 1.0}
    return tree


@pytest.fixture(scope="module")
def unbroken(shards: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Retrieval and a linear probe on one process."""
    folder = tmp_path_factory.mktemp("unbroken")
    for name, tree in (("retrieval", retrieval), ("probe", probe)):
        train(tree(shards, folder / name, pretrained))
    return {name: folder / name for name in ("retrieval", "probe")}


def test_images_are_mixed_in_training_alone(shards: Path, pretrained: Path, tmp_path: Path) -> None:
    tree = probe(shards, tmp_path / "run", pretrained)
    for mixes in (True, False):
        config = validate_config(RunConfig, tree)
        for training in (True, False):
            dataset = build_dataset(config, config.data.train, training=training)
            (name,) = dataset.sources
            batch = dataset.batch(name, [SampleRef(name, 0, item) for item in range(3)])
            assert (batch.label_share is not None) == (mixes and training)
        tree["task"] |= {"mixup": 0.0, "cutmix": 0.0}


@pytest.mark.parametrize("name", ["retrieval", "probe"])
def test_one_and_two_steps_are_three_bit_for_bit(
    shards: Path, pretrained: Path, tmp_path: Path, unbroken: dict[str, Path], name: str
) -> None:
    tree = {"retrieval": retrieval, "probe": probe}[name](shards, tmp_path / "run", pretrained)
    train(tree, stop_after=1)
    train(tree)
    assert tensors_of_checkpoint(tmp_path / "run", 3) == tensors_of_checkpoint(unbroken[name], 3)
    assert final_weights(tmp_path / "run") == final_weights(unbroken[name])
    assert figures(tmp_path / "run") == figures(unbroken[name])


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("retrieval", {"strategy": "ddp"}),
        ("retrieval", {"strategy": "fsdp"}),
        ("retrieval", {"strategy": "fsdp", "expert_parallel": 2}),
        ("probe", {"strategy": "ddp"}),
        ("probe", {"strategy": "fsdp", "expert_parallel": 2}),
    ],
    ids=str,
)
def test_two_processes_train_the_model_of_one(
    shards: Path, pretrained: Path, tmp_path: Path, unbroken: dict[str, Path], name: str, layout: dict[str, Any]
) -> None:
    """Of six pairs each has three, and compares them with all six."""
    out = tmp_path / "run"
    tree = {"retrieval": retrieval, "probe": probe}[name](shards, out, pretrained, **layout)
    run_ranks(partial(train, tree), 2)
    for kind in ("train", "validation"):
        for found, expected in zip(read_metrics(out, kind), read_metrics(unbroken[name], kind), strict=True):
            for figure, value in expected.items():
                if isinstance(value, float) and "second" not in figure:
                    assert found[figure] == pytest.approx(value, rel=1e-5, abs=1e-5), figure
    found, expected = load_file(out / "model.safetensors"), load_file(unbroken[name] / "model.safetensors")
    assert found.keys() == expected.keys()
    for tensor_name, tensor in expected.items():
        # A softmax does not see the bias of keys: its gradient is rounding, which Adam makes as large as any other.
        if not (".qkv." in tensor_name and tensor_name.endswith(".bias")):
            assert torch.allclose(found[tensor_name], tensor, rtol=1e-4, atol=1e-4), tensor_name


@pytest.mark.parametrize(
    ("task", "data", "figure"),
    [("retrieval", "pairs-train", "mean of the six"), ("classification", "classes-train", "score")],
)
def test_they_learn_what_they_are_shown(shards: Path, tmp_path: Path, task: str, data: str, figure: str) -> None:
    """24 scenes, 80 times: from scratch, and far above what a random order and the commonest class reach."""
    tree = fine_tuning(shards, tmp_path / "run", task, tmp_path)
    tree |= {"init_from": None, "max_steps": 80, "num_micro_batches": 1, "log_every": 40}
    tree["model"] |= {"dim": 32, "drop_path": 0.0}
    tree["data"] |= {"batch_size": 24, "augment": {"crop_scale": None, "flip": False}}
    tree["optimizer"] = {"learning_rate": 5e-3, "warmup_steps": 5}
    train(tree)
    program = {"retrieval": eval.retrieval, "classification": eval.classification}[task]
    assert program.main(["--run", str(tmp_path / "run"), "--data", str(shards / data)]) == 0
    card = json.loads((tmp_path / "run" / f"{task}_score.json").read_text())
    by_chance = [value for name, value in card["details"].items() if name.startswith("chance: ")] or [card["majority"]]
    assert (card["details"] | card)[figure] > 1.5 * sum(by_chance) / len(by_chance)


def test_a_probe_leaves_the_encoder_as_it_was(pretrained: Path, unbroken: dict[str, Path]) -> None:
    before, after = final_weights(pretrained), final_weights(unbroken["probe"])
    encoder = {name for name in after if name.startswith("encoder.")}
    assert encoder < after.keys()
    assert all(after[name] == before[name] for name in encoder)
    # Nothing is kept for what is not trained.
    moments = {name for name in tensors_of_checkpoint(unbroken["probe"], 3) if "exp_avg" in name}
    assert moments
    assert not any("encoder." in name for name in moments)


def test_ranks_share_out_an_evaluation(shards: Path, unbroken: dict[str, Path]) -> None:
    data = [str(shards / "pairs-val")]
    captions = captions_by_image(data)
    texts = [text for of_image in captions.values() for text in of_image]

    def rankings(world: World) -> Rankings:
        trained = load_trained(unbroken["retrieval"], world, task_kind="retrieval")
        assert isinstance(trained.task, RetrievalTask)
        images = embed_images(trained.task, trained.batches(data, batch_size=3))
        assert images.keys() == captions.keys()
        of_texts = embed_texts(trained.task, texts, trained.tokenizer, text_length=16, batch_size=3)
        assert of_texts.keys() == set(texts)
        return rank_pairs(captions, images, of_texts)

    assert run_ranks(rankings, 2) == [rankings(ALONE)] * 2


def test_experts_are_analysed_as_the_task_uses_them(shards: Path, unbroken: dict[str, Path]) -> None:
    """Image and text apart: what the text is does not reach the image's routers."""
    run = load_trained(unbroken["retrieval"], ALONE, task_kind="retrieval")
    found = analyse_experts(run, run.config.data.validation, num_samples=4)
    dataset = build_dataset(run.config, run.config.data.validation, training=False)
    refs = [SampleRef("x", 0, permuted(position, 8, "analysis")) for position in range(4)]
    with torch.no_grad():
        encoded = run.task.encoder(dataset.batch("x", refs).image)
    (routing,) = [item.routing for item in encoded.routings if item.name == "block1/vision"]
    counted = torch.bincount(routing.experts_NK.flatten(), minlength=routing.num_experts)
    (pool,) = [use for use in found.pools if use.pool == "block1/vision"]
    assert pool.load == pytest.approx((counted / counted.sum()).tolist())
    assert {use.pool for use in found.pools} == {"block1/vision", "block1/text"}
    probed = load_trained(unbroken["probe"], ALONE, task_kind="classification")
    of_images = analyse_experts(probed, probed.config.data.validation, num_samples=4)
    assert {use.pool for use in of_images.pools} == {"block1/vision"}


def test_all_captions_or_the_first(shards: Path, unbroken: dict[str, Path], tmp_path: Path) -> None:
    run, data = unbroken["retrieval"], str(shards / "pairs-val")
    cards = {}
    for number in (None, 1):
        out = tmp_path / f"{number}.json"
        options = ["--run", str(run), "--data", data, "--predictions", str(tmp_path / "x.json"), "--out", str(out)]
        options += [] if number is None else ["--captions-per-image", str(number)]
        assert eval.retrieval.main(options) == 0
        cards[number] = json.loads(out.read_text())
    assert cards[1]["notes"] == ["8 images, 8 captions"]
    assert cards[None]["notes"][0].startswith("8 images, ")
    assert cards[None]["notes"] != cards[1]["notes"]
    assert cards[1]["majority"] == pytest.approx(12.5)


def test_a_fold_size_that_does_not_fit(
    shards: Path, unbroken: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--run", str(unbroken["retrieval"]), "--data", str(shards / "pairs-val"), "--fold-size", "3"]
    with pytest.raises(SystemExit) as stopped:
        eval.retrieval.main(options)
    assert stopped.value.code == 64
    assert "--fold-size: 3 does not divide the 8 images" in capsys.readouterr().err


def test_what_a_dry_run_says(shards: Path, pretrained: Path, tmp_path: Path) -> None:
    """An image of 4 patches alone; of retrieval, image and text that do not see each other."""
    said = {
        name: dry_run(validate_config(RunConfig, tree(shards, tmp_path / name, pretrained)))
        for name, tree in (("probe", probe), ("retrieval", retrieval))
    }
    assert "for 5 image and 0 text tokens" in said["probe"]
    assert "for 5 image and 16 text tokens" in said["retrieval"]
    assert "train.x: 24 items, 100.0% of each step" in said["probe"]


def test_classes_that_the_list_does_not_have(shards: Path, pretrained: Path, tmp_path: Path) -> None:
    tree = probe(shards, tmp_path / "run", pretrained)
    (tmp_path / "classes.json").write_text(json.dumps({"classes": ["another"]}))
    tree["task"]["classes"] = str(tmp_path / "classes.json")
    with pytest.raises(DataError, match=r"class 'class\d' is not in the list of classes; pack with --classes"):
        train(tree)
