"""Brute-force MoE written from the papers: plain loops over tokens, heads and choices.

It shares nothing with ``mhmoe_vl.moe`` but the names of the parameters. Autograd differentiates the loops, so the
gradients are independent of every gather, sort and fused kernel in the library.

MH-MoE: arXiv 2404.15045, equations 1-7 and 10. Cosine router: X-MoE, arXiv 2204.09179, equation 5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Decision:
    """What the reference decided for one row."""

    scores: list[Tensor]
    balance_probs: list[Tensor]
    experts: list[int]
    weights: list[Tensor]


@dataclass(frozen=True)
class Reference:
    """One layer. ``params`` are the named parameters of the library's layer, detached or not."""

    params: dict[str, Tensor]
    num_experts: int
    top_k: int
    num_heads: int | None = None
    router: str = "linear"
    gate: str = "softmax"
    renormalize: bool = False
    inner_residual: bool = False
    glu: bool = False
    selection_bias: Sequence[float] = field(default=())

    def forward(
        self, tokens: Tensor, valid: Sequence[bool] | None = None, *, dropped: Sequence[tuple[int, int]] = ()
    ) -> tuple[Tensor, list[Decision | None]]:
        """Outputs ``[T, dim]`` and one decision per (sub-)token, None for padding.

        Args:
            dropped: ``(row, choice)`` pairs that some capacity limit refused.
        """
        outputs, decisions = [], []
        for t in range(tokens.shape[0]):
            if valid is not None and not valid[t]:
                outputs.append(torch.zeros_like(tokens[t]))
                decisions += [None] * (self.num_heads or 1)
                continue
            token = tokens[t]
            if self.num_heads is not None:
                token = self._affine(token, "head")
            width = token.shape[0] // (self.num_heads or 1)
            parts = []
            for j in range(self.num_heads or 1):
                row = token[j * width : (j + 1) * width]
                decision = self.route(row)
                mixed = row if self.inner_residual else torch.zeros_like(row)
                for c in range(self.top_k):
                    if (len(decisions), c) not in dropped:
                        mixed = mixed + decision.weights[c] * self.expert(decision.experts[c], row)
                decisions.append(decision)
                parts.append(mixed)
            token = torch.cat(parts)
            if self.num_heads is not None:
                token = self._affine(token, "merge")
            outputs.append(token)
        return torch.stack(outputs), decisions

    def route(self, row: Tensor) -> Decision:
        scores, balance_scores = self._linear_scores(row) if self.router == "linear" else self._cosine_scores(row)
        probs = _softmax(scores) if self.gate == "softmax" else [1 / (1 + torch.exp(-s)) for s in scores]
        bias = self.selection_bias or [0.0] * self.num_experts
        ranked = sorted(range(self.num_experts), key=lambda e: (-(probs[e].item() + bias[e]), e))
        chosen = ranked[: self.top_k]
        weights = [probs[e] for e in chosen]
        if self.renormalize:
            total = sum(weights)
            weights = [w / total for w in weights]
        return Decision(scores, _softmax(balance_scores), chosen, weights)

    def expert(self, e: int, row: Tensor) -> Tensor:
        w1, w2 = self._moe("experts.w1_EDF")[e], self._moe("experts.w2_EFD")[e]
        hidden = row @ w1
        b1, b2 = self._moe("experts.b1_EF"), self._moe("experts.b2_ED")
        if b1 is not None:
            hidden = hidden + b1[e]
        if self.glu:
            ffn_dim = w2.shape[0]
            gate, up = hidden[:ffn_dim], hidden[ffn_dim:]
            hidden = gate / (1 + torch.exp(-gate)) * up
        else:
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        norm_weight, norm_bias = self._moe("experts.norm_weight_EF"), self._moe("experts.norm_bias_EF")
        if norm_weight is not None:
            centred = hidden - hidden.mean()
            hidden = centred / torch.sqrt(centred.square().mean() + 1e-5) * norm_weight[e] + norm_bias[e]
        out = hidden @ w2
        return out if b2 is None else out + b2[e]

    def _linear_scores(self, row: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        weight = self._moe("router.weight_DE")
        scores = [sum(row[d] * weight[d, e] for d in range(row.shape[0])) for e in range(self.num_experts)]
        return scores, scores

    def _cosine_scores(self, row: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        projected = row @ self._moe("router.projection_DR")
        embedding = self._moe("router.embedding_ER")
        temperature = torch.exp(self._moe("router.log_temperature")).squeeze()
        fixed_temperature = 0.3 if self.gate == "softmax" else 0.07
        cosines = []
        for e in range(self.num_experts):
            norms = (projected * projected).sum().sqrt() * (embedding[e] * embedding[e]).sum().sqrt()
            cosines.append((projected * embedding[e]).sum() / norms)
        return [c / temperature for c in cosines], [c / fixed_temperature for c in cosines]

    def _moe(self, name: str) -> Tensor | None:
        return self.params.get(name if self.num_heads is None else f"moe.{name}")

    def _affine(self, x: Tensor, name: str) -> Tensor:
        return self.params[f"{name}.weight"] @ x + self.params[f"{name}.bias"]


def balance(decisions: Sequence[Decision | None], num_experts: int) -> Tensor:
    """``E * sum_e (share of all choices) * (mean gate)``, equation 10 with every choice counted."""
    routed = [d for d in decisions if d is not None]
    num_choices = sum(len(d.experts) for d in routed)
    loss = torch.zeros((), dtype=torch.float64)
    for e in range(num_experts):
        share = sum(d.experts.count(e) for d in routed) / num_choices
        mean_gate = sum(d.balance_probs[e] for d in routed) / len(routed)
        loss = loss + num_experts * share * mean_gate
    return loss


def z(decisions: Sequence[Decision | None]) -> Tensor:
    """Mean of ``log(sum exp(score))^2`` (ST-MoE, arXiv 2202.08906, equation 5)."""
    routed = [d for d in decisions if d is not None]
    return sum(torch.log(sum(torch.exp(s) for s in d.scores)) ** 2 for d in routed) / len(routed)


def capacity_drops(
    experts: Sequence[Sequence[int]], valid: Sequence[bool], num_experts: int, factor: float
) -> list[tuple[int, int]]:
    """``(row, choice)`` pairs refused when places are given out choice by choice, then row by row."""
    top_k = len(experts[0])
    capacity = math.ceil(factor * top_k * sum(valid) / num_experts)
    taken = [0] * num_experts
    dropped = []
    for c in range(top_k):
        for n, choices in enumerate(experts):
            if not valid[n]:
                continue
            if taken[choices[c]] == capacity:
                dropped.append((n, c))
            else:
                taken[choices[c]] += 1
    return dropped


def _softmax(scores: Sequence[Tensor]) -> list[Tensor]:
    largest = max(s.item() for s in scores)
    powers = [torch.exp(s - largest) for s in scores]
    total = sum(powers)
    return [p / total for p in powers]
