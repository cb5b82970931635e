"""The feed-forward half of a block: which network each token goes through.

Shape suffixes: B samples, L tokens, T tokens flattened, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mhmoe_vl.models.config import MODALITIES, ModelConfig
from mhmoe_vl.models.streams import Streams
from mhmoe_vl.moe import FeedForward, MoE, MultiHeadMoE, Routing
from mhmoe_vl.moe.cost import MULTI_HEAD_KINDS


class LayerRouting(NamedTuple):
    """Routing of one expert pool in one block.

    Attributes:
        layer: index of the block.
        pool: ``vision``, ``text``, ``shared`` (both modalities in one pool) or ``joint`` (the VL feed-forward).
        num_vision_tokens: how many of the pool's tokens, in front, are image tokens.
    """

    layer: int
    pool: str
    routing: Routing
    num_vision_tokens: int

    @property
    def name(self) -> str:
        return f"block{self.layer}/{self.pool}"

    def name_of(self, modality: str) -> str:
        """Name of what one modality does: ``block3/vision``, in a pool of both ``block3/shared/vision``."""
        return self.name if self.pool == modality else f"{self.name}/{modality}"

    def by_modality(self) -> dict[str, Routing]:
        """The same decisions by modality; a pool of both has both, even if one has no tokens here."""
        if self.pool in MODALITIES:
            return {self.pool: self.routing}
        cut = self.num_vision_tokens * self.routing.num_heads
        return {"vision": _rows(self.routing, slice(0, cut)), "text": _rows(self.routing, slice(cut, None))}


def pool_of(name: str) -> str:
    """The pool behind :meth:`LayerRouting.name_of`: ``block3/shared/vision`` -> ``block3/shared``."""
    return "/".join(name.split("/")[:2])


def _rows(routing: Routing, span: slice) -> Routing:
    return routing.replace(
        logits_NE=routing.logits_NE[span],
        balance_probs_NE=routing.balance_probs_NE[span],
        weights_NK=routing.weights_NK[span],
        experts_NK=routing.experts_NK[span],
        valid_N=None if routing.valid_N is None else routing.valid_N[span],
        kept_NK=None if routing.kept_NK is None else routing.kept_NK[span],
    )


def build_feed_forward(config: ModelConfig, *, sparse: bool) -> nn.Module:
    """One feed-forward network of the configured kind: called with ``(x, valid)``, gives ``(y, routing or None)``."""
    if not sparse:
        return FeedForward(config.dim, config.ffn_dim, glu=config.glu, sub_ln=config.sub_ln)
    shape, moe = config.ffn_shape, config.moe
    arguments = {
        "top_k": shape.top_k,
        "router": config.router,
        "gate": moe.gate,
        "renormalize": moe.renormalize,
        "inner_residual": moe.inner_residual,
        "capacity_factor": moe.capacity_factor,
        "glu": config.glu,
        "sub_ln": moe.sub_ln,
        "backend": moe.backend,
    }
    if config.ffn in MULTI_HEAD_KINDS:
        return MultiHeadMoE(
            config.dim,
            shape.ffn_dim,
            shape.num_experts,
            shape.num_heads,
            pools="per_head" if config.ffn == "mhmoe_head_parallel" else "shared",
            num_head_layers=moe.num_head_layers,
            num_merge_layers=moe.num_merge_layers,
            **arguments,  # type: ignore[arg-type]
        )
    return MoE(config.dim, shape.ffn_dim, shape.num_experts, **arguments)  # type: ignore[arg-type]


class MultiwayFeedForward(nn.Module):
    """A network per modality, or one shared pool; in the top blocks optionally a joint one for pairs (VL-FFN)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        sparse = config.is_sparse(layer)
        self.is_shared = sparse and config.moe.experts == "shared"
        pools: list[str] = ["shared"] if self.is_shared else list(config.modalities)
        if config.has_vl_ffn(layer):
            pools.append("joint")
        self.pools = nn.ModuleDict({pool: build_feed_forward(config, sparse=sparse) for pool in pools})

    def forward(
        self, streams: Streams, text_valid: Tensor | None, *, is_pair: bool
    ) -> tuple[Streams, list[LayerRouting]]:
        nothing = Streams(streams.vision[:, :0], streams.text[:, :0])
        nothing_valid = None if text_valid is None else text_valid[:, :0]
        routings: list[LayerRouting] = []
        if "joint" in self.pools:
            # Pairs go through the joint network, everything else through its modality's; the other side runs on
            # zero rows.
            joint, alone = (streams, nothing) if is_pair else (nothing, streams)
            valid, alone_valid = (text_valid, nothing_valid) if is_pair else (nothing_valid, text_valid)
            together = self._run_together("joint", joint, valid, routings)
            apart = self._run_by_modality(alone, alone_valid, routings)
            return Streams(*(torch.cat(pair, dim=1) for pair in zip(together, apart, strict=True))), routings
        return self._run_by_modality(streams, text_valid, routings), routings

    def _run_by_modality(self, streams: Streams, text_valid: Tensor | None, routings: list[LayerRouting]) -> Streams:
        if self.is_shared:
            return self._run_together("shared", streams, text_valid, routings)
        return Streams(
            self._run("vision", streams.vision, None, streams.vision.shape[:2].numel(), routings),
            self._run("text", streams.text, text_valid, 0, routings),
        )

    def _run_together(
        self, pool: str, streams: Streams, text_valid: Tensor | None, routings: list[LayerRouting]
    ) -> Streams:
        vision_TD, text_TD = streams.vision.flatten(0, 1), streams.text.flatten(0, 1)
        valid_T = None
        if text_valid is not None:
            valid_T = torch.cat([text_valid.new_ones(vision_TD.shape[0]), text_valid.flatten()])
        y_TD = self._run(pool, torch.cat([vision_TD, text_TD]), valid_T, vision_TD.shape[0], routings)
        return Streams(
            y_TD[: vision_TD.shape[0]].view_as(streams.vision), y_TD[vision_TD.shape[0] :].view_as(streams.text)
        )

    def _run(
        self, pool: str, x: Tensor, valid: Tensor | None, num_vision_tokens: int, routings: list[LayerRouting]
    ) -> Tensor:
        if pool not in self.pools:
            return x
        y, routing = self.pools[pool](x, valid)
        if routing is not None:
            routings.append(LayerRouting(self.layer, pool, routing, num_vision_tokens))
        return y
