"""A product is bytes: `linear(x, part)` is the only way the model multiplies. (The forward pass in model.py uses it.)"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(slots=True)
class Part:
    """One weight of the model: [out, in], or [out] for a norm, and its bias [out] or None."""
    weight: Tensor
    bias: Tensor | None = None


def pack(part: Part) -> Part:
    """The part in the form in which this device multiplies fastest; the plain weight may be let go."""
    return part


def linear(x_TE: Tensor, part: Part) -> Tensor:
    """x W^T + b."""
    return F.linear(x_TE, part.weight, part.bias)
