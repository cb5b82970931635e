"""What teachers say of patches, against hand-worked cases and plain loops; and networks of timm and open_clip."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from mhmoe_vl.errors import ConfigError, DataError
from mhmoe_vl.models.teachers import HogTeacher, PixelTeacher, RandomTeacher, build_teacher


def byte_image(size: int, *, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (2, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_hog_of_an_edge() -> None:
    """Black to white between columns 3 and 4 of the left cell: two columns of 8 pixels see half of 255 each, all of it
    horizontal, which is the first sector."""
    image = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    image[..., 4:] = 255
    (features,) = HogTeacher(16)(image)[0]
    expected = torch.zeros(2, 2, 27)
    expected[:, 0, [0, 9, 18]] = 2 * 8 * 127.5 / 64
    assert_close(features, torch.cat([expected.flatten(), torch.tensor([1.0])]))


@pytest.mark.parametrize(
    ("dx", "dy", "sector"), [(1, 1, 2), (-1, -1, 2), (-1, 1, 6), (1, -1, 6), (0, 1, 4), (-1, 0, 0)]
)
def test_hog_of_a_slope(dx: int, dy: int, sector: int) -> None:
    """A gradient of 45 degrees is in the third of nine sectors of 20 degrees, and its opposite too."""
    rows, columns = torch.meshgrid(torch.arange(24), torch.arange(24), indexing="ij")
    image = (128 + 2 * (dx * columns + dy * rows)).to(torch.uint8).expand(1, 3, -1, -1)
    features = HogTeacher(8)(image)[0, 4]  # the patch in the middle, without borders
    expected = torch.zeros(3, 9)
    expected[:, sector] = 2 * math.hypot(dx, dy)
    assert_close(features, torch.cat([expected.flatten(), torch.tensor([1.0])]))


def hog_by_loops(image: Tensor, patch: int, cell: int) -> Tensor:
    """Of one image ``[3, H, W]``; what lies outside is like the border."""
    size = image.shape[-1]
    rows = []
    for top in range(0, size, patch):
        for left in range(0, size, patch):
            row = []
            for y0 in range(top, top + patch, cell):
                for x0 in range(left, left + patch, cell):
                    for channel in image.double().tolist():
                        votes = [0.0] * 9
                        for y in range(y0, y0 + cell):
                            for x in range(x0, x0 + cell):
                                dx = (channel[y][min(x + 1, size - 1)] - channel[y][max(x - 1, 0)]) / 2
                                dy = (channel[min(y + 1, size - 1)][x] - channel[max(y - 1, 0)][x]) / 2
                                degrees = math.degrees(math.atan2(dy, dx)) % 180
                                votes[min(int(degrees // 20), 8)] += math.hypot(dx, dy)
                        row += [vote / cell**2 for vote in votes]
            rows.append([*row, 1.0])
    return torch.tensor(rows)


@pytest.mark.parametrize(("patch", "cell"), [(16, 8), (8, 8), (4, 4)])
def test_hog_against_loops(patch: int, cell: int) -> None:
    image = byte_image(16)
    teacher = HogTeacher(patch)
    found = teacher(image)
    assert found.shape == (2, (16 // patch) ** 2, teacher.num_features)
    for of_image, pixels in zip(found, image, strict=True):
        assert_close(of_image, hog_by_loops(pixels, patch, cell), atol=1e-3, rtol=1e-4)


def test_pixels() -> None:
    image = byte_image(4)
    found = PixelTeacher(2)(image)
    assert found.shape == (2, 4, 13)
    assert_close(found[1, 2, :12], (image[1, :, 2:, :2] / 127.5 - 1).flatten())
    assert_close(found[..., 12], torch.full((2, 4), 0.1 * math.sqrt(12)))


def test_the_random_teacher_is_always_the_same() -> None:
    torch.manual_seed(1)
    first = build_teacher("random", None, image_size=32, patch_size=8)
    following = torch.rand(())
    torch.manual_seed(1)
    assert torch.equal(torch.rand(()), following), "the global generator has moved"
    second = RandomTeacher(32, 8)
    features = first(byte_image(32))
    assert torch.equal(features, second(byte_image(32)))
    assert features.shape == (2, 16, first.num_features)
    assert features.std(1).mean() > 0.1


def test_a_transformer_of_timm(tmp_path: Path) -> None:
    """On images of its own patches: 4 x 4 of 16 pixels, for 4 x 4 patches of 8."""
    import timm

    teacher = build_teacher("timm:test_vit", "random", image_size=32, patch_size=8)
    network = timm.create_model("test_vit", num_classes=0, img_size=64).eval()
    weights = {name: torch.rand_like(tensor) / 10 for name, tensor in network.state_dict().items()}
    network.load_state_dict(weights)
    # At the size that the model has by itself: positions are resized on the way.
    own = timm.create_model("test_vit", num_classes=0)
    own.load_state_dict(weights | {"pos_embed": own.pos_embed})
    save_file(own.state_dict(), tmp_path / "x.safetensors")
    own.set_input_size(img_size=64)
    loaded = build_teacher("timm:test_vit", str(tmp_path / "x.safetensors"), image_size=32, patch_size=8)
    image = byte_image(64)
    mean, std = (torch.tensor(network.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        expected = own.eval().forward_features((image / 255 - mean) / std)[:, 1:]
        assert_close(loaded(image), expected)
        assert loaded(byte_image(32)).shape == teacher(byte_image(32)).shape == expected.shape
        assert (teacher(image) - expected).abs().max() > 0.1
    assert teacher.num_features == expected.shape[-1]


def test_a_convolutional_network_of_timm() -> None:
    teacher = build_teacher("timm:test_resnet", "random", image_size=32, patch_size=16)
    with torch.no_grad():
        assert teacher(byte_image(32)).shape == (2, 4, teacher.num_features)


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that open_clip can make in no time."""
    import open_clip

    sizes = {"width": 32, "layers": 1, "heads": 2}
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 50, **sizes},
    }
    path = tmp_path_factory.mktemp("clip") / "tiny-clip.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    return "tiny-clip"


def test_a_tower_of_open_clip(tiny_clip: str, tmp_path: Path) -> None:
    """Patch tokens after the norm and the projection that its class token goes through."""
    import open_clip

    whole = open_clip.create_model(tiny_clip, pretrained_text=False)
    weights = {name: torch.rand_like(tensor.float()) / 10 for name, tensor in whole.state_dict().items()}
    save_file(weights, tmp_path / "clip.safetensors")
    whole.load_state_dict(weights)
    teacher = build_teacher(f"open_clip:{tiny_clip}", str(tmp_path / "clip.safetensors"), image_size=64, patch_size=16)
    image = byte_image(32)
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    with torch.no_grad():
        x = (image / 255 - mean) / std
        hidden = whole.visual.ln_post(whole.visual.transformer(whole.visual._embeds(x)))
        assert_close(hidden[:, 0] @ whole.visual.proj, whole.visual(x))
        assert_close(teacher(image), hidden[:, 1:] @ whole.visual.proj)
    assert teacher.num_features == 24


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("hogs", None, r"'hogs' is no teacher \(did you mean 'hog'\?\); there are hog, pixels, random, timm:<model>"),
        ("timm:", None, "'timm:' is no teacher"),
        ("hog", "x.safetensors", "teacher 'hog' has none; leave 'x.safetensors' out"),
        ("timm:test_vitt", "random", r"timm has no model 'test_vitt' \(did you mean 'test_vit"),
        ("timm:test_vit", "x.pt", r"'x.pt' for timm:test_vit is no safetensors file \(pickles .* never opened\); conv"),
        ("timm:test_vit", "x.safetensors", "x.safetensors: no such file; use 'random', or null"),
        ("open_clip:ViT-B-322", "random", r"open_clip has no model 'ViT-B-322' \(did you mean 'ViT-B-32"),
        ("open_clip:RN50", "yfcc15m.pt", "no safetensors file .*; pretrained tags of RN50: openai, yfcc15m"),
    ],
)
def test_teachers_that_cannot_be(name: str, weights: str | None, message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        build_teacher(name, weights, image_size=32, patch_size=8)


def test_weights_of_another_model(tmp_path: Path, tiny_clip: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"something": torch.zeros(1)}, path)
    with pytest.raises(DataError, match=r"x.safetensors: has no weights for \d+ tensors of timm:test_vit, among them"):
        build_teacher("timm:test_vit", str(path), image_size=32, patch_size=8)
    with pytest.raises(DataError, match=r"x.safetensors: are no weights of open_clip:tiny-clip: "):
        build_teacher(f"open_clip:{tiny_clip}", str(path), image_size=32, patch_size=8)
    path.write_bytes(b"\x80\x04nonsense")
    with pytest.raises(DataError, match=r"x.safetensors: are no weights of timm:test_vit"):
        build_teacher("timm:test_vit", str(path), image_size=32, patch_size=8)


def test_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def offline(*place: str) -> str:
        asked.append(place)
        raise LocalEntryNotFoundError("no connection\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    for name, weights in (("timm:test_vit.r160_in1k", None), ("open_clip:ViT-B-32", "laion2b_s34b_b79k")):
        with pytest.raises(
            DataError, match=r"not in the hub's cache and cannot be downloaded .*or choose the teacher hog$"
        ):
            build_teacher(name, weights, image_size=32, patch_size=8)
    assert asked[0] == ("timm/test_vit.r160_in1k", "model.safetensors")
    assert asked[1][1].endswith(".safetensors")
