"""The equation: a frozen layer plus a trainable update of low rank.

Children carry PEFT's names (`base_layer`, `lora_A`, `lora_B`, ... with the adapter's name below),
in PEFT's order, so that a parameter's key in PEFT's files is its key here with a constant prefix,
and optimizer states line up by index. `bert`'s query, key and value are separate linear layers: the
fused-QKV LoRA of other libraries is not needed.

r rank; shapes as in torch: a linear weight is (out_features, in_features).
"""

import math

import torch
from torch import Tensor, nn

from minilora.lora import variants


class LoRALinear(nn.Module):
    """A frozen linear layer plus, for each active adapter, a low-rank update.

        y = W x + b + scaling * B A dropout(x),    scaling = lora_alpha / r   (/ sqrt(r) with rsLoRA)

    Shapes: x (..., in_features), A (r, in_features), B (out_features, r), y (..., out_features).
    B starts at zero, so the layer starts as its base layer.

    The operations and their order are PEFT's (peft 0.21 `lora.Linear.forward`), so float32 results
    agree bit for bit: `scaling` multiplies the product, not A or B. With a float32 adapter over a
    bfloat16 base, x is raised to float32 for the update and the sum is rounded once, at the end.

    Source: LoRA, arXiv:2106.09685, section 4.1. A is Kaiming-uniform as in the authors' code; the
        paper says Gaussian.
    """

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_dropout = nn.ModuleDict()
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_magnitude_vector = nn.ParameterDict()  # DoRA only: m, (out_features,)
        self.scaling: dict[str, float] = {}
        self.active_adapters: tuple[str, ...] = ()
        # While merged: the parameters as they were, so that unmerging restores the very bits.
        self.unmerged: dict[str, nn.Parameter] | None = None

    def create_adapter(
        self,
        adapter_name: str,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        lora_bias: bool,
    ) -> None:
        """Add the modules of one adapter, holding torch's default draws; `initialise` gives them
        their values.

        Draws from torch's global generator as PEFT does: A's default, then B's.
        """
        out_features, in_features = self.base_layer.weight.shape
        # Dropout 0 costs nothing: no mask, no copy of x.
        self.lora_dropout[adapter_name] = (
            nn.Dropout(lora_dropout) if lora_dropout > 0 else nn.Identity()
        )
        self.lora_A[adapter_name] = nn.Linear(in_features, r, bias=False)
        self.lora_B[adapter_name] = nn.Linear(r, out_features, bias=lora_bias)
        self.scaling[adapter_name] = lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r

    def factors(self, name: str) -> tuple[nn.Linear, nn.Linear]:
        """The modules A and B of adapter `name`."""
        return self.lora_A[name], self.lora_B[name]  # pyright: ignore[reportReturnType]

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)  # (..., in_features) -> (..., out_features)
        if self.unmerged is not None:
            return result
        dtype = result.dtype
        for name in self.active_adapters:
            if name in self.lora_A:
                lora_A, _ = self.factors(name)
                result = self.update(name, x.to(lora_A.weight.dtype), result)
        return result.to(dtype)

    def update(self, name: str, x: Tensor, result: Tensor) -> Tensor:
        """`result` (the base layer's output for x) plus what adapter `name` adds to it."""
        lora_A, lora_B = self.factors(name)
        dropout = self.lora_dropout[name]
        if name in self.lora_magnitude_vector:
            return variants.dora_linear(
                x,
                result,
                base_layer=self.base_layer,
                lora_A=lora_A,
                lora_B=lora_B,
                magnitude=self.lora_magnitude_vector[name],
                scaling=self.scaling[name],
                dropout=dropout,
            )
        # (..., in_features) -> (..., r) -> (..., out_features)
        return result + lora_B(lora_A(dropout(x))) * self.scaling[name]

    def delta_weight(self, name: str) -> Tensor:
        """scaling * B A, the change adapter `name` makes to W: (out_features, in_features)."""
        lora_A, lora_B = self.factors(name)
        return (lora_B.weight @ lora_A.weight) * self.scaling[name]

    def merged_parameters(
        self, name: str, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """`weight` and `bias` with adapter `name` folded in, in their own dtypes.

        Raises:
            ValueError: the adapter has a bias on B and the base layer has none to fold it into.
        """
        delta = self.delta_weight(name)
        if name in self.lora_magnitude_vector:
            merged = variants.dora_merged_weight(weight, delta, self.lora_magnitude_vector[name])
        else:
            merged = weight + delta.to(weight.dtype)
        _, lora_B = self.factors(name)
        if lora_B.bias is not None:
            if bias is None:
                raise ValueError("lora_bias=True cannot be merged into a base layer without a bias")
            bias = (bias + lora_B.bias * self.scaling[name]).to(bias.dtype)
        return merged.to(weight.dtype), bias

    def adapter_parameters(self, name: str) -> dict[str, Tensor]:
        """The trainable tensors of adapter `name` under PEFT's file names: `lora_A.weight`, ..."""
        if name not in self.lora_A:
            return {}
        lora_A, lora_B = self.factors(name)
        found: dict[str, Tensor] = {
            "lora_A.weight": lora_A.weight,
            "lora_B.weight": lora_B.weight,
        }
        if lora_B.bias is not None:
            found["lora_B.bias"] = lora_B.bias
        if name in self.lora_magnitude_vector:
            found["lora_magnitude_vector"] = self.lora_magnitude_vector[name]
        return found

    def convert_adapter(self, name: str, device: torch.device, dtype: torch.dtype) -> None:
        """Move adapter `name` to a device and dtype."""
        for factor in self.factors(name):
            factor.to(device, dtype)
        if name in self.lora_magnitude_vector:
            moved = self.lora_magnitude_vector[name].detach().to(device, dtype)
            self.lora_magnitude_vector[name] = nn.Parameter(moved)

    def has_adapter(self, name: str) -> bool:
        """Whether adapter `name` adapts this layer."""
        return name in self.lora_A

    def remove_adapter(self, name: str) -> None:
        """Forget adapter `name`; a layer without it is left as it is."""
        for per_adapter in (
            self.lora_dropout,
            self.lora_A,
            self.lora_B,
            self.lora_magnitude_vector,
            self.scaling,
        ):
            if name in per_adapter:
                del per_adapter[name]

    # Some models read a linear layer's attributes instead of calling it.
    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    @property
    def in_features(self) -> int:
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        return self.base_layer.out_features
