"""Exercise 1: the layer."""

import torch
from torch import Tensor, nn


class LoRALinear(nn.Module):
    def __init__(
        self, base_layer: nn.Linear, r: int, lora_alpha: float, lora_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.Linear(base_layer.in_features, r, bias=False)
        self.lora_B = nn.Linear(r, base_layer.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        self.lora_dropout = nn.Dropout(lora_dropout)
        self.scaling = lora_alpha / r
        self.unmerged: Tensor | None = None  # W, while the base layer holds W + delta_weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if self.unmerged is not None:
            return y
        return y + self.lora_B(self.lora_A(self.lora_dropout(x))) * self.scaling

    def delta_weight(self) -> Tensor:
        return self.lora_B.weight @ self.lora_A.weight * self.scaling

    @torch.no_grad()
    def merge(self) -> None:
        if self.unmerged is None:
            self.unmerged = self.base_layer.weight.clone()
            self.base_layer.weight.add_(self.delta_weight())

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.unmerged is not None:
            self.base_layer.weight.copy_(self.unmerged)
            self.unmerged = None
