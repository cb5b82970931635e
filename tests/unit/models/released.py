"""Released BEiT-3 checkpoints as unilm/beit3 writes them: names and shapes by hand, fabricated tensors, and the forward
pass in a few lines of torch on the released names. Nothing here comes from the project.

Shape suffixes: B samples, L tokens, D width, H heads, C width of a head, V or T vision or text.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

BASE = {"dim": 768, "depth": 12, "ffn_dim": 3072}
LARGE = {"dim": 1024, "depth": 24, "ffn_dim": 4096}
#: Two attention heads of 64.
TINY = {"dim": 128, "depth": 2, "ffn_dim": 96, "image_size": 32, "vocab_size": 40, "max_positions": 14, "num_codes": 9}

#: Files of the release: task, whether the encoder ends with a norm, size of the images.
RELEASED = {
    "pretrain": (True, 224),
    "encoder": (True, 224),
    "vqa": (False, 480),
    "nlvr2": (True, 224),
    "captioning": (True, 480),
    "retrieval": (True, 384),
    "classification": (False, 224),
}


def released_shapes(
    kind: str,
    *,
    dim: int,
    depth: int,
    ffn_dim: int,
    image_size: int | None = None,
    patch_size: int = 16,
    vocab_size: int = 64010,
    max_positions: int = 1024,
    num_codes: int = 8192,
    num_answers: int = 3129,
    num_classes: int = 1000,
    branches: str = "AB",
) -> dict[str, tuple[int, ...]]:
    """Name to shape."""
    final_norm, released_size = RELEASED[kind]
    num_patches = ((image_size or released_size) // patch_size) ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "beit3.vision_embed.mask_token": (1, 1, dim),
        "beit3.vision_embed.cls_token": (1, 1, dim),
        "beit3.vision_embed.proj.weight": (dim, 3, patch_size, patch_size),
        "beit3.vision_embed.proj.bias": (dim,),
        "beit3.encoder.embed_positions.A.weight": (num_patches + 3, dim),
    }
    if "B" in branches:
        shapes["beit3.text_embed.weight"] = (vocab_size, dim)
        shapes["beit3.encoder.embed_positions.B.weight"] = (max_positions, dim)

    def add(name: str, *weight: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = weight
        if bias:
            shapes[f"{name}.bias"] = weight[:1]

    for branch in branches:
        for layer in (f"beit3.encoder.layers.{number}" for number in range(depth)):
            for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
                add(f"{layer}.self_attn.{projection}.{branch}", dim, dim)
            add(f"{layer}.self_attn.inner_attn_ln.{branch}", dim)
            add(f"{layer}.self_attn_layer_norm.{branch}", dim)
            add(f"{layer}.ffn.{branch}.fc1", ffn_dim, dim)
            add(f"{layer}.ffn.{branch}.fc2", dim, ffn_dim)
            add(f"{layer}.ffn.{branch}.ffn_layernorm", ffn_dim)
            add(f"{layer}.final_layer_norm.{branch}", dim)
        if final_norm:
            add(f"beit3.encoder.layer_norm.{branch}", dim)
    if kind in ("pretrain", "captioning"):
        add("mlm_head", vocab_size, dim)
    if kind == "pretrain":
        add("mim_head", num_codes, dim)
    elif kind == "vqa":
        add("pooler.norm", dim)
        add("pooler.dense", dim, dim)
        add("head.0", 2 * dim, dim)
        add("head.1", 2 * dim)
        add("head.3", num_answers, 2 * dim)
    elif kind == "nlvr2":
        add("head.norm1", 4 * dim)
        add("head.dense1", 2 * dim, 4 * dim)
        add("head.norm2", 2 * dim)
        add("head.dense2", 2, 2 * dim)
    elif kind == "retrieval":
        add("language_head", dim, dim, bias=False)
        add("vision_head", dim, dim, bias=False)
        shapes["logit_scale"] = ()
    elif kind == "classification":
        add("fc_norm", dim)
        add("head", num_classes, dim)
    return shapes


def fabricate(kind: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: Any) -> dict[str, Tensor]:
    """A tiny checkpoint of random numbers, in which nothing is zero or one. Sizes as in :func:`released_shapes`."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in released_shapes(kind, **(TINY | {"num_answers": 7, "num_classes": 5} | sizes)).items():
        noise = torch.randn(shape, generator=generator, dtype=dtype)
        is_norm_weight = ("norm" in name or "_ln" in name or name == "head.1.weight") and name.endswith("weight")
        tensors[name] = 1 + 0.3 * noise if is_norm_weight else noise * (0.5 if len(shape) < 2 else shape[-1] ** -0.5)
    return tensors


class Plain:
    """The forward pass of a released encoder of 64 values per attention head."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.depth = 1 + max(int(name.split(".")[3]) for name in tensors if name.startswith("beit3.encoder.layers."))

    def __call__(
        self,
        image: Tensor | None = None,
        text_ids: Tensor | None = None,
        *,
        padding: Tensor | None = None,
        masked_patches: Tensor | None = None,
        causal_text: bool = False,
    ) -> Tensor:
        """Hidden states ``[B, V + T, D]``; ``padding`` is True where there is no text."""
        vision = None if image is None else self.embed_image(image, masked_patches)
        text = None if text_ids is None else self.embed_text(text_ids)
        x_BLD = torch.cat([part for part in (vision, text) if part is not None], dim=1)
        num_vision = 0 if vision is None else vision.shape[1]
        hidden_BL = torch.zeros(x_BLD.shape[:2], dtype=torch.bool)
        if padding is not None:
            hidden_BL[:, num_vision:] = padding
        x_BLD = x_BLD.masked_fill(hidden_BL[..., None], 0)
        bias_B1LL = torch.zeros(x_BLD.shape[0], 1, x_BLD.shape[1], x_BLD.shape[1], dtype=x_BLD.dtype)
        bias_B1LL = bias_B1LL.masked_fill(hidden_BL[:, None, None], -math.inf)
        if causal_text:
            later_LL = torch.ones(x_BLD.shape[1], x_BLD.shape[1], dtype=torch.bool).triu(1)
            later_LL[:num_vision, :num_vision] = False
            bias_B1LL = bias_B1LL.masked_fill(later_LL, -math.inf)
        for layer in (f"beit3.encoder.layers.{number}" for number in range(self.depth)):
            normed = self.norm(f"{layer}.self_attn_layer_norm", x_BLD, num_vision)
            x_BLD = x_BLD + self.attend(f"{layer}.self_attn", normed, bias_B1LL, num_vision)
            normed = self.norm(f"{layer}.final_layer_norm", x_BLD, num_vision)
            x_BLD = x_BLD + self.per_branch(f"{layer}.ffn", normed, num_vision, self.feed_forward)
        if "beit3.encoder.layer_norm.A.weight" in self.tensors:
            x_BLD = self.norm("beit3.encoder.layer_norm", x_BLD, num_vision)
        return x_BLD

    def embed_image(self, image: Tensor, masked_patches: Tensor | None) -> Tensor:
        weight, bias = self.pair("beit3.vision_embed.proj")
        x = F.conv2d(image, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
        if masked_patches is not None:
            x = torch.where(masked_patches[..., None], self.tensors["beit3.vision_embed.mask_token"], x)
        x = torch.cat([self.tensors["beit3.vision_embed.cls_token"].expand(x.shape[0], 1, -1), x], dim=1)
        return x + self.tensors["beit3.encoder.embed_positions.A.weight"][2 : 2 + x.shape[1]]

    def embed_text(self, text_ids: Tensor) -> Tensor:
        x = self.tensors["beit3.text_embed.weight"][text_ids]
        return x + self.tensors["beit3.encoder.embed_positions.B.weight"][2 : 2 + x.shape[1]]

    def attend(self, name: str, x: Tensor, bias: Tensor, num_vision: int) -> Tensor:
        def heads(projection: str) -> Tensor:
            y = self.per_branch(f"{name}.{projection}", x, num_vision, self.linear)
            return y.unflatten(-1, (-1, 64)).transpose(1, 2)

        scores = heads("q_proj") @ heads("k_proj").transpose(-1, -2) / 8 + bias
        y = (scores.softmax(-1) @ heads("v_proj")).transpose(1, 2).flatten(2)
        y = self.norm(f"{name}.inner_attn_ln", y, num_vision)
        return self.per_branch(f"{name}.out_proj", y, num_vision, self.linear)

    def feed_forward(self, name: str, x: Tensor) -> Tensor:
        hidden = F.gelu(self.linear(f"{name}.fc1", x))
        return self.linear(f"{name}.fc2", self.layer_norm(f"{name}.ffn_layernorm", hidden))

    def norm(self, name: str, x: Tensor, num_vision: int) -> Tensor:
        return self.per_branch(name, x, num_vision, self.layer_norm)

    def per_branch(self, name: str, x: Tensor, num_vision: int, layer: Any) -> Tensor:
        """Branch A for image tokens, branch B for text tokens, each if there are any."""
        parts = [(f"{name}.A", x[:, :num_vision]), (f"{name}.B", x[:, num_vision:])]
        return torch.cat([layer(branch, part) for branch, part in parts if part.shape[1]], dim=1)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, *self.pair(name))

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.pair(name)
        return F.layer_norm(x, weight.shape, weight, bias)

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        return self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
