"""Experts: a layer has many MLPs, and each token asks a few of them. (Read it beside the MLP in model.py.)

A model knows more if its MLP is larger, and each token pays for all of it. Here it pays for a part: a layer has X MLPs,
the experts, and a router gives each of them a score for each token. The C experts of the best scores are the token's,
and what they make of it is added up by weight (Shazeer et al. 2017; Mixtral, Jiang et al. 2024). Qwen3-30B-A3B has
X = 128 and C = 8: of its 30 billion weights a token meets 3 billion.

A token at one of its experts is a visit. Visits are sorted by expert, so that each expert reads its weights once and
multiplies all its rows at once. With X = 4, C = 2, and three tokens that choose experts 2 and 0, 2 and 1, 0 and 2:

    visit        0   1   2   3   4   5        visit r is of token r // C
    expert       2   0   2   1   0   2
    order_R      1   4   3   0   2   5        by expert: 1 and 4 visit expert 0, 3 visits 1; 0, 2 and 5 visit 2
    starts_X     0       2   3           6    and 6 again: expert 3 has no visit, and is not read

No expert has room for so many visits only, and none is dropped. So what a token gets depends on the token alone.
What a step reads depends on how many experts its tokens choose between them; roofline.py counts it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from config import Experts
from linear import linear, linear_experts, multiply


def mixture(x_TE: Tensor, w: dict[str, list], l: int, e: Experts, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """[T, E]: what its experts make of each token, added up by weight in float32, and the MLP that all tokens share, if
    there is one. An expert's gate stands above its up. The router's bias is the correction of its scores. Where several
    ranks share the model, each has some of the experts, and a slice of what all tokens share."""
    router = w["router"][l]
    # On a CPU in INT8 a weight must not depend on the order of a sum, which other tokens change: see `Batch.exact`.
    exact = isinstance(w["up"][l], list) and w["up"][l][0].weight.dtype == torch.int8
    dtype = torch.float64 if exact else router.weight.dtype
    logits_TX = F.linear(x_TE.to(dtype), router.weight.to(dtype)).float()
    weight_TC, expert_TC = choose_experts(logits_TX, router.bias, e)
    order_R, starts_X = sort_visits(expert_TC, e.X)
    mine = router.slice.piece(e.X) if router.slice else slice(0, e.X)
    starts_X = starts_X[mine.start:mine.stop + 1]
    gate, value = linear_experts(x_TE, w["up"][l], order_R, starts_X).chunk(2, -1)
    y_RE = linear_experts(activation(gate).mul_(value), w["down"][l], order_R, starts_X)
    y_TCE = y_RE.view(*expert_TC.shape, -1) * weight_TC[:, :, None]
    y_TE = y_TCE.sum(1).to(x_TE.dtype)
    if e.shared:
        gate, value = linear(x_TE, w["shared_up"][l]).chunk(2, -1)
        y_TE += multiply(activation(gate).mul_(value), w["shared_down"][l])
    return router.slice.join(y_TE) if router.slice else y_TE


def choose_experts(logits_TX: Tensor, correction_X: Tensor | None, e: Experts) -> tuple[Tensor, Tensor]:
    """The weights of each token's experts, float32 [T, C], and which they are, [T, C]: those of the best scores, and
    among equals the first.

    DeepSeek puts a group of experts on one machine, and a token is sent to a few machines only: it chooses the best
    groups, then experts among theirs. A correction makes experts that few tokens choose come first more often, while
    the weights stay those of the scores (DeepSeek-V3, 2024, section 2.1.2).
    """
    score_TX = logits_TX.softmax(-1) if e.scoring == "softmax" else logits_TX.sigmoid()
    rank_TX = score_TX if correction_X is None else score_TX + correction_X
    if e.top_groups < e.groups:
        rank_TGX = rank_TX.unflatten(1, (e.groups, -1))
        best_TG = rank_TGX.topk(e.ranked_by).values.sum(-1)
        others = best_TG.sort(dim=-1, descending=True, stable=True).indices[:, e.top_groups:]
        left_out_TG = torch.zeros_like(best_TG, dtype=torch.bool).scatter_(1, others, True)
        rank_TX = rank_TGX.masked_fill(left_out_TG[:, :, None], -torch.inf).flatten(1)
    expert_TC = rank_TX.sort(dim=-1, descending=True, stable=True).indices[:, :e.C]
    weight_TC = score_TX.gather(1, expert_TC)
    if e.normalised:
        weight_TC = weight_TC / (weight_TC.sum(-1, keepdim=True) + 1e-20)   # sigmoids may all be 0
    return weight_TC * e.factor, expert_TC


def sort_visits(expert_TC: Tensor, X: int) -> tuple[Tensor, Tensor]:
    """order_R, starts_X [X + 1]: expert e has the visits order_R[starts_X[e]:starts_X[e + 1]]."""
    expert_R, order_R = expert_TC.flatten().sort(stable=True)
    return order_R, torch.searchsorted(expert_R, torch.arange(X + 1, device=expert_R.device))
