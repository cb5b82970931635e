"""Training a visual tokenizer as a whole run, and pretraining with what it leaves."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mhmoe_vl.config import validate_config
from mhmoe_vl.data.plan import SampleRef
from mhmoe_vl.errors import ConfigError, DataError
from mhmoe_vl.models.visual_codebook import to_patches
from mhmoe_vl.models.visual_tokenizer import VisualTokenizer, load_visual_tokenizer
from mhmoe_vl.plan.devices import find_device
from mhmoe_vl.plan.plan import make_plan
from mhmoe_vl.train.build import build_dataset, build_task
from mhmoe_vl.train.config import RunConfig
from mhmoe_vl.train.dry_run import dry_run
from mhmoe_vl.train.metrics import read_metrics
from tests.distributed.fork_harness import run_ranks
from tests.integration.runs import (
    figures,
    final_weights,
    language_modeling,
    pretraining,
    tensors_of_checkpoint,
    train,
)


def distillation(shards: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Six images a step in two micro-batches of two sources; 24 patches for 8 codes, of which some die."""
    tree = pretraining(shards, out)
    tree["task"] = {
        "kind": "visual_tokenizer",
        "teacher": "pixels",
        "num_codes": 8,
        "code_dim": 4,
        "codebook_decay": 0.3,
        "revival_share": 0.4,
    }
    tree["model"] |= {"modalities": ["vision"], "ffn": "dense"}
    del tree["data"]["text_tokenizer"]
    sources = {"image": "images", "pair": "pairs"}
    for split, end in (("train", "train"), ("validation", "val")):
        tree["data"][split] = {
            kind: {"kind": kind, "shards": str(shards / f"{folder}-{end}")} for kind, folder in sources.items()
        }
    return tree | changes


@pytest.fixture(scope="module")
def unbroken(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps on one process."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    train(distillation(shards, out))
    return out


def test_two_and_two_steps_are_four_bit_for_bit(shards: Path, tmp_path: Path, unbroken: Path) -> None:
    train(distillation(shards, tmp_path), stop_after=2)
    train(distillation(shards, tmp_path))
    found, expected = (tensors_of_checkpoint(out, 4) for out in (tmp_path, unbroken))
    assert found == expected
    buffers = ("codebook.codes_KC", "codebook.usage_K", "codebook.num_updates", "code_head.center_C", "decoder.mean_F")
    assert all(any(name.endswith(buffer) for name in found) for buffer in buffers)
    assert figures(tmp_path) == figures(unbroken)
    assert sum(record["codes_revived"] for record in figures(unbroken).values()) > 0
    files = [(out / "visual_tokenizer.safetensors").read_bytes() for out in (tmp_path, unbroken)]
    assert files[0] == files[1]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_on_two_processes(shards: Path, tmp_path: Path, unbroken: Path, strategy: str) -> None:
    run_ranks(partial(train, distillation(shards, tmp_path, strategy=strategy)), 2)
    for kind in ("train", "validation"):
        for found, expected in zip(read_metrics(tmp_path, kind), read_metrics(unbroken, kind), strict=True):
            assert found.keys() == expected.keys()
            names = [name for name in expected if name.startswith(("co", "loss", "grad"))]
            assert [found[n] for n in names] == pytest.approx([expected[n] for n in names], rel=1e-4, abs=1e-5)
    found_weights, expected_weights = (load_file(out / "model.safetensors") for out in (tmp_path, unbroken))
    for name in ("codebook.codes_KC", "codebook.usage_K", "code_head.center_C", "decoder.mean_F"):
        torch.testing.assert_close(found_weights[name], expected_weights[name], rtol=1e-4, atol=1e-5, msg=name)
    images = held_out_images(shards, unbroken)
    tokenizers = [load_visual_tokenizer(out / "visual_tokenizer.safetensors") for out in (tmp_path, unbroken)]
    assert torch.equal(*(tokenizer.encode(images) for tokenizer in tokenizers))
    assert isinstance(tokenizers[0], VisualTokenizer)
    assert isinstance(tokenizers[1], VisualTokenizer)
    torch.testing.assert_close(tokenizers[0].mean_patches_KM, tokenizers[1].mean_patches_KM)


def held_out_images(shards: Path, out: Path) -> torch.Tensor:
    config = validate_config(RunConfig, distillation(shards, out))
    dataset = build_dataset(config, config.data.validation, training=False)
    image = dataset.batch("image", [SampleRef("image", 0, item) for item in range(8)]).image
    assert image is not None
    return image


def test_the_file_holds_what_the_run_has_trained(shards: Path, unbroken: Path) -> None:
    """Its codes are those of the task, and the picture of a code is the mean of its patches in the training images."""
    tree = distillation(shards, unbroken)
    tree["data"]["augment"] = {"crop_scale": None, "flip": False}
    config = validate_config(RunConfig, tree)
    tokenizer = load_visual_tokenizer(unbroken / "visual_tokenizer.safetensors")
    task = build_task(config)
    task.load_state_dict(load_file(unbroken / "model.safetensors"))
    images = held_out_images(shards, unbroken)
    task.eval()
    dataset = build_dataset(config, config.data.validation, training=False)
    batch = dataset.batch("image", [SampleRef("image", 0, item) for item in range(8)])
    codes = task({"image": batch}, {"patches": 1.0}).patches["image"].codes_N  # type: ignore[attr-defined]
    assert torch.equal(tokenizer.encode(images).flatten(), codes)
    # Of the whole validation: eight images, once as images and once of pairs.
    (record,) = read_metrics(unbroken, "validation")
    assert record["codes_used"] == len(codes.unique())
    share = torch.bincount(codes, minlength=8) / len(codes)
    assert record["codes_perplexity"] == pytest.approx(float(torch.special.entr(share).sum().exp()), rel=1e-5)


def test_pictures_of_codes_are_mean_patches(shards: Path, tmp_path: Path) -> None:
    """Without augmentation, and with samples for one epoch, over all training images."""
    tree = distillation(shards, tmp_path, max_steps=2)
    tree["data"] |= {"augment": {"crop_scale": None, "flip": False}, "batch_size": 6}
    del tree["data"]["train"]["pair"]
    train(tree)
    tokenizer = load_visual_tokenizer(tmp_path / "visual_tokenizer.safetensors")
    config = validate_config(RunConfig, tree)
    dataset = build_dataset(config, config.data.train, training=False)
    image = dataset.batch("image", [SampleRef("image", 0, item) for item in range(24)]).image
    assert image is not None
    codes, patches = tokenizer.encode(image).flatten(), to_patches(image / 127.5 - 1, 16).flatten(0, 1)
    for code in range(8):
        of_code = patches[codes == code] if (codes == code).any() else patches
        picture = tokenizer.decode(torch.tensor([[code]]), (1, 1))
        torch.testing.assert_close(to_patches(picture, 16)[0, 0], of_code.mean(0), atol=1e-5, rtol=0)


def test_pretraining_with_it(shards: Path, tmp_path: Path, unbroken: Path) -> None:
    """At another image size; of the tokenizer nothing is trained, saved or counted."""
    path = unbroken / "visual_tokenizer.safetensors"
    tree = pretraining(shards, tmp_path / "run", max_steps=2)
    tree["task"]["visual_codebook"] = str(path)
    tree["model"] |= {"num_visual_codes": 8, "image_size": 64}
    train(tree)
    assert (tmp_path / "run/visual_codebook.safetensors").read_bytes() == path.read_bytes()
    assert not any("codebook" in name for name in final_weights(tmp_path / "run"))
    assert not any("codebook" in name for name in tensors_of_checkpoint(tmp_path / "run", 2))
    config = validate_config(RunConfig, tree)
    with_it = build_task(config)
    tree["task"]["visual_codebook"] = str(shards / "codebook.safetensors")
    tree["model"]["num_visual_codes"] = 16
    without = build_task(validate_config(RunConfig, tree))
    # It draws no random numbers either: the encoder of both starts alike.
    assert all(map(torch.equal, with_it.encoder.parameters(), without.encoder.parameters()))
    assert sum(p.numel() for p in with_it.parameters()) == sum(p.numel() for p in without.parameters()) - 8 * 17
    assert not with_it.train().codebook.training  # type: ignore[attr-defined, operator]


def test_settings_that_cannot_be(shards: Path, tmp_path: Path) -> None:
    def complaint(change: dict[str, Any]) -> str:
        tree = distillation(shards, tmp_path)
        for key, value in change.items():
            tree[key] = {**tree[key], **value}
        with pytest.raises((ConfigError, DataError)) as raised:
            build_task(validate_config(RunConfig, tree))
        return str(raised.value)

    assert "num_codes: 99 codes begin as centres of a step's patches, and data.batch_size=6 has 24; use at least" in (
        complaint({"task": {"num_codes": 99}})
    )
    assert "set model.modalities=[vision]" in complaint({"model": {"modalities": ["vision", "text"]}})
    assert "'hogg' is no teacher (did you mean 'hog'?)" in complaint({"task": {"teacher": "hogg"}})
    assert "teacher 'pixels' has none" in complaint({"task": {"teacher_weights": "random"}})
    assert "'text' cannot feed task 'visual_tokenizer'" in complaint(
        {"data": {"train": {"a": {"kind": "text", "shards": "x"}}}}
    )
    no_words = language_modeling(shards, shards, tmp_path)
    del no_words["data"]["text_tokenizer"]
    with pytest.raises(ConfigError, match=r"data\.text_tokenizer: missing, and task 'language_modeling' needs one"):
        validate_config(RunConfig, no_words)


def test_looking_before_training(shards: Path, tmp_path: Path) -> None:
    config = validate_config(RunConfig, distillation(shards, tmp_path))
    assert "task visual_tokenizer, ffn dense" in dry_run(config)
    with pytest.raises(ConfigError, match=r"task\.kind: 'visual_tokenizer' cannot be planned"):
        make_plan(config, find_device("h100", precision="auto"), world_size=1)
