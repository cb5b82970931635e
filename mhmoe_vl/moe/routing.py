"""Routers: which experts a row goes to, and with what weight.

Shape suffixes: N rows (tokens, or sub-tokens under MH-MoE), D row width, E experts, K choices per row,
R router width of the cosine router, T tokens, H heads.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mhmoe_vl.moe.choice import is_faster_for, softmax_choice
from mhmoe_vl.moe.local import local_part
from mhmoe_vl.moe.scores import router_scores

ROUTERS = ("linear", "cosine")


class Routing(NamedTuple):
    """What one MoE layer decided for its rows. Row ``n * num_heads + j`` is head ``j`` of token ``n``.

    Attributes:
        logits_NE: router scores before the gate, float32 (or float64); of the experts that the row may choose from,
            which are those of its own pool if there are several.
        balance_probs_NE: softmax over experts that the balance loss uses. For the cosine router it is taken at the
            fixed initial temperature (X-MoE, arXiv 2204.09179, section 3.2), so the loss cannot be lowered by
            making the gate flat.
        weights_NK: combine weight of each choice, best choice first; differentiable.
        experts_NK: chosen experts, int64, best choice first.
        valid_N: False for padding rows, which were not routed; None if every row is valid.
        kept_NK: False where a capacity dispatcher dropped the choice; None if nothing can be dropped.
        num_heads: sub-tokens per token.
        num_pools: row n is routed among the experts of pool ``n % num_pools``; ``experts_NK`` numbers the experts of
            all pools, one pool after the other.
    """

    logits_NE: Tensor
    balance_probs_NE: Tensor
    weights_NK: Tensor
    experts_NK: Tensor
    valid_N: Tensor | None = None
    kept_NK: Tensor | None = None
    num_heads: int = 1
    num_pools: int = 1

    def replace(self, **changes: Tensor | int | None) -> Routing:
        """A copy with some fields changed. Unlike ``_replace``, torch 2.11 can compile what returns it."""
        return Routing(*(changes.get(name, value) for name, value in zip(self._fields, self, strict=True)))  # type: ignore[arg-type]

    @property
    def num_experts(self) -> int:
        return self.logits_NE.shape[-1] * self.num_pools

    @property
    def top_k(self) -> int:
        return self.experts_NK.shape[-1]


def router_dtype(x: Tensor) -> torch.dtype:
    """At least float32: in bfloat16, ties and rounding send about one row in two hundred to another expert."""
    return torch.promote_types(x.dtype, torch.float32)


def choose_top_k(scores_NE: Tensor, top_k: int, logits_NE: Tensor | None = None) -> Tensor:
    """Indices ``[N, K]`` of the ``top_k`` largest scores, best first.

    Ties go to the larger of the logits, if they are given, and then to the lowest index.

    Repeated argmax instead of ``torch.topk``: its ties are defined, and on CPU it is several times faster for the
    small K used here.
    """
    if top_k == 1:
        return _best(scores_NE, logits_NE)
    remaining_NE = scores_NE.detach().clone()
    choices = []
    for _ in range(top_k):
        choice_N1 = _best(remaining_NE, logits_NE)
        choices.append(choice_N1)
        remaining_NE.scatter_(-1, choice_N1, -math.inf)
    return torch.cat(choices, dim=-1)


def _best(scores_NE: Tensor, logits_NE: Tensor | None) -> Tensor:
    if logits_NE is not None:
        is_best_NE = scores_NE == scores_NE.amax(dim=-1, keepdim=True)
        scores_NE = logits_NE.detach().masked_fill(~is_best_NE, -math.inf)
    return scores_NE.argmax(dim=-1, keepdim=True)


def _no_autocast(x: Tensor) -> AbstractContextManager[object]:
    # The meta device knows no autocast, not even to be switched off.
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


class _Router(nn.Module):
    """Shared second half of every router: gate, selection and combine weights."""

    selection_bias_E: Tensor

    def __init__(self, num_experts: int, top_k: int, *, gate: str, renormalize: bool) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k} must lie between 1 and num_experts={num_experts}")
        if gate not in ("softmax", "sigmoid"):
            raise ValueError(f"gate={gate!r} must be 'softmax' or 'sigmoid'")
        self.num_experts = num_experts
        self.top_k = top_k
        self.gate = gate
        self.renormalize = renormalize
        # Added to the scores for selection only ("loss-free" balancing, arXiv 2408.15664); zero unless updated.
        self.register_buffer("selection_bias_E", torch.zeros(num_experts))

    def select(self, logits_NE: Tensor, balance_logits_NE: Tensor, bias_E: Tensor) -> Routing:
        probs_NE, weights_NK, experts_NK = self._choose(logits_NE, bias_E)
        if self.renormalize:
            # Sigmoid gates can all be tiny: the floor is against 0/0 only.
            weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True).clamp_min(1e-20)
        if self.gate == "softmax" and balance_logits_NE is logits_NE:
            balance_probs_NE = probs_NE
        else:
            balance_probs_NE = balance_logits_NE.softmax(-1)
        return Routing(logits_NE, balance_probs_NE, weights_NK, experts_NK)

    def _choose(self, logits_NE: Tensor, bias_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gates of all experts, and of those that are chosen, and the choice."""
        if self.gate == "softmax" and is_faster_for(logits_NE):
            *rows, num_experts = logits_NE.shape
            bias_HE = bias_E.reshape(-1, num_experts)
            chosen = softmax_choice(logits_NE.reshape(-1, num_experts), bias_HE, self.top_k)
            probs_NE, weights_NK, experts_NK = (part.view(*rows, part.shape[-1]) for part in chosen)
            return probs_NE, weights_NK, experts_NK
        probs_NE = logits_NE.softmax(-1) if self.gate == "softmax" else logits_NE.sigmoid()
        scores_NE = probs_NE + bias_E.to(probs_NE.dtype)
        # Sigmoid gates saturate: several experts of a row then have a gate of exactly 1.
        experts_NK = choose_top_k(scores_NE, self.top_k, logits_NE if self.gate == "sigmoid" else None)
        return probs_NE, probs_NE.gather(-1, experts_NK), experts_NK

    @torch.no_grad()
    def update_selection_bias(self, load_E: Tensor, rate: float = 1e-3) -> None:
        """Move the selection bias towards equal load: ``b += rate * sign(mean(load) - load)``.

        Args:
            load_E: assignments per expert of the last step, summed over all ranks.
            rate: step size; 1e-3 in arXiv 2408.15664.
        """
        load_E = load_E.to(self.selection_bias_E)
        self.selection_bias_E += rate * torch.sign(load_E.mean() - load_E)


class LinearRouter(_Router):
    """Bias-free linear scores and a gate: ``softmax(x W)`` (GShard; MH-MoE, arXiv 2404.15045, equation 3)."""

    def __init__(
        self, dim: int, num_experts: int, top_k: int = 1, *, gate: str = "softmax", renormalize: bool = False
    ) -> None:
        super().__init__(num_experts, top_k, gate=gate, renormalize=renormalize)
        self.weight_DE = nn.Parameter(torch.empty(dim, num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight_DE, std=0.02)
        nn.init.zeros_(self.selection_bias_E)

    def forward(self, x_ND: Tensor) -> Routing:
        with _no_autocast(x_ND):
            dtype = router_dtype(x_ND)
            weight_DE = self.weight_DE.to(dtype)
            logits_NE = router_scores(x_ND, weight_DE) if x_ND.device.type == "cpu" else x_ND.to(dtype) @ weight_DE
            return self.select(logits_NE, logits_NE, self.selection_bias_E)


class PerHeadRouter(_Router):
    """A linear router for each head, over experts of its own (Multi-Head LatentMoE, arXiv 2602.04870).

    Args:
        num_experts: of all heads; each has ``num_experts / num_heads``, one head after the other.

    Attributes:
        first_head: rows come from this head on; not 0 where heads are spread over ranks.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        num_heads: int,
        top_k: int = 1,
        *,
        gate: str = "softmax",
        renormalize: bool = False,
    ) -> None:
        if num_experts % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide num_experts={num_experts}: each head has its own")
        if top_k > num_experts // num_heads:
            raise ValueError(f"top_k={top_k} must be at most the {num_experts // num_heads} experts of a head")
        super().__init__(num_experts, top_k, gate=gate, renormalize=renormalize)
        self.num_heads = num_heads
        self.first_head = 0
        self.weight_HDE = nn.Parameter(torch.empty(num_heads, dim, num_experts // num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight_HDE, std=0.02)
        nn.init.zeros_(self.selection_bias_E)

    def forward(self, x_ND: Tensor) -> Routing:
        """Route rows of heads that take turns."""
        with _no_autocast(x_ND):
            dtype = router_dtype(x_ND)
            weight_HDE = local_part(self.weight_HDE).to(dtype)
            x_THD = x_ND.to(dtype).view(-1, weight_HDE.shape[0], x_ND.shape[1])
            return self.choose(torch.einsum("thd,hde->the", x_THD, weight_HDE), self.first_head)

    def choose(self, logits_THE: Tensor, first_head: int = 0) -> Routing:
        """The routing that follows from scores ``[tokens, heads, experts of a head]``, one row per token and head."""
        _, num_heads, num_experts = logits_THE.shape
        bias_HE = self.selection_bias_E.view(self.num_heads, -1)[first_head : first_head + num_heads]
        routing = self.select(logits_THE, logits_THE, bias_HE)
        first_H1 = torch.arange(0, num_heads * num_experts, num_experts, device=logits_THE.device)[:, None]
        return Routing(
            logits_NE=routing.logits_NE.flatten(0, 1),
            balance_probs_NE=routing.balance_probs_NE.flatten(0, 1),
            weights_NK=routing.weights_NK.flatten(0, 1),
            experts_NK=(routing.experts_NK + first_H1).flatten(0, 1),
            num_pools=num_heads,
        )


class CosineRouter(_Router):
    """X-MoE's router (arXiv 2204.09179, equation 5): project, normalise both sides, learnable temperature.

    Args:
        router_dim: width of the shared space; E/2 in the paper.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 1,
        *,
        gate: str = "softmax",
        renormalize: bool = False,
        router_dim: int | None = None,
    ) -> None:
        super().__init__(num_experts, top_k, gate=gate, renormalize=renormalize)
        self.router_dim = router_dim or cosine_router_dim(num_experts)
        self.initial_temperature = 0.3 if gate == "softmax" else 0.07
        self.projection_DR = nn.Parameter(torch.empty(dim, self.router_dim))
        self.embedding_ER = nn.Parameter(torch.empty(num_experts, self.router_dim))
        # Learned as a logarithm, so that it stays positive. One element and not a scalar, which FSDP2 cannot shard.
        self.log_temperature = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.orthogonal_(self.projection_DR)
        nn.init.normal_(self.embedding_ER)
        nn.init.constant_(self.log_temperature, math.log(self.initial_temperature))
        nn.init.zeros_(self.selection_bias_E)

    def forward(self, x_ND: Tensor) -> Routing:
        with _no_autocast(x_ND):
            dtype = router_dtype(x_ND)
            rows_NR = nn.functional.normalize(x_ND.to(dtype) @ self.projection_DR.to(dtype), dim=-1, eps=1e-4)
            experts_ER = nn.functional.normalize(self.embedding_ER.to(dtype), dim=-1, eps=1e-4)
            cosine_NE = rows_NR @ experts_ER.T
            logits_NE = cosine_NE / self.log_temperature.to(dtype).exp()
            return self.select(logits_NE, cosine_NE / self.initial_temperature, self.selection_bias_E)


def cosine_router_dim(num_experts: int) -> int:
    """Router width of X-MoE, E/2, but never below 2: on a line, cosines are only -1 and 1."""
    return max(2, num_experts // 2)
