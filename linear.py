"""A product is bytes: `linear(x, part)` is the only way the model multiplies. (A first reading may skip this file.)

A decode multiplies a few rows by every weight. Each weight is read once and used once per row, so the time is that
of reading it: bytes over bandwidth. On a CPU PyTorch's float32 product (MKL) and its 16-bit product (oneDNN) both fall
short of the memory's bandwidth for a few rows. oneDNN prefers weights in an order of its own, blocks that fit its
registers, and brings a plain weight into this order at every call. So `pack` does that once, while loading:

    part = pack(Part(weight, bias))      the plain weight can go: there is one copy of it
    y_TF = linear(x_TE, part)            x W^T + b

Small float32 weights stay as they are. They sit in the caches, and a call of MKL's costs less than one of oneDNN's.
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

    A weight of 8 bits (int8 or float8_e4m3fn) comes with its scale, float32 [out, G]: each element of row o and of the
    g-th 128 columns stands for itself times scale[o, g]. With G = 1 the scale is that of the whole row.
    """
    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None


def linear(x_TE: Tensor, part: Part) -> Tensor:
    """x W^T + b: [T, out], in the dtype of x."""
    if part.weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise.default(x_TE, part.weight, part.bias, "none", [], "")
    return F.linear(x_TE, part.weight, part.bias)


def widen(part: Part, dtype: torch.dtype) -> Part:
    """The part with its weight in `dtype`, multiplied by its scale; a part without a scale as it is."""
    if part.scale is None:
        return part
    weight = part.weight.to(dtype)   # exact: 16 bits hold every number of these 8
    columns = 128 if part.scale.shape[1] > 1 else weight.shape[1]
    for piece, scale in zip(weight.split(columns, 1), part.scale.split(1, 1)):
        piece.mul_(scale)
    return Part(weight, part.bias)


def pack(part: Part) -> Part:
    """The part in the order in which this device multiplies fastest; its weight may be a tensor for `linear` alone."""
    weight, rows = part.weight, 64   # the order suits any number of rows; oneDNN asks for one to have in mind
    if weight.device.type != "cpu" or not has_instructions_for(weight.dtype):
        return part
    if weight.dtype == torch.float32 and weight.nbytes < SMALL:
        return part
    return Part(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows), part.bias)


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
