"""The nearest-patch tokenizer against brute force, and its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mhmoe_vl.errors import DataError
from mhmoe_vl.models.visual_codebook import FORMAT, VisualCodebook, to_patches

PATCH = 2


def random_codes(num: int = 9) -> torch.Tensor:
    return torch.rand(num, 3 * PATCH**2, generator=torch.Generator().manual_seed(0)) * 2 - 1


def random_images(num: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (num, 3, height, width), generator=generator, dtype=torch.uint8)


def test_patches_come_row_by_row_and_channels_first() -> None:
    image = torch.arange(3 * 4 * 6).view(1, 3, 4, 6)
    patches = to_patches(image, PATCH)
    assert patches.shape == (1, 6, 12)
    for number, (row, column) in enumerate((r, c) for r in range(2) for c in range(3)):
        pixels = [
            image[0, channel, 2 * row + y, 2 * column + x].item()
            for channel in range(3)
            for y in range(2)
            for x in range(2)
        ]
        assert patches[0, number].tolist() == pixels


def test_encoding_finds_the_nearest_code() -> None:
    codes, images = random_codes(), random_images(3, 4, 6)
    found = VisualCodebook(codes, PATCH).encode(images)
    assert found.dtype == torch.int64
    for image, of_image in zip(images, found, strict=True):
        pixels = image.double() / 127.5 - 1
        for number, code in enumerate(of_image.tolist()):
            row, column = divmod(number, 3)
            patch = pixels[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten()
            distances = [float((patch - candidate).square().sum()) for candidate in codes.double()]
            assert distances[code] == pytest.approx(min(distances), abs=1e-5)
    assert len(found.unique()) > 3


def test_the_precision_of_a_run_changes_no_code() -> None:
    """In bfloat16 some of these patches would get another code."""
    codebook, images = VisualCodebook(random_codes(500), PATCH), random_images(3, 20, 30)
    expected = codebook.encode(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(codebook.encode(images), expected)


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that is made."""

    num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [tensor for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)]
        self.num_elements = max(self.num_elements, *(tensor.numel() for tensor in made), 0)
        return result


def test_distances_are_never_all_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    codebook, images = VisualCodebook(random_codes(500), PATCH), random_images(3, 20, 30)
    expected = codebook.encode(images)
    monkeypatch.setattr("mhmoe_vl.models.visual_codebook._MAX_DISTANCES", 7000)
    with LargestTensor() as largest:
        found = codebook.encode(images)
    assert torch.equal(found, expected)
    assert largest.num_elements == 7000


def test_an_image_made_of_codes_survives() -> None:
    pixel_codes = torch.randint(0, 256, (9, 12), generator=torch.Generator().manual_seed(2))
    codebook = VisualCodebook(pixel_codes / 127.5 - 1, PATCH)
    chosen = torch.randint(0, 9, (2, 6), generator=torch.Generator().manual_seed(3))
    image = codebook.decode(chosen, (2, 3))
    assert image.shape == (2, 3, 4, 6)
    as_bytes = ((image + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(codebook.encode(as_bytes), chosen)
    assert_close(codebook.decode(codebook.encode(as_bytes), (2, 3)), as_bytes.float() / 127.5 - 1)


def test_it_is_no_part_of_a_checkpoint() -> None:
    codebook = VisualCodebook(random_codes(), PATCH)
    assert codebook.state_dict() == {}
    assert list(codebook.parameters()) == []
    assert codebook.num_codes == 9


def test_saving_and_loading(tmp_path: Path) -> None:
    codebook = VisualCodebook(random_codes(), PATCH)
    (tmp_path / "codes.safetensors").write_bytes(codebook.serialized())
    loaded = VisualCodebook.load(tmp_path / "codes.safetensors")
    assert torch.equal(loaded.codes_KC, codebook.codes_KC)
    assert loaded.patch_size == PATCH
    # Whoever stores codes knows the file by its hash.
    assert {loaded.serialized() for _ in range(10)} == {codebook.serialized()}


def test_codes_that_do_not_fit_their_patches() -> None:
    with pytest.raises(ValueError, match=r"codes of shape \(9, 12\) do not fit patches of 3 px"):
        VisualCodebook(random_codes(), 3)


def test_files_that_are_no_codebook(tmp_path: Path) -> None:
    path = tmp_path / "codes.safetensors"
    with pytest.raises(DataError, match=r"no such visual codebook; make one with python -m data_prep.fit_visual_codeb"):
        VisualCodebook.load(path)
    path.write_bytes(b"nonsense, and longer than a header")
    with pytest.raises(DataError, match="not readable as safetensors"):
        VisualCodebook.load(path)
    for metadata in (None, {"format": "something/1"}):
        save_file({"codes": random_codes()}, path, metadata=metadata)
        with pytest.raises(DataError, match=f"is not a visual codebook .{FORMAT}."):
            VisualCodebook.load(path)
    for damaged in ({"format": FORMAT}, {"format": FORMAT, "config": "{"}, {"format": FORMAT, "config": "{}"}):
        save_file({"codes": random_codes()}, path, metadata=damaged)
        with pytest.raises(DataError, match="damaged header"):
            VisualCodebook.load(path)
