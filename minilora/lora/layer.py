"""LoRA itself: a frozen linear layer plus trainable updates of low rank.

    y = W x + b + scaling * B A dropout(x)        scaling = lora_alpha / r  (rsLoRA: / sqrt(r))

W (out_features, in_features) and b stay as they are. Only A (r, in_features) and B (out_features,
r) are trained: r * (in + out) numbers in place of in * out. B starts at zero, so that the layer
starts as its base layer. With DoRA the direction of W + s B A is trained, and its length apart:

    y = W' x + b,  W' = m * (W + s B A) / ||W + s B A||        norms of rows, m (out_features,)

Not here: the first values (`initialise.py`), embeddings (`embedding.py`), how layers get into a
model (`adapters.py`), names on disk (`peft_files.py`).

Sources: LoRA, arXiv:2106.09685, section 4.1; DoRA, arXiv:2402.09353, section 4. The operations and
their order are PEFT's (0.21, `lora.Linear.forward`, `tuners/lora/dora.py`), so that every bit is.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Magnitude(nn.Module):
    """DoRA's m; a module, because parameters of modules stand after those of A and B."""

    def __init__(self, weight: Tensor, dim: int) -> None:
        super().__init__()
        self.dim = dim  # what the norm runs over: a row of W, a column of an embedding's E
        self.weight = nn.Parameter(torch.linalg.norm(weight, dim=dim))

    def scale(self, weight: Tensor, delta: Tensor) -> Tensor:
        """m / ||W + delta||, (out_features,); the norm without a gradient, as in section 4.3."""
        return self.weight / torch.linalg.norm(weight + delta, dim=self.dim).detach()


class Lora(nn.Module):
    """One adapter of one linear layer."""

    def __init__(
        self, base_layer: nn.Linear, r: int, scaling: float, lora_dropout: float, lora_bias: bool
    ) -> None:
        super().__init__()
        self.scaling = scaling
        # Dropout 0 costs nothing: no mask, no copy of x. `--dropout fast` puts its own in place.
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout > 0 else nn.Identity()
        # Made in PEFT's order, A, B, magnitude: random draws follow it, and an optimizer's states,
        # which know a parameter by its position only.
        self.lora_A = nn.Linear(base_layer.in_features, r, bias=False)
        self.lora_B = nn.Linear(r, base_layer.out_features, bias=lora_bias)
        self.lora_magnitude_vector: Magnitude | None = None  # with use_dora

    def forward(self, x: Tensor) -> Tensor:
        """B A x, not scaled: (..., in_features) -> (..., r) -> (..., out_features)."""
        return self.lora_B(self.lora_A(x))

    def delta_weight(self) -> Tensor:
        """scaling * B A, the change to W: (out_features, in_features)."""
        return (self.lora_B.weight @ self.lora_A.weight) * self.scaling


class Wrapper(nn.Module):
    """What takes the place of an adapted module: the module as it was, `base_layer`, and its
    adapters by name, of which those in `active_adapters` count.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.adapters: Any = nn.ModuleDict()
        self.active_adapters: tuple[str, ...] = ()

    def called(self, names: Iterable[str]) -> list[Any]:
        """Of the adapters `names` those that this module has."""
        return [self.adapters[name] for name in names if name in self.adapters]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output(self.called(self.active_adapters), None, *args, **kwargs)

    def output(self, adapters: list[Any], base: Any, x: Tensor) -> Tensor:
        """The output for x with `adapters`; `base` is base_layer(x), if it is known already."""
        base = result = self.base_layer(x) if base is None else base
        for adapter in adapters:
            result = self.update(adapter, x, base, result)
        return result.to(base.dtype)

    def merged(self, adapter: Any, weight: Tensor, base: Tensor) -> Tensor:
        """`weight`, W beside others' updates, with `adapter` folded in, too; `base` is W alone."""
        delta, magnitude = adapter.delta_weight(), adapter.lora_magnitude_vector
        if magnitude is None:
            return weight + delta.to(weight.dtype)
        scale = magnitude.scale(base, delta).unsqueeze(magnitude.dim)
        return (weight - base + scale * (base + delta)).to(weight.dtype)

    def shown(self) -> nn.Module:
        """The module whose attributes this one has: models read them (weight, padding_idx)."""
        return self.base_layer

    def __getattr__(self, name: str) -> Any:
        if name in self._modules or name.startswith("__"):
            return super().__getattr__(name)
        return getattr(self.shown(), name)


class LoRALinear(Wrapper):
    """A frozen linear layer with its adapters.

    `fused` is for the trainer to choose (`adapters.set_fused`): the same sum in a faster order.
    """

    fused = False

    def update(self, lora: Lora, x: Tensor, base: Tensor, result: Tensor) -> Tensor:
        """`result`, (..., out_features), plus scaling * B A dropout(x) of one adapter."""
        magnitude = lora.lora_magnitude_vector
        if self.fused and magnitude is None and lora.lora_B.bias is None:
            # minilora's order, of training by default: each row's r numbers are scaled, not its
            # out_features, the sum is part of the product, and over a bfloat16 base only A and B
            # are converted. Gradients reach the float32 A and B; the optimizer sees none rounded.
            dtype, shape = result.dtype, result.shape
            A, B = lora.lora_A.weight.to(dtype), lora.lora_B.weight.to(dtype)
            x, rows = x.to(dtype).reshape(-1, A.shape[1]), result.reshape(-1, len(B))  # (N, ...)
            after_A = F.linear(lora.lora_dropout(x), A) * lora.scaling  # (N, r)
            # B^T in its own order: its gradient is then a product of r rows, five times as fast.
            return torch.addmm(rows, after_A, B.t().contiguous()).view(shape)
        # PEFT's order. Over a bfloat16 base all of x is raised to float32 and so is the sum, which
        # `output` rounds at the end.
        x = x.to(lora.lora_A.weight.dtype)
        dropped = lora.lora_dropout(x)
        if magnitude is None:
            return result + lora(dropped) * lora.scaling
        # PEFT's way to (B A)^T; it costs more than a matrix product.
        identity = torch.eye(x.shape[-1], device=x.device, dtype=x.dtype)
        weight, bias = self.base_layer.weight.to(x.dtype), self.base_layer.bias
        scale = magnitude.scale(weight, lora.scaling * lora(identity).T.to(x.dtype)).view(1, -1)
        if dropped is not x:
            base = F.linear(dropped, weight)  # W must see the x that A sees
        elif bias is not None:
            base = base - bias
        return result + ((scale - 1) * base + scale * lora(dropped) * lora.scaling)
