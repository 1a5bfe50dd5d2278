"""Exercise 1: the layer.

    y = W x + b + scaling * B A dropout(x)        scaling = lora_alpha / r

Build, in this order:

1. `__init__`: keep `base_layer` and freeze it, weight and bias. Make `lora_A` (in_features -> r)
   and `lora_B` (r -> out_features), both nn.Linear without bias; leave A as nn.Linear draws it and
   set B to zero. Keep `scaling`, and a dropout for the x that A sees.
2. `forward`: the equation. It takes x of any leading dimensions: (..., in_features).
3. `delta_weight`: what the adapter adds to W.
4. `merge` and `unmerge`: fold it into W, and give W back to the last bit. A merged layer adds
   nothing beside W. Merging twice, or unmerging what is not merged, changes nothing.

Run: python -m pytest examples/exercises/test_layer.py
"""

import torch
from torch import Tensor, nn


class LoRALinear(nn.Module):
    """A frozen linear layer with an update of rank r.

    Has the attributes `base_layer`, `lora_A`, `lora_B` and `scaling`.
    """

    def __init__(
        self, base_layer: nn.Linear, r: int, lora_alpha: float, lora_dropout: float = 0.0
    ) -> None:
        super().__init__()
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        raise NotImplementedError

    def delta_weight(self) -> Tensor:
        """scaling * B A: (out_features, in_features)."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self) -> None:
        """Fold `delta_weight` into the base layer's weight, in place."""
        raise NotImplementedError

    @torch.no_grad()
    def unmerge(self) -> None:
        """The base layer's weight again, every bit of it."""
        raise NotImplementedError
