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
from device import jit, load_triton
from linear import GROUP, Part, _load_bytes, _load_scales, has_kernels, linear, pack, quantize_rows_triton

triton = tl = INTERPRETED = None   # until `load_triton`


def mixture(x_TE: Tensor, router: Part, up: Part | list[Part], down: Part | list[Part], e: Experts,
            activation: Callable[[Tensor], Tensor]) -> Tensor:
    """[T, E]: what each token's experts make of it, added up by weight in float32. up, down: as `pack_experts` gives
    them, with an expert's gate above its up. The router's bias is the correction of its scores."""
    logits_TX = F.linear(x_TE.to(router.weight.dtype), router.weight).float()
    weight_TC, expert_TC = choose(logits_TX, router.bias, e)
    order_R, starts_X = sort_visits(expert_TC, e.X)
    gate, value = linear_experts(x_TE, up, order_R, starts_X).chunk(2, -1)
    y_RE = linear_experts(activation(gate).mul_(value), down, order_R, starts_X)
    y_TCE = y_RE.view(*expert_TC.shape, -1) * weight_TC[:, :, None]
    return y_TCE.sum(1).to(x_TE.dtype)


def choose(logits_TX: Tensor, correction_X: Tensor | None, e: Experts) -> tuple[Tensor, Tensor]:
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


# ---------------------------------------------------------------------------------------------
# Many weights, each of which multiplies rows of its own

def pack_experts(part: Part, X: int, dtype: torch.dtype) -> Part | list[Part]:
    """X weights that are stacked along their rows. A GPU multiplies by them in one launch, and they stay together;
    elsewhere each is packed for itself."""
    if has_kernels(part.weight.device):
        return part
    scales = [None] * X if part.scale is None else part.scale.chunk(X)
    return [pack(Part(weight, None, scale), dtype) for weight, scale in zip(part.weight.chunk(X), scales)]


def linear_experts(x_NE: Tensor, experts: Part | list[Part], order_R: Tensor, starts_X: Tensor) -> Tensor:
    """Row r of the result, [R, out], is x W^T with the weight of visit r's expert.

    x has a row per visit, or one that a token's visits share: visit r multiplies row r // (R // N). Each expert
    multiplies all of its rows at once. On a GPU all of them do so in one launch, and nothing waits for the GPU, so a
    graph can record it.
    """
    if isinstance(experts, Part):
        return linear_experts_triton(x_NE, experts, order_R, starts_X)
    share, starts, found = len(order_R) // len(x_NE), starts_X.tolist(), []
    for part, begin, end in zip(experts, starts, starts[1:]):
        if begin < end:
            found.append(linear(x_NE[order_R[begin:end] // share], part))
    y_RF = torch.cat(found)   # in the order of the experts
    return torch.empty_like(y_RF).index_copy_(0, order_R, y_RF)


def linear_experts_triton(x_NE: Tensor, part: Part, order_R: Tensor, starts_X: Tensor) -> Tensor:
    """`linear_experts` for weights stacked along their rows, of any type. x is contiguous.

    The number of programs depends on the shapes alone: R rows of m experts that have any fill (R - m) // ROWS + m tiles
    at most. Each program finds out whose rows its tile has, and those that are left over have none.
    """
    load_triton()
    (N, E), R, X, scale = x_NE.shape, len(order_R), len(starts_X) - 1, part.scale
    out, G = len(part.weight) // X, 1 if scale is None else scale.shape[1]
    x, x_scale_NG, weight = x_NE, None, part.weight
    if scale is not None:
        x, x_scale_NG = quantize_rows_triton(x_NE, weight.dtype, G)
        x, weight = x.view(torch.int8), weight.view(torch.int8)
    y_RF = torch.empty(R, out, dtype=x_NE.dtype, device=x_NE.device)
    options = tile_options(R / X, x_NE.dtype if scale is None else weight.dtype)
    tiles = (R - min(R, X)) // options["ROWS"] + min(R, X)
    _experts_kernel[(triton.cdiv(out, options["TILE"]), tiles)](
        x, x_scale_NG, weight, scale, y_RF, order_R, starts_X, N, E, out, G, X, R // N,
        EXPERTS=triton.next_power_of_2(X), GROUPED=G > 1, INT8=part.weight.dtype == torch.int8,
        FP8=part.weight.dtype == torch.float8_e4m3fn, **options)
    return y_RF


def tile_options(rows: float, dtype: torch.dtype) -> dict:
    """Tile and launch shape, for so many rows per expert on average. With few, reading the weights takes the time."""
    if dtype == torch.float32:   # no matrix unit multiplies it exactly, and ordinary registers have to hold the tiles
        return dict(ROWS=16, TILE=64, GROUP=32, num_warps=4, num_stages=2)
    columns = GROUP if dtype == torch.int8 else 64
    if rows <= 16:
        return dict(ROWS=16, TILE=64, GROUP=columns, num_warps=4, num_stages=4)
    return dict(ROWS=64, TILE=128, GROUP=columns, num_warps=8, num_stages=3)


@jit
def _experts_kernel(x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, y_ptr, order_ptr, starts_ptr, N, E, OUT, G, X, SHARE,
                    EXPERTS: tl.constexpr, GROUP: tl.constexpr, GROUPED: tl.constexpr, INT8: tl.constexpr,
                    FP8: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """TILE outputs of up to ROWS rows of one expert.

    Cost and bound: those of `_product_kernel`, for each expert that has rows. With few rows for each that is the time
    of reading these experts. Loses where an expert has a few rows only and the batch is large: its tile of ROWS is
    mostly empty, and the matrix units compute it all the same.
    """
    expert_X, tile = tl.arange(0, EXPERTS), tl.program_id(1)
    start_X = tl.load(starts_ptr + expert_X, mask=expert_X < X, other=0).to(tl.int32)
    end_X = tl.load(starts_ptr + expert_X + 1, mask=expert_X < X, other=0).to(tl.int32)
    tiles_X = (end_X - start_X + ROWS - 1) // ROWS
    before_X = tl.cumsum(tiles_X, 0) - tiles_X   # tiles of the experts before
    mine_X = (tile >= before_X) & (tile < before_X + tiles_X)   # one, or none for a tile that is left over
    expert = tl.sum(tl.where(mine_X, expert_X, 0)).to(tl.int64)
    begin_row = tl.sum(tl.where(mine_X, start_X + (tile - before_X) * ROWS, 0))
    end_row = tl.sum(tl.where(mine_X, end_X, 0))
    if begin_row < end_row:
        out_F = tl.program_id(0) * TILE + tl.arange(0, TILE)
        place_R = begin_row + tl.arange(0, ROWS)
        there_R = place_R < end_row
        visit_R = tl.load(order_ptr + place_R, mask=there_R, other=0)
        row_R = tl.where(there_R, visit_R // SHARE, N)   # row N is beyond the end of x
        w_ptr += expert * OUT * E
        EXACT: tl.constexpr = tl.int32 if INT8 else tl.float32
        sums = tl.zeros([TILE, ROWS], tl.float32 if GROUPED else EXACT)
        for begin in range(0, E, GROUP):
            w = _load_bytes(w_ptr, out_F, OUT, begin, E, GROUP, 1, FP8)
            x = tl.trans(_load_bytes(x_ptr, row_R, N, begin, E, GROUP, 1, FP8))
            if GROUPED:
                w_scale = _load_scales(w_scale_ptr + expert * OUT * G, out_F, OUT, begin, G, GROUP, 1)[:, None]
                x_scale = _load_scales(x_scale_ptr, row_R, N, begin, G, GROUP, 1)[None, :]
                sums += tl.dot(w, x, out_dtype=EXACT).to(tl.float32) * w_scale * x_scale
            else:
                sums = tl.dot(w, x, sums, input_precision="ieee", out_dtype=EXACT)
        y_FR = sums.to(tl.float32)
        if w_scale_ptr is not None:
            if not GROUPED:
                y_FR *= tl.load(x_scale_ptr + row_R, mask=there_R, other=0.0)[None, :]
                y_FR *= tl.load(w_scale_ptr + expert * OUT + out_F, mask=out_F < OUT, other=0.0)[:, None]
        at_FR = visit_R.to(tl.int64)[None, :] * OUT + out_F[:, None]
        tl.store(y_ptr + at_FR, y_FR.to(y_ptr.dtype.element_ty), mask=there_R[None, :] & (out_F < OUT)[:, None])
