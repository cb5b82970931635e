"""The learned tokenizer as a file and as a function of images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from mhmoe_vl.errors import DataError
from mhmoe_vl.models.frozen import Frozen
from mhmoe_vl.models.visual_codebook import VisualCodebook
from mhmoe_vl.models.visual_tokenizer import (
    FORMAT,
    VisualTokenizer,
    build_visual_tokenizer,
    load_visual_tokenizer,
)
from tests.unit.models.builders import make_visual_tokenizer


def images(size: int = 16) -> Tensor:
    return torch.randint(0, 256, (3, 3, size, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def written(tokenizer: VisualTokenizer, folder: Path) -> Path:
    path = folder / "tokenizer.safetensors"
    path.write_bytes(tokenizer.serialized())
    return path


def test_codes_are_nearest_to_centred_vectors() -> None:
    tokenizer = make_visual_tokenizer()
    found = tokenizer.encode(images())
    assert found.dtype == torch.int64
    hidden = tokenizer.encoder(images()).vision[:, 1:]
    raw = tokenizer.code_head.layers(hidden) - tokenizer.code_head.center_C
    cosine = F.cosine_similarity(raw[:, :, None], tokenizer.codes_KC, dim=-1)
    assert torch.equal(found, cosine.argmax(-1))
    assert len(found.unique()) > 3


@pytest.mark.parametrize("ffn", ["dense", "mhmoe"])
def test_writing_and_loading(tmp_path: Path, ffn: str) -> None:
    """Also under autocast, at another size, and without touching the random numbers of whoever loads it."""
    tokenizer = make_visual_tokenizer(ffn)
    path = written(tokenizer, tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    loaded = load_visual_tokenizer(path)
    assert torch.equal(torch.rand(()), expected)
    assert isinstance(loaded, VisualTokenizer)
    for size in (16, 24):
        assert torch.equal(loaded.encode(images(size)), tokenizer.encode(images(size)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loaded.encode(images()), tokenizer.encode(images()))
    assert (loaded.num_codes, loaded.patch_size, loaded.origin) == (7, 4, {"teacher": "x"})
    assert loaded.serialized() == tokenizer.serialized()
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training
    # As a run that is only looked at does it.
    with torch.device("meta"):
        loaded = load_visual_tokenizer(path)
    assert torch.equal(loaded.encode(images()), tokenizer.encode(images()))


def test_pictures_are_the_mean_patches_of_codes() -> None:
    tokenizer = make_visual_tokenizer()
    codes = torch.randint(0, 7, (2, 6), generator=torch.Generator().manual_seed(2))
    expected = VisualCodebook(tokenizer.mean_patches_KM, 4).decode(codes, (2, 3))
    assert_close(tokenizer.decode(codes, (2, 3)), expected)


def test_a_codebook_of_patches_is_a_visual_tokenizer_too(tmp_path: Path) -> None:
    codebook = VisualCodebook(torch.rand(5, 48), 4)
    (tmp_path / "x.safetensors").write_bytes(codebook.serialized())
    loaded = load_visual_tokenizer(tmp_path / "x.safetensors")
    assert isinstance(loaded, VisualCodebook)
    assert torch.equal(loaded.encode(images()), codebook.encode(images()))


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.safetensors"
    with pytest.raises(
        DataError, match=r"no such visual tokenizer; make one with python -m data_prep.fit_visual_codeb"
    ):
        load_visual_tokenizer(path)
    path.write_bytes(b"\x80\x04nonsense, and longer than a header")
    with pytest.raises(DataError, match="not readable as safetensors"):
        load_visual_tokenizer(path)
    save_file({"codes": torch.zeros(1)}, path, metadata={"format": "something/1"})
    with pytest.raises(DataError, match=f"is not a visual tokenizer .{FORMAT} or mhmoe_vl/visual-codebook/1."):
        load_visual_tokenizer(path)
    written(make_visual_tokenizer(), tmp_path)
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    config = json.loads(metadata["config"])
    for damaged, of_tensors in (
        ({"format": FORMAT}, tensors),
        (metadata | {"config": "{"}, tensors),
        (metadata | {"config": json.dumps(config | {"model": config["model"] | {"dim": 17}})}, tensors),
        (metadata | {"config": json.dumps(config | {"model": config["model"] | {"depth": 1}})}, tensors),
        (metadata, {name: tensor for name, tensor in tensors.items() if name != "code_head.center_C"}),
        (metadata, {name: tensor for name, tensor in tensors.items() if name != "mean_patches_KM"}),
    ):
        save_file(of_tensors, path, metadata=damaged)
        with pytest.raises(DataError, match=r"damaged \(.*\); export the tokenizer again"):
            load_visual_tokenizer(path)


def test_building_makes_no_copies() -> None:
    tokenizer = make_visual_tokenizer()
    built = build_visual_tokenizer(tokenizer.encoder.config, tokenizer.state_dict(), {})
    assert built.codes_KC.data_ptr() == tokenizer.codes_KC.data_ptr()


def test_what_is_frozen_is_no_part() -> None:
    class Owner(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = torch.nn.Linear(1, 1)
            self.frozen = Frozen(make_visual_tokenizer().train())

    owner = Owner().train()
    inside = owner.frozen.on(torch.device("cpu"))
    assert set(owner.state_dict()) == {"own.weight", "own.bias"}
    assert not inside.training
    assert not any(parameter.requires_grad for parameter in inside.parameters())
    assert owner.frozen.on(torch.device("meta")) is inside
    assert {tensor.device.type for tensor in inside.state_dict().values()} == {"meta"}
