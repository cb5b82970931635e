"""One set of tiny shards for all tests of whole runs, made by the project's own programs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from data_prep import (
    fit_visual_codebook,
    make_scenes,
    pack_classes,
    pack_images,
    pack_nlvr2,
    pack_pairs,
    pack_text,
    pack_vqa,
    train_text_tokenizer,
)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``images-train``, ``text-val`` and so on, of 24 and 8 scenes of 32 pixels; a tokenizer and a codebook."""
    folder = tmp_path_factory.mktemp("data")
    scenes = folder / "scenes"
    sizes = "--num-train-images 24 --num-val-images 8 --num-train-statements 4 --num-val-statements 2"
    texts = "--num-train-texts 24 --num-val-texts 6"
    make_scenes.main(["--out", str(scenes), "--image-size", "32", *sizes.split(), *texts.split()])
    for split in ("train", "val"):
        _pack(folder, scenes, split)
    sources = [str(folder / f"{kind}-train") for kind in ("pairs", "text", "vqa", "nlvr2")]
    tokenizer = ["--vocab-size", "300", "--lowercase", "--out", str(folder / "tokenizer.json")]
    assert train_text_tokenizer.main([*sources, *tokenizer]) == 0
    codebook = ["--num-codes", "16", "--image-size", "32", "--out", str(folder / "codebook.safetensors")]
    assert fit_visual_codebook.main(["--shards", str(folder / "images-train"), *codebook]) == 0
    return folder


def _pack(folder: Path, scenes: Path, split: str) -> None:
    images = ["--images", str(scenes / "images" / split)]
    vqa = ["--questions", str(scenes / f"vqa_{split}_questions.json"), *images]
    vqa += ["--annotations", str(scenes / f"vqa_{split}_annotations.json")]
    vqa += ["--image-pattern", "COCO_{data_subtype}_{image_id:012d}.png"]
    answers = folder / "vqa-train" / "answers.json"
    vqa += ["--min-answer-count", "1"] if split == "train" else ["--answers", str(answers)]
    classes = ["--images", str(_class_folder(folder / "classes" / split, scenes / "images" / split))]
    if split == "val":
        classes += ["--classes", str(folder / "classes-train" / "classes.json")]
    nlvr2 = ["--examples", str(scenes / f"nlvr2_{split}.json"), "--images", str(scenes / "images")]
    for name, program, arguments in (
        ("images", pack_images, [*images, "--samples-per-shard", "10"]),
        ("text", pack_text, [str(scenes / f"text_{split}.txt")]),
        ("pairs", pack_pairs, ["--coco", str(scenes / f"captions_{split}.json"), *images]),
        ("vqa", pack_vqa, vqa),
        ("nlvr2", pack_nlvr2, nlvr2),
        ("classes", pack_classes, classes),
    ):
        assert program.main([*arguments, "--out", str(folder / f"{name}-{split}")]) == 0  # type: ignore[attr-defined]


def _class_folder(folder: Path, images: Path) -> Path:
    """Three classes that mean nothing: every third image."""
    for number, image in enumerate(sorted(images.iterdir())):
        (folder / f"class{number % 3}").mkdir(parents=True, exist_ok=True)
        shutil.copy(image, folder / f"class{number % 3}")
    return folder


@pytest.fixture(scope="session")
def corpus(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two languages: short documents, and longer ones of which some are two segments."""
    folder = tmp_path_factory.mktemp("corpus")
    words = ["red", "green", "blue", "square", "circle", "left", "of", "the", "a", "is", "and", "large"]
    for language, num, repeats in (("short", 30, 1), ("long", 6, 12)):
        lines = [
            " ".join(words[(7 * line + 5 * place + place * place) % 12] for place in range((4 + line % 9) * repeats))
            for line in range(num)
        ]
        (folder / f"{language}.txt").write_text("\n".join(lines))
        assert pack_text.main([str(folder / f"{language}.txt"), "--out", str(folder / language)]) == 0
    return folder
