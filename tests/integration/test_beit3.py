"""From fabricated BEiT-3 checkpoints to fine-tuning and evaluation, and back, by the commands of the README."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision.transforms.v2 import functional

import eval.classification
import eval.nlvr2
import eval.retrieval
import eval.vqa
from mhmoe_vl.config import load_config, validate_config
from mhmoe_vl.convert.__main__ import main
from mhmoe_vl.convert.beit3 import require_same
from mhmoe_vl.distributed.weights import load_weights
from mhmoe_vl.errors import ConfigError
from mhmoe_vl.models.beit3 import recognize
from mhmoe_vl.tasks.classification import ClassificationTask
from mhmoe_vl.tasks.retrieval import RetrievalTask
from mhmoe_vl.train import run_directory
from mhmoe_vl.train.build import build_task, initial_weights
from mhmoe_vl.train.config import RunConfig
from mhmoe_vl.train.trained import load_trained
from tests.integration.runs import ALONE, fine_tuning, language_modeling, pretraining, train, write_config
from tests.unit.data_prep.test_sentencepiece import write_model
from tests.unit.models.released import BASE, LARGE, TINY, Plain, fabricate, released_shapes

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs/beit3").glob("*.yaml"))

#: What the shards of these tests need; two attention heads of 64.
SIZES = {"image_size": 32, "vocab_size": 300, "max_positions": 26, "num_codes": 16}
MODEL = {"dim": 128, "ffn_dim": TINY["ffn_dim"], "ffn": "dense", "drop_path": 0.0}


def save_released(path: Path, kind: str, **changes: Any) -> dict[str, Tensor]:
    tensors = fabricate(kind, **(SIZES | changes))
    torch.save({"model": tensors}, path)
    return tensors


def convert(*arguments: str | Path) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    with pytest.raises(SystemExit):
        main([str(argument) for argument in arguments])
    (line,) = capsys.readouterr().err.splitlines()
    return line


def configuration(shards: Path, folder: Path, task: str, **model: Any) -> dict[str, Any]:
    """A run of the fabricated size; positions of BEiT-3 count from 2, so that 26 rows are 24 tokens."""
    tree = fine_tuning(shards, folder / "run", task, folder / "released")
    tree["model"] |= MODEL | model
    if task == "nlvr2":
        tree["task"]["input_norm"] = True
    return tree


@pytest.fixture
def released(tmp_path: Path) -> dict[str, Tensor]:
    """A pretrained checkpoint, and ``tmp_path / "released"`` made of it."""
    tensors = save_released(tmp_path / "released.pth", "pretrain")
    convert("from-beit3", "--checkpoint", tmp_path / "released.pth", "--out", tmp_path / "released")
    return tensors


@pytest.mark.parametrize("task", ["vqa", "nlvr2", "captioning"])
def test_fine_tuning_starts_from_released_weights(
    shards: Path, tmp_path: Path, released: dict[str, Tensor], task: str
) -> None:
    """VQA leaves the final norm out, as the release does, and captioning takes the MLM head."""
    tree = configuration(shards, tmp_path, task, final_norm=task != "vqa")
    taken = initial_weights(build_task(validate_config(RunConfig, tree)), str(tmp_path / "released"))
    assert ("mlm_head.linear.weight" in taken) == (task == "captioning")
    assert ("encoder.norm.vision.weight" in taken) == (task != "vqa")
    q = torch.cat([released[f"beit3.encoder.layers.1.self_attn.{x}_proj.B.weight"] for x in "qkv"])
    assert torch.equal(taken["encoder.blocks.1.attention.qkv.text.weight"], q)
    train(tree)


def test_a_model_of_one_modality_takes_its_branches(
    shards: Path, corpus: Path, tmp_path: Path, released: dict[str, Tensor]
) -> None:
    """As the release does for ImageNet with images; here with text."""
    tree = language_modeling(shards, corpus, tmp_path / "run", init_from=str(tmp_path / "released"))
    tree["model"] |= MODEL | {"positions": "learned"}
    taken = initial_weights(build_task(validate_config(RunConfig, tree)), str(tmp_path / "released"))
    assert not any("vision" in name for name in taken)
    assert torch.equal(taken["encoder.norm.text.bias"], released["beit3.encoder.layer_norm.B.bias"])
    # What it does want must be there.
    tree["model"]["max_text_length"] = 30
    with pytest.raises(ConfigError, match=r"1 tensors of the encoder differ: encoder.text_embedding.positions"):
        initial_weights(build_task(validate_config(RunConfig, tree)), str(tmp_path / "released"))


def test_pretraining_goes_on_from_released_weights(shards: Path, tmp_path: Path, released: dict[str, Tensor]) -> None:
    tree = pretraining(shards, tmp_path / "run", init_from=str(tmp_path / "released"), max_steps=2)
    tree["model"] |= MODEL
    config = validate_config(RunConfig, tree)
    taken = initial_weights(build_task(config), str(tmp_path / "released"))
    assert torch.equal(taken["mim_head.linear.weight"], released["mim_head.weight"])
    assert taken.keys() == build_task(config).state_dict().keys()
    train(tree)
    # And what came of it is a BEiT-3 checkpoint again, of the released names and shapes.
    convert("to-beit3", "--run", tmp_path / "run", "--out", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in released.items()}
    assert not torch.equal(back["mim_head.weight"], released["mim_head.weight"])


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_there_and_back_is_bit_exact(tmp_path: Path, released: dict[str, Tensor], suffix: str) -> None:
    back = tmp_path / f"back.{suffix}"
    convert("to-beit3", "--run", tmp_path / "released", "--out", back)
    again = tmp_path / "again"
    convert("from-beit3", "--checkpoint", back, "--out", again)
    convert("to-beit3", "--run", again, "--out", tmp_path / "twice.pth")
    twice = torch.load(tmp_path / "twice.pth", weights_only=True)["model"]
    assert twice.keys() == released.keys()
    assert all(torch.equal(twice[name], tensor) for name, tensor in released.items())


def test_a_fine_tuned_vqa_checkpoint_is_evaluated(shards: Path, tmp_path: Path) -> None:
    """Its answers are those of the plain implementation, numbered by the released list."""
    answers = json.loads((shards / "vqa-train" / "answers.json").read_text())["answers"][::-1]
    tensors = save_released(tmp_path / "vqa.pth", "vqa", num_answers=len(answers))
    lines = [json.dumps({"answer": answer, "label": label}) for label, answer in enumerate(answers)]
    (tmp_path / "answer2label.txt").write_text("\n".join(lines))
    config = write_config(tmp_path / "vqa.yaml", configuration(shards, tmp_path, "vqa", final_norm=False))
    run = tmp_path / "run"
    convert(
        "from-beit3", "--checkpoint", tmp_path / "vqa.pth", "--config", config, "--out", run,
        "--answer2label", tmp_path / "answer2label.txt", "data.text_length=12",
    )  # fmt: skip
    assert eval.vqa.main(["--run", str(run), "--data", str(shards / "vqa-val")]) == 0
    card = json.loads((run / "vqa_score.json").read_text())
    assert card["cost"]["trained_on"] is None

    trained = load_trained(run, ALONE, task_kind="vqa")
    (batch,) = trained.batches([str(shards / "vqa-val")], batch_size=100)
    assert batch.image is not None
    assert batch.text_valid is not None
    plain = Plain(tensors)
    with torch.no_grad():
        hidden = plain(batch.image.float() / 127.5 - 1, batch.text_ids, padding=~batch.text_valid)
        pooled = plain.linear("pooler.dense", plain.layer_norm("pooler.norm", hidden[:, 0])).tanh()
        logits = plain.linear("head.3", F.gelu(plain.layer_norm("head.1", plain.linear("head.0", pooled))))
        assert_close(trained.task.logits(batch)[0], logits, atol=2e-5, rtol=0)
    predictions = json.loads((run / "vqa_predictions.json").read_text())
    expected = sorted(answers[index] for index in logits.argmax(-1))
    assert sorted(prediction["answer"] for prediction in predictions) == expected


def test_a_fine_tuned_nlvr2_checkpoint_is_evaluated(shards: Path, tmp_path: Path) -> None:
    tensors = save_released(tmp_path / "nlvr2.pth", "nlvr2")
    config = write_config(tmp_path / "nlvr2.yaml", configuration(shards, tmp_path, "nlvr2"))
    run = tmp_path / "run"
    convert("from-beit3", "--checkpoint", tmp_path / "nlvr2.pth", "--config", config, "--out", run)
    assert eval.nlvr2.main(["--run", str(run), "--data", str(shards / "nlvr2-val")]) == 0
    trained = load_trained(run, ALONE, task_kind="nlvr2")
    (batch,) = trained.batches([str(shards / "nlvr2-val")], batch_size=100)
    plain, firsts = Plain(tensors), []
    assert batch.text_valid is not None
    with torch.no_grad():
        for image in (batch.image, batch.right_image):
            assert image is not None
            hidden = plain(image.float() / 127.5 - 1, batch.text_ids, padding=~batch.text_valid)
            firsts += [hidden[:, 0], hidden[:, 5]]
        normed = plain.layer_norm("head.norm1", torch.cat(firsts, dim=-1))
        logits = plain.linear(
            "head.dense2", F.gelu(plain.layer_norm("head.norm2", plain.linear("head.dense1", normed)))
        )
        assert_close(trained.task.logits(batch)[0], logits, atol=2e-5, rtol=0)
    # A run that was converted is converted back, too.
    assert there_and_back(run, tmp_path, tensors)


def test_a_fine_tuned_retrieval_checkpoint_is_evaluated(shards: Path, tmp_path: Path) -> None:
    """The names are ``vision_head``, ``language_head`` and a ``logit_scale`` without dimensions."""
    tensors = save_released(tmp_path / "retrieval.pth", "retrieval")
    assert tensors["logit_scale"].shape == ()
    config = write_config(tmp_path / "retrieval.yaml", configuration(shards, tmp_path, "retrieval"))
    run = tmp_path / "run"
    convert("from-beit3", "--checkpoint", tmp_path / "retrieval.pth", "--config", config, "--out", run)
    assert eval.retrieval.main(["--run", str(run), "--data", str(shards / "pairs-val")]) == 0
    trained = load_trained(run, ALONE, task_kind="retrieval")
    assert isinstance(trained.task, RetrievalTask)
    assert torch.equal(trained.task.logit_scale[0], tensors["logit_scale"])
    (batch,) = trained.batches([str(shards / "pairs-val")], batch_size=100)
    assert batch.image is not None
    assert batch.text_valid is not None
    plain = Plain(tensors)
    assert batch.text_ids is not None
    with torch.no_grad():
        images = plain(batch.image.float() / 127.5 - 1)[:, 0] @ tensors["vision_head.weight"].T
        texts = plain(None, batch.text_ids, padding=~batch.text_valid)[:, 0] @ tensors["language_head.weight"].T
        found = (
            trained.task.embed_images(batch.image)[0],
            trained.task.embed_texts(batch.text_ids, batch.text_valid)[0],
        )
    for embedding, expected in zip(found, (images, texts), strict=True):
        assert_close(embedding, F.normalize(expected, dim=-1), atol=2e-5, rtol=0)
    assert there_and_back(run, tmp_path, tensors)


def test_a_fine_tuned_imagenet_checkpoint_is_evaluated(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ImageNet's mean and deviation, the middle of the image, no final norm, the mean of the patches, ``fc_norm``."""
    classes = json.loads((shards / "classes-train" / "classes.json").read_text())["classes"]
    tensors = save_released(tmp_path / "in1k.pth", "classification", num_classes=len(classes))
    config = write_config(
        tmp_path / "in1k.yaml",
        configuration(shards, tmp_path, "classification", final_norm=False, image_normalization="imagenet"),
    )
    run = tmp_path / "run"
    arguments = ("from-beit3", "--checkpoint", tmp_path / "in1k.pth", "--config", config, "--out", run)
    line = refusal(capsys, *arguments, "model.image_normalization=half")
    assert line.endswith("set model.image_normalization=imagenet")
    convert(*arguments, "data.center_crop=true")
    assert eval.classification.main(["--run", str(run), "--data", str(shards / "classes-val")]) == 0
    trained = load_trained(run, ALONE, task_kind="classification")
    assert isinstance(trained.task, ClassificationTask)
    (batch,) = trained.batches([str(shards / "classes-val")], batch_size=100)
    assert batch.image is not None
    image = functional.normalize(batch.image / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    plain = Plain(tensors)
    with torch.no_grad():
        mean_patch = plain(image)[:, 1:].mean(1)
        logits = plain.linear("head", plain.layer_norm("fc_norm", mean_patch))
        assert_close(trained.task.logits(batch)[0], logits, atol=2e-5, rtol=0)
    assert there_and_back(run, tmp_path, tensors)


def there_and_back(run: Path, folder: Path, tensors: dict[str, Tensor]) -> bool:
    """Whether a run that was made of a released file becomes that file again, bit by bit."""
    convert("to-beit3", "--run", run, "--out", folder / "back.pth")
    back = torch.load(folder / "back.pth", weights_only=True)["model"]
    return back.keys() == tensors.keys() and all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("kind", ["retrieval", "classification"])
def test_other_tasks_give_their_encoder(shards: Path, tmp_path: Path, kind: str) -> None:
    save_released(tmp_path / "x.pth", kind)
    convert("from-beit3", "--checkpoint", tmp_path / "x.pth", "--out", tmp_path / "released")
    tree = configuration(shards, tmp_path, "vqa", final_norm=False)
    assert initial_weights(build_task(validate_config(RunConfig, tree)), str(tmp_path / "released"))


def test_mistakes_are_one_line(
    shards: Path, tmp_path: Path, released: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    num_answers = len(json.loads((shards / "vqa-train" / "answers.json").read_text())["answers"])
    save_released(tmp_path / "vqa.pth", "vqa", num_answers=num_answers + 1)
    vqa = write_config(tmp_path / "vqa.yaml", configuration(shards, tmp_path, "vqa"))
    nlvr2 = write_config(tmp_path / "nlvr2.yaml", configuration(shards, tmp_path, "nlvr2"))
    arguments = ("from-beit3", "--checkpoint", tmp_path / "vqa.pth", "--out", tmp_path / "out")
    assert "task.kind: 'nlvr2', but" in refusal(capsys, *arguments, "--config", nlvr2)
    line = refusal(capsys, *arguments, "--config", vqa, "model.dim=64", "model.ffn=smoe")
    assert line.endswith("set model.dim=128 model.ffn=dense model.final_norm=false")
    line = refusal(capsys, *arguments, "--config", vqa, "model.final_norm=false")
    assert f"vqa_head.classifier.3.bias is [{num_answers + 1}] there and [{num_answers}] by the configuration" in line
    assert "--config: is required" in refusal(capsys, *arguments, "model.dim=64")
    assert "exists; choose another --out" in refusal(capsys, *arguments[:3], "--out", tmp_path / "released")
    tree = pretraining(shards, tmp_path / "sparse", max_steps=2)
    train(tree)
    capsys.readouterr()
    line = refusal(capsys, "to-beit3", "--run", tmp_path / "sparse", "--out", tmp_path / "x.pth")
    assert line.endswith("sparse: model.ffn: mhmoe, and released BEiT-3 has dense")
    assert "neither config.yaml of a run nor model.yaml" in refusal(
        capsys, "to-beit3", "--run", tmp_path, "--out", tmp_path / "x.pth"
    )


def test_a_converted_run_has_no_history(shards: Path, tmp_path: Path) -> None:
    save_released(tmp_path / "x.pth", "captioning")
    config = write_config(tmp_path / "x.yaml", configuration(shards, tmp_path, "captioning"))
    convert("from-beit3", "--checkpoint", tmp_path / "x.pth", "--config", config, "--out", tmp_path / "run")
    loaded = load_config(RunConfig, tmp_path / "run" / run_directory.CONFIG)
    assert loaded.init_from is None
    assert loaded.data.text_tokenizer == str(tmp_path / "run" / run_directory.TOKENIZER)
    assert run_directory.starts_of(tmp_path / "run") == []
    assert load_weights(tmp_path / "run" / run_directory.WEIGHTS)["mlm_head.linear.bias"].shape == (300,)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_of_the_released_sizes(path: Path) -> None:
    """Released names and shapes of the task and size that a file of ``configs/beit3`` is for."""
    config = load_config(RunConfig, path, ["model.ffn=dense"])
    size = LARGE if path.stem.endswith("_large") else BASE
    shapes = released_shapes(config.task.kind, **size, image_size=config.model.image_size)
    require_same(config, recognize(shapes, "file"), Path("file"))


#: What makes the README's commands small; sizes are those of the fabricated checkpoints.
SMALL = [
    "model.dim=128", "model.depth=2", "model.num_heads=2", "model.ffn_dim=96", "model.image_size=32",
    "model.vocab_size=300", "model.max_text_length=24", "model.num_visual_codes=16", "model.moe.match=none",
    "data.text_length=16", "data.batch_size=6", "data.num_workers=0", "optimizer.warmup_steps=1", "max_steps=2",
]  # fmt: skip


def readme_commands() -> list[list[str]]:
    section = (ROOT / "README.md").read_text().partition("## Start from BEiT-3 weights")[2].partition("\n## ")[0]
    (block,) = re.findall(r"^```bash\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_the_commands_of_the_readme(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, in order, on fabricated files of the released names; the last training is a dry run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "data/beit3").mkdir(parents=True)
    for name, made in (
        ("vqa-train", "vqa-train"), ("vqa-val", "vqa-val"), ("images", "images-train"), ("text", "text-train"),
        ("pairs", "pairs-train"), ("pairs-val", "pairs-val"), ("visual_codebook.safetensors", "codebook.safetensors"),
    ):  # fmt: skip
        (tmp_path / "data" / name).symlink_to(shards / made)
    answers = json.loads((shards / "vqa-train" / "answers.json").read_text())["answers"]
    (tmp_path / "answer2label.txt").write_text(
        "".join(json.dumps({"answer": answer, "label": label}) + "\n" for label, answer in enumerate(answers))
    )
    write_model(tmp_path / "beit3.spm")
    save_released(tmp_path / "beit3_base_patch16_224.pth", "pretrain")
    save_released(tmp_path / "beit3_base_patch16_480_vqa.pth", "vqa", num_answers=len(answers))
    ran = []
    for program, *words in readme_commands():
        module, arguments = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
        if "--config" in arguments:
            arguments += SMALL
        if arguments[0] == "upcycle":
            arguments += ["--num-samples", "9", "--fit-steps", "2"]
        if "configs/beit3/mhmoe.yaml" in arguments and module == "mhmoe_vl.train":
            arguments.append("--dry-run")
        is_package = (ROOT / module.replace(".", "/")).is_dir()
        assert importlib.import_module(f"{module}.__main__" if is_package else module).main(arguments) == 0
        ran.append((program, module, arguments[0]))
    assert ran == [
        ("python", "data_prep.train_text_tokenizer", "--sentencepiece"),
        ("python", "mhmoe_vl.convert", "from-beit3"),
        ("torchrun", "mhmoe_vl.train", "--config"),
        ("python", "mhmoe_vl.convert", "to-beit3"),
        ("python", "mhmoe_vl.convert", "from-beit3"),
        ("python", "eval.vqa", "--run"),
        ("python", "mhmoe_vl.convert", "upcycle"),
        ("torchrun", "mhmoe_vl.train", "--config"),
    ]
    back = torch.load(tmp_path / "vqa.pth", weights_only=True)["model"]
    assert {name: tuple(tensor.shape) for name, tensor in back.items()} == released_shapes(
        "vqa", **(TINY | SIZES), num_answers=len(answers)
    )
