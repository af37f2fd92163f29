"""A product is bytes: `linear(x, part)` multiplies by a weight, whatever it is. (A first reading may skip this file.)

A decode multiplies a few rows by every weight. Each weight is read once and used once per row, so the time is that
of reading it: bytes over bandwidth. On a CPU PyTorch's float32 product (MKL) and its 16-bit product (oneDNN) both fall
short of the memory's bandwidth for a few rows. oneDNN prefers weights in an order of its own, blocks that fit its
registers, and brings a plain weight into this order at every call. So `pack` does that once, while loading:

    part = pack(Part(weight, bias))      the plain weight can go: there is one copy of it
    y_TF = linear(x_TE, part)            x W^T + b

Small float32 weights stay as they are. They sit in the caches, and a call of MKL's costs less than one of oneDNN's.

Fewer bytes. A weight in 8 bits is read in a quarter of the time of float32. Where the rows are in 8 bits, too,
the processor multiplies four times as many at once (VNNI, AMX), so prompts gain as well as decodes. A number becomes a
whole number from -127 to 127, times a scale: one scale per row of the weight, and one per token, which depends on
nothing but that token:

    row      0.02  -0.5   0.31   1.27         scale = 1.27 / 127 = 0.01
    int8        2   -50     31    127
    y[t, o] = sum_i x8[t, i] w8[o, i]  *  scale of token t  *  scale of row o         the sum in exact whole numbers

(LLM.int8(), Dettmers et al. 2022, without its outliers; FP8, Micikevicius et al. 2022.) FP8 is a float of 8 bits:
no processor multiplies it, so on a CPU it is widened while loading. It saves the disk's bytes and not the memory's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from device import jit, load_triton

ROUNDS = 1.5 * 2 ** 23   # a float32 sum of this size is whole: rounded, ties to even, with the number in its last bits
SMALL = 1 << 20   # bytes of a weight that sits in the caches
GROUP = 128       # columns that share a scale, where a row has several; in blocks of FP8 as many rows do, too
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
triton = tl = INTERPRETED = None   # until `load_triton`


@dataclass(slots=True)
class Part:
    """One weight of the model: [out, in], or [out] for a norm, and its bias [out] or None.

    A weight in 8 bits, int8 or float8_e4m3fn, has a scale, float32 [out, G]: what the weights of row o and of group g
    of the columns are multiplied by. G is 1, or there is a group for each 128 columns. ([out] once packed for oneDNN.)

    Where several processes share a model, a part is a slice of the weight, and `slice` joins what the ranks compute.
    None: no other rank is needed.
    """
    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None
    slice: Columns | Vocabulary | None = None


def linear(x_TE: Tensor, part: Part) -> Tensor:
    """x W^T + b: [T, out], in the dtype of x."""
    y_TF = multiply(x_TE, part)
    return y_TF if part.slice is None else part.slice.join(y_TF)


def rows(ids_T: Tensor, part: Part) -> Tensor:
    """The rows of the weight by their numbers: [T, in]."""
    return part.weight[ids_T] if part.slice is None else part.slice.rows(ids_T, part.weight)


def multiply(x_TE: Tensor, part: Part) -> Tensor:
    """x W^T + b of what is in this part."""
    if part.scale is not None:
        return linear_triton(x_TE, part) if has_kernels(x_TE.device) else linear_int8(x_TE, part)
    if part.weight.is_mkldnn:
        rows_TE = enough_rows(x_TE, part)
        y_TF = torch.ops.mkldnn._linear_pointwise.default(rows_TE, part.weight, part.bias, "none", [], "")
        return y_TF[:len(x_TE)]
    return F.linear(x_TE, part.weight, part.bias)


def enough_rows(x_TE: Tensor, part: Part) -> Tensor:
    """One or two rows with zeros below them, five in all: for five oneDNN reads a large weight faster than for fewer.
    (On an AMD EPYC in 0.8 to 0.9 of the time of one row, 0.75 of that of two, 0.95 of that of three or four.)"""
    few = 0 < len(x_TE) < 3 and part.weight.nbytes > 2 * SMALL   # what is smaller is read as fast as it is padded
    return F.pad(x_TE, (0, 0, 0, 5 - len(x_TE))) if few else x_TE


def pack(part: Part, dtype: torch.dtype) -> Part:
    """The part in the order in which this device multiplies it fastest by rows of a dtype. Afterwards only `linear` can
    read its weight."""
    if part.weight.dtype == torch.int8:
        return pack_int8(part)
    if not has_kernels(part.weight.device):
        part = widen(part, dtype)
    weight, about = part.weight, 64   # the order suits any number of rows; oneDNN asks for one to have in mind
    if weight.device.type != "cpu" or not has_instructions_for(weight.dtype):
        return part
    if weight.dtype == torch.float32 and weight.nbytes < SMALL:
        return part
    return replace(part, weight=torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), about))


# ---------------------------------------------------------------------------------------------
# A slice of a part (parallel.py). `ranks` has `rank` and `size`, and sums, compares and gathers the tensors of all

def share_of(count: int, rank: int, size: int) -> slice:
    """Which of so many things are this rank's."""
    return slice(count * rank // size, count * (rank + 1) // size)


class Columns:
    """Of a weight that each rank has some columns of: the product is the sum of the ranks' products."""

    def __init__(self, ranks):
        self.ranks, self.join, self.largest = ranks, ranks.sum, ranks.largest

    def piece(self, count: int) -> slice:
        return share_of(count, self.ranks.rank, self.ranks.size)


class Vocabulary:
    """Of an embedding or a head that each rank has some rows of, the last rank perhaps fewer than the others."""

    def __init__(self, ranks, V: int):
        self.ranks, self.V, self.start = ranks, V, self.piece(V, ranks.rank, ranks.size).start

    @staticmethod
    def piece(V: int, rank: int, size: int) -> slice:
        return slice(-(-V // size) * rank, min(V, -(-V // size) * (rank + 1)))

    def join(self, logits_BV: Tensor) -> Tensor:
        """Everybody's logits, on rank 0. The others go on with their own, which nobody reads."""
        missing = -(-self.V // self.ranks.size) - logits_BV.shape[1]
        found = self.ranks.gather(F.pad(logits_BV, (0, missing))) if len(logits_BV) else []
        return torch.cat(found, 1)[:, :self.V] if found else logits_BV

    def largest(self, x: Tensor) -> Tensor:
        """Rows are whole here, and so is what is largest in them."""
        return x

    def rows(self, ids_T: Tensor, weight: Tensor) -> Tensor:
        """Zeros for rows that others have, and the sum is everybody's."""
        local_T = ids_T - self.start
        there_T1 = ((local_T >= 0) & (local_T < len(weight)))[:, None]
        return self.ranks.sum(torch.where(there_T1, weight[local_T.clamp(0, len(weight) - 1)], 0))


# ---------------------------------------------------------------------------------------------
# Experts: many weights, each of which multiplies rows of its own (experts.py)

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
    graph can record it. Visits of experts that are not here give zeros.
    """
    if isinstance(experts, Part):
        return linear_experts_triton(x_NE, experts, order_R, starts_X)
    share, starts, found = len(order_R) // len(x_NE), starts_X.tolist(), []
    for part, begin, end in zip(experts, starts, starts[1:]):
        if begin < end:
            found.append(linear(x_NE[order_R[begin:end] // share], part))
    found = found or [linear(x_NE[:1], experts[0])[:0]]   # nobody visits the experts that are here
    y_RF = torch.cat(found)   # in the order of the experts
    return y_RF.new_zeros(len(order_R), y_RF.shape[1]).index_copy_(0, order_R[starts[0]:starts[-1]], y_RF)


# ---------------------------------------------------------------------------------------------
# 8 bits

QUANTIZATIONS = {"int8": (torch.int8, 127), "fp8": (torch.float8_e4m3fn, 448)}   # the type, its largest number


def quantize(part: Part, quantization: str | None) -> Part:
    """A float part in 8 bits, with a scale per row; None leaves it as it is. A row of zeros has the scale 0."""
    if quantization is None:
        return part
    dtype, largest = QUANTIZATIONS[quantization]
    weight_FE = torch.empty(part.weight.shape, dtype=dtype, device=part.weight.device)
    scale_F1 = torch.empty(len(weight_FE), 1, device=part.weight.device)
    for plain, weight, scale in zip(part.weight.split(1024), weight_FE.split(1024), scale_F1.split(1024)):
        scale.copy_(plain.abs().amax(1, keepdim=True))
        if part.slice is not None:   # the scale is that of the whole row
            part.slice.largest(scale)
        scale.div_(largest)
        scaled = plain / scale.clamp_min(torch.finfo(torch.float32).tiny)
        weight.copy_(scaled.round_() if dtype == torch.int8 else scaled)
    return replace(part, weight=weight_FE, scale=scale_F1)


def widen(part: Part, dtype: torch.dtype) -> Part:
    """The part with its weight in `dtype`, multiplied by its scale; a part without a scale as it is."""
    if part.scale is None:
        return part
    weight = part.weight.to(dtype)   # exact: 16 bits hold every number of these 8
    columns = GROUP if part.scale.shape[1] > 1 else weight.shape[1]
    for piece, scale in zip(weight.split(columns, 1), part.scale.split(1, 1)):
        piece.mul_(scale)
    return replace(part, weight=weight, scale=None)


def quantize_rows(x_TE: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    """Each row in steps of its scale, float32 [T, E], not rounded yet to what the part's type holds, and the scales,
    float32 [T, 1]. A row of zeros has the scale 0 and a row with a NaN the scale NaN, which is what all their products
    become. Of a row whose columns are on several ranks the largest number of all decides."""
    scale_T1 = x_TE.abs().amax(-1, keepdim=True).float()
    if part.slice is not None:
        part.slice.largest(scale_T1)
    if part.weight.dtype == torch.float8_e4m3fn:
        scale_T1.div_(448)
        return x_TE / scale_T1.clamp_min(torch.finfo(torch.float32).tiny), scale_T1
    scale_T1.div_(127)
    return x_TE / scale_T1, scale_T1


def linear_int8(x_TE: Tensor, part: Part) -> Tensor:
    """`linear` for a weight of int8: whole numbers, exactly, then the scales."""
    steps_TE, scale_T1 = quantize_rows(x_TE, part)
    if part.weight.is_mkldnn:   # it wants rows from 1 to 255, and takes out of the sums what that adds
        rows_TE = enough_rows(steps_TE.add_(ROUNDS + 128).view(torch.int32).to(torch.uint8), part)
        y_TF = torch.ops.onednn.qlinear_pointwise.default(
            rows_TE, 1.0, 128, part.weight, part.scale, None, None, 1.0, 0, torch.float32, "none", [], "")[:len(x_TE)]
    else:
        y_TF = multiply_exactly(steps_TE.round_().to(torch.int8), part.weight) * part.scale.T
    y_TF *= scale_T1
    if part.bias is not None:
        y_TF += part.bias
    return y_TF.to(x_TE.dtype)


def multiply_exactly(a_TE: Tensor, b_FE: Tensor) -> Tensor:
    """a b^T of int8 matrices as float32 [T, F], on any processor: float32 holds the sums of 1,024 products exactly."""
    return sum(F.linear(a.float(), b.float()).int() for a, b in zip(a_TE.split(1024, 1), b_FE.split(1024, 1))).float()


def pack_int8(part: Part) -> Part:
    """In oneDNN's order, where the processor adds up products of 8 bits in 32 (VNNI, AMX). Older ones add up pairs of
    them in 16 bits first, which overflow."""
    able = torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()
    if part.weight.device.type != "cpu" or not able:
        return part
    weight = torch.ops.onednn.qlinear_prepack(part.weight, None)
    return replace(part, weight=weight, scale=part.scale[:, 0].contiguous())


# ---------------------------------------------------------------------------------------------
# What suits this processor

def has_instructions_for(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies this type on this CPU without converting it first."""
    if not torch.backends.mkldnn.is_available():
        return False
    bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return {torch.float32: True, torch.bfloat16: bfloat16, torch.float16: torch.cpu._is_amx_fp16_supported()}[dtype]


def fastest_dtype(stored: str, device: torch.device, out: int, inputs: int) -> tuple[str, str]:
    """The fastest type that holds weights as they are stored, judged by the model's largest weight [out, inputs] of a
    layer; and why. On a CPU that is their own type, or float32.

    A 16-bit weight is read in half the time. That helps where the processor multiplies it as it is, and where reading
    is what takes the time: a small weight sits in the caches.
    """
    stored = stored if stored in DTYPES else "float32"
    if device.type != "cpu" or stored == "float32":
        return stored, "as stored"
    if not has_instructions_for(DTYPES[stored]):
        return "float32", f"this processor converts {stored} before it multiplies"
    if out * inputs * 4 < SMALL:
        return "float32", f"weights as small as these sit in the caches, where {stored} gains nothing"
    return stored, "as stored"


# ---------------------------------------------------------------------------------------------
# The same on a GPU

# A weight of one byte is read in half the time of a bfloat16 one, if nothing is widened in memory. With xq and wq as
# the bytes, and the groups of 128 columns that share a scale (one group of all columns where G is 1),
#
#     y[t, o] = bias[o] + sum over groups g of x_scale[t, g] * w_scale[o, g] * (xq[t] . wq[o] over the columns of g)
#
# FP8 (e4m3) is widened to float16 in registers: every GPU multiplies that, and its products in float32 are exact.

@cache
def has_kernels(device: torch.device) -> bool:
    """Whether Triton's 8-bit products run there."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) and load_triton() is not None


FEW = 32      # rows; as many cost as much as one, the time of reading the weight


def linear_triton(x_TE: Tensor, part: Part) -> Tensor:
    """x W^T + b for a weight of int8 or float8_e4m3fn: [T, out] in the dtype of x. Columns of x must be contiguous.

    Rows of x become bytes, too, each with scales of its own. Integers are summed in int32, which is exact, so no row
    depends on its company and no choice below changes a result; FP8 is summed in float32. Nothing here waits for the
    GPU, so a graph can record it.
    """
    load_triton()
    (T, E), (out, G), fp8 = x_TE.shape, part.scale.shape, part.weight.dtype != torch.int8
    if part.slice is not None and G == 1:   # what decides is between two steps: the ranks' largest number
        steps_TE, scale_TG = quantize_rows(x_TE, part)
        q_TE = (steps_TE if fp8 else steps_TE.round_()).to(part.weight.dtype)
    else:
        q_TE, scale_TG = quantize_rows_triton(x_TE, part.weight.dtype, G)
    y_TF = torch.empty(T, out, dtype=x_TE.dtype, device=x_TE.device)
    if torch_multiplies(x_TE, part):
        if fp8:
            return torch._scaled_mm(q_TE, part.weight.t(), scale_TG, part.scale.t(), part.bias, out_dtype=x_TE.dtype)
        sums_TF = torch._int_mm(q_TE, part.weight.t())
        _scale_kernel[(triton.cdiv(out, 128), triton.cdiv(T, 16))](
            sums_TF, scale_TG, part.scale, part.bias, y_TF, T, out, ROWS=16, TILE=128)
        return y_TF
    options = product_options(T, out, x_TE.device)
    _product_kernel[(triton.cdiv(out, options["TILE"]), triton.cdiv(T, options["ROWS"]))](
        q_TE.view(torch.int8), scale_TG, part.weight.view(torch.int8), part.scale, part.bias, y_TF, T, E, out, G,
        GROUP=GROUP, GROUPED=G > 1, FP8=fp8, **options)
    return y_TF


def torch_multiplies(x_TE: Tensor, part: Part) -> bool:
    """Whether PyTorch has a product for so many rows, this type and these sizes, on this GPU. Its limits are those of
    `_int_mm` (cuBLAS) and of `_scaled_mm` with a scale per row (cuBLAS or CUTLASS)."""
    (out, E), G = part.weight.shape, part.scale.shape[1]
    if not x_TE.is_cuda or len(x_TE) <= FEW or G > 1:
        return False
    if part.weight.dtype == torch.int8:
        return E % 8 == 0 and out % 8 == 0
    return (E % 16 == 0 and out % 16 == 0 and x_TE.dtype == torch.bfloat16
            and torch.cuda.get_device_capability(x_TE.device) >= (8, 9))


def product_options(T: int, out: int, device: torch.device) -> dict:
    """Tile and launch shape. For few rows a program has four warps of 16 outputs. Two share 16 outputs and split the
    columns between them; or all four, where 32 outputs a program would be fewer programs than multiprocessors."""
    if T > FEW:
        return dict(ROWS=64, TILE=128, SPLITS=1, num_warps=8, num_stages=3)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    splits = 2 if out >= 32 * processors else 4
    return dict(ROWS=16 if T <= 16 else 32, TILE=64 // splits, SPLITS=splits, num_warps=4, num_stages=4)


def quantize_rows_triton(x_TE: Tensor, dtype: torch.dtype, G: int = 1) -> tuple[Tensor, Tensor]:
    """Rows as bytes [T, E] of dtype int8 or float8_e4m3fn, and their scales, float32 [T, G], in one launch.

    The largest number of a group (all columns, or 128) becomes 127 or 448, the largest of the type, and the others are
    rounded to nearest. A group with NaN or infinity becomes zeros and a scale that is not finite, so all products with
    this row are NaN, and nobody else's.
    """
    load_triton()
    T, E = x_TE.shape
    q_TE = torch.empty(T, E, dtype=torch.int8, device=x_TE.device)
    scale_TG = torch.empty(T, G, dtype=torch.float32, device=x_TE.device)
    _quantize_rows_kernel[(T,)](
        x_TE, q_TE, scale_TG, x_TE.stride(0), E, G, GROUPS=triton.next_power_of_2(G),
        WIDTH=GROUP if G > 1 else triton.next_power_of_2(E), FP8=dtype != torch.int8, num_warps=8)
    return q_TE.view(dtype), scale_TG


@jit
def _quantize_rows_kernel(x_ptr, q_ptr, scale_ptr, x_stride, E, G,
                          GROUPS: tl.constexpr, WIDTH: tl.constexpr, FP8: tl.constexpr):
    """One row. Bound: its launch; a row stays in registers between its largest element and its bytes."""
    row, group = tl.program_id(0).to(tl.int64), tl.arange(0, GROUPS)
    column_GW = group[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    x_GW = tl.load(x_ptr + row * x_stride + column_GW, mask=column_GW < E, other=0.0).to(tl.float32)
    # The bits of positive floats are in order as integers, too, with NaN above infinity. (tl.max passes NaN over.)
    largest_G = tl.max(tl.abs(x_GW).to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)
    scale_G = tl.div_rn(largest_G, tl.full([GROUPS], 448.0 if FP8 else 127.0, tl.float32))
    tl.store(scale_ptr + row * G + group, scale_G, mask=group < G)
    usual_G = (scale_G >= 1.1754944e-38) & (scale_G < float("inf"))   # a smaller scale has lost bits: such rows are 0
    x_GW, divisor_G = tl.where(usual_G[:, None], x_GW, 0.0), tl.where(usual_G, scale_G, 1.0)
    q_GW = tl.div_rn(x_GW, tl.broadcast_to(divisor_G[:, None], [GROUPS, WIDTH]))
    if FP8:   # times 2^-120 e4m3 is the upper bits of a float32; add half of what is cut off, ties to even
        bits = (q_GW * 7.52316384526264e-37).to(tl.int32, bitcast=True)
        above = bits & 0x7FFFFFFF
        bytes = ((above + 0x7FFFF + ((above >> 20) & 1)) >> 20) | ((bits >> 24) & 0x80)
    else:     # floats from 2^23 to 2^24 are whole numbers: adding 1.5 * 2^23 rounds, ties to even
        bytes = (q_GW + 12582912.0) - 12582912.0
    tl.store(q_ptr + row * E + column_GW, bytes.to(tl.int8), mask=column_GW < E)


@jit
def _load_bytes(ptr, row_R, rows, begin, E, GROUP: tl.constexpr, SPLITS: tl.constexpr, FP8: tl.constexpr):
    """Columns [begin, begin + SPLITS * GROUP) of these rows, [SPLITS, R, GROUP], or [R, GROUP] for one split."""
    if SPLITS > 1:
        row, column = row_R[None, :, None], tl.arange(0, GROUP)[None, None, :]
        column += tl.arange(0, SPLITS)[:, None, None] * GROUP
    else:
        row, column = row_R[:, None], tl.arange(0, GROUP)[None, :]
    there = (row < rows) & (begin + column < E)
    tile = tl.load(ptr + row.to(tl.int64) * E + begin + column, mask=there, other=0)
    if FP8:
        tile = _widen(tile)
    return tile


@jit
def _widen(tile):
    """Bytes of e4m3 as float16. e4m3 is a small float16: the sign, 4 bits of exponent of 5, 3 bits of mantissa of 10.
    So a shift puts its bits in their places, subnormal numbers included; what comes out is 256 times too small, as
    exponents count from 7 here and from 15 there. Newer GPUs have an instruction for it."""
    if tl.target_info.cuda_capability_geq(8, 9):
        return tile.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    return ((tile.to(tl.int16) << 7) & -0x4001).to(tl.float16, bitcast=True) * 256.0   # bit 14 was the sign again


@jit
def _load_scales(ptr, row_R, rows, begin, G, GROUP: tl.constexpr, SPLITS: tl.constexpr):
    """The scales of those columns, [SPLITS, R], or [R] for one split."""
    group, row = begin // GROUP, row_R
    if SPLITS > 1:
        group, row = begin // GROUP + tl.arange(0, SPLITS)[:, None], row_R[None, :]
    return tl.load(ptr + row * G + group, mask=(row < rows) & (group < G), other=0.0)


@jit
def _finish(sums_FR, x_scale_ptr, w_scale_ptr, bias_ptr, y_ptr, out_F, row_R, T, OUT, GROUPED: tl.constexpr):
    """Scale the sums, unless their groups were; add the bias; store."""
    y_FR = sums_FR.to(tl.float32)
    if not GROUPED:
        y_FR *= tl.load(x_scale_ptr + row_R, mask=row_R < T, other=0.0)[None, :]
        y_FR *= tl.load(w_scale_ptr + out_F, mask=out_F < OUT, other=0.0)[:, None]
    if bias_ptr is not None:
        y_FR += tl.load(bias_ptr + out_F, mask=out_F < OUT, other=0.0).to(tl.float32)[:, None]
    at_FR = row_R.to(tl.int64)[None, :] * OUT + out_F[:, None]
    tl.store(y_ptr + at_FR, y_FR.to(y_ptr.dtype.element_ty), mask=(row_R < T)[None, :] & (out_F < OUT)[:, None])


@jit
def _product_kernel(x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, bias_ptr, y_ptr, T, E, OUT, G,
                    GROUP: tl.constexpr, GROUPED: tl.constexpr, FP8: tl.constexpr,
                    ROWS: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr):
    """TILE outputs of ROWS rows.

    Cost: 2 * T * E * OUT operations for E * OUT bytes of weights, 2 T operations per byte. Bound, for few rows:
    bandwidth; the floor is E * OUT bytes over it, 1.4 us for 2048 x 2048 on an H100 (3 TB/s). Weights are the tall
    side of tl.dot, of which 16 rows fill an instruction; rows of x are the other, half-empty for free. Splits: all
    columns of 16 outputs are a long way for one warp, and each warp has some, so in every round of the loop the
    splits read neighbouring columns, and their sums meet in shared memory, always in the same order.
    Loses where the weights are smaller than a launch costs (2 us, or 6 MB); for many rows `torch_multiplies` first.
    """
    out_F = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row_R = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    EXACT: tl.constexpr = tl.float32 if FP8 else tl.int32   # products are exact in it; so are sums of int8's
    sums = tl.zeros([SPLITS, TILE, ROWS] if SPLITS > 1 else [TILE, ROWS], tl.float32 if GROUPED else EXACT)
    for begin in range(0, E, SPLITS * GROUP):
        w = _load_bytes(w_ptr, out_F, OUT, begin, E, GROUP, SPLITS, FP8)
        x = _load_bytes(x_ptr, row_R, T, begin, E, GROUP, SPLITS, FP8)
        x = tl.permute(x, [0, 2, 1]) if SPLITS > 1 else tl.trans(x)
        if GROUPED:
            w_scale = tl.expand_dims(_load_scales(w_scale_ptr, out_F, OUT, begin, G, GROUP, SPLITS), -1)
            x_scale = tl.expand_dims(_load_scales(x_scale_ptr, row_R, T, begin, G, GROUP, SPLITS), -2)
            sums += tl.dot(w, x, out_dtype=EXACT).to(tl.float32) * w_scale * x_scale
        else:
            sums = tl.dot(w, x, sums, out_dtype=EXACT)
    if SPLITS > 1:
        sums = tl.sum(sums, 0)
    _finish(sums, x_scale_ptr, w_scale_ptr, bias_ptr, y_ptr, out_F, row_R, T, OUT, GROUPED)


@jit
def _scale_kernel(sums_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, y_ptr, T, OUT, ROWS: tl.constexpr, TILE: tl.constexpr):
    """What `_product_kernel` ends with, for int32 sums [T, OUT] that somebody else made."""
    out_F = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row_R = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    at_FR = row_R.to(tl.int64)[None, :] * OUT + out_F[:, None]
    sums_FR = tl.load(sums_ptr + at_FR, mask=(row_R < T)[None, :] & (out_F < OUT)[:, None], other=0)
    _finish(sums_FR, x_scale_ptr, w_scale_ptr, bias_ptr, y_ptr, out_F, row_R, T, OUT, False)


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
    y_RF = torch.zeros(R, out, dtype=x_NE.dtype, device=x_NE.device)
    options = tile_options(R / X, E, part.weight.dtype)
    tiles = (R - min(R, X)) // options["ROWS"] + min(R, X)
    _experts_kernel[(triton.cdiv(out, options["TILE"]), tiles)](
        x, x_scale_NG, weight, scale, y_RF, order_R, starts_X, N, E, out, G, X, R // N,
        EXPERTS=triton.next_power_of_2(X), GROUPED=G > 1, INT8=part.weight.dtype == torch.int8,
        FP8=part.weight.dtype == torch.float8_e4m3fn, **options)
    return y_RF


def tile_options(rows: float, E: int, dtype: torch.dtype) -> dict:
    """Tile and launch shape for weights of a dtype, E columns, and so many rows per expert on average: with few, the
    time is that of reading weights. Registers bound a tile, and with these none spills on sm_80, 90 and 100. Small ones
    are for float32, which no matrix unit multiplies exactly; for rows that begin anywhere, so that each number is
    loaded for itself; and for many rows in FP8, which is widened."""
    if dtype == torch.float32:
        return dict(ROWS=16, TILE=64, GROUP=32, num_warps=4, num_stages=2)
    columns = GROUP if dtype.itemsize == 1 else 64
    if E % 16:
        return dict(ROWS=16, TILE=16, GROUP=columns, num_warps=4, num_stages=2)
    if rows <= 16:
        return dict(ROWS=16, TILE=64, GROUP=columns, num_warps=4, num_stages=4)
    tile = 64 if dtype == torch.float8_e4m3fn else 128
    return dict(ROWS=64, TILE=tile, GROUP=columns, num_warps=8, num_stages=3)


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
