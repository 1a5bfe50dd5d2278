"""The equation: a frozen layer plus a trainable update of low rank.

Children carry PEFT's names (`base_layer`, `lora_A`, `lora_B`, ... with the adapter's name below),
in PEFT's order, so that a parameter's key in PEFT's files is its key here with a constant prefix,
and optimizer states line up by index. `bert`'s query, key and value are separate linear layers: the
fused-QKV LoRA of other libraries is not needed.

r rank; shapes as in torch: a linear weight is (out_features, in_features).
"""

import math

import torch
import torch.nn.functional as F
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


class LoRAEmbedding(nn.Module):
    """A frozen embedding plus, for each active adapter, a low-rank update.

        y = E[ids] + scaling * A^T[ids] B^T

    Shapes: ids (...), E (num_embeddings, embedding_dim), A (r, num_embeddings), B (embedding_dim,
    r), y (..., embedding_dim). A starts at zero and B normal, the other way round than in a linear
    layer. As in PEFT, `lora_dropout` has no effect here: ids cannot be dropped.

    Source: peft 0.21 `lora.Embedding`, after microsoft/LoRA `loralib.Embedding`.
    """

    def __init__(self, base_layer: nn.Embedding) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()
        self.lora_magnitude_vector = nn.ParameterDict()  # DoRA only: m, (embedding_dim,)
        self.scaling: dict[str, float] = {}
        self.active_adapters: tuple[str, ...] = ()
        self.unmerged: dict[str, nn.Parameter] | None = None

    def create_adapter(
        self,
        adapter_name: str,
        r: int,
        lora_alpha: float,
        use_rslora: bool,
    ) -> None:
        """Add the parameters of one adapter, drawing from torch's global generator as PEFT does: A,
        then B.
        """
        num_embeddings, embedding_dim = self.base_layer.weight.shape
        self.lora_embedding_A[adapter_name] = nn.Parameter(torch.randn(r, num_embeddings))
        self.lora_embedding_B[adapter_name] = nn.Parameter(torch.randn(embedding_dim, r))
        self.scaling[adapter_name] = lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r

    def forward(self, ids: Tensor) -> Tensor:
        result = self.base_layer(ids)  # (...) -> (..., embedding_dim)
        if self.unmerged is not None:
            return result
        dtype = result.dtype
        for name in self.active_adapters:
            if name in self.lora_embedding_A:
                result = self.update(name, ids, result)
        return result.to(dtype)

    def update(self, name: str, ids: Tensor, result: Tensor) -> Tensor:
        """`result` (the base layer's output for ids) plus what adapter `name` adds to it."""
        lora_A, lora_B = self.lora_embedding_A[name], self.lora_embedding_B[name]
        after_A = F.embedding(
            ids, lora_A.T, padding_idx=self.base_layer.padding_idx
        )  # (...) -> (..., r)
        if name in self.lora_magnitude_vector:
            return variants.dora_embedding(
                after_A,
                result,
                base_weight=self.base_layer.weight,
                lora_A=lora_A,
                lora_B=lora_B,
                magnitude=self.lora_magnitude_vector[name],
                scaling=self.scaling[name],
            )
        return (
            result + (after_A @ lora_B.T) * self.scaling[name]
        )  # (..., r) -> (..., embedding_dim)

    def delta_weight(self, name: str) -> Tensor:
        """scaling * (B A)^T, the change adapter `name` makes to E: (num_embeddings, embedding_dim)."""
        return (self.lora_embedding_B[name] @ self.lora_embedding_A[name]).T * self.scaling[name]

    def merged_parameters(
        self, name: str, weight: Tensor, bias: None = None
    ) -> tuple[Tensor, None]:
        """`weight` with adapter `name` folded in, in its own dtype (an embedding has no bias)."""
        delta = self.delta_weight(name)
        if name in self.lora_magnitude_vector:
            # The norm of an embedding runs over its columns, the transpose of a linear layer's
            # rows.
            merged = variants.dora_merged_weight(
                weight.T, delta.T, self.lora_magnitude_vector[name]
            ).T
        else:
            merged = weight + delta.to(weight.dtype)
        return merged.to(weight.dtype).contiguous(), bias

    def adapter_parameters(self, name: str) -> dict[str, Tensor]:
        """The trainable tensors of adapter `name` under PEFT's file names (no `.weight` here)."""
        if name not in self.lora_embedding_A:
            return {}
        found: dict[str, Tensor] = {
            "lora_embedding_A": self.lora_embedding_A[name],
            "lora_embedding_B": self.lora_embedding_B[name],
        }
        if name in self.lora_magnitude_vector:
            found["lora_magnitude_vector"] = self.lora_magnitude_vector[name]
        return found

    def convert_adapter(self, name: str, device: torch.device, dtype: torch.dtype) -> None:
        """Move adapter `name` to a device and dtype."""
        for per_adapter in (
            self.lora_embedding_A,
            self.lora_embedding_B,
            self.lora_magnitude_vector,
        ):
            if name in per_adapter:
                per_adapter[name] = nn.Parameter(per_adapter[name].detach().to(device, dtype))

    def has_adapter(self, name: str) -> bool:
        """Whether adapter `name` adapts this layer."""
        return name in self.lora_embedding_A

    def remove_adapter(self, name: str) -> None:
        """Forget adapter `name`; a layer without it is left as it is."""
        for per_adapter in (
            self.lora_embedding_A,
            self.lora_embedding_B,
            self.lora_magnitude_vector,
            self.scaling,
        ):
            if name in per_adapter:
                del per_adapter[name]

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight


class TrainableTokens(nn.Module):
    """A frozen embedding of which, for each active adapter, some rows are trained in full.

        y = E'[ids],    E' = E with the adapter's rows in place of its own

    Shapes: ids (...), E (num_embeddings, embedding_dim), rows (n, embedding_dim), y (...,
    embedding_dim). The rows start as E's own. Source: peft 0.21 `TrainableTokensLayer`.
    """

    def __init__(self, base_layer: nn.Embedding) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.trainable_tokens_delta = nn.ParameterDict()  # PEFT's name; the rows, not differences
        self.token_indices: dict[str, list[int]] = {}
        self.active_adapters: tuple[str, ...] = ()
        self.unmerged: dict[str, nn.Parameter] | None = None

    def create_adapter(self, adapter_name: str, indices: list[int]) -> None:
        """Add the rows of one adapter. Draws nothing."""
        rows = self.base_layer.weight.detach()[indices]
        # Trained in float32 over a bfloat16 embedding, as PEFT does.
        self.trainable_tokens_delta[adapter_name] = nn.Parameter(
            rows.to(torch.promote_types(rows.dtype, torch.float32))
        )
        self.token_indices[adapter_name] = indices

    def forward(self, ids: Tensor) -> Tensor:
        active = [name for name in self.active_adapters if self.has_adapter(name)]
        if self.unmerged is not None or not active:
            return self.base_layer(ids)
        weight = self.base_layer.weight
        for name in active:
            weight, _ = self.merged_parameters(name, weight)
        return F.embedding(ids, weight, padding_idx=self.base_layer.padding_idx)

    def merged_parameters(
        self, name: str, weight: Tensor, bias: None = None
    ) -> tuple[Tensor, None]:
        """`weight` with adapter `name`'s rows in place, in its own dtype."""
        index = torch.tensor(self.token_indices[name], device=weight.device)
        return weight.index_copy(0, index, self.trainable_tokens_delta[name].to(weight)), bias

    def adapter_parameters(self, name: str) -> dict[str, Tensor]:
        """The trainable tensor of adapter `name` under PEFT's file name."""
        if not self.has_adapter(name):
            return {}
        return {"token_adapter.trainable_tokens_delta": self.trainable_tokens_delta[name]}

    def has_adapter(self, name: str) -> bool:
        """Whether adapter `name` adapts this layer."""
        return name in self.trainable_tokens_delta

    def remove_adapter(self, name: str) -> None:
        """Forget adapter `name`; a layer without it is left as it is."""
        if self.has_adapter(name):
            del self.trainable_tokens_delta[name], self.token_indices[name]

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight


class ModulesToSave(nn.Module):
    """A module trained in full beside LoRA, usually the task's head: the original, and a copy for
    each adapter.

    `forward` is the active adapter's copy; with no active copy, the original. The two children are
    called as in PEFT's `ModulesToSaveWrapper`; on disk the copy takes the original's place and
    name.
    """

    def __init__(self, original_module: nn.Module) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()
        self.active_adapters: tuple[str, ...] = ()

    def active_module(self) -> nn.Module:
        """The module whose forward is in force."""
        copies = [name for name in self.active_adapters if name in self.modules_to_save]
        return self.modules_to_save[copies[-1]] if copies else self.original_module

    def forward(self, *args, **kwargs):
        return self.active_module()(*args, **kwargs)

    def adapter_parameters(self, name: str) -> dict[str, Tensor]:
        """The trainable tensors of adapter `name` under the original module's names."""
        if name not in self.modules_to_save:
            return {}
        return dict(self.modules_to_save[name].named_parameters())

    def remove_adapter(self, name: str) -> None:
        """Forget adapter `name`; a wrapper without it is left as it is."""
        if name in self.modules_to_save:
            del self.modules_to_save[name]

    @property
    def weight(self) -> Tensor:
        return self.active_module().weight  # pyright: ignore[reportReturnType]


AdapterLayer = LoRALinear | LoRAEmbedding | TrainableTokens
