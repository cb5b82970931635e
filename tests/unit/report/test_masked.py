from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from mhmoe_vl.config import validate_config
from mhmoe_vl.data.batch import Batch
from mhmoe_vl.data.prepare.text_tokenizer import clip_tokenizer
from mhmoe_vl.data.text import TextTokenizer
from mhmoe_vl.distributed.world import World
from mhmoe_vl.models.config import ModelConfig
from mhmoe_vl.models.visual_codebook import VisualCodebook
from mhmoe_vl.report.masked import predict_masked
from mhmoe_vl.tasks.pretrain import PretrainConfig, PretrainTask
from mhmoe_vl.train.trained import TrainedRun
from tests.unit.report.runs import MODEL, NUM_CODES, PATCH, run_config, write_codebook, write_tokenizer

WORLD = World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
#: Codes of the four patches of the test image, which are the codebook's own gray values.
TRUE_CODES = [0, 7, 2, 5]
HIDDEN = [False, True, True, False]


class Answers(nn.Module):
    """A head that gives the same classes ``[L]`` for every sample."""

    def __init__(self, classes: list[int], num_classes: int) -> None:
        super().__init__()
        self.logits = nn.functional.one_hot(torch.tensor(classes), num_classes).float()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.logits.expand(hidden.shape[0], -1, -1)


def gray(code: int) -> int:
    return round((-1 + 2 * code / (NUM_CODES - 1) + 1) * 127.5)


def patches(values: list[int]) -> NDArray[np.uint8]:
    """Image ``[32, 32]`` of four constant patches."""
    return np.array(values, np.uint8).reshape(2, 2).repeat(PATCH, 0).repeat(PATCH, 1)


def pixels(uri: str) -> NDArray[np.uint8]:
    """The red channel of a data URI, which must be gray."""
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))
    assert (image == image[..., :1]).all()
    return image[..., 0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    folder = tmp_path_factory.mktemp("masked")
    codebook = VisualCodebook.load(write_codebook(folder / "codebook.safetensors"))
    tokenizer = write_tokenizer(folder / "tokenizer.json")
    config = run_config(
        folder / "run", {"kind": "pretrain", "visual_codebook": "x"}, {"kind": "pair", "shards": "x"}, tokenizer
    )
    task = PretrainTask(validate_config(ModelConfig, MODEL), PretrainConfig(visual_codebook="x"), codebook).eval()
    return TrainedRun(config, task, TextTokenizer.load(tokenizer), WORLD)


def image_batch() -> Batch:
    image = torch.from_numpy(patches([gray(code) for code in TRUE_CODES])).expand(1, 3, -1, -1)
    return Batch(("7",), torch.tensor([0]), image=image, image_mask=torch.tensor([HIDDEN]))


def test_hidden_patches_show_the_predicted_code_and_others_stay(trained: TrainedRun) -> None:
    trained.task.mim_head = Answers([3, 7, 1, 3], NUM_CODES)  # right for the second patch, wrong for the third
    (sample,) = predict_masked(trained, image_batch())
    assert sample.sample_id == "7"
    assert sample.words == []
    picture = sample.image
    assert picture is not None
    true = [gray(code) for code in TRUE_CODES]
    assert (pixels(picture.original) == patches(true)).all()
    assert (pixels(picture.masked) == patches([true[0], 128, 128, true[3]])).all()
    assert (pixels(picture.predicted) == patches([true[0], gray(7), gray(1), true[3]])).all()
    assert (pixels(picture.reconstructed) == patches(true)).all()
    assert (picture.num_right, picture.num_masked) == (1, 2)


@pytest.mark.parametrize("clip", [False, True], ids=["bpe", "clip"])
def test_words_are_the_text_with_the_answers_at_hidden_places(trained: TrainedRun, clip: bool) -> None:
    if clip:
        tokenizer = TextTokenizer(clip_tokenizer())
        task = PretrainTask(
            validate_config(ModelConfig, MODEL | {"vocab_size": tokenizer.num_tokens}),
            PretrainConfig(visual_codebook="x"),
            VisualCodebook(torch.zeros(NUM_CODES, 3 * PATCH**2), PATCH),
        ).eval()
        trained = TrainedRun(trained.config, task, tokenizer, WORLD)
    tokenizer = trained.tokenizer
    ids = tokenizer.encode("a small red square", 16)
    red, square = (tokenizer.encode(text, 16)[-2] for text in ("a red", "a square"))
    assert ids[-3:-1] == [red, square]
    targets = [-100] * len(ids) + [-100]
    targets[-4:-2] = [red, square]
    shown = [*ids, tokenizer.pad_id]
    shown[-4:-2] = [tokenizer.mask_id, square]  # the second is hidden too, but stands there, as one in ten does
    answers = [red] * len(shown)
    trained.task.mlm_head = Answers(answers, tokenizer.num_tokens)
    valid = torch.tensor([[True] * len(ids) + [False]])
    batch = Batch(
        ("x",),
        torch.tensor([0]),
        text_ids=torch.tensor([shown]),
        text_valid=valid,
        text_targets=torch.tensor([targets]),
    )
    (sample,) = predict_masked(trained, batch)
    assert sample.image is None
    assert "".join(word.text for word in sample.words).strip() == "a small red square"
    asked = [word for word in sample.words if word.predicted is not None]
    assert [(word.text.strip(), (word.predicted or "").strip(), word.is_right) for word in asked] == [
        ("red", "red", True),
        ("square", "red", False),
    ]


def test_pairs_have_both(trained: TrainedRun) -> None:
    ids = trained.tokenizer.encode("a red circle", 16)
    text = {"text_ids": torch.tensor([ids]), "text_valid": torch.ones(1, len(ids), dtype=torch.bool)}
    only_image = image_batch()
    trained.task.mim_head = Answers([0] * 4, NUM_CODES)
    trained.task.mlm_head = Answers([0] * len(ids), MODEL["vocab_size"])  # type: ignore[arg-type]
    batch = Batch(
        ("7",), only_image.seed, image=only_image.image, image_mask=only_image.image_mask,
        text_targets=torch.full((1, len(ids)), -100), **text,
    )  # fmt: skip
    (sample,) = predict_masked(trained, batch)
    assert sample.image is not None
    assert all(word.predicted is None for word in sample.words)
