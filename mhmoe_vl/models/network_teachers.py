"""Teachers that other people have trained: any vision transformer or convolutional network of timm, any vision tower of
open_clip. Weights are safetensors only; a pickle is never opened.

Shape suffixes: B images, P patches, F features, H height, W width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from mhmoe_vl.errors import ConfigError, DataError, suggest
from mhmoe_vl.models.teachers import Teacher

#: ``teacher_weights`` of a network that is wanted as its library initialises it.
RANDOM = "random"


class NetworkTeacher(Teacher):
    """A network whose grid of features is as fine as the tokenizer's grid of patches.

    Args:
        network: made for images of ``image_size`` pixels.
        features: from normalised images to ``[B, P, F]``, row by row.
        mean, std: of the network's pixels in [0, 1].
        grid: patches per side.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        features: Callable[[nn.Module, Tensor], Tensor],
        *,
        image_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        grid: int,
        name: str,
    ) -> None:
        super().__init__()
        self.network, self.features, self.image_size = network.eval(), features, image_size
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        with torch.no_grad():
            found = self(torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8))
        if found.shape[1] != grid**2:
            raise ConfigError(
                f"task.teacher: {name} has {found.shape[1]} features of an image of {image_size} px, and the tokenizer "
                f"{grid} x {grid} patches; choose another teacher, or another model.image_size or model.patch_size"
            )
        self.num_features = found.shape[2]

    def forward(self, image: Tensor) -> Tensor:
        x_B3HW = image.float() / 255
        if x_B3HW.shape[-2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            x_B3HW = F.interpolate(x_B3HW, size, mode="bicubic", antialias=True).clamp(0, 1)
        return self.features(self.network, (x_B3HW - self.mean) / self.std)


def timm_teacher(model: str, weights: str | None, *, grid: int) -> NetworkTeacher:
    """What :func:`mhmoe_vl.models.teachers.build_teacher` does for ``timm:<model>``."""
    import timm

    name = f"timm:{model}"
    if not timm.is_model(model):
        raise ConfigError(f"task.teacher: timm has no model '{model}'{suggest(model, timm.list_models())}")
    network = timm.create_model(model, pretrained=False, num_classes=0)
    if weights != RANDOM:
        cfg = network.pretrained_cfg
        path = _local_file(name, weights) if weights is not None else _from_hub(name, _timm_place(name, cfg))
        _load(name, network, path)
    image_size = _resize_timm(name, network, grid)
    data = timm.data.resolve_model_data_config(network)
    return NetworkTeacher(
        network, _timm_features, image_size=image_size, mean=data["mean"], std=data["std"], grid=grid, name=name
    )


def open_clip_teacher(model: str, weights: str | None, *, grid: int) -> NetworkTeacher:
    """What :func:`mhmoe_vl.models.teachers.build_teacher` does for ``open_clip:<model>``: patch tokens after the
    tower's own projection, as BEiT v2 takes them from CLIP."""
    import open_clip
    from open_clip.transformer import VisionTransformer

    name = f"open_clip:{model}"
    tower = open_clip.get_model_config(model)
    if tower is None:
        raise ConfigError(f"task.teacher: open_clip has no model '{model}'{suggest(model, open_clip.list_models())}")
    path: Path | None = None
    options: dict[str, Any] = {}
    if weights != RANDOM:
        path, options = _open_clip_file(name, model, weights)
    patch_size = tower["vision_cfg"].get("patch_size")
    if "timm_model_name" not in tower["vision_cfg"] and isinstance(patch_size, int):
        options["force_image_size"] = grid * patch_size
    with _without_advice():
        whole = open_clip.create_model(model, pretrained_image=False, pretrained_text=False, **options)
        if path is not None:
            try:
                # Resizes positions too.
                open_clip.load_checkpoint(whole, str(path), strict=True)
            except (OSError, SafetensorError, RuntimeError, KeyError) as error:
                raise _unfit(name, path, error) from None
    visual = whole.visual
    mean, std = visual.preprocess_cfg["mean"], visual.preprocess_cfg["std"]
    if isinstance(visual, VisionTransformer) and visual.attn_pool is None:
        visual.output_tokens = True
        return NetworkTeacher(
            visual, _clip_features, image_size=visual.image_size[0], mean=mean, std=std, grid=grid, name=name
        )
    if not hasattr(visual, "trunk"):
        raise ConfigError(f"task.teacher: the vision tower of {name} has no tokens per patch; choose a ViT")
    image_size = _resize_timm(name, visual.trunk, grid)
    return NetworkTeacher(visual.trunk, _timm_features, image_size=image_size, mean=mean, std=std, grid=grid, name=name)


def _clip_features(visual: nn.Module, x_B3HW: Tensor) -> Tensor:
    _, tokens_BPD = visual(x_B3HW)
    if visual.final_ln_after_pool:
        tokens_BPD = visual.ln_post(tokens_BPD)  # type: ignore[operator]
    return tokens_BPD if visual.proj is None else tokens_BPD @ visual.proj


def _timm_features(network: nn.Module, x_B3HW: Tensor) -> Tensor:
    found = network.forward_features(x_B3HW)  # type: ignore[operator]
    if found.ndim == 3:
        return found[:, getattr(network, "num_prefix_tokens", 0) :]
    # Convolutional networks have channels first, Swin transformers last.
    return found.flatten(2).transpose(1, 2) if found.shape[1] == network.num_features else found.flatten(1, 2)


def _resize_timm(name: str, network: nn.Module, grid: int) -> int:
    """Make a network of timm ready for images of ``grid`` patches per side; returns their size."""
    embedding: Any = getattr(network, "patch_embed", None)
    if embedding is not None and hasattr(network, "set_input_size") and hasattr(network, "num_prefix_tokens"):
        image_size = grid * embedding.patch_size[0]
        if embedding.img_size != (image_size, image_size):
            network.set_input_size(img_size=image_size)  # type: ignore[operator]
        return image_size
    info: Any = getattr(network, "feature_info", None)
    if not info:
        raise ConfigError(f"task.teacher: {name} does not say how large its patches are; choose another model")
    return grid * info[-1]["reduction"]


def _timm_place(name: str, cfg: dict[str, Any]) -> tuple[str, str]:
    """Repository and file of the pretrained weights."""
    repository, file = cfg.get("hf_hub_id"), cfg.get("hf_hub_filename")
    if not repository:
        raise DataError(
            f"task.teacher: {name} names no pretrained weights on the hub; add a tag to the model's name, or set "
            f"task.teacher_weights to a safetensors file, or to '{RANDOM}'"
        )
    # A repository of CLIP holds the same weights twice.
    return repository, "model.safetensors" if file is None else "open_clip_model.safetensors"


def _open_clip_file(name: str, model: str, weights: str | None) -> tuple[Path, dict[str, Any]]:
    """Where the weights are, and how the model must be built for them."""
    from open_clip import pretrained

    tags = pretrained.list_pretrained_tags_by_model(model)
    if weights is not None and weights not in tags:
        try:
            return _local_file(name, weights), {}
        except DataError as error:
            known = f"; pretrained tags of {model}: {', '.join(tags)}" if tags else ""
            raise DataError(f"{error}{known}") from None
    if not tags:
        raise DataError(
            f"task.teacher: open_clip knows no pretrained weights of {model}; set task.teacher_weights to a "
            f"safetensors file, or to '{RANDOM}'"
        )
    tag = weights or tags[0]
    cfg = pretrained.get_pretrained_cfg(model, tag)
    place = cfg.get("hf_hub", "")
    repository, _, file = place.rpartition("/")
    if not repository or (file and not file.endswith(".safetensors")):
        raise DataError(
            f"task.teacher_weights: tag '{tag}' of {model} is published as a pickle, which is never opened; choose "
            "another tag, or convert it to a safetensors file and name that"
        )
    path = _from_hub(f"{name} ({tag})", (repository, file or "open_clip_model.safetensors"))
    return path, {"force_quick_gelu": bool(cfg.get("quick_gelu", False))}


def _local_file(name: str, weights: str) -> Path:
    path = Path(weights)
    if path.suffix != ".safetensors":
        raise DataError(
            f"task.teacher_weights: '{weights}' for {name} is no safetensors file (pickles such as .pt and .bin are "
            f"never opened); convert it, or use '{RANDOM}', or null for weights from the hub"
        )
    if not path.is_file():
        raise DataError(f"task.teacher_weights: {path}: no such file; use '{RANDOM}', or null for weights from the hub")
    return path


def _from_hub(name: str, place: tuple[str, str]) -> Path:
    """The file from the hub's cache, or else from the network."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    repository, file = place
    try:
        return Path(hf_hub_download(repository, file))
    except (OSError, ValueError, RuntimeError, HfHubHTTPError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(
            f"task.teacher: no weights of {name}: {file} of {repository} is not in the hub's cache and cannot be "
            f"downloaded ({type(error).__name__}: {reason}); set task.teacher_weights to a safetensors file, or to "
            f"'{RANDOM}', or choose the teacher hog"
        ) from None


def _load(name: str, network: nn.Module, path: Path) -> None:
    try:
        missing = network.load_state_dict(load_file(path), strict=False).missing_keys
    except (OSError, SafetensorError, RuntimeError) as error:
        raise _unfit(name, path, error) from None
    if missing:
        raise DataError(f"{path}: has no weights for {len(missing)} tensors of {name}, among them {missing[0]}")


def _unfit(name: str, path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: are no weights of {name}: {' '.join(str(error).split())[:200]}")


@contextmanager
def _without_advice() -> Iterator[None]:
    """Open_clip warns, on the root logger, that a model without weights is random; here that is somebody's wish."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
