"""A dense multiway encoder written token by token, with loops over heads, queries and keys.

It reads the weights of the real one by name and shares no code with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mhmoe_vl.models.encoder import MultiwayEncoder

#: May the query at this position of the joint sequence look at this key?
Allowed = Callable[[int, int], bool]


def everybody(query: int, key: int) -> bool:
    return True


class Reference:
    """Forward pass of one sample."""

    def __init__(self, encoder: MultiwayEncoder) -> None:
        self.config = encoder.config
        self.weights = {name: p.detach() for name, p in encoder.named_parameters()}

    def __call__(
        self,
        image: Tensor | None,
        text_ids: list[int] | None,
        allowed: Allowed = everybody,
        hidden_patches: set[int] = frozenset(),  # type: ignore[assignment]
    ) -> tuple[Tensor, Tensor]:
        """Final hidden states ``[Lv, D]`` and ``[Lt, D]``."""
        tokens = [("vision", x) for x in self._image_tokens(image, hidden_patches)] if image is not None else []
        if text_ids is not None:
            table, positions = self.weights["text_embedding.tokens.weight"], self.weights["text_embedding.positions"]
            tokens += [("text", table[index] + positions[0, place]) for place, index in enumerate(text_ids)]
        is_pair = image is not None and text_ids is not None
        for layer in range(self.config.depth):
            tokens = self._block(f"blocks.{layer}", layer, tokens, allowed, is_pair)
        if self.config.final_norm:
            tokens = [(m, self._norm(f"norm.{m}", x)) for m, x in tokens]
        empty = torch.empty(0, self.config.dim, dtype=torch.float64)
        by_modality = {m: [x for which, x in tokens if which == m] for m in ("vision", "text")}
        vision, text = (torch.stack(rows) if rows else empty for rows in by_modality.values())
        return vision, text

    def _image_tokens(self, image: Tensor, hidden_patches: set[int]) -> list[Tensor]:
        size, positions = self.config.patch_size, self.weights["vision_embedding.positions"][0]
        kernel = self.weights["vision_embedding.patches.weight"].flatten(1)
        tokens = [self.weights["vision_embedding.class_token"][0, 0] + positions[0]]
        for row in range(image.shape[1] // size):
            for column in range(image.shape[2] // size):
                number = len(tokens) - 1
                pixels = image[:, row * size : (row + 1) * size, column * size : (column + 1) * size].flatten()
                token = kernel @ pixels + self.weights["vision_embedding.patches.bias"]
                if number in hidden_patches:
                    token = self.weights["vision_embedding.mask_token"][0, 0]
                tokens.append(token + positions[number + 1])
        return tokens

    def _block(
        self, name: str, layer: int, tokens: list[tuple[str, Tensor]], allowed: Allowed, is_pair: bool
    ) -> list[tuple[str, Tensor]]:
        attended = self._attention(name, tokens, allowed)
        tokens = [(m, x + y) for (m, x), y in zip(tokens, attended, strict=True)]
        joint = is_pair and layer >= self.config.depth - self.config.vl_ffn_layers
        return [(m, x + self._feed_forward(name, m, "joint" if joint else m, x)) for m, x in tokens]

    def _attention(self, name: str, tokens: list[tuple[str, Tensor]], allowed: Allowed) -> list[Tensor]:
        def branch(modality: str) -> str:
            return "shared" if self.config.shared_attention else modality

        num_heads, width = self.config.num_heads, self.config.dim // self.config.num_heads
        projected = []
        for modality, x in tokens:
            normed = self._norm(f"{name}.attention_norm.{branch(modality)}", x)
            projected.append(self._linear(f"{name}.attention.qkv.{branch(modality)}", normed).view(3, num_heads, width))
        outputs = []
        for i, (modality, _) in enumerate(tokens):
            heads = []
            for head in range(num_heads):
                seen = [j for j in range(len(tokens)) if allowed(i, j)]
                scores = [float(projected[i][0, head] @ projected[j][1, head]) / math.sqrt(width) for j in seen]
                largest = max(scores)
                powers = [math.exp(score - largest) for score in scores]
                heads.append(sum(p / sum(powers) * projected[j][2, head] for p, j in zip(powers, seen, strict=True)))
            mixed = torch.cat(heads)  # type: ignore[arg-type]
            if self.config.sub_ln:
                mixed = self._norm(f"{name}.attention.norm.{branch(modality)}", mixed)
            outputs.append(self._linear(f"{name}.attention.out.{branch(modality)}", mixed))
        return outputs

    def _feed_forward(self, name: str, modality: str, pool: str, x: Tensor) -> Tensor:
        hidden = self._linear(f"{name}.ffn.pools.{pool}.w1", self._norm(f"{name}.ffn_norm.{modality}", x))
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
        if self.config.sub_ln:
            hidden = self._norm(f"{name}.ffn.pools.{pool}.norm", hidden)
        return self._linear(f"{name}.ffn.pools.{pool}.w2", hidden)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return self.weights[f"{name}.weight"] @ x + self.weights[f"{name}.bias"]

    def _norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean()
        scaled = centred / torch.sqrt(centred.square().mean() + 1e-5)
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]
