"""A product is bytes: `linear(x, part)` is the only way the model multiplies. (A first reading may skip this file.)

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

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL = 1 << 20   # bytes of a weight in float32
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(slots=True)
class Part:
    """One weight of the model: [out, in], or [out] for a norm, and its bias [out] or None.

    A weight in 8 bits, int8 or float8_e4m3fn, has a scale, float32 [out, G]: what the weights of row o and of group g
    of the columns are multiplied by. G is 1, or there is a group for each 128 columns.
    """
    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None


def linear(x_TE: Tensor, part: Part) -> Tensor:
    """x W^T + b: [T, out], in the dtype of x."""
    if part.scale is not None:
        return linear_int8(x_TE, part)
    if part.weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise.default(x_TE, part.weight, part.bias, "none", [], "")
    return F.linear(x_TE, part.weight, part.bias)


def pack(part: Part, dtype: torch.dtype) -> Part:
    """The part in the order in which this device multiplies it fastest by rows of a dtype. Its weight may be a tensor for
    `linear` alone."""
    if part.weight.dtype == torch.int8:
        return pack_int8(part)
    if part.weight.device.type != "cuda":
        part = widen(part, dtype)
    weight, rows = part.weight, 64   # the order suits any number of rows; oneDNN asks for one to have in mind
    if weight.device.type != "cpu" or not has_instructions_for(weight.dtype):
        return part
    if weight.dtype == torch.float32 and weight.nbytes < SMALL:
        return part
    return Part(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows), part.bias)


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
        scale.copy_(plain.abs().amax(1, keepdim=True)).div_(largest)
        scaled = plain / scale.clamp_min(torch.finfo(torch.float32).tiny)
        weight.copy_(scaled.round_() if dtype == torch.int8 else scaled)
    return Part(weight_FE, part.bias, scale_F1)


def widen(part: Part, dtype: torch.dtype) -> Part:
    """The part with its weight in `dtype`, multiplied by its scale; a part without a scale as it is."""
    if part.scale is None:
        return part
    weight = part.weight.to(dtype)   # exact: 16 bits hold every number of these 8
    columns = 128 if part.scale.shape[1] > 1 else weight.shape[1]
    for piece, scale in zip(weight.split(columns, 1), part.scale.split(1, 1)):
        piece.mul_(scale)
    return Part(weight, part.bias)


def quantize_rows(x_TE: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [T, E] and a scale per token, float32 [T, 1]. A row of zeros has the scale 0, a row with a NaN the scale NaN,
    and so have their products."""
    scale_T1 = x_TE.abs().amax(-1, keepdim=True).float().div_(127)
    return (x_TE / scale_T1).round_().to(torch.int8), scale_T1


def linear_int8(x_TE: Tensor, part: Part) -> Tensor:
    """`linear` for a weight of int8: whole numbers, exactly, then the scales."""
    rows_TE, scale_T1 = quantize_rows(x_TE)
    if part.weight.is_mkldnn:   # it wants rows from 1 to 255, and takes out of the sums what that adds
        rows_TE = rows_TE.view(torch.uint8).bitwise_xor_(128)
        y_TF = torch.ops.onednn.qlinear_pointwise.default(rows_TE, 1.0, 128, part.weight, part.scale, None, None, 1.0, 0,
                                                          torch.float32, "none", [], "")
    else:
        y_TF = multiply_exactly(rows_TE, part.weight) * part.scale.T
    y_TF *= scale_T1
    if part.bias is not None:
        y_TF += part.bias
    return y_TF.to(x_TE.dtype)


def multiply_exactly(a_TE: Tensor, b_FE: Tensor) -> Tensor:
    """a b^T of int8 matrices as float32 [T, F], on any processor: float32 holds the sums of 1,024 products exactly."""
    return sum(F.linear(a.float(), b.float()).int() for a, b in zip(a_TE.split(1024, 1), b_FE.split(1024, 1))).float()


def pack_int8(part: Part) -> Part:
    """For oneDNN where the processor adds up products of 8 bits in 32 (VNNI, AMX). Older ones add up pairs of them in 16
    bits first, which overflow."""
    if part.weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or not torch.cpu._is_vnni_supported():
        return part
    return Part(torch.ops.onednn.qlinear_prepack(part.weight, None), part.bias, part.scale[:, 0].contiguous())


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
