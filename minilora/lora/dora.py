"""DoRA: the update split into a magnitude and a direction (arXiv:2402.09353, section 4).

    W' = m * (W + s B A) / ||W + s B A||        norms of rows; m (out_features,) starts as the norm

The operations and their order are PEFT's (peft 0.21 `tuners/lora/dora.py`), so that every bit is.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Magnitude(nn.Module):
    """m of one adapter; a module, because parameters of modules stand after those of A and B."""

    def __init__(self, weight: Tensor, dim: int) -> None:
        super().__init__()
        self.dim = dim  # what the norm runs over: a row of W, a column of an embedding's E
        self.weight = nn.Parameter(torch.linalg.norm(weight, dim=dim))

    def scale(self, weight: Tensor, delta: Tensor) -> Tensor:
        """m / ||W + delta||, (out_features,); the norm without a gradient, as in section 4.3."""
        return self.weight / torch.linalg.norm(weight + delta, dim=self.dim).detach()

    def merged(self, weight: Tensor, base: Tensor, delta: Tensor) -> Tensor:
        """As `Wrapper.merged`, with W' - W of this adapter in place of delta."""
        scale = self.scale(base, delta).unsqueeze(self.dim)
        return (weight - base + scale * (base + delta)).to(weight.dtype)

    def forward(self, x: Tensor, result: Tensor | None, base: nn.Linear, lora: Any) -> Tensor:
        """W' x - W x, which is to be added to the base's output: (..., in) -> (..., out).

        `result` is that output; None if it was computed from another x, before dropout.
        """
        # PEFT's way to (B A)^T; it costs more than a matrix product.
        identity = torch.eye(base.in_features, device=x.device, dtype=x.dtype)
        weight = base.weight.to(x.dtype)
        scale = self.scale(weight, lora.scaling * lora(identity).T.to(x.dtype)).view(1, -1)
        if result is None:
            result = F.linear(x, weight)
        elif base.bias is not None:
            result = result - base.bias
        return (scale - 1) * result + scale * lora(x) * lora.scaling
